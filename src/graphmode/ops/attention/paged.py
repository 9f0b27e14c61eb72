"""Causal attention of packed, ragged queries over the paged KV cache.

Every shape, grid and loop count comes from shapes alone, so that a captured call serves every batch of its number of
tokens; lengths and block tables are read on the device. Two decompositions:

- **decode** (``max_query_len == 1``): row ``i`` is sequence ``i``. A program takes one key/value head and one sequence,
  or part of its keys where it has many (:mod:`graphmode.ops.attention.split_kv`).
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

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from graphmode.ops._checks import FLOATS, require, require_cache, require_tensor
from graphmode.ops._triton import (
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    runs_triton,
    tl,
)
from graphmode.ops.attention.cpu import attend_on_cpu
from graphmode.ops.attention.split_kv import (
    SplitKVPlan,
    combine_parts,
    join_sink,
    load_part,
    plan_split_kv,
    room_for_parts,
)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    selection: torch.Tensor | None = None,
    parts: SplitKVPlan | None = None,
) -> torch.Tensor:
    """Attend from every new token to its sequence's tokens up to and with itself.

    The new tokens' keys and values must be in the cache already. Query ``i`` of a sequence's ``n`` new ones stands at
    position ``p = kv_len - n + i`` and sees keys ``0 .. p``, or the last ``window`` of these. Scores, softmax and sums
    are float32.

    Args:
        q: ``[tokens, q_heads, key_dim]``, packed: one sequence's new tokens after the other's; float32, bfloat16 or
            float16, any strides.
        k_cache: ``[num_blocks, block_size, kv_heads, key_dim]`` in ``q``'s dtype, contiguous. ``q_heads`` is a
            multiple of ``kv_heads``: query head ``h`` uses key/value head ``h // (q_heads // kv_heads)``.
        v_cache: ``[num_blocks, block_size, kv_heads, value_dim]``, as ``k_cache``; or, of one key/value head, the view
            ``k_cache[..., :value_dim]``.
        block_tables: int32 ``[seqs, max_blocks]``: the cache blocks of each sequence, in order. Entries beyond a
            sequence's length are not used and may hold anything.
        cu_query_lens: int32 ``[seqs + 1]``: where each sequence's new tokens start in ``q``, and after the last one
            their number. A padding sequence has none, so the tail repeats the number. Decode does not read it.
        kv_lens: int32 ``[seqs]``: each sequence's length with its new tokens; 0 for padding.
        scale: factor of the scores.
        max_query_len: the most new tokens that a sequence can have. 1 is decode: ``tokens == seqs``, one query each.
        window: of sliding-window attention: the keys that a query sees at most, its own among them. What no query of a
            sequence sees is not read: neither its slots nor its table entries.
        soft_cap: bounds the scaled scores: ``soft_cap * tanh(scores / soft_cap)``.
        sinks: ``[q_heads]``, float32, bfloat16 or float16, contiguous: a logit of each head that joins the softmax's
            denominator and has no value, neither scaled nor capped.
        selection: int32 ``[tokens, top_k]``, rows contiguous: the positions of the keys that each token sees, as
            :func:`~graphmode.ops.select_keys` gives them: distinct, none after the token, the first
            ``min(p + 1, top_k)`` of a row used. Without ``window``.
        parts: how decode is shared out among programs, as
            :func:`~graphmode.ops.attention.split_kv.plan_split_kv` gives it of these ``kv_lens``,
            with this window or ``top_k``; None has it computed. A reference does not read it.

    Returns:
        ``[tokens, q_heads, value_dim]`` in ``q``'s dtype, contiguous; zero for padding tokens.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit, or a number is out of range.
    """
    require_tensor("q", q, shape=(None, None, None), dtypes=FLOATS, like=q)
    tokens, q_heads, key_dim = q.shape
    require_cache("k_cache", k_cache, shape=(None, None, None, key_dim), like=q)
    require_cache("v_cache", v_cache, shape=(*k_cache.shape[:3], None), like=q)
    kv_heads = k_cache.shape[2]
    require(q_heads % kv_heads == 0, "q_heads", q_heads, f"a multiple of kv_heads, {kv_heads}")
    require_tensor("block_tables", block_tables, shape=(None, None), dtypes=(torch.int32,), like=q)
    require(block_tables.stride(1) == 1, "block_tables.stride(1)", block_tables.stride(1), "1")
    seqs = block_tables.shape[0]
    require_tensor("cu_query_lens", cu_query_lens, shape=(seqs + 1,), dtypes=(torch.int32,), like=q)
    require_tensor("kv_lens", kv_lens, shape=(seqs,), dtypes=(torch.int32,), like=q)
    require(max_query_len >= 1, "max_query_len", max_query_len, "1 or more")
    require(max_query_len > 1 or tokens == seqs, "tokens", tokens, f"{seqs}, one for each sequence of a decode batch")
    require(window is None or window >= 1, "window", window, "1 or more")
    require(soft_cap is None or soft_cap > 0, "soft_cap", soft_cap, "more than 0")
    if sinks is not None:
        require_tensor("sinks", sinks, shape=(q_heads,), dtypes=FLOATS, like=q)
        require(sinks.is_contiguous(), "sinks.stride(0)", sinks.stride(0), "1")
    if selection is not None:
        require_tensor("selection", selection, shape=(tokens, None), dtypes=(torch.int32,), like=q)
        require(selection.stride(1) == 1, "selection.stride(1)", selection.stride(1), "1")
        require(window is None, "window", window, "None with a selection")
    run: Callable[..., torch.Tensor] = paged_attention_cpu if q.device.type == "cpu" else paged_attention_reference
    if runs_triton(q):
        run = functools.partial(paged_attention_triton, parts=parts)
    return run(
        q,
        k_cache,
        v_cache,
        block_tables,
        cu_query_lens,
        kv_lens,
        scale=scale,
        max_query_len=max_query_len,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        selection=selection,
    )


def paged_attention_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    selection: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run :func:`paged_attention` on a CPU, by an operator that reads the lengths when it runs."""
    out = torch.empty((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype)
    lengths = block_tables, cu_query_lens, kv_lens
    attend_on_cpu(q, k_cache, v_cache, *lengths, scale, max_query_len, window, soft_cap, sinks, selection, out)
    return out


# The reference in PyTorch, which is also the attention of devices that have no kernel of their own.

# What the loop over query blocks holds at a time, for each of keys, values and scores: larger tensors leave the cores'
# caches, and fresh memory of that size costs more in page faults than the arithmetic does.
_CHUNK_BYTES = 1 << 20
# What gathering the keys and values of a query block costs, in rows of its score matrix.
_GATHER_COST = 6


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    selection: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run :func:`paged_attention` in PyTorch with fixed shapes: each query block meets the same number of keys.

    Keys beyond what a block sees are gathered from the first slot that it sees instead of their own, so that masking
    them is enough: no weight of zero meets the NaN that an unused slot may hold.
    """
    tokens, q_heads, _ = q.shape
    if tokens == 0:
        return q.new_empty((0, q_heads, v_cache.shape[3]))
    block_size = k_cache.shape[1]
    lens = kv_lens.long()
    scoring = _Scoring(scale, window, soft_cap, None if sinks is None else sinks.float())
    if selection is not None:
        seq, position = find_tokens(cu_query_lens, kv_lens, tokens, max_query_len)
        last_key = position.clamp(max=selection.shape[1] - 1).unsqueeze(1)
        used = torch.arange(selection.shape[1], device=q.device) <= last_key
        selected = torch.where(used, selection, 0)
        page = block_tables.long()[seq].gather(1, selected // block_size)
        slots = page * block_size + selected % block_size
        out = _attend_blocks(q.unsqueeze(1), last_key, slots, k_cache, v_cache, scoring)
        real = position >= 0
    elif max_query_len == 1:
        slots = _slots(block_tables, block_size)
        out = _attend_blocks(q.unsqueeze(1), (lens - 1).unsqueeze(1), slots, k_cache, v_cache, scoring)
        real = lens > 0
    else:
        slots = _slots(block_tables, block_size)
        seqs, max_len = slots.shape
        group = q_heads // k_cache.shape[2]
        block_q, num_blocks = _choose_blocks(tokens, seqs, group, max_query_len, window, max_len)
        blocks = _find_blocks(cu_query_lens.long(), lens, tokens, block_q, num_blocks)
        queries = q.index_select(0, blocks.token.view(-1)).view(num_blocks, block_q, *q.shape[1:])
        slots = slots.index_select(0, blocks.seq)
        out = _attend_blocks(queries, blocks.last_key, slots, k_cache, v_cache, scoring)
        out = out.flatten(0, 1).index_select(0, blocks.row_of_token)
        real = blocks.real_token
    return torch.where(real.view(-1, 1, 1), out.view(tokens, q_heads, -1), 0.0).to(q.dtype)


def find_tokens(
    cu_query_lens: torch.Tensor, kv_lens: torch.Tensor, tokens: int, max_query_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequence and the position of each token, int64 ``[tokens]``; position -1 for padding.

    Arguments as of :func:`paged_attention`. The sequence of padding is some valid one.
    """
    lens = kv_lens.long()
    token = torch.arange(tokens, device=kv_lens.device)
    if max_query_len == 1:
        return token, lens - 1
    starts = cu_query_lens.long()
    seq = (torch.searchsorted(starts, token, right=True) - 1).clamp(max=kv_lens.shape[0] - 1)
    position = lens[seq] - (starts[seq + 1] - token)
    return seq, torch.where(token < starts[-1], position, -1)


class _Scoring(NamedTuple):
    """How scores come about; as in :func:`paged_attention`, ``sinks`` in float32."""

    scale: float
    window: int | None
    soft_cap: float | None
    sinks: torch.Tensor | None


def _slots(block_tables: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the slot of each position of each sequence, ``[seqs, max_len]``."""
    offset = torch.arange(block_size, device=block_tables.device)
    return (block_tables.long().unsqueeze(2) * block_size + offset).flatten(1)


def _choose_blocks(
    tokens: int, seqs: int, group: int, max_query_len: int, window: int | None, max_len: int
) -> tuple[int, int]:
    """Return the rows of a query block and the number of blocks: the cheapest, by shapes alone.

    A sequence that fits one block gets one; ``tokens // block_q + seqs`` blocks do for any lengths.
    """
    longest = min(tokens, max_query_len)
    choices = [(longest, seqs)]
    choices += [(1 << i, (tokens >> i) + seqs) for i in range(longest.bit_length())]

    def cost(choice: tuple[int, int]) -> int:
        block_q, num_blocks = choice
        return num_blocks * (_GATHER_COST + block_q * group) * _num_keys(block_q, window, max_len)

    return min(choices, key=cost)


def _num_keys(block_q: int, window: int | None, max_len: int) -> int:
    """Return how many keys in a row a query block can see at most."""
    return max_len if window is None else min(max_len, window + block_q - 1)


class _QueryBlocks(NamedTuple):
    """A mixed batch cut into query blocks. Unused blocks and rows point at some valid place."""

    seq: torch.Tensor  # [blocks]: the sequence of each block
    token: torch.Tensor  # [blocks, block_q]: the token in each row
    last_key: torch.Tensor  # [blocks, block_q]: the last position that each row sees, rising; -1 for none
    row_of_token: torch.Tensor  # [tokens]: where each token is among the blocks' rows
    real_token: torch.Tensor  # [tokens]: False for padding


def _find_blocks(
    cu_query_lens: torch.Tensor, kv_lens: torch.Tensor, tokens: int, block_q: int, num_blocks: int
) -> _QueryBlocks:
    device = kv_lens.device
    seqs = kv_lens.shape[0]
    first_block = torch.arange(seqs, device=device)
    if num_blocks > seqs:
        first_block = first_block + cu_query_lens[:-1] // block_q
    block = torch.arange(num_blocks, device=device)
    seq = torch.searchsorted(first_block, block, right=True) - 1
    first_row = ((block - first_block[seq]) * block_q).unsqueeze(1)
    row = first_row + torch.arange(block_q, device=device)
    start = cu_query_lens[seq].unsqueeze(1)
    query_len = cu_query_lens[seq + 1].unsqueeze(1) - start
    context = kv_lens[seq].unsqueeze(1) - query_len

    token = torch.arange(tokens, device=device)
    seq_of_token = (torch.searchsorted(cu_query_lens, token, right=True) - 1).clamp(max=seqs - 1)
    row_of_token = first_block[seq_of_token] * block_q + token - cu_query_lens[seq_of_token]
    return _QueryBlocks(
        seq,
        (start + row).clamp(max=tokens - 1),
        context + torch.minimum(row, query_len - 1),
        row_of_token.clamp(max=num_blocks * block_q - 1),
        token < cu_query_lens[-1],
    )


def _attend_blocks(
    queries: torch.Tensor,
    last_key: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scoring: _Scoring,
) -> torch.Tensor:
    """Attend with each query block to the slots of its sequence.

    Args:
        queries: ``[blocks, block_q, q_heads, key_dim]``.
        last_key: ``[blocks, block_q]``: the last position that each row sees, rising; the result is NaN for -1.
        slots: ``[blocks, max_len]``: the slot of each position; anything where no row sees it.
        k_cache: as in :func:`paged_attention`.
        v_cache: as in :func:`paged_attention`.
        scoring: of all rows.

    Returns:
        float32 ``[blocks, block_q, q_heads, value_dim]``.
    """
    scale, window, soft_cap, sinks = scoring
    blocks, block_q, q_heads, key_dim = queries.shape
    kv_heads, value_dim = v_cache.shape[2:]
    group = q_heads // kv_heads
    max_len = slots.shape[1]
    device = queries.device
    num_keys = _num_keys(block_q, window, max_len)
    position = torch.arange(num_keys, device=device)
    if window is not None:
        position = position + (last_key[:, :1] - (window - 1)).clamp(min=0)
        slots = slots.gather(1, position.clamp(max=max_len - 1))
    hidden = position.unsqueeze(-2) > last_key.unsqueeze(2)
    if window is not None:
        hidden |= position.unsqueeze(-2) <= last_key.unsqueeze(2) - window
    hidden = hidden.view(blocks, 1, block_q, 1, num_keys)
    seen = position <= last_key[:, -1:]
    slots = torch.where(seen, slots, torch.where(seen[:, :1], slots[:, :1], 0))
    # Rows of the caches as [slots * kv_heads, dim], in the order that makes one batched matrix product of them.
    rows = slots.unsqueeze(1) * kv_heads + torch.arange(kv_heads, device=device).unsqueeze(1)
    queries = (queries.float() * scale).view(blocks, block_q, kv_heads, group, key_dim).transpose(1, 2)
    queries = queries.reshape(blocks, kv_heads, block_q * group, key_dim)

    head_bytes = 4 * num_keys * max(key_dim, value_dim, block_q * group)
    chunk_heads = min(max(_CHUNK_BYTES // head_bytes, 1), kv_heads)
    chunk_blocks = max(_CHUNK_BYTES // (head_bytes * kv_heads), 1)
    parts = []
    for b in range(0, blocks, chunk_blocks):
        for h in range(0, kv_heads, chunk_heads):
            chunk = slice(b, b + chunk_blocks), slice(h, h + chunk_heads)
            by_head = (-1, min(chunk_heads, kv_heads - h), block_q, group)
            index = rows[chunk].reshape(-1)
            keys = k_cache.view(-1, key_dim).index_select(0, index).view(-1, num_keys, key_dim).float()
            scores = torch.bmm(queries[chunk].flatten(0, 1), keys.transpose(1, 2))
            if soft_cap is not None:
                scores.div_(soft_cap).tanh_().mul_(soft_cap)
            scores.view(*by_head, num_keys).masked_fill_(hidden[b : b + chunk_blocks], float("-inf"))
            values = v_cache.view(-1, value_dim).index_select(0, index).view(-1, num_keys, value_dim).float()
            part = torch.bmm(scores.softmax(-1), values)
            if sinks is not None:
                # With a sink of weight w beside weights that sum to s, the others keep the share s / (s + w).
                excess = scores.logsumexp(-1).view(by_head) - sinks.view(kv_heads, 1, group)[chunk[1]]
                part.mul_(torch.sigmoid(excess).view(-1, block_q * group, 1))
            parts.append(part)
    out = torch.cat(parts).view(blocks, kv_heads, block_q, group, value_dim)
    return out.transpose(1, 2).reshape(blocks, block_q, q_heads, value_dim)


# The kernels in Triton.

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
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    selection: torch.Tensor | None = None,
    parts: SplitKVPlan | None = None,
) -> torch.Tensor:
    """Run :func:`paged_attention` in Triton."""
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
    if max_query_len > 1:
        # The tokens of a mixed batch with a selection are many, and have as many keys each: a program each.
        parts, programs = None, tokens
        acc, tops, sums = out, kv_lens, kv_lens  # not used
    else:
        if parts is None:
            parts = plan_split_kv(
                kv_lens, kv_heads, window=window, top_k=None if selection is None else selection.shape[1]
            )
        programs = len(parts.programs)
        acc, tops, sums = room_for_parts(parts, q_heads, value_dim)
    _decode_kernel[(programs, kv_heads * head_blocks)](
        *inputs,
        selection,
        0 if selection is None else selection.stride(0),
        None if parts is None else parts.programs,
        out,
        acc,
        tops,
        sums,
        scale_log2,
        tokens,
        seqs,
        **constants,
        top_k=0 if selection is None else selection.shape[1],
        block_m=block_m,
        block_seqs=next_power_of_2(seqs + 1),
        num_warps=_num_warps(block_m, block_d, block_v),
        num_stages=3 if max(block_d, block_v) <= 256 else 2,
        **launch_options(q.device),
    )
    if parts is not None:
        combine_parts(acc, tops, sums, sinks, out, parts)
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
    programs,
    out,
    parts,
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
    """Attend with query heads of one key/value head of one token to all of its keys, or to one part of them.

    Then ``parts`` takes the sums before division, ``tops`` and ``sums`` each row's largest score and sum of weights.
    """
    if early:
        gdc_launch_dependents()
    number = tl.program_id(0)
    kv_head = tl.program_id(1) // head_blocks
    first_head = tl.program_id(1) % head_blocks * block_heads
    if programs is not None:
        seq, start, end, count, _ = load_part(programs, number)
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
    top, total, acc = _attend(
        q_first,
        q_rest,
        top,
        total,
        acc,
        start,
        end,
        last_key,
        selected,
        block_tables + seq.to(tl.int64) * table_stride,
        k_cache + kv_head * (first_dim + rest_dim),
        v_cache + kv_head * value_dim,
        scale_log2,
        first_dim,
        rest_dim,
        value_dim,
        block_size,
        block_d,
        block_r,
        block_v,
        block_n,
        k_slot,
        v_slot,
        values_in_keys,
        window,
        soft_cap,
        True,
    )
    dim = tl.arange(0, block_v)
    inside = mine[:, None] & (dim < value_dim)[None, :]
    if count == 1:
        row = token * (kv_heads * group) + head
        total = join_sink(total, top, sinks, head, mine)
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + row[:, None] * value_dim + dim[None, :], acc.to(out.dtype.element_ty), mask=inside)
    else:
        row = number.to(tl.int64) * (kv_heads * group) + head
        tl.store(tops + row, top, mask=mine)
        tl.store(sums + row, total, mask=mine)
        tl.store(parts + row[:, None] * value_dim + dim[None, :], acc, mask=inside)


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
        q_first,
        q_rest,
        top,
        total,
        acc,
        start,
        whole,
        last_key,
        None,
        table,
        k_head,
        v_head,
        scale_log2,
        first_dim,
        rest_dim,
        value_dim,
        block_size,
        block_d,
        block_r,
        block_v,
        block_n,
        k_slot,
        v_slot,
        values_in_keys,
        window,
        soft_cap,
        False,
    )
    top, total, acc = _attend(
        q_first,
        q_rest,
        top,
        total,
        acc,
        whole,
        end,
        last_key,
        None,
        table,
        k_head,
        v_head,
        scale_log2,
        first_dim,
        rest_dim,
        value_dim,
        block_size,
        block_d,
        block_r,
        block_v,
        block_n,
        k_slot,
        v_slot,
        values_in_keys,
        window,
        soft_cap,
        True,
    )
    total = join_sink(total, top, sinks, head, mine)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    dim = tl.arange(0, block_v)
    out_row = token * (kv_heads * group) + head
    tl.store(
        out + out_row[:, None] * value_dim + dim[None, :],
        acc.to(out.dtype.element_ty),
        mask=mine_here[:, None] & (dim < value_dim)[None, :],
    )


@jit()
def find_token(token, tokens, cu_query_lens, kv_lens, seqs, block_seqs: constexpr):  # type: ignore[no-untyped-def]
    """Return the sequence of a token of a mixed batch and how many keys the token sees: none where it is padding."""
    index = tl.arange(0, block_seqs)
    starts = tl.load(cu_query_lens + index, mask=index <= seqs, other=tokens)
    seq = tl.sum(((starts <= token) & (index <= seqs)).to(tl.int32), 0) - 1
    query_end = tl.load(cu_query_lens + seq + 1, mask=seq < seqs, other=0)
    kv_len = tl.load(kv_lens + seq, mask=seq < seqs, other=0)
    return seq, tl.where(seq < seqs, kv_len - (query_end - token - 1), 0)


@jit()
def _load_queries(  # type: ignore[no-untyped-def]
    q_row, stride, mine, first_dim: constexpr, rest_dim: constexpr, block_d: constexpr, block_r: constexpr
):
    """Load a tile of queries in two parts; without a rest, the second is the first."""
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
        if masked:
            key_inside = number < end
            if selected is not None:
                position = tl.load(selected + number, mask=key_inside, other=0)
            page = tl.load(table + position // block_size, mask=key_inside, other=0)
            inside = key_inside[:, None] & (dim < first_dim)[None, :]
        else:
            page = tl.load(table + position // block_size)
            inside = (dim < first_dim)[None, :]
        slot = page.to(tl.int64) * block_size + position % block_size
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
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        correction = tl.exp2(top - new_top)
        if values_in_keys:
            values = keys
        else:
            value_at = tl.arange(0, block_v)
            inside = (value_at < value_dim)[None, :]
            if masked:
                inside = inside & key_inside[:, None]
            values = tl.load(v_head + (slot * v_slot)[:, None] + value_at[None, :], mask=inside, other=0.0)
        total = total * correction + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * correction[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc
