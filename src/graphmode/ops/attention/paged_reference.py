"""Paged attention in PyTorch, which is also the attention of devices that have no kernel of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphmode.ops.attention.batch import PagedBatch, Scoring

# What the loop over query blocks holds at a time, for each of keys, values and scores: larger tensors leave the cores'
# caches, and fresh memory of that size costs more in page faults than the arithmetic does.
_CHUNK_BYTES = 1 << 20
# What gathering the keys and values of a query block costs, in rows of its score matrix.
_GATHER_COST = 6


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scoring: Scoring,
    selection: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run :func:`~graphmode.ops.paged_attention` in PyTorch with fixed shapes: query blocks meet equally many keys.

    Keys beyond what a block sees are gathered from the first slot that it sees instead of their own, so that masking
    them is enough: no weight of zero meets the NaN that an unused slot may hold.
    """
    tokens, q_heads, _ = q.shape
    if tokens == 0:
        return q.new_empty((0, q_heads, v_cache.shape[3]))
    block_size = k_cache.shape[1]
    lens = batch.kv_lens.long()
    if selection is not None:
        seq, position = batch.find_tokens(tokens)
        last_key = position.clamp(max=selection.shape[1] - 1).unsqueeze(1)
        used = torch.arange(selection.shape[1], device=q.device) <= last_key
        selected = torch.where(used, selection, 0)
        page = batch.block_tables.long()[seq].gather(1, selected // block_size)
        slots = page * block_size + selected % block_size
        out = _attend_blocks(q.unsqueeze(1), last_key, slots, k_cache, v_cache, scoring)
        real = position >= 0
    elif batch.max_query_len == 1:
        slots = _slots(batch.block_tables, block_size)
        out = _attend_blocks(q.unsqueeze(1), (lens - 1).unsqueeze(1), slots, k_cache, v_cache, scoring)
        real = lens > 0
    else:
        slots = _slots(batch.block_tables, block_size)
        seqs, max_len = slots.shape
        group = q_heads // k_cache.shape[2]
        block_q, num_blocks = _choose_blocks(tokens, seqs, group, batch.max_query_len, scoring.window, max_len)
        blocks = _find_blocks(batch.cu_query_lens.long(), lens, tokens, block_q, num_blocks)
        queries = q.index_select(0, blocks.token.view(-1)).view(num_blocks, block_q, *q.shape[1:])
        slots = slots.index_select(0, blocks.seq)
        out = _attend_blocks(queries, blocks.last_key, slots, k_cache, v_cache, scoring)
        out = out.flatten(0, 1).index_select(0, blocks.row_of_token)
        real = blocks.real_token
    return torch.where(real.view(-1, 1, 1), out.view(tokens, q_heads, -1), 0.0).to(q.dtype)


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
    """Return how many successive keys a query block can see at most."""
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
    scoring: Scoring,
) -> torch.Tensor:
    """Attend with each query block to the slots of its sequence.

    Args:
        queries: ``[blocks, block_q, q_heads, key_dim]``.
        last_key: ``[blocks, block_q]``: the last position that each row sees, rising; the result is NaN for -1.
        slots: ``[blocks, max_len]``: the slot of each position; anything where no row sees it.
        k_cache: as in :func:`~graphmode.ops.paged_attention`.
        v_cache: as ``k_cache``.
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
    outputs = []
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
            output = torch.bmm(scores.softmax(-1), values)
            if sinks is not None:
                # With a sink of weight w beside weights that sum to s, the others keep the share s / (s + w).
                excess = scores.logsumexp(-1).view(by_head) - sinks.float().view(kv_heads, 1, group)[chunk[1]]
                output.mul_(torch.sigmoid(excess).view(-1, block_q * group, 1))
            outputs.append(output)
    out = torch.cat(outputs).view(blocks, kv_heads, block_q, group, value_dim)
    return out.transpose(1, 2).reshape(blocks, block_q, q_heads, value_dim)
