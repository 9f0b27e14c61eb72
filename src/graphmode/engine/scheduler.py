"""The scheduler: which sequences compute how many tokens in the next step. Pure bookkeeping, no device.

It runs one step ahead: a step is scheduled while the one before is still in flight, so the token that the earlier one
makes is known to exist but not by value. The scheduler needs lengths; values arrive with :meth:`Scheduler.update`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from heapq import heappop, heappush
from itertools import count

from graphmode.cache.block_manager import BlockManager
from graphmode.engine.sequence import Sequence
from graphmode.engine.types import Batch, Family, Limits, ScheduledSequence
from graphmode.errors import InputError

_NONE = range(0)


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
        decoding: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            (prompts if sequence.num_pending > 1 else decoding).append(sequence)
        # Decoding sequences before prompts: a long prompt must not hold up those that are already answering.
        for sequence in decoding + prompts:
            if budget == 0 or sequence not in self.running or sequence.num_computed >= sequence.max_len - 1:
                continue
            if (row := _part(sequence, budget, scores)) is None:
                continue
            while not self.blocks.extend([(sequence, row.start + row.num_tokens)]):
                if (other := rows.pop(victim := self._preempt(), None)) is not None:
                    budget += other.num_tokens
                    scores += len(other.scored)
                if victim is sequence:
                    break
            else:
                rows[sequence] = row
                budget -= row.num_tokens
                scores -= len(row.scored)
        # Whoever gave up its blocks in this step waits for the next one.
        while budget > 0 and self.preemptions == preemptions and (first := self._next_waiting()) is not None:
            if (row := self._admit(first, budget, scores)) is None:
                break
            del self.waiting[first]
            _insert(self.running, first)
            admitted.append(first)
            rows[first] = row
            budget -= row.num_tokens
            scores -= len(row.scored)
        if not rows:
            return None
        chosen = tuple(rows.values())
        if self.preemptions == preemptions:
            self._repeat(chosen)
        query_len, num_tokens = self.limits.decode_query_len, 0
        family: Family = "decode"
        for row in chosen:
            sequence = row.sequence
            sequence.num_computed += row.num_tokens + row.steps - 1
            if row.samples:
                sequence.in_flight += row.steps
            num_tokens += row.num_tokens
            if row.num_tokens != query_len:
                family = "mixed"
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

    def _longest(self, prompt_tokens: int, max_tokens: int | None) -> int:
        limit = self.limits.max_model_len
        return limit if max_tokens is None else min(prompt_tokens + max_tokens, limit)

    def _append(self, sequence: Sequence, made: list[int], eos_token_ids: frozenset[int]) -> list[int]:
        """Append what a sequence made up to its end, saying why it ends there; return these tokens."""
        params = sequence.params
        # What ends a text is drawn in a grammar only where it may, and nothing can follow it there.
        ends = frozenset() if params.ignore_eos and sequence.grammar is None else eos_token_ids
        stops = ends.union(params.stop_token_ids) if params.stop_token_ids else ends
        if not stops.isdisjoint(made):
            made = made[: 1 + next(at for at, token in enumerate(made) if token in stops)]
            sequence.finish_reason = "stop"
            sequence.stop_reason = None if made[-1] in ends else made[-1]
        sequence.token_ids += made
        if sequence.finish_reason is None and len(sequence.token_ids) >= sequence.max_len:
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
                min(steps, row.sequence.max_len - 1 - row.start) if row.sequence.grammar is None else 1 for row in rows
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

    def _admit(self, sequence: Sequence, budget: int, scores: int) -> ScheduledSequence | None:
        """Give a waiting sequence the blocks of its part of the step, and return that; None where there is no room."""
        if len(self.running) >= self.limits.max_num_seqs:
            return None
        params = sequence.params
        reads = params.prompt_logprobs is None and not params.skip_reading_prefix_cache
        self.blocks.begin(sequence, read_prefix=reads)
        cached = sequence.num_computed
        row = _part(sequence, budget, scores)
        if row is None or not self.blocks.extend([(sequence, cached + row.num_tokens)]):
            self.blocks.release(sequence)
            return None
        sequence.max_len = self._longest(len(sequence.prompt_token_ids), params.max_tokens)
        if sequence.num_cached < 0:
            sequence.num_cached = cached
            self.prefix_queries += len(sequence.prompt_token_ids)
            self.prefix_hits += cached
        sequence.state_index = self._free_state_indices.pop()
        return row


def _insert(queue: dict[Sequence, None], sequence: Sequence) -> None:
    """Put a sequence where its order says: most often last."""
    later = []
    for each in reversed(queue):
        if each.order <= sequence.order:
            break
        later.append(each)
    queue[sequence] = None
    for each in reversed(later):
        queue[each] = queue.pop(each)


def _part(sequence: Sequence, budget: int, scores: int) -> ScheduledSequence | None:
    """Return the part of a step that a sequence can have; None where it can have none.

    Args:
        sequence: whose next tokens are computed.
        budget: the tokens that there is room for.
        scores: the prompt tokens that there is room to score.
    """
    start, pending = sequence.num_computed, sequence.num_pending
    tokens, scored = min(pending, budget), _NONE
    if sequence.params.prompt_logprobs is not None:
        first, last = len(sequence.prompt_logprobs), len(sequence.prompt_token_ids) - 1
        scored = range(max(start, first), min(start + tokens, last))
        if len(scored) > scores:
            scored = scored[:scores]
            tokens = scored.stop - start
    if tokens == 0 or (sequence.grammar is not None and tokens == pending and not sequence.may_draw):
        return None
    return ScheduledSequence(sequence, start, tokens, int(tokens == pending), scored)


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
