"""The scheduler: which sequences compute how many tokens in the next step. Pure bookkeeping, no device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from graphmode.engine.block_allocator import BlockAllocator
from graphmode.engine.sequence import Sequence
from graphmode.graph.errors import InputError

Family = Literal["decode", "mixed"]


@dataclass(frozen=True)
class Limits:
    """What a step may hold.

    Attributes:
        max_num_seqs: sequences in a step.
        max_num_batched_tokens: tokens in a step; longer prompts are computed in chunks.
        max_model_len: tokens of a sequence, prompt and output together.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True)
class Row:
    """A sequence's part of a step.

    Attributes:
        sequence: whose.
        start: its first token that the step computes.
        num_tokens: how many it computes.
        samples: whether the step ends at the sequence's last known token, so that it makes the next one.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True)
class Batch:
    """One step.

    Attributes:
        family: ``decode`` where every sequence computes one token, else ``mixed``.
        rows: the sequences, in order.
        num_tokens: tokens of all rows.
    """

    family: Family
    rows: tuple[Row, ...]
    num_tokens: int


class Scheduler:
    """Continuous batching with chunked prefill.

    Running sequences come first, one token each where they decode; what is left of the token budget goes to prompts, in
    the order of submission, the last one cut to a chunk. A sequence starts when a row is free and blocks for the
    whole of it (prompt and ``max_tokens``) are, so that it never has to stop for want of memory.

    Args:
        limits: what a step may hold.
        allocator: the cache's blocks.
    """

    def __init__(self, limits: Limits, allocator: BlockAllocator) -> None:
        self.limits = limits
        self.allocator = allocator
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.waiting or self.running)

    def check(self, prompt_tokens: int, max_tokens: int) -> None:
        """Check that a sequence could run.

        Raises:
            InputError: the prompt is empty or too long, or the cache is too small for it.
        """
        limit = self.limits.max_model_len
        if prompt_tokens < 1:
            raise InputError("the prompt has no tokens; give at least one")
        if prompt_tokens >= limit:
            raise InputError(
                f"the prompt has {prompt_tokens} tokens; with max_model_len={limit} it may have {limit - 1}, one less, "
                "so that there is room for an answer. Shorten it, or raise max_model_len if the model allows it"
            )
        needed = self.allocator.blocks_for(min(prompt_tokens + max_tokens, limit))
        if needed > self.allocator.num_blocks:
            raise InputError(
                f"a prompt of {prompt_tokens} tokens with max_tokens={max_tokens} needs {needed} KV blocks; the cache "
                f"has {self.allocator.num_blocks}. Lower max_tokens, or raise kv_cache_memory"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            InputError: it could never run.
        """
        self.check(len(sequence.prompt_token_ids), sequence.params.max_tokens)
        self.waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """Choose the next step, admitting waiting sequences; None where there is nothing to do."""
        budget = self.limits.max_num_batched_tokens
        rows = []
        # Decoding sequences before prompts: a long prompt must not hold up those that are already answering.
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_pending > 1):
            if budget > 0:
                rows.append(_row(sequence, budget))
                budget -= rows[-1].num_tokens
        while self.waiting and budget > 0 and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            rows.append(_row(sequence, budget))
            budget -= rows[-1].num_tokens
        if not rows:
            return None
        num_tokens = sum(row.num_tokens for row in rows)
        return Batch("decode" if num_tokens == len(rows) else "mixed", tuple(rows), num_tokens)

    def update(self, batch: Batch, tokens: list[int], eos_token_ids: frozenset[int]) -> list[Sequence]:
        """Take in what a step made and return the sequences that it changed.

        Args:
            batch: the step.
            tokens: the sampled token of each row; those of rows that do not sample are ignored.
            eos_token_ids: tokens that end a text.
        """
        changed = []
        for row, token in zip(batch.rows, tokens, strict=True):
            sequence = row.sequence
            sequence.num_computed += row.num_tokens
            if not row.samples:
                continue
            sequence.token_ids.append(token)
            changed.append(sequence)
            if token in eos_token_ids and not sequence.params.ignore_eos:
                sequence.finish_reason = "stop"
            elif len(sequence.token_ids) >= self._max_len(sequence):
                sequence.finish_reason = "length"
            if sequence.finish_reason is not None:
                self.running.remove(sequence)
                self.allocator.free(sequence.blocks)
                sequence.blocks = []
        return changed

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence, waiting or running, and take its blocks back. A finished one is left as it is."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.allocator.free(sequence.blocks)
            sequence.blocks = []
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _max_len(self, sequence: Sequence) -> int:
        return min(len(sequence.prompt_token_ids) + sequence.params.max_tokens, self.limits.max_model_len)

    def _admit(self, sequence: Sequence) -> bool:
        """Give ``sequence`` its blocks, if there is a row and memory for it."""
        needed = self.allocator.blocks_for(self._max_len(sequence))
        if len(self.running) >= self.limits.max_num_seqs or needed > self.allocator.num_free:
            return False
        sequence.blocks = self.allocator.allocate(needed)
        return True


def _row(sequence: Sequence, budget: int) -> Row:
    num_tokens = min(sequence.num_pending, budget)
    return Row(sequence, sequence.num_computed, num_tokens, samples=num_tokens == sequence.num_pending)
