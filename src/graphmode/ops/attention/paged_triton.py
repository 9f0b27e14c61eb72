"""Paged attention in Triton. Two decompositions:

- **decode** (``max_query_len == 1``): row ``i`` is sequence ``i``. A program takes one key/value head and one sequence,
  or a split of its keys where it has many (:mod:`graphmode.ops.attention.split_kv`).
- **mixed** (all else): the queries are cut into blocks of ``block_q`` rows of one sequence. Sequence ``s`` gets the
  blocks from ``cu_query_lens[s] // block_q + s`` on, which is room enough whatever the lengths, so
  ``tokens // block_q + seqs`` blocks always do and each finds its sequence by searching ``cu_query_lens``.

The query heads that share a key/value head are rows of one matrix: keys and values are never repeated.

A sliding window cuts the keys that are read, not only those that count: a program starts at the first key that one of
its queries sees, which it finds from the lengths on the device. With a selection of keys every batch takes the decode
decomposition, a program for each token, and reads the selected keys alone.

Keys may be wider than values. The dot product with such keys is two, of their first ``value_dim`` elements and of the
rest, so that sizes like 576 = 512 + 64 are not padded to a power of two; and where the values are those first elements,
as in a cache of latents, they are read once.
"""

from __future__ import annotations

import math

import torch

from graphmode.ops._device import add_sink, find_token, load_slots, load_split, online_softmax, softmax_average
from graphmode.ops._triton import constexpr, gdc_launch_dependents, gdc_wait, jit, launch_options, next_power_of_2, tl
from graphmode.ops.attention.batch import PagedBatch, Scoring
from graphmode.ops.attention.split_kv import SplitKVPlan, merge_splits, new_partials, plan_split_kv

# Shared memory of one tile of keys or of values; three stages of both leave room for two programs.
_TILE_BYTES = 16384
# Bytes of the first part of a program's queries. With a latent cache of DeepSeek's sizes (512 + 64, bf16) a program has
# 64 rows of queries, 73,728 bytes, and two stages of 32 latents, 73,728 bytes: of the 232,448 bytes of shared memory
# that it may have on H100, 147,456. Its sums, 64 * 512 float32, fill half the registers.
_QUERY_BYTES = 65536


def paged_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scoring: Scoring,
    selection: torch.Tensor | None = None,
    plan: SplitKVPlan | None = None,
) -> torch.Tensor:
    """Run :func:`~graphmode.ops.paged_attention` in Triton."""
    block_tables, cu_query_lens, kv_lens, max_query_len = batch
    scale, window, soft_cap, sinks = scoring
    tokens, q_heads, key_dim = q.shape
    _, block_size, kv_heads, value_dim = v_cache.shape
    out = torch.empty((tokens, q_heads, value_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    seqs = block_tables.shape[0]
    group = q_heads // kv_heads
    first_dim = min(key_dim, value_dim)
    block_d = max(16, next_power_of_2(first_dim))
    block_v = max(16, next_power_of_2(value_dim))
    values_in_keys = v_cache.data_ptr() == k_cache.data_ptr()
    tile_bytes = _TILE_BYTES * (2 if values_in_keys else 1)
    block_n = min(max(tile_bytes // (block_v * q.element_size()), 16), 128)
    # Where the query heads of one key/value head are more than a program takes, several share them.
    max_rows = max(_QUERY_BYTES // (max(block_d, block_v) * q.element_size()), 16)
    head_blocks = -(-group // max_rows)
    block_heads = -(-group // head_blocks)
    constants = {
        "kv_heads": kv_heads,
        "group": group,
        "head_blocks": head_blocks,
        "block_heads": block_heads,
        "first_dim": first_dim,
        "rest_dim": key_dim - first_dim,
        "value_dim": value_dim,
        "block_size": block_size,
        "block_d": block_d,
        "block_r": max(16, next_power_of_2(key_dim - first_dim)) if key_dim > first_dim else 0,
        "block_v": block_v,
        "block_n": block_n,
        "k_slot": k_cache.stride(1),
        "v_slot": v_cache.stride(1),
        "values_in_keys": values_in_keys,
        "window": window,
        "soft_cap": soft_cap,
    }
    inputs = (q, *q.stride(), k_cache, v_cache, block_tables, block_tables.stride(0), kv_lens, cu_query_lens, sinks)
    scale_log2 = scale * math.log2(math.e)
    if max_query_len > 1 and selection is None:
        # On an H100 as fast as tiles of 128 rows for long prompts, faster for short ones (docs/performance.md).
        rows = 64 if tokens > 32 and q.element_size() == 2 else 16
        block_m = max(min(rows, max_rows), next_power_of_2(block_heads))
        block_q = block_m // block_heads
        _mixed_kernel[(tokens // block_q + seqs + 1, kv_heads * head_blocks)](
            *inputs,
            out,
            scale_log2,
            tokens,
            seqs,
            **constants,
            block_q=block_q,
            block_m=block_m,
            block_seqs=next_power_of_2(seqs + 1),
            num_warps=_num_warps(block_m, block_d, block_v),
            num_stages=2,
        )
        return out
    block_m = max(next_power_of_2(block_heads), 16)
    top_k = 0 if selection is None else selection.shape[1]
    if max_query_len > 1:
        # The tokens of a mixed batch with a selection are many, and have as many keys each: a program each.
        plan, splits, programs = None, None, tokens
        partials: tuple[torch.Tensor, ...] = (out, kv_lens, kv_lens)  # not used
    else:
        plan = plan or plan_split_kv(kv_lens, kv_heads, window=window, top_k=top_k or None)
        splits, programs = plan.splits, len(plan.splits)
        partials = new_partials(plan, q_heads, value_dim)
    _decode_kernel[(programs, kv_heads * head_blocks)](
        *inputs,
        selection,
        0 if selection is None else selection.stride(0),
        splits,
        out,
        *partials,
        scale_log2,
        tokens,
        seqs,
        **constants,
        top_k=top_k,
        block_m=block_m,
        block_seqs=next_power_of_2(seqs + 1),
        num_warps=_num_warps(block_m, block_d, block_v),
        num_stages=3 if max(block_d, block_v) <= 256 else 2,
        **launch_options(q.device),
    )
    if plan is not None:
        merge_splits(partials, sinks, out, plan)
    return out


def _num_warps(block_m: int, block_d: int, block_v: int) -> int:
    return 8 if block_m * max(block_d, block_v, 128) >= 128 * 128 else 4


@jit(do_not_specialize=["tokens", "seqs"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    q,
    q_stride_token,
    q_stride_head,
    q_stride_dim,
    k_cache,
    v_cache,
    block_tables,
    table_stride,
    kv_lens,
    cu_query_lens,
    sinks,
    selection,
    selection_stride,
    splits,
    out,
    accs,
    tops,
    sums,
    scale_log2,
    tokens,
    seqs,
    kv_heads: constexpr,
    group: constexpr,
    head_blocks: constexpr,
    block_heads: constexpr,
    first_dim: constexpr,
    rest_dim: constexpr,
    value_dim: constexpr,
    block_size: constexpr,
    block_d: constexpr,
    block_r: constexpr,
    block_v: constexpr,
    block_n: constexpr,
    k_slot: constexpr,
    v_slot: constexpr,
    values_in_keys: constexpr,
    window: constexpr,
    soft_cap: constexpr,
    top_k: constexpr,
    block_m: constexpr,
    block_seqs: constexpr,
    early: constexpr,
):
    """Attend with query heads of one key/value head of one token to all of its keys, or to a split of them.

    Then ``accs`` takes the sums before division, ``tops`` and ``sums`` each row's largest score and sum of weights.
    """
    if early:
        gdc_launch_dependents()
    number = tl.program_id(0)
    kv_head = tl.program_id(1) // head_blocks
    first_head = tl.program_id(1) % head_blocks * block_heads
    if splits is not None:
        seq, start, end, count, _ = load_split(splits, number)
        if count == 0:
            return
        token = seq.to(tl.int64)
    else:
        token = number.to(tl.int64)
        seq, end = find_token(number, tokens, cu_query_lens, kv_lens, seqs, block_seqs)
        start = 0
        end = tl.minimum(end, top_k)
        count = 1
    selected = None
    if selection is not None:
        selected = selection + token * selection_stride

    if early:
        gdc_wait()
    member = tl.arange(0, block_m)
    mine = (member < block_heads) & (first_head + member < group)
    head = kv_head * group + first_head + member
    q_row = q + token * q_stride_token + head * q_stride_head
    q_first, q_rest = _load_queries(q_row, q_stride_dim, mine, first_dim, rest_dim, block_d, block_r)
    top = tl.full([block_m], -1e38, tl.float32)
    total = tl.zeros([block_m], tl.float32)
    acc = tl.zeros([block_m, block_v], tl.float32)
    last_key = tl.zeros([block_m], tl.int32) + (end - 1)
    table = block_tables + seq.to(tl.int64) * table_stride
    k_head = k_cache + kv_head * (first_dim + rest_dim)
    v_head = v_cache + kv_head * value_dim
    top, total, acc = _attend(
        q_first, q_rest, top, total, acc, start, end, last_key, selected, table, k_head, v_head, scale_log2,
        first_dim, rest_dim, value_dim, block_size, block_d, block_r, block_v, block_n, k_slot, v_slot, values_in_keys,
        window, soft_cap, True,
    )  # fmt: skip
    dim = tl.arange(0, block_v)
    inside = mine[:, None] & (dim < value_dim)[None, :]
    if count == 1:
        row = token * (kv_heads * group) + head
        total = add_sink(total, top, sinks, head, mine)
        acc = softmax_average(acc, total[:, None])
        tl.store(out + row[:, None] * value_dim + dim[None, :], acc.to(out.dtype.element_ty), mask=inside)
    else:
        row = number.to(tl.int64) * (kv_heads * group) + head
        tl.store(tops + row, top, mask=mine)
        tl.store(sums + row, total, mask=mine)
        tl.store(accs + row[:, None] * value_dim + dim[None, :], acc, mask=inside)


@jit(do_not_specialize=["tokens", "seqs"])
def _mixed_kernel(  # type: ignore[no-untyped-def]
    q,
    q_stride_token,
    q_stride_head,
    q_stride_dim,
    k_cache,
    v_cache,
    block_tables,
    table_stride,
    kv_lens,
    cu_query_lens,
    sinks,
    out,
    scale_log2,
    tokens,
    seqs,
    kv_heads: constexpr,
    group: constexpr,
    head_blocks: constexpr,
    block_heads: constexpr,
    first_dim: constexpr,
    rest_dim: constexpr,
    value_dim: constexpr,
    block_size: constexpr,
    block_d: constexpr,
    block_r: constexpr,
    block_v: constexpr,
    block_n: constexpr,
    k_slot: constexpr,
    v_slot: constexpr,
    values_in_keys: constexpr,
    window: constexpr,
    soft_cap: constexpr,
    block_q: constexpr,
    block_m: constexpr,
    block_seqs: constexpr,
):
    """Attend with ``block_q`` queries of one sequence, in query heads of one key/value head.

    The padding tokens at the end are one more sequence, of length 0: it sees no key and gets zeros.
    """
    block = tl.program_id(0)
    kv_head = tl.program_id(1) // head_blocks
    first_head = tl.program_id(1) % head_blocks * block_heads
    # First blocks rise strictly with the sequence, so that this block's sequence is the last that starts by it.
    index = tl.arange(0, block_seqs)
    first_block = tl.load(cu_query_lens + index, mask=index <= seqs, other=0) // block_q + index
    seq = tl.sum(((first_block <= block) & (index <= seqs)).to(tl.int32), 0) - 1
    query_start = tl.load(cu_query_lens + seq)
    query_end = tl.load(cu_query_lens + seq + 1, mask=seq < seqs, other=tokens)
    query_len = query_end - query_start
    first_row = (block - (query_start // block_q + seq)) * block_q
    if first_row >= query_len:
        return
    kv_len = tl.load(kv_lens + seq, mask=seq < seqs, other=0)
    context = kv_len - query_len
    last_row = tl.minimum(first_row + block_q, query_len) - 1

    member = tl.arange(0, block_m)
    row = first_row + member // block_heads
    mine = (member < block_q * block_heads) & (first_head + member % block_heads < group)
    head = kv_head * group + first_head + member % block_heads
    token = (query_start + row).to(tl.int64)
    q_row = q + token * q_stride_token + head * q_stride_head
    mine_here = mine & (row < query_len)
    q_first, q_rest = _load_queries(q_row, q_stride_dim, mine_here, first_dim, rest_dim, block_d, block_r)
    top = tl.full([block_m], -1e38, tl.float32)
    total = tl.zeros([block_m], tl.float32)
    acc = tl.zeros([block_m, block_v], tl.float32)
    last_key = context + row
    table = block_tables + seq.to(tl.int64) * table_stride
    k_head = k_cache + kv_head * (first_dim + rest_dim)
    v_head = v_cache + kv_head * value_dim
    # Tiles that every row sees whole need no mask. Where the window cuts, all tiles get one: they are few.
    start = 0
    whole = tl.maximum(context + first_row + 1, 0) // block_n * block_n
    if window is not None:
        start = tl.maximum(context + first_row + 1 - window, 0)
        whole = tl.where(context + last_row < window, whole, start)
    end = tl.minimum(context + last_row + 1, kv_len)
    top, total, acc = _attend(
        q_first, q_rest, top, total, acc, start, whole, last_key, None, table, k_head, v_head, scale_log2,
        first_dim, rest_dim, value_dim, block_size, block_d, block_r, block_v, block_n, k_slot, v_slot, values_in_keys,
        window, soft_cap, False,
    )  # fmt: skip
    top, total, acc = _attend(
        q_first, q_rest, top, total, acc, whole, end, last_key, None, table, k_head, v_head, scale_log2,
        first_dim, rest_dim, value_dim, block_size, block_d, block_r, block_v, block_n, k_slot, v_slot, values_in_keys,
        window, soft_cap, True,
    )  # fmt: skip
    total = add_sink(total, top, sinks, head, mine)
    acc = softmax_average(acc, total[:, None])
    dim = tl.arange(0, block_v)
    out_row = token * (kv_heads * group) + head
    tl.store(
        out + out_row[:, None] * value_dim + dim[None, :],
        acc.to(out.dtype.element_ty),
        mask=mine_here[:, None] & (dim < value_dim)[None, :],
    )


@jit()
def _load_queries(  # type: ignore[no-untyped-def]
    q_row, stride, mine, first_dim: constexpr, rest_dim: constexpr, block_d: constexpr, block_r: constexpr
):
    """Load a tile of queries, its first elements and the rest; without a rest, the first elements twice."""
    dim = tl.arange(0, block_d)
    inside = mine[:, None] & (dim < first_dim)[None, :]
    first = tl.load(q_row[:, None] + dim[None, :] * stride, mask=inside, other=0.0)
    rest = first
    if block_r > 0:
        rest_at = tl.arange(0, block_r)
        inside = mine[:, None] & (rest_at < rest_dim)[None, :]
        rest = tl.load(q_row[:, None] + (first_dim + rest_at)[None, :] * stride, mask=inside, other=0.0)
    return first, rest


@jit()
def _attend(  # type: ignore[no-untyped-def]
    q_first,
    q_rest,
    top,
    total,
    acc,
    start,
    end,
    last_key,
    selected,
    table,
    k_head,
    v_head,
    scale_log2,
    first_dim: constexpr,
    rest_dim: constexpr,
    value_dim: constexpr,
    block_size: constexpr,
    block_d: constexpr,
    block_r: constexpr,
    block_v: constexpr,
    block_n: constexpr,
    k_slot: constexpr,
    v_slot: constexpr,
    values_in_keys: constexpr,
    window: constexpr,
    soft_cap: constexpr,
    masked: constexpr,
):
    """Take the keys ``start .. end - 1`` of one sequence into the online softmax of a tile of query rows.

    Where ``masked``, row ``i`` sees keys up to ``last_key[i]``, or the last ``window`` of these, and nothing at ``end``
    or later is read; ``end`` ends a tile or is past every row's last key. Else every row sees every key of every tile.
    ``top`` starts finite, so that a row may see nothing of the tiles before its window. Where keys are ``selected``,
    which is then their positions, the numbers of keys count these.
    """
    dim = tl.arange(0, block_d)
    for tile in range(start, end, block_n):
        number = tile + tl.arange(0, block_n)
        position = number
        inside = (dim < first_dim)[None, :]
        if masked:
            key_inside = number < end
            if selected is not None:
                position = tl.load(selected + number, mask=key_inside, other=0)
            inside = key_inside[:, None] & inside
            slot = load_slots(table, position, key_inside, block_size)
        else:
            slot = load_slots(table, position, None, block_size)
        k_row = (slot * k_slot)[:, None]
        keys = tl.load(k_head + k_row + dim[None, :], mask=inside, other=0.0)
        scores = tl.dot(q_first, tl.trans(keys), input_precision="ieee")
        if block_r > 0:
            rest_at = tl.arange(0, block_r)
            inside = (rest_at < rest_dim)[None, :]
            if masked:
                inside = inside & key_inside[:, None]
            rest = tl.load(k_head + k_row + (first_dim + rest_at)[None, :], mask=inside, other=0.0)
            scores = tl.dot(q_rest, tl.trans(rest), scores, input_precision="ieee")
        scores = scores * scale_log2
        if soft_cap is not None:
            decay = tl.exp2(tl.abs(scores) * (-2.0 / soft_cap))  # of tanh, odd in the scores; at most 1
            bounded = (1.0 - decay) / (1.0 + decay) * (soft_cap * 1.4426950408889634)
            scores = tl.where(scores < 0.0, -bounded, bounded)
        if masked:
            seen = number[None, :] <= last_key[:, None]
            if window is not None:
                seen = seen & (number[None, :] > last_key[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        weights, correction, top, total = online_softmax(scores, top, total, 1)
        if values_in_keys:
            values = keys
        else:
            value_at = tl.arange(0, block_v)
            inside = (value_at < value_dim)[None, :]
            if masked:
                inside = inside & key_inside[:, None]
            values = tl.load(v_head + (slot * v_slot)[:, None] + value_at[None, :], mask=inside, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * correction[:, None], input_precision="ieee")
    return top, total, acc
