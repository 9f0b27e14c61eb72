"""Paged batches whose every unused place is poisoned, and attention in float64, sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphmode.ops import PagedBatch, Scoring

GARBAGE = 0x7FEDCBA9  # far beyond any cache


@dataclass
class PoisonedBatch:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    cu_query_lens: torch.Tensor
    kv_lens: torch.Tensor
    query_lens: list[int]  # of the real sequences
    options: dict[str, Any] = field(default_factory=dict)  # window, soft_cap, sinks, selection

    @property
    def num_real_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def is_decode(self) -> bool:
        return all(n == 1 for n in self.query_lens)

    @property
    def paged(self) -> PagedBatch:
        tokens, seqs = len(self.q), len(self.kv_lens)
        most = 1 if self.is_decode and tokens == seqs else max(tokens, 2)
        return PagedBatch(self.block_tables, self.cu_query_lens, self.kv_lens, most)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.scale, *(self.options.get(name) for name in ("window", "soft_cap", "sinks")))

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch, Scoring, torch.Tensor | None]:
        """What attention takes."""
        return self.q, self.k_cache, self.v_cache, self.paged, self.scoring, self.options.get("selection")

    def first_key(self, seq: int) -> int:
        """The first position that a new token of the sequence sees."""
        window = self.options.get("window")
        return 0 if window is None else max(0, int(self.kv_lens[seq]) - self.query_lens[seq] + 1 - window)

    def seen_slots(self) -> torch.Tensor:
        """Where in the caches, as [slots], a token is that a new one sees."""
        slots = self.k_cache.shape[0] * self.k_cache.shape[1]
        seen = torch.zeros(slots, dtype=torch.bool, device=self.q.device)
        for seq in range(len(self.query_lens)):
            seen[self.slots_of(seq)] = True
        return seen

    def slots_of(self, seq: int) -> torch.Tensor:
        """The slots of the sequence's positions from the first on that a new token sees."""
        position = torch.arange(self.first_key(seq), int(self.kv_lens[seq]), device=self.q.device)
        block_size = self.k_cache.shape[1]
        return self.block_tables[seq, position // block_size].long() * block_size + position % block_size

    def with_unused(self, value: float, entry: int) -> PoisonedBatch:
        """The same batch with other contents wherever no real token reads: padding queries, slots, table entries."""
        changed = replace(
            self,
            q=self.q.clone(),
            k_cache=self.k_cache.clone(),
            v_cache=self.v_cache.clone(),
            block_tables=self.block_tables.clone(),
        )
        if self.v_cache.data_ptr() == self.k_cache.data_ptr():
            changed.v_cache = changed.k_cache[..., : self.v_cache.shape[3]]
        changed.q[self.num_real_tokens :] = value
        unseen = ~self.seen_slots()
        for cache in (changed.k_cache, changed.v_cache):
            cache.view(-1, *cache.shape[2:])[unseen] = value
        block_size = self.k_cache.shape[1]
        first = torch.arange(self.block_tables.shape[1], device=self.q.device) * block_size
        changed.block_tables[first >= self.kv_lens.unsqueeze(1)] = entry
        for seq in range(len(self.query_lens)):
            changed.block_tables[seq, : self.first_key(seq) // block_size] = entry
        return changed


def make_batch(
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    tokens: int | None = None,
    seqs: int | None = None,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    value_dim: int | None = None,
    values_in_keys: bool = False,
    block_size: int = 16,
    max_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    window: int | None = None,
    soft_cap: float | None = None,
    with_sinks: bool = False,
    top_k: int | None = None,
) -> PoisonedBatch:
    """A batch padded to ``tokens`` and ``seqs``; NaN and garbage wherever nothing is to be read.

    With ``top_k`` each token sees as many keys, chosen at random.
    """
    random = torch.Generator().manual_seed(seed)
    tokens = sum(query_lens) if tokens is None else tokens
    seqs = len(query_lens) if seqs is None else seqs
    max_blocks = -(-max([max_len or 1, *kv_lens]) // block_size)
    num_blocks = sum(-(-n // block_size) for n in kv_lens) + 3
    free = torch.randperm(num_blocks, generator=random, dtype=torch.int32)
    block_tables = torch.zeros((seqs, max_blocks), dtype=torch.int32)
    for seq, kv_len in enumerate(kv_lens):
        used = -(-kv_len // block_size)
        block_tables[seq, :used], free = free[:used], free[used:]

    noise = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, device=device).to(dtype)

    padding = seqs - len(query_lens)
    q = normal(tokens, q_heads, head_dim)
    k_cache = normal(num_blocks, block_size, kv_heads, head_dim)
    value_dim = value_dim or head_dim
    v_cache = k_cache[..., :value_dim] if values_in_keys else normal(num_blocks, block_size, kv_heads, value_dim)
    selection = None
    if top_k is not None:
        positions = [kv - new + i for new, kv in zip(query_lens, kv_lens, strict=True) for i in range(new)]
        selection = torch.full((tokens, top_k), GARBAGE, dtype=torch.int32)
        for token, position in enumerate(positions):
            picked = torch.randperm(position + 1, generator=random)[:top_k].sort().values
            selection[token, : len(picked)] = picked.int()
        selection = selection.to(device)
    batch = PoisonedBatch(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=block_tables.to(device),
        cu_query_lens=torch.tensor([0, *query_lens, *[0] * padding], device=device).cumsum(0).int(),
        kv_lens=torch.tensor([*kv_lens, *[0] * padding], dtype=torch.int32, device=device),
        query_lens=list(query_lens),
        options={
            "window": window,
            "soft_cap": soft_cap,
            "sinks": normal(q_heads) * 2 if with_sinks else None,
            "selection": selection,
        },
    )
    return batch.with_unused(float("nan"), GARBAGE)


def attend_one_by_one(batch: PoisonedBatch, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Attention of each sequence by itself, in ``dtype``: ``[real tokens, q_heads, head_dim]``."""
    group = batch.q.shape[1] // batch.k_cache.shape[2]
    outputs = []
    start = 0
    for seq, query_len in enumerate(batch.query_lens):
        slots = batch.slots_of(seq)
        keys = batch.k_cache.flatten(0, 1)[slots].to(dtype).repeat_interleave(group, dim=1)
        values = batch.v_cache.flatten(0, 1)[slots].to(dtype).repeat_interleave(group, dim=1)
        queries = batch.q[start : start + query_len].to(dtype)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * batch.scale
        window, soft_cap, sinks = (batch.options.get(name) for name in ("window", "soft_cap", "sinks"))
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        key = torch.arange(len(slots), device=slots.device)
        position = key[len(slots) - query_len :].unsqueeze(1)
        hidden = key > position if window is None else (key > position) | (key <= position - window)
        if (selection := batch.options.get("selection")) is not None:
            for row in range(query_len):
                used = selection[start + row, : int(position[row]) + 1].long()
                hidden[row] = True
                hidden[row, used] = False
        scores.masked_fill_(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(dtype).view(-1, 1, 1).expand(-1, query_len, 1)], -1)
        weights = scores.softmax(-1)[..., : len(slots)]
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
        start += query_len
    return torch.cat(outputs)
