"""The keys that a query attends to under sparse attention: the best by the scores of a small indexer.

The score of key ``s`` for query ``t`` is ``sum over h of weights[t, h] * relu(q[t, h] . k[s])``: the lightning indexer
of DeepSeek-V3.2 (https://github.com/deepseek-ai/DeepSeek-V3.2-Exp, the report's section 2.1). Index keys lie in a
paged cache of their own, at the slots of the main one. The choice is exact and the same in every batch: keys of equal
scores are taken in the order of their positions.

Scores of all keys that a sequence can have are held in memory, for as many tokens at a time as 64 MiB take, at least
one: work and memory follow from shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphmode.ops._checks import FLOATS, require, require_cache, require_tensor
from graphmode.ops._cpu import cpu_operator
from graphmode.ops._device import find_token, load_slots
from graphmode.ops._triton import constexpr, jit, next_power_of_2, runs_triton, tl
from graphmode.ops.attention.batch import PagedBatch
from graphmode.ops.sampling.filters import largest_reaching_triton, load_values

# What the scores may take at a time.
_SCORES_BYTES = 1 << 26


def select_keys(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    batch: PagedBatch,
    *,
    top_k: int,
) -> torch.Tensor:
    """Return the positions of the ``top_k`` keys with the largest scores among those up to each token's own.

    The new tokens' index keys must be in the cache already. A token at position ``p`` chooses among ``p + 1`` keys;
    where these are no more than ``top_k``, it gets them all.

    Args:
        q: the indexer's queries, ``[tokens, heads, dim]``; float32, bfloat16 or float16, contiguous.
        weights: float32 ``[tokens, heads]``, contiguous: of the heads, with all factors of the scores.
        index_cache: the index keys, ``[num_blocks, block_size, 1, dim]`` in ``q``'s dtype.
        batch: the sequences.
        top_k: keys of each token, 1 or more.

    Returns:
        int32 ``[tokens, min(top_k, max_blocks * block_size)]``: ascending positions, then -1; padding has none.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit, or a number is out of range.
    """
    require_tensor("q", q, shape=(None, None, None), dtypes=FLOATS, like=q)
    require(q.is_contiguous(), "q.stride()", q.stride(), "contiguous")
    tokens, heads, dim = q.shape
    require_tensor("weights", weights, shape=(tokens, heads), dtypes=(torch.float32,), like=q)
    require(weights.is_contiguous(), "weights.stride()", weights.stride(), "contiguous")
    require_cache("index_cache", index_cache, shape=(None, None, 1, dim), like=q)
    batch.require(tokens, like=q)
    require(top_k >= 1, "top_k", top_k, "1 or more")
    on_cpu = q.device.type == "cpu"
    select = select_keys_triton if runs_triton(q) else select_keys_cpu if on_cpu else select_keys_reference
    return select(q, weights, index_cache, batch, top_k=top_k)


def select_keys_cpu(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    batch: PagedBatch,
    *,
    top_k: int,
) -> torch.Tensor:
    """Run :func:`select_keys` on a CPU, by an operator that reads the lengths when it runs."""
    width = min(top_k, batch.block_tables.shape[1] * index_cache.shape[1])
    out = torch.empty((q.shape[0], width), dtype=torch.int32)
    _select_on_cpu(q, weights, index_cache, *batch, out)
    return out


@cpu_operator(
    "select_on_cpu(Tensor q, Tensor weights, Tensor index_cache, Tensor block_tables, Tensor cu_query_lens, "
    "Tensor kv_lens, int max_query_len, Tensor(a!) out)"
)
def _select_on_cpu(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    kv_lens: torch.Tensor,
    max_query_len: int,
    out: torch.Tensor,
) -> Callable[[], None]:
    """Write to ``out`` what :func:`~graphmode.ops.select_keys` returns; its arguments."""

    def select() -> None:
        out.fill_(-1)
        lens = kv_lens.tolist()
        starts = list(range(len(lens) + 1)) if max_query_len == 1 else cu_query_lens.tolist()
        for seq, length in enumerate(lens):
            first, last = starts[seq : seq + 2]
            if length == 0 or first == last:
                continue
            batch = PagedBatch(
                block_tables[seq : seq + 1, : -(-length // index_cache.shape[1])],
                torch.tensor([0, last - first], dtype=torch.int32),
                kv_lens[seq : seq + 1],
                last - first,
            )
            chosen = select_keys_reference(q[first:last], weights[first:last], index_cache, batch, top_k=out.shape[1])
            out[first:last, : chosen.shape[1]] = chosen

    return select


def select_keys_reference(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    batch: PagedBatch,
    *,
    top_k: int,
) -> torch.Tensor:
    """Run :func:`select_keys` in PyTorch with fixed shapes, by a stable sort."""
    tokens, heads, dim = q.shape
    block_size = index_cache.shape[1]
    max_len = batch.block_tables.shape[1] * block_size
    width = min(top_k, max_len)
    if tokens == 0:
        return torch.empty((0, width), dtype=torch.int32, device=q.device)
    seqs, positions = batch.find_tokens(tokens)
    place = torch.arange(max_len, device=q.device)
    keys = index_cache.flatten(0, 2)
    chosen = []
    # The keys of each token are gathered, and each head has scores.
    rows = _rows_at_a_time(max_len * max(heads, dim))
    for start in range(0, tokens, rows):
        chunk = slice(start, start + rows)
        position = positions[chunk].unsqueeze(1)
        visible = place <= position
        page = batch.block_tables.long()[seqs[chunk]].gather(1, (place // block_size).expand(len(position), -1))
        # What no token sees is read from the first slot instead of its own, which may hold anything.
        slot = torch.where(visible, page * block_size + place % block_size, 0)
        own = keys[slot].float().masked_fill(~visible.unsqueeze(2), 0)
        scores = torch.bmm(q[chunk].float(), own.transpose(1, 2)).relu_()
        scores = torch.bmm(weights[chunk].unsqueeze(1), scores).squeeze(1)
        scores = scores.masked_fill(~visible, float("-inf"))
        best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :width]
        used = torch.arange(width, device=q.device) <= position
        best = torch.where(used, best, max_len).sort(dim=1).values
        chosen.append(torch.where(best < max_len, best, -1).int())
    return torch.cat(chosen)


def _rows_at_a_time(floats: int) -> int:
    return max(_SCORES_BYTES // (4 * floats), 1)


def select_keys_triton(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    batch: PagedBatch,
    *,
    top_k: int,
) -> torch.Tensor:
    """Run :func:`select_keys` in Triton: a kernel for the scores, and one for the largest of each row."""
    tokens, heads, dim = q.shape
    _, block_size, _, _ = index_cache.shape
    seqs, max_blocks = batch.block_tables.shape
    max_len = max_blocks * block_size
    width = min(top_k, max_len)
    chosen = torch.empty((tokens, width), dtype=torch.int32, device=q.device)
    rows = min(_rows_at_a_time(max_len), tokens)
    scores = torch.empty((rows, max_len), dtype=torch.float32, device=q.device)
    block_n = 64
    lens = (batch.cu_query_lens, batch.kv_lens, tokens, seqs)
    constants = {"ragged": batch.max_query_len > 1, "block_seqs": next_power_of_2(seqs + 1)}
    for start in range(0, tokens, rows):
        grid = min(rows, tokens - start)
        _index_scores_kernel[(grid, -(-max_len // block_n))](
            q,
            weights,
            index_cache,
            batch.block_tables,
            batch.block_tables.stride(0),
            *lens,
            scores,
            start,
            max_len,
            heads=heads,
            dim=dim,
            block_size=block_size,
            slot_stride=index_cache.stride(1),
            block_h=max(16, next_power_of_2(heads)),
            block_d=max(16, next_power_of_2(dim)),
            block_n=block_n,
            **constants,
            num_warps=4,
        )
        _choose_kernel[(grid,)](
            scores,
            *lens,
            chosen,
            start,
            max_len,
            top_k=width,
            block=min(max(next_power_of_2(max_len), 32), 4096),
            **constants,
            num_warps=8,
        )
    return chosen


@jit(do_not_specialize=["tokens", "seqs", "first_token", "max_len"])
def _index_scores_kernel(  # type: ignore[no-untyped-def]
    q,
    weights,
    index_cache,
    block_tables,
    table_stride,
    cu_query_lens,
    kv_lens,
    tokens,
    seqs,
    scores,
    first_token,
    max_len,
    heads: constexpr,
    dim: constexpr,
    block_size: constexpr,
    slot_stride: constexpr,
    block_h: constexpr,
    block_d: constexpr,
    block_n: constexpr,
    ragged: constexpr,
    block_seqs: constexpr,
):
    """Score one tile of the keys of one token. Scores of keys that it does not see are left as they are."""
    row = tl.program_id(0)
    token = first_token + row
    if ragged:
        seq, visible = find_token(token, tokens, cu_query_lens, kv_lens, seqs, block_seqs)
    else:
        seq = token
        visible = tl.load(kv_lens + token)
    start = tl.program_id(1) * block_n
    if start >= visible:
        return
    position = start + tl.arange(0, block_n)
    seen = position < visible
    slot = load_slots(block_tables + seq.to(tl.int64) * table_stride, position, seen, block_size)
    at = tl.arange(0, block_d)
    head = tl.arange(0, block_h)
    keys = tl.load(
        index_cache + (slot * slot_stride)[:, None] + at[None, :], mask=seen[:, None] & (at < dim)[None, :], other=0.0
    )
    query_row = token.to(tl.int64) * heads + head
    queries = tl.load(
        q + (query_row * dim)[:, None] + at[None, :], mask=(head < heads)[:, None] & (at < dim)[None, :], other=0.0
    )
    by_head = tl.maximum(tl.dot(queries, tl.trans(keys), input_precision="ieee"), 0.0)
    weight = tl.load(weights + query_row, mask=head < heads, other=0.0)
    score = tl.sum(by_head * weight[:, None], 0)
    tl.store(scores + row.to(tl.int64) * max_len + position, score, mask=seen)


@jit(do_not_specialize=["tokens", "seqs", "first_token", "max_len"])
def _choose_kernel(  # type: ignore[no-untyped-def]
    scores,
    cu_query_lens,
    kv_lens,
    tokens,
    seqs,
    chosen,
    first_token,
    max_len,
    top_k: constexpr,
    block: constexpr,
    ragged: constexpr,
    block_seqs: constexpr,
):
    """Write the positions of the largest scores of one token, ascending."""
    row = tl.program_id(0)
    token = first_token + row
    if ragged:
        _, visible = find_token(token, tokens, cu_query_lens, kv_lens, seqs, block_seqs)
    else:
        visible = tl.load(kv_lens + token)
    out = chosen + token.to(tl.int64) * top_k
    lane = tl.arange(0, block)
    if visible <= top_k:
        for start in range(0, top_k, block):
            position = start + lane
            tl.store(out + position, tl.where(position < visible, position, -1), mask=position < top_k)
        return
    values = scores + row.to(tl.int64) * max_len
    wanted = tl.full([], top_k, tl.int64)
    # At least top_k scores reach this, and they are more only if several equal it.
    threshold = largest_reaching_triton(values, 1, visible, 0.0, 0.0, 0.0, wanted, False, block)
    larger = tl.zeros([block], tl.int32)
    for start in range(0, visible, block):
        larger += (load_values(values, start + lane, 1, visible) > threshold).to(tl.int32)
    ties_wanted = top_k - tl.sum(larger, 0)
    taken = visible * 0
    ties = visible * 0
    for start in range(0, visible, block):
        position = start + lane
        value = load_values(values, position, 1, visible)
        tie = ((value == threshold) & (position < visible)).to(tl.int32)
        ties_before = ties + tl.cumsum(tie, 0) - tie
        take = ((value > threshold) | ((tie > 0) & (ties_before < ties_wanted))).to(tl.int32)
        place = taken + tl.cumsum(take, 0) - take
        tl.store(out + place, position, mask=take > 0)
        taken += tl.sum(take, 0)
        ties += tl.sum(tie, 0)
