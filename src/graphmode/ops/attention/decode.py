"""Decode attention from the projections on: norms of heads, rotation, cache writes and attention in one kernel.

A program has the new key of its sequence and head at hand: the last of a sequence's programs attends to it without
waiting for the cache, and writes it there. The keys before it do not depend on the kernel ahead, so their loads start
before the wait for that kernel. For few sequences: with many, what each program holds
costs more than a kernel less saves. Hopper has a kernel of its own, for any number
(:mod:`graphmode.ops.attention.decode_hopper`).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from graphmode.ops._checks import FLOATS, require, require_contiguous, require_tensor
from graphmode.ops._device import load_slots, load_split, online_softmax, overlap, rms_factor
from graphmode.ops._triton import constexpr, jit, launch_options, next_power_of_2, tl
from graphmode.ops.attention import decode_hopper
from graphmode.ops.attention.batch import PagedBatch, Scoring
from graphmode.ops.attention.paged import paged_attention
from graphmode.ops.attention.paged_reference import paged_attention_reference
from graphmode.ops.attention.split_kv import SplitKVPlan, merge_splits, new_partials, plan_split_kv
from graphmode.ops.dispatch import choose
from graphmode.ops.rope import HeadInputs, rotate_and_cache, rotate_and_cache_reference

_TILE_BYTES = 16384


def rotate_and_attend(
    qkv: torch.Tensor,
    inputs: HeadInputs,
    batch: PagedBatch,
    scoring: Scoring,
    plan: SplitKVPlan | None = None,
) -> torch.Tensor:
    """Run :func:`~graphmode.ops.rotate_and_cache`, then :func:`~graphmode.ops.paged_attention`, for decode.

    Arguments are theirs; every sequence has one new token, the last of its ``kv_lens``.

    Returns:
        ``[tokens, q_heads, head_dim]``; zero for padding tokens.

    Raises:
        ValueError: as they raise.
    """
    require_tensor("qkv", qkv, shape=(None, None), dtypes=FLOATS, like=qkv)
    require_contiguous(qkv=qkv)
    inputs.require(qkv, qkv.shape[1])
    require(batch.max_query_len == 1, "max_query_len", batch.max_query_len, "1")
    batch.require(len(qkv), like=qkv)
    kernel = choose("rotate_and_attend", len(qkv), qkv, heads=inputs.kind(qkv.shape[1]))
    if kernel == "in two" or scoring.soft_cap is not None or scoring.sinks is not None:
        queries = rotate_and_cache(qkv, inputs)
        return paged_attention(queries, inputs.k_cache, inputs.v_cache, batch, scoring, plan=plan)
    return rotate_and_attend_triton(qkv, inputs, batch, scoring, plan, hopper=kernel == "hopper")


def rotate_and_attend_reference(
    qkv: torch.Tensor,
    inputs: HeadInputs,
    batch: PagedBatch,
    scoring: Scoring,
) -> torch.Tensor:
    """Run :func:`rotate_and_attend` in PyTorch."""
    queries = rotate_and_cache_reference(qkv, inputs)
    return paged_attention_reference(queries, inputs.k_cache, inputs.v_cache, batch, scoring)


def rotate_and_attend_triton(
    qkv: torch.Tensor,
    inputs: HeadInputs,
    batch: PagedBatch,
    scoring: Scoring,
    plan: SplitKVPlan | None = None,
    *,
    hopper: bool = False,
) -> torch.Tensor:
    """Run :func:`rotate_and_attend` in Triton, for whole heads rotated by halves; on ``hopper`` by its own kernel."""
    tokens, (q_heads, kv_heads, head_dim) = len(qkv), inputs.sizes(qkv.shape[1])
    out = torch.empty((tokens, q_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return out
    group = q_heads // kv_heads
    plan = plan or plan_split_kv(batch.kv_lens, kv_heads, window=scoring.window)
    programs = len(plan.splits)
    partials = new_partials(plan, q_heads, head_dim)
    counters: tuple[torch.Tensor, ...] = ()
    if hopper:
        kernel, grid, constants = decode_hopper.choose(tokens, programs, kv_heads, head_dim)
        counters = (plan.finished,)
    else:
        kernel, grid = _rotate_and_attend_kernel, (programs, kv_heads)
        constants = _constants(group, head_dim, qkv.element_size())
    kernel[grid](
        qkv,
        *inputs.pointers,
        batch.block_tables,
        batch.block_tables.stride(0),
        plan.splits,
        out,
        *partials,
        *counters,
        scoring.scale * math.log2(math.e),
        kv_heads=kv_heads,
        group=group,
        block_size=inputs.k_cache.shape[1],
        **constants,
        **launch_options(qkv.device),
    )
    if not (hopper and constants["many"]):
        merge_splits(partials, None, out, plan)
    return out


def _constants(group: int, head_dim: int, itemsize: int) -> dict[str, Any]:
    """Return the constants that the kernel below has and Hopper's has not."""
    block_half = max(16, next_power_of_2(head_dim // 2))
    block_m = max(next_power_of_2(group), 16)
    return {
        "half": head_dim // 2,
        "block_half": block_half,
        "block_m": block_m,
        "block_n": min(max(_TILE_BYTES // (2 * block_half * itemsize), 16), 128),
        "num_warps": 8 if block_m >= 128 else 4,
        "num_stages": 3,
    }


@jit()
def _rotate_and_attend_kernel(  # type: ignore[no-untyped-def]
    qkv,
    q_norm,
    k_norm,
    eps,
    cos,
    sin,
    positions,
    k_cache,
    v_cache,
    slot_mapping,
    block_tables,
    table_stride,
    splits,
    out,
    accs,
    tops,
    sums,
    scale_log2,
    kv_heads: constexpr,
    group: constexpr,
    half: constexpr,
    block_size: constexpr,
    block_half: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    early: constexpr,
):
    """Attend with the query heads of one key/value head of one sequence to all of its keys, or to a split of them.

    Then ``accs``, ``tops`` and ``sums`` take what :func:`~graphmode.ops.attention.split_kv.merge_splits` merges.
    """
    number = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq, start, end, count, newest = load_split(splits, number)
    if count == 0:
        return
    token = seq.to(tl.int64)
    head_dim: constexpr = 2 * half
    # The newest key is not in the cache yet.
    has_new = newest > 0
    end -= newest

    dim = tl.arange(0, block_half)
    real = dim < half
    table = block_tables + token * table_stride
    k_head = k_cache + kv_head * head_dim
    v_head = v_cache + kv_head * head_dim
    step = kv_heads * head_dim
    keys_a, keys_b, values_a, values_b, seen = _load_tile(
        k_head, v_head, table, start, end, dim, half, step, block_size, block_n
    )
    position = tl.load(positions + token)
    cosine = tl.load(cos + position * half + dim, mask=real, other=0.0)
    sine = tl.load(sin + position * half + dim, mask=real, other=0.0)
    slot = tl.load(slot_mapping + token)
    if q_norm is not None:
        q_scale_a = tl.load(q_norm + dim, mask=real, other=0.0).to(tl.float32)
        q_scale_b = tl.load(q_norm + half + dim, mask=real, other=0.0).to(tl.float32)
    if k_norm is not None:
        k_scale_a = tl.load(k_norm + dim, mask=real, other=0.0).to(tl.float32)
        k_scale_b = tl.load(k_norm + half + dim, mask=real, other=0.0).to(tl.float32)
    # Only now: the weights that kernels after this one ask for come after these keys.
    overlap(early)

    row = qkv + token * ((group + 2) * kv_heads * head_dim)
    member = tl.arange(0, block_m)
    mine = member < group
    head = kv_head * group + member
    place = row + head[:, None] * head_dim + dim[None, :]
    both = mine[:, None] & real[None, :]
    a = tl.load(place, mask=both, other=0.0).to(tl.float32)
    b = tl.load(place + half, mask=both, other=0.0).to(tl.float32)
    if q_norm is not None:
        factor = rms_factor(tl.sum(a * a, 1) + tl.sum(b * b, 1), head_dim, eps)[:, None]
        a = a * factor * q_scale_a[None, :]
        b = b * factor * q_scale_b[None, :]
    kind = k_cache.dtype.element_ty
    query_a = (a * cosine[None, :] - b * sine[None, :]).to(kind)
    query_b = (b * cosine[None, :] + a * sine[None, :]).to(kind)

    key = row + (group * kv_heads + kv_head) * head_dim + dim
    a = tl.load(key, mask=real, other=0.0).to(tl.float32)
    b = tl.load(key + half, mask=real, other=0.0).to(tl.float32)
    if k_norm is not None:
        factor = rms_factor(tl.sum(a * a, 0) + tl.sum(b * b, 0), head_dim, eps)
        a = a * factor * k_scale_a
        b = b * factor * k_scale_b
    key_a = (a * cosine - b * sine).to(kind)
    key_b = (b * cosine + a * sine).to(kind)
    value = row + ((group + 1) * kv_heads + kv_head) * head_dim + dim
    value_a = tl.load(value, mask=real, other=0.0)
    value_b = tl.load(value + half, mask=real, other=0.0)
    if has_new & (slot >= 0):
        tl.store(k_head + slot * step + dim, key_a, mask=real)
        tl.store(k_head + slot * step + half + dim, key_b, mask=real)
        tl.store(v_head + slot * step + dim, value_a, mask=real)
        tl.store(v_head + slot * step + half + dim, value_b, mask=real)

    new = tl.sum(query_a.to(tl.float32) * key_a.to(tl.float32)[None, :], 1)
    new = (new + tl.sum(query_b.to(tl.float32) * key_b.to(tl.float32)[None, :], 1)) * scale_log2
    top = tl.where(has_new, new, -1e38)
    total = tl.zeros([block_m], tl.float32) + tl.where(has_new, 1.0, 0.0)
    zero = tl.zeros([block_m, block_half], tl.float32)
    acc_a = zero + tl.where(has_new, value_a.to(tl.float32), 0.0)[None, :]
    acc_b = zero + tl.where(has_new, value_b.to(tl.float32), 0.0)[None, :]
    top, total, acc_a, acc_b = _take_tile(
        query_a, query_b, keys_a, keys_b, values_a, values_b, seen, top, total, acc_a, acc_b, scale_log2
    )
    for tile in range(start + block_n, end, block_n):
        keys_a, keys_b, values_a, values_b, seen = _load_tile(
            k_head, v_head, table, tile, end, dim, half, step, block_size, block_n
        )
        top, total, acc_a, acc_b = _take_tile(
            query_a, query_b, keys_a, keys_b, values_a, values_b, seen, top, total, acc_a, acc_b, scale_log2
        )

    if count == 1:
        weight = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        whole = out + (token * (kv_heads * group) + head)[:, None] * head_dim + dim[None, :]
        tl.store(whole, (acc_a * weight).to(out.dtype.element_ty), mask=both)
        tl.store(whole + half, (acc_b * weight).to(out.dtype.element_ty), mask=both)
    else:
        partial = number.to(tl.int64) * (kv_heads * group) + head
        tl.store(tops + partial, top, mask=mine)
        tl.store(sums + partial, total, mask=mine)
        target = accs + partial[:, None] * head_dim + dim[None, :]
        tl.store(target, acc_a, mask=both)
        tl.store(target + half, acc_b, mask=both)


@jit()
def _load_tile(  # type: ignore[no-untyped-def]
    k_head, v_head, table, start, end, dim, half: constexpr, step, block_size: constexpr, block_n: constexpr
):
    """Load keys and values from ``start`` on, nothing at ``end`` or later, in halves ``[block_n, half]``."""
    number = start + tl.arange(0, block_n)
    seen = number < end
    place = (load_slots(table, number, seen, block_size) * step)[:, None] + dim[None, :]
    inside = seen[:, None] & (dim < half)[None, :]
    keys_a = tl.load(k_head + place, mask=inside, other=0.0)
    keys_b = tl.load(k_head + place + half, mask=inside, other=0.0)
    values_a = tl.load(v_head + place, mask=inside, other=0.0)
    values_b = tl.load(v_head + place + half, mask=inside, other=0.0)
    return keys_a, keys_b, values_a, values_b, seen


@jit()
def _take_tile(  # type: ignore[no-untyped-def]
    query_a, query_b, keys_a, keys_b, values_a, values_b, seen, top, total, acc_a, acc_b, scale_log2
):
    """Take a tile of keys and values into the online softmax."""
    scores = tl.dot(query_a, tl.trans(keys_a), input_precision="ieee")
    scores = tl.dot(query_b, tl.trans(keys_b), scores, input_precision="ieee") * scale_log2
    scores = tl.where(seen[None, :], scores, float("-inf"))
    weights, correction, top, total = online_softmax(scores, top, total, 1)
    weights = weights.to(values_a.dtype)
    acc_a = tl.dot(weights, values_a, acc_a * correction[:, None], input_precision="ieee")
    acc_b = tl.dot(weights, values_b, acc_b * correction[:, None], input_precision="ieee")
    return top, total, acc_a, acc_b
