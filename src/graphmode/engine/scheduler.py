"""The scheduler: which sequences compute how many tokens in the next step. Pure bookkeeping, no device.

It runs one step ahead: a step is scheduled while the one before is still in flight, so the token that the earlier one
makes is known to exist but not by value. The scheduler needs lengths; values arrive with :meth:`Scheduler.update`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from heapq import heappop, heappush
from itertools import count, takewhile

from graphmode.cache.block_manager import BlockManager
from graphmode.engine.sequence import Sequence
from graphmode.engine.types import Batch, Family, Limits, ScheduledSequence
from graphmode.errors import InputError


class Scheduler:
    """Continuous batching with chunked prefill, prefix caching, priorities and preemption.

    Sequences are in order of priority, and of submission where that is the same. Running ones come first, one token
    each where they decode; what is left of the token budget goes to prompts, in order, the last one cut to a chunk.
    Blocks are taken as tokens need them. When none are left, the last in order of those that run gives up its own and
    is computed again later; the first never does, so every sequence ends. A step scores as many prompt tokens as it may
    hold sequences, so prompts that are scored are cut to that.

    Args:
        limits: what a step may hold.
        blocks: gives sequences the blocks of the cache.

    Attributes:
        waiting: the sequences that wait and are made already, in order.
        running: those that run, in order.
        preemptions: times that a sequence gave up its blocks.
        prefix_queries: tokens of the prompts that were looked up in the cache, each when it first ran.
        prefix_hits: those of them that were found there.
    """

    def __init__(self, limits: Limits, blocks: BlockManager) -> None:
        self.limits = limits
        self.blocks = blocks
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.running: dict[Sequence, None] = {}
        self.preemptions = self.prefix_queries = self.prefix_hits = 0
        self._arrived: deque[tuple[int, int, Iterator[tuple[int, Sequence]]]] = deque()
        self._sources: list[tuple[int, int, Iterator[tuple[int, Sequence]]]] = []  # a heap
        self._numbers = count()
        self._free_state_indices = list(range(limits.max_num_seqs, 0, -1))

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished, or may still come."""
        return bool(self.waiting or self.running or self._sources or self._arrived)

    def check(self, prompt_tokens: int, max_tokens: int | None) -> None:
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
        if (lacking := self.blocks.lacking(self._longest(prompt_tokens, max_tokens))) is not None:
            needed, there = lacking
            raise InputError(
                f"a prompt of {prompt_tokens} tokens with max_tokens={max_tokens} needs {needed} KV blocks; the cache "
                f"has {there}. Give a smaller max_tokens, or raise kv_cache_memory"
            )

    def add(self, sequences: Iterator[Sequence], priority: int = 0) -> None:
        """Queue sequences, each asked for when a step has room for it and none before it waits. Any thread may call it.

        So the first step starts before the last sequence is made, and holds what it would if all had been there.

        Args:
            sequences: makes them; each fits (:meth:`check`). What it raises, :meth:`schedule` raises.
            priority: lower ones run first.
        """
        self._arrived.append((priority, next(self._numbers), enumerate(sequences)))

    def schedule(self) -> Batch | None:
        """Choose the next step, admitting waiting sequences; None where there is nothing to compute now."""
        rows: dict[Sequence, ScheduledSequence] = {}
        admitted = []
        budget, scores = self.limits.max_num_batched_tokens, self.limits.max_num_seqs
        preemptions = self.preemptions
        # Decoding sequences before prompts: a long prompt must not hold up those that are already answering.
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_pending > 1):
            if budget == 0 or sequence not in self.running or sequence.num_computed >= self._max_len(sequence) - 1:
                continue
            tokens = _up_to(sequence, sequence.num_computed, min(sequence.num_pending, budget), scores)
            if tokens == 0 or (tokens == sequence.num_pending and not sequence.may_draw):
                continue
            while not self.blocks.extend([(sequence, sequence.num_computed + tokens)]):
                if (row := rows.pop(victim := self._preempt(), None)) is not None:
                    budget += row.num_tokens
                    scores += len(row.scored)
                if victim is sequence:
                    break
            else:
                rows[sequence] = row = _row(sequence, tokens)
                budget -= tokens
                scores -= len(row.scored)
        # Whoever gave up its blocks in this step waits for the next one.
        while budget > 0 and self.preemptions == preemptions and (first := self._next_waiting()) is not None:
            if not (tokens := self._admit(first, budget, scores)):
                break
            del self.waiting[first]
            _insert(self.running, first)
            admitted.append(first)
            rows[first] = row = _row(first, tokens)
            budget -= tokens
            scores -= len(row.scored)
        if not rows:
            return None
        chosen = tuple(rows.values())
        if self.preemptions == preemptions:
            self._repeat(chosen)
        for row in chosen:
            row.sequence.num_computed += row.num_tokens + row.steps - 1
            if row.samples:
                row.sequence.in_flight += row.steps
        num_tokens = sum(row.num_tokens for row in chosen)
        decode = all(row.num_tokens == self.limits.decode_query_len for row in chosen)
        family: Family = "decode" if decode else "mixed"
        return Batch(family, chosen, num_tokens, tuple(admitted))

    def update(self, batch: Batch, tokens: list[list[int]], eos_token_ids: frozenset[int]) -> dict[Sequence, list[int]]:
        """Take in what a batch made and return the new tokens of each sequence that got any.

        Args:
            batch: the batch.
            tokens: those that each of its sequences sampled. Ignored are those of sequences that have ended.
            eos_token_ids: tokens that end a text.
        """
        changed: dict[Sequence, list[int]] = {}
        for row, made in zip(batch.scheduled, tokens, strict=True):
            sequence = row.sequence
            if row.samples:
                sequence.in_flight -= row.steps
            if not self._holds(sequence):
                continue
            if row.samples:
                changed[sequence] = self._append(sequence, made, eos_token_ids)
            if sequence.finish_reason:
                self.drop(sequence)
        return changed

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running, and take its blocks back. One that was dropped is left as it is."""
        if self._holds(sequence):
            self.running.pop(sequence, None)
            self.waiting.pop(sequence, None)
            self._release(sequence)

    def _holds(self, sequence: Sequence) -> bool:
        return sequence in self.running or sequence in self.waiting

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        if sequence.state_index:
            self._free_state_indices.append(sequence.state_index)
        sequence.state_index = 0

    def _max_len(self, sequence: Sequence) -> int:
        return self._longest(len(sequence.prompt_token_ids), sequence.params.max_tokens)

    def _longest(self, prompt_tokens: int, max_tokens: int | None) -> int:
        limit = self.limits.max_model_len
        return limit if max_tokens is None else min(prompt_tokens + max_tokens, limit)

    def _append(self, sequence: Sequence, made: list[int], eos_token_ids: frozenset[int]) -> list[int]:
        """Append what a sequence made up to its end, saying why it ends there; return these tokens."""
        params = sequence.params
        # What ends a text is drawn in a grammar only where it may, and nothing can follow it there.
        ends = frozenset() if params.ignore_eos and sequence.grammar is None else eos_token_ids
        stops = ends.union(params.stop_token_ids)
        if not stops.isdisjoint(made):
            made = made[: 1 + next(at for at, token in enumerate(made) if token in stops)]
            sequence.finish_reason = "stop"
            sequence.stop_reason = None if made[-1] in ends else made[-1]
        sequence.token_ids += made
        if sequence.finish_reason is None and len(sequence.token_ids) >= self._max_len(sequence):
            sequence.finish_reason = "length"
        return made

    def _repeat(self, rows: Collection[ScheduledSequence]) -> None:
        """Let decode rows go on for several steps, where there are enough blocks; other rows keep one step.

        So do rows in a grammar, which cannot draw before the host knows what they drew last; the others go on.
        """
        steps = self.limits.decode_steps
        if steps == 1 or not all(_repeats(row) for row in rows):
            return
        while steps > 1:
            counts = [
                min(steps, self._max_len(row.sequence) - 1 - row.start) if row.sequence.grammar is None else 1
                for row in rows
            ]
            if self.blocks.extend([(row.sequence, row.start + n) for row, n in zip(rows, counts, strict=True)]):
                for row, count in zip(rows, counts, strict=True):
                    row.steps = count
                return
            steps //= 2

    def _preempt(self) -> Sequence:
        """Take the blocks of the last running sequence, which waits to be computed again; return it."""
        victim, _ = self.running.popitem()
        self._release(victim)
        _insert(self.waiting, victim)
        self.preemptions += 1
        return victim

    def _next_waiting(self) -> Sequence | None:
        """Return the sequence that is to be admitted next, asking for it if it is not made; None where none comes."""
        while self._arrived:
            heappush(self._sources, self._arrived.popleft())
        first = next(iter(self.waiting), None)
        while self._sources and (first is None or self._sources[0][:2] < first.order[:2]):
            priority, number, sequences = self._sources[0]
            if (following := next(sequences, None)) is None:
                heappop(self._sources)
            else:
                at, first = following
                first.order = (priority, number, at)
                _insert(self.waiting, first)
        return first

    def _admit(self, sequence: Sequence, budget: int, scores: int) -> int:
        """Give a waiting sequence the blocks of its first step and return its tokens; 0 where there is no room."""
        if len(self.running) >= self.limits.max_num_seqs:
            return 0
        params = sequence.params
        reads = params.prompt_logprobs is None and not params.skip_reading_prefix_cache
        self.blocks.begin(sequence, read_prefix=reads)
        cached = sequence.num_computed
        tokens = _up_to(sequence, cached, min(sequence.num_pending, budget), scores)
        waits = tokens == sequence.num_pending and not sequence.may_draw  # it was preempted
        if tokens == 0 or waits or not self.blocks.extend([(sequence, cached + tokens)]):
            self.blocks.release(sequence)
            return 0
        if sequence.num_cached < 0:
            sequence.num_cached = cached
            self.prefix_queries += len(sequence.prompt_token_ids)
            self.prefix_hits += cached
        sequence.state_index = self._free_state_indices.pop()
        return tokens


def _insert(queue: dict[Sequence, None], sequence: Sequence) -> None:
    """Put a sequence where its order says: most often last."""
    later = list(takewhile(lambda each: each.order > sequence.order, reversed(queue)))
    queue[sequence] = None
    for each in reversed(later):
        queue[each] = queue.pop(each)


def _up_to(sequence: Sequence, start: int, tokens: int, scores: int) -> int:
    """Return how many of the ``tokens`` from ``start`` on a step computes that has room for ``scores`` scored ones."""
    scored = _scored(sequence, start, start + tokens)
    return tokens if len(scored) <= scores else scored.start + scores - start


def _scored(sequence: Sequence, start: int, end: int) -> range:
    """Return the positions from ``start`` to ``end`` whose next token is of the prompt and still to be scored."""
    if sequence.params.prompt_logprobs is None:
        return range(0)
    return range(max(start, len(sequence.prompt_logprobs)), min(end, len(sequence.prompt_token_ids) - 1))


def _repeats(row: ScheduledSequence) -> bool:
    """Return whether a row's part of a step may be followed by another without the host.

    What the device does not move on must not belong to the first step alone: scored prompt tokens, a token that stands
    for a part of an image. Log-probabilities are read after every step.
    """
    vision = row.sequence.vision
    return (
        row.samples == row.num_tokens == 1
        and not row.scored
        and row.sequence.params.logprobs is None
        and not (vision and vision.spans_in(row.start, row.start + 1))
    )


def _row(sequence: Sequence, num_tokens: int) -> ScheduledSequence:
    start, end = sequence.num_computed, sequence.num_computed + num_tokens
    return ScheduledSequence(sequence, start, num_tokens, end == sequence.num_tokens, _scored(sequence, start, end))
