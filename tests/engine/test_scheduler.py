"""The scheduler as a state machine, one step ahead of a simulated device.

The device remembers which tokens every cache slot stands for, so a wrong block, a prefix shared wrongly, memory given
away too early or a token taken from the wrong place is seen. No limit is broken, nobody starves, nothing is lost.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graphmode.cache.block_manager import BlockManager
from graphmode.cache.specs import CacheGroup
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.scheduler import Scheduler
from graphmode.engine.sequence import Sequence
from graphmode.engine.types import Batch, Limits
from graphmode.graph import InputError

EOS = 7
SIZE = 4


def group(window: int | None = None, block_size: int = SIZE) -> CacheGroup:
    return CacheGroup("full" if window is None else "window", (0,), torch.float32, block_size, 1, window)


GROUPS = [
    [group()],
    [group(1)],
    [group(6)],
    [group(), group(5)],
    [group(9), group(), group(3, block_size=2)],
    [group(7, block_size=8), group(block_size=2), group(block_size=4)],
]


def manager(limits: Limits, blocks: int, *, caching: bool = True) -> BlockManager:
    """Blocks of one group without a window."""
    return BlockManager([group()], [blocks], step_tokens=limits.max_num_batched_tokens, prefix_caching=caching)


class Device:
    """Runs batches as they are launched: every slot of a group holds the tokens up to the one that it stands for."""

    def __init__(self, groups: list[CacheGroup]) -> None:
        self.groups = groups
        self.slots: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self.written: dict[Sequence, tuple[int, ...]] = {}
        self.last: dict[int, int] = {}

    def places(self, sequence: Sequence, at: int) -> list[tuple[int, int, int]]:
        return [
            (number, sequence.block_tables[number][at // each.block_size], at % each.block_size)
            for number, each in enumerate(self.groups)
        ]

    def write(self, sequence: Sequence, at: int, tokens: tuple[int, ...]) -> None:
        self.written[sequence] = tokens
        for place in self.places(sequence, at):
            self.slots[place] = tokens

    def check_reads(self, sequence: Sequence, at: int, tokens: tuple[int, ...]) -> None:
        """The token at a position reads of each group what its window holds: that is the sequence's own."""
        for number, each in enumerate(self.groups):
            for seen in range(max(0, at + 1 - (each.window or at + 1)), at + 1):
                held = self.slots.get(self.places(sequence, seen)[number])
                assert held == tokens[: seen + 1], f"token {at} reads the cache of other tokens at {seen}"

    def run(self, batch: Batch, choose: list[int]) -> list[list[int]]:
        """Run a batch's steps, in which sequences sample what ``choose`` says in turn; return what each sampled."""
        made = [self.run_first(batch, choose[: len(batch.scheduled)])]
        extra = {row: [made[0][index]] for index, row in enumerate(batch.scheduled)}
        for step in range(1, batch.steps):
            following = [choose[(index + 5 * step) % len(choose)] for index in range(len(batch.scheduled))]
            for row, token in zip(batch.scheduled, following, strict=True):
                if step < row.steps:
                    tokens = (*self.written[row.sequence], extra[row][-1])
                    at = row.start + step
                    assert len(tokens) == at + 1
                    self.write(row.sequence, at, tokens)
                    self.check_reads(row.sequence, at, tokens)
                    extra[row].append(token)
                    self.last[row.sequence.state_index] = token
            made.append(following)
        return [
            [tokens[index] for tokens in made[: row.steps]] if row.samples else []
            for index, row in enumerate(batch.scheduled)
        ]

    def run_first(self, batch: Batch, choose: list[int]) -> list[int]:
        rows = []
        for row in batch.scheduled:
            tokens = tuple(row.sequence.token_ids[: row.start + row.num_tokens])
            if len(tokens) < row.start + row.num_tokens:
                # The host knows fewer tokens than the device has made.
                before = self.written[row.sequence]
                assert len(before) == row.start
                assert before[: len(tokens)] == tokens[: len(before)]
                tokens = (*before, self.last[row.sequence.state_index])
            assert len(tokens) == row.start + row.num_tokens
            for at in range(row.start, len(tokens)):
                self.write(row.sequence, at, tokens[: at + 1])
            rows.append((row, tokens))
        for row, tokens in rows:
            for at in range(row.start, len(tokens)):
                self.check_reads(row.sequence, at, tokens)
        self.last |= {
            row.sequence.state_index: token for row, token in zip(batch.scheduled, choose, strict=False) if row.samples
        }
        return choose


class Grammar:
    """What the scheduler sees of a grammar."""

    ready = True


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        seqs=st.integers(1, 5),
        extra=st.integers(0, 20),
        length=st.integers(2, 40),
        groups=st.sampled_from(GROUPS),
        blocks=st.lists(st.integers(0, 14), min_size=3, max_size=3),
        caching=st.booleans(),
        decode_steps=st.sampled_from([1, 2, 5]),
    )
    def start(
        self,
        seqs: int,
        extra: int,
        length: int,
        groups: list[CacheGroup],
        blocks: list[int],
        caching: bool,
        decode_steps: int,
    ) -> None:
        self.limits = Limits(seqs, seqs + extra, length, decode_steps)
        self.groups = groups
        self.totals = [
            each.most_blocks(length, seqs + extra, decode_steps) + more
            for each, more in zip(groups, blocks, strict=False)
        ]
        self.blocks = BlockManager(
            groups, self.totals, step_tokens=seqs + extra, decode_steps=decode_steps, prefix_caching=caching
        )
        self.scheduler = Scheduler(self.limits, self.blocks)
        self.device = Device(groups)
        self.sequences: list[Sequence] = []
        self.aborted: set[str] = set()
        self.queued = 0
        self.place: dict[Sequence, tuple[int, int]] = {}  # priority and order of submission
        self.in_flight: tuple[Batch, list[list[int]]] | None = None

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=45),
        answer=st.integers(1, 30),
        ignore=st.booleans(),
        scored=st.sampled_from([None, None, 0]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        held=st.booleans(),
    )
    def add(self, prompt: list[int], answer: int, ignore: bool, scored: int | None, priority: int, held: bool) -> None:
        params = SamplingParams(max_tokens=answer, ignore_eos=ignore, prompt_logprobs=scored)
        if len(prompt) >= self.limits.max_model_len:
            with pytest.raises(InputError, match=str(len(prompt))):
                self.scheduler.check(len(prompt), answer)
        else:
            self.scheduler.check(len(prompt), answer)
            self.queue([(prompt, params)], priority, Grammar() if held else None)

    @rule(
        lengths=st.lists(st.integers(1, 12), max_size=6), answer=st.integers(1, 9), priority=st.sampled_from([0, 0, 2])
    )
    def add_several(self, lengths: list[int], answer: int, priority: int) -> None:
        params = SamplingParams(max_tokens=answer)
        self.queue([([1] * min(length, self.limits.max_model_len - 1), params) for length in lengths], priority)

    def queue(
        self, asked: list[tuple[list[int], SamplingParams]], priority: int, grammar: Grammar | None = None
    ) -> None:
        number, self.queued = self.queued, self.queued + len(asked)

        def made() -> Iterator[Sequence]:
            for at, (prompt, params) in enumerate(asked):
                before = [self.place[each] for each in self.scheduler.waiting]
                assert all(place > (priority, number) for place in before), "one is asked for while one before it waits"
                name = str(len(self.sequences))
                self.sequences.append(sequence := Sequence(name, prompt, params, 0, grammar=grammar))
                self.place[sequence] = (priority, number + at)
                yield sequence

        self.scheduler.add(made(), priority)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 1000))
    def drop(self, which: int) -> None:
        sequence = self.sequences[which % len(self.sequences)]
        if sequence.finish_reason is None:
            self.aborted.add(sequence.request_id)
        self.scheduler.drop(sequence)

    @rule(which=st.integers(0, 1000))
    def know_what_may_follow(self, which: int) -> None:
        waiting = [each.grammar for each in self.sequences if each.grammar and not each.grammar.ready]
        if waiting:
            waiting[which % len(waiting)].ready = True

    @rule(choose=st.lists(st.sampled_from([1, 2, 2, 2, 2, EOS]), min_size=25, max_size=25))
    def step(self, choose: list[int]) -> None:
        running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        batch = self.scheduler.schedule()
        self.check_order(running, waiting, () if batch is None else batch.admitted)
        before, self.in_flight = self.in_flight, None
        if batch is not None:
            self.check(batch)
            self.in_flight = batch, self.device.run(batch, choose)
        if before is not None:
            lengths = {sequence: len(sequence.token_ids) for sequence in self.sequences}
            changed = self.scheduler.update(*before, frozenset({EOS}))
            for row in before[0].scheduled:
                for at in row.scored:
                    assert at == len(row.sequence.prompt_logprobs), "a token of the prompt is scored twice, or never"
                    row.sequence.prompt_logprobs.append({})
            for sequence in self.sequences:
                assert sequence.token_ids[lengths[sequence] :] == changed.get(sequence, [])
                if sequence in changed and sequence.grammar is not None:
                    sequence.grammar.ready = False
        elif batch is None:
            held = [each for each in (*self.scheduler.running, *self.scheduler.waiting) if not each.may_draw]
            assert held or not self.scheduler.has_work

    def check_order(self, running: list[Sequence], waiting: list[Sequence], admitted: tuple[Sequence, ...]) -> None:
        """The first by priority and submission run: they are admitted before all that wait, and preempted after."""
        place = self.place.__getitem__
        for queue in (self.scheduler.running, self.scheduler.waiting):
            assert list(map(place, queue)) == sorted(map(place, queue))
        preempted = [sequence for sequence in running if sequence in self.scheduler.waiting]
        kept = [sequence for sequence in running if sequence in self.scheduler.running]
        assert not running or running[0] in kept, "the first is never preempted"
        assert all(place(one) < place(other) for one in kept for other in preempted)
        assert not (preempted and admitted)
        passed_over = [sequence for sequence in waiting if sequence in self.scheduler.waiting]
        assert all(place(one) < place(other) for one in admitted for other in passed_over)

    def check(self, batch: Batch) -> None:
        assert batch.scheduled
        assert len(batch.scheduled) <= self.limits.max_num_seqs
        assert batch.num_tokens == sum(row.num_tokens for row in batch.scheduled) <= self.limits.max_num_batched_tokens
        assert (batch.family == "decode") == all(row.num_tokens == 1 for row in batch.scheduled)
        assert len({row.sequence for row in batch.scheduled}) == len(batch.scheduled)
        assert sum(len(row.scored) for row in batch.scheduled) <= self.limits.max_num_seqs
        assert all(sequence in self.scheduler.running for sequence in batch.admitted)
        states = [sequence.state_index for sequence in self.scheduler.running]
        assert len(set(states)) == len(states)
        assert all(1 <= state <= self.limits.max_num_seqs for state in states)
        for row in batch.scheduled:
            assert row.num_tokens >= 1
            if row.samples and row.sequence.grammar is not None:
                assert row.sequence.grammar.ready
                assert row.steps == row.sequence.in_flight == 1
            assert all(row.start <= at < row.start + row.num_tokens for at in row.scored)
            end = row.start + row.num_tokens + row.steps - 1
            assert end == row.sequence.num_computed
            for each, table in zip(self.groups, row.sequence.block_tables, strict=True):
                assert end <= len(table) * each.block_size
            assert 1 <= row.steps <= (self.limits.decode_steps if batch.family == "decode" else 1)
            assert row.samples == (row.sequence.num_computed == row.sequence.num_tokens - int(row.samples))
            assert row.sequence.num_computed < self.limits.max_model_len

    @invariant()
    def blocks_are_all_accounted_for(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert all(s in self.scheduler.running for s in self.sequences if s.block_tables)
        for number, (each, pool) in enumerate(zip(self.groups, self.blocks.pools, strict=True)):
            held: dict[int, tuple[int, ...]] = {}
            for sequence in self.scheduler.running:
                table, size = sequence.block_tables[number], each.block_size
                late = each.first_read(sequence.num_settled) // size
                for at, block in enumerate(table[late:], late):
                    content = tuple(sequence.token_ids[: (at + 1) * size])
                    assert held.setdefault(block, content) == content, "a block has two owners and two contents"
                assert len(table) - late <= each.most_blocks(
                    self.limits.max_model_len, self.limits.max_num_batched_tokens, self.limits.decode_steps
                )
            assert len(held) == self.totals[number] - pool.num_free

    def teardown(self) -> None:
        """Run dry: every request ends, in bounded steps, with the tokens that its limits allow, and all blocks back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(200 * (1 + self.queued)):
            if not self.scheduler.has_work and self.in_flight is None:
                break
            for sequence in self.sequences:
                if sequence.grammar is not None:
                    sequence.grammar.ready = True
            self.step([2] * 25)
        assert not self.scheduler.has_work
        assert len(self.sequences) == self.queued
        assert list(self.blocks.num_free) == self.totals
        for sequence in self.sequences:
            answer = sequence.output_token_ids
            if sequence.request_id not in self.aborted and sequence.params.prompt_logprobs is not None:
                assert len(sequence.prompt_logprobs) == len(sequence.prompt_token_ids) - 1
            if sequence.request_id in self.aborted:
                assert sequence.finish_reason is None
            elif sequence.finish_reason == "stop":
                assert answer[-1] == EOS
            else:
                room = self.limits.max_model_len - len(sequence.prompt_token_ids)
                assert len(answer) == min(sequence.params.max_tokens, room)
            if not sequence.params.ignore_eos or sequence.grammar is not None:
                assert EOS not in answer[:-1]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(stateful_step_count=50)


@given(
    prompts=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=30), max_size=12),
    answer=st.integers(1, 8),
    seqs=st.integers(1, 5),
    extra=st.integers(0, 30),
    blocks=st.integers(10, 40),
    caching=st.booleans(),
    decode_steps=st.sampled_from([1, 3]),
)
def test_sequences_made_when_there_is_room_run_in_the_steps_of_those_that_wait_from_the_start(
    prompts: list[list[int]], answer: int, seqs: int, extra: int, blocks: int, caching: bool, decode_steps: int
) -> None:
    def batches(one_by_one: bool) -> list[list[tuple[str, int, int, int]]]:
        limits = Limits(seqs, seqs + extra, 40, decode_steps)
        scheduler = Scheduler(limits, manager(limits, blocks, caching=caching))
        made = (Sequence(str(n), prompt, SamplingParams(max_tokens=answer), 0) for n, prompt in enumerate(prompts))
        if one_by_one:
            scheduler.add(made)
        else:
            for number, sequence in enumerate(made):
                sequence.order = (0, 0, number)
                scheduler.waiting[sequence] = None
        return [
            [(row.sequence.request_id, row.start, row.num_tokens, row.steps) for row in batch.scheduled]
            for batch in run_to_end(scheduler, Device([group()]))
        ]

    assert batches(one_by_one=True) == batches(one_by_one=False)


def test_a_sequence_in_a_grammar_sits_a_step_out_and_the_others_keep_their_bursts() -> None:
    scheduler = Scheduler(limits := Limits(4, 16, 100, decode_steps=4), manager(limits, 64))
    free, held = (Sequence(name, [1], SamplingParams(max_tokens=40), 0) for name in ("free", "held"))
    held.grammar = Grammar()  # type: ignore[assignment]
    scheduler.add(iter([free, held]))

    def steps(batch: Batch) -> dict[str, int]:
        return {row.sequence.request_id: row.steps for row in batch.scheduled}

    def made(batch: Batch) -> None:
        scheduler.update(batch, [[1] * row.steps for row in batch.scheduled], frozenset())

    made(scheduler.schedule())  # the prompts
    first = scheduler.schedule()
    assert steps(first) == {"free": 4, "held": 1}
    second = scheduler.schedule()
    assert steps(second) == {"free": 4}  # its token is in flight
    made(first)
    held.grammar.ready = False
    third = scheduler.schedule()
    assert steps(third) == {"free": 4}  # its token is known, and not what may follow
    made(second)
    held.grammar.ready = True
    assert steps(scheduler.schedule()) == {"free": 4, "held": 1}
    scheduler.drop(free)
    made(third)
    assert scheduler.schedule() is None


def test_no_sequence_is_made_before_a_step_has_room_for_it() -> None:
    scheduler = Scheduler(limits := Limits(8, 16, 100), manager(limits, 64))
    made = []

    def sequences() -> Iterator[Sequence]:
        for number in range(6):
            made.append(number)
            yield Sequence(str(number), [number] * 8, SamplingParams(max_tokens=1), 0)

    scheduler.add(sequences())
    assert scheduler.has_work
    counts = []
    while (batch := scheduler.schedule()) is not None:
        counts.append((len(batch.scheduled), len(made)))
        scheduler.update(batch, [[1] * row.samples for row in batch.scheduled], frozenset())
    assert counts == [(2, 2), (2, 4), (2, 6)]
    assert not scheduler.has_work


def run_to_end(scheduler: Scheduler, device: Device, in_flight: Batch | None = None) -> list[Batch]:
    batches: list[Batch] = []
    before = None if in_flight is None else (in_flight, device.run(in_flight, [1] * 25))
    while scheduler.has_work or before is not None:
        batch = scheduler.schedule()
        late, before = before, None
        if batch is not None:
            before = batch, device.run(batch, [1] * 25)
            batches.append(batch)
        if late is not None:
            scheduler.update(*late, frozenset())
    return batches


def test_a_long_prompt_is_cut_into_chunks_and_does_not_hold_up_others() -> None:
    scheduler = Scheduler(limits := Limits(4, 16, 100), manager(limits, 64))
    first = Sequence("0", [1, 2, 3], SamplingParams(max_tokens=10), 0)
    scheduler.add(iter([first]))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.add(iter([Sequence("1", list(range(40)), SamplingParams(max_tokens=2), 0)]))
    chunks = []
    for _ in range(3):
        following = scheduler.schedule()
        assert following is not None
        assert following.family == "mixed"
        assert following.scheduled[0].sequence is first
        chunks.append(following.scheduled[1].num_tokens)
        scheduler.update(batch, [[1] * row.samples for row in batch.scheduled], frozenset())
        batch = following
    assert chunks == [15, 15, 10]


def test_a_prompt_that_begins_as_an_earlier_one_computes_only_the_rest() -> None:
    scheduler = Scheduler(limits := Limits(2, 64, 100), manager(limits, 64))
    device, prompt = Device([group()]), list(range(1, 23))
    scheduler.add(iter([Sequence("0", prompt, SamplingParams(max_tokens=3), 0)]))
    run_to_end(scheduler, device)
    again, longer = (Sequence(str(n), prompt + [9] * n, SamplingParams(max_tokens=3), 0) for n in (0, 5))
    scheduler.add(iter([again, longer]))
    batches = run_to_end(scheduler, device)
    assert again.num_cached == longer.num_cached == 20
    assert batches[0].num_tokens == 2 + 7


def test_a_lower_priority_number_runs_first_and_is_preempted_last() -> None:
    scheduler = Scheduler(limits := Limits(2, 32, 32), manager(limits, 9))
    params = SamplingParams(max_tokens=20)
    low, first, second, urgent = (Sequence(name, [n + 1] * 8, params, 0) for n, name in enumerate("abcd"))
    scheduler.add(iter([low]), 5)
    run = scheduler.schedule()
    assert run is not None
    for sequence, priority in ((first, 0), (second, 0), (urgent, -3)):
        scheduler.add(iter([sequence]), priority)
    batches = [run, *run_to_end(scheduler, Device([group()]), run)]
    admitted = [sequence for batch in batches for sequence in batch.admitted]
    assert list(dict.fromkeys(admitted)) == [low, urgent, first, second]
    assert scheduler.preemptions > 0
    assert [admitted.count(sequence) > 1 for sequence in (low, urgent)] == [True, False]
    assert all(len(sequence.output_token_ids) == 20 for sequence in (low, first, second, urgent))


def test_memory_that_runs_out_preempts_the_last_admitted_and_all_still_end() -> None:
    scheduler = Scheduler(limits := Limits(3, 32, 32), manager(limits, 9))
    sequences = [Sequence(str(n), [n + 1] * 8, SamplingParams(max_tokens=20), 0) for n in range(3)]
    scheduler.add(iter(sequences))
    run_to_end(scheduler, Device([group()]))
    assert scheduler.preemptions > 0
    assert all(len(sequence.output_token_ids) == 20 for sequence in sequences)
    assert scheduler.blocks.num_free == (9,)
