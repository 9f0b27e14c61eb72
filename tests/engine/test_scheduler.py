"""The scheduler as a state machine, one step ahead of a simulated device.

The device remembers which tokens every cache slot stands for, so a wrong block, a prefix shared wrongly, memory given
away too early or a token taken from the wrong row is seen. No limit is broken, nobody starves, nothing is lost.
"""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graphmode.cache.block_pool import BlockPool
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.scheduler import Scheduler
from graphmode.engine.sequence import Sequence
from graphmode.engine.types import Batch, Limits
from graphmode.graph import InputError

EOS = 7
SIZE = 4


class Device:
    """Runs batches as they are launched: every slot holds the tokens up to the one that it stands for."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.sampled: list[int] = []

    def run(self, batch: Batch, choose: list[int]) -> list[list[int]]:
        """Run a batch's steps, whose rows sample what ``choose`` says in turn."""
        made = [self.run_first(batch, choose[: len(batch.rows)])]
        extra = {row: [made[0][index]] for index, row in enumerate(batch.rows)}
        for step in range(1, batch.steps):
            following = [choose[(index + 5 * step) % len(choose)] for index in range(len(batch.rows))]
            for row, token in zip(batch.rows, following, strict=True):
                if step < row.steps:
                    before = self.slots[row.sequence.block_tables[0][row.start // SIZE], row.start % SIZE]
                    tokens = (*before, *extra[row])
                    at = row.start + step
                    assert len(tokens) == at + 1 < len(row.sequence.block_tables[0]) * SIZE + 1
                    for place in range(at):
                        held = self.slots.get((row.sequence.block_tables[0][place // SIZE], place % SIZE))
                        assert held == tokens[: place + 1], f"position {place} reads the cache of other tokens"
                    self.slots[row.sequence.block_tables[0][at // SIZE], at % SIZE] = tokens
                    extra[row].append(token)
                    self.sampled[batch.rows.index(row)] = token
            made.append(following)
        return made

    def run_first(self, batch: Batch, choose: list[int]) -> list[int]:
        rows = []
        for row in batch.rows:
            tokens = list(row.sequence.token_ids[: row.start + row.num_tokens])
            if row.source >= 0:
                # The host knows fewer tokens than the device has made.
                last = row.start - 1
                before = self.slots[row.sequence.block_tables[0][last // SIZE], last % SIZE]
                assert list(before[: len(tokens)]) == tokens[: len(before)]
                tokens = [*before, self.sampled[row.source]]
            assert len(tokens) == row.start + row.num_tokens
            for at in range(row.start, len(tokens)):
                self.slots[row.sequence.block_tables[0][at // SIZE], at % SIZE] = tuple(tokens[: at + 1])
            rows.append((row, tokens))
        for row, tokens in rows:
            for at in range(len(tokens)):
                held = self.slots.get((row.sequence.block_tables[0][at // SIZE], at % SIZE))
                assert held == tuple(tokens[: at + 1]), f"position {at} reads the cache of other tokens"
        self.sampled = list(choose)
        return choose


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        seqs=st.integers(1, 5),
        extra=st.integers(0, 20),
        length=st.integers(2, 40),
        blocks=st.integers(0, 14),
        caching=st.booleans(),
        decode_steps=st.sampled_from([1, 2, 5]),
    )
    def start(self, seqs: int, extra: int, length: int, blocks: int, caching: bool, decode_steps: int) -> None:
        self.limits = Limits(seqs, seqs + extra, length, decode_steps)
        self.total = -(-length // SIZE) + blocks
        self.pool = BlockPool(self.total, SIZE)
        self.scheduler = Scheduler(self.limits, self.pool, prefix_caching=caching)
        self.device = Device()
        self.sequences: list[Sequence] = []
        self.aborted: set[str] = set()
        self.queued = 0
        self.under_way: tuple[Batch, list[list[int]]] | None = None

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=45),
        answer=st.integers(1, 30),
        ignore=st.booleans(),
        scored=st.sampled_from([None, None, 0]),
    )
    def add(self, prompt: list[int], answer: int, ignore: bool, scored: int | None) -> None:
        params = SamplingParams(max_tokens=answer, ignore_eos=ignore, prompt_logprobs=scored)
        if len(prompt) >= self.limits.max_model_len:
            with pytest.raises(InputError, match=str(len(prompt))):
                self.scheduler.check(len(prompt), answer)
        else:
            self.scheduler.check(len(prompt), answer)
            self.queue([(prompt, params)])

    @rule(lengths=st.lists(st.integers(1, 12), max_size=6), answer=st.integers(1, 9))
    def add_several(self, lengths: list[int], answer: int) -> None:
        params = SamplingParams(max_tokens=answer)
        self.queue([([1] * min(length, self.limits.max_model_len - 1), params) for length in lengths])

    def queue(self, asked: list[tuple[list[int], SamplingParams]]) -> None:
        self.queued += len(asked)

        def made() -> Iterator[Sequence]:
            for prompt, params in asked:
                assert not self.scheduler.waiting, "one is asked for while another waits"
                self.sequences.append(Sequence(str(len(self.sequences)), prompt, params, 0))
                yield self.sequences[-1]

        self.scheduler.add(made())

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 1000))
    def drop(self, which: int) -> None:
        sequence = self.sequences[which % len(self.sequences)]
        if sequence.finish_reason is None:
            self.aborted.add(sequence.request_id)
        self.scheduler.drop(sequence)

    @rule(choose=st.lists(st.sampled_from([1, 2, 2, 2, 2, EOS]), min_size=25, max_size=25))
    def step(self, choose: list[int]) -> None:
        batch = self.scheduler.schedule()
        before, self.under_way = self.under_way, None
        if batch is not None:
            self.check(batch)
            self.under_way = batch, self.device.run(batch, choose)
        if before is not None:
            lengths = {sequence: len(sequence.token_ids) for sequence in self.sequences}
            changed = self.scheduler.update(*before, frozenset({EOS}))
            for row in before[0].rows:
                for at in row.scored:
                    assert at == len(row.sequence.prompt_logprobs), "a token of the prompt is scored twice, or never"
                    row.sequence.prompt_logprobs.append({})
            for sequence in self.sequences:
                assert len(sequence.token_ids) - lengths[sequence] == changed.get(sequence, 0)
        elif batch is None:
            assert not self.scheduler.has_work

    def check(self, batch: Batch) -> None:
        assert batch.rows
        assert len(batch.rows) <= self.limits.max_num_seqs
        assert batch.num_tokens == sum(row.num_tokens for row in batch.rows) <= self.limits.max_num_batched_tokens
        assert (batch.family == "decode") == all(row.num_tokens == 1 for row in batch.rows)
        assert len({row.sequence for row in batch.rows}) == len(batch.rows)
        assert sum(len(row.scored) for row in batch.rows) <= self.limits.max_num_seqs
        assert all(sequence in self.scheduler.running for sequence in batch.admitted)
        slots = [sequence.slot for sequence in self.scheduler.running]
        assert len(set(slots)) == len(slots)
        assert all(1 <= slot <= self.limits.max_num_seqs for slot in slots)
        for row in batch.rows:
            assert row.num_tokens >= 1
            assert all(row.start <= at < row.start + row.num_tokens for at in row.scored)
            end = row.start + row.num_tokens + row.steps - 1
            assert end == row.sequence.num_computed <= len(row.sequence.block_tables[0]) * SIZE
            assert 1 <= row.steps <= (self.limits.decode_steps if batch.family == "decode" else 1)
            assert row.samples == (row.sequence.num_computed == row.sequence.num_tokens - int(row.samples))
            assert row.sequence.num_computed < self.limits.max_model_len

    @invariant()
    def blocks_are_all_accounted_for(self) -> None:
        if hasattr(self, "scheduler"):
            held = {block for sequence in self.sequences for table in sequence.block_tables for block in table}
            assert len(held) == self.total - self.pool.num_free
            assert all(s in self.scheduler.running for s in self.sequences if s.block_tables)

    def teardown(self) -> None:
        """Run dry: every request ends, in bounded steps, with the tokens that its limits allow, and all blocks back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(200 * (1 + self.queued)):
            if not self.scheduler.has_work and self.under_way is None:
                break
            self.step([2] * 25)
        assert not self.scheduler.has_work
        assert len(self.sequences) == self.queued
        assert self.pool.num_free == self.total
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
            if not sequence.params.ignore_eos:
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
        scheduler = Scheduler(limits, BlockPool(blocks, SIZE), prefix_caching=caching)
        made = (Sequence(str(n), prompt, SamplingParams(max_tokens=answer), 0) for n, prompt in enumerate(prompts))
        if one_by_one:
            scheduler.add(made)
        else:
            scheduler.waiting.update(dict.fromkeys(made))
        return [
            [(row.sequence.request_id, row.start, row.num_tokens, row.steps) for row in batch.rows]
            for batch in run_to_end(scheduler, Device())
        ]

    assert batches(one_by_one=True) == batches(one_by_one=False)


def test_no_sequence_is_made_before_a_step_has_room_for_it() -> None:
    scheduler = Scheduler(Limits(8, 16, 100), BlockPool(64, SIZE))
    made = []

    def sequences() -> Iterator[Sequence]:
        for number in range(6):
            made.append(number)
            yield Sequence(str(number), [number] * 8, SamplingParams(max_tokens=1), 0)

    scheduler.add(sequences())
    assert scheduler.has_work
    counts = []
    while (batch := scheduler.schedule()) is not None:
        counts.append((len(batch.rows), len(made)))
        scheduler.update(batch, [[1] * len(batch.rows)], frozenset())
    assert counts == [(2, 2), (2, 4), (2, 6)]
    assert not scheduler.has_work


def run_to_end(scheduler: Scheduler, device: Device) -> list[Batch]:
    batches: list[Batch] = []
    before: tuple[Batch, list[list[int]]] | None = None
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
    scheduler = Scheduler(Limits(4, 16, 100), BlockPool(64, SIZE))
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
        assert following.rows[0].sequence is first
        chunks.append(following.rows[1].num_tokens)
        scheduler.update(batch, [[1] * len(batch.rows)], frozenset())
        batch = following
    assert chunks == [15, 15, 10]


def test_a_prompt_that_begins_as_an_earlier_one_computes_only_the_rest() -> None:
    scheduler = Scheduler(Limits(2, 64, 100), BlockPool(64, SIZE))
    device, prompt = Device(), list(range(1, 23))
    scheduler.add(iter([Sequence("0", prompt, SamplingParams(max_tokens=3), 0)]))
    run_to_end(scheduler, device)
    again, longer = (Sequence(str(n), prompt + [9] * n, SamplingParams(max_tokens=3), 0) for n in (0, 5))
    scheduler.add(iter([again, longer]))
    batches = run_to_end(scheduler, device)
    assert again.num_cached == longer.num_cached == 20
    assert batches[0].num_tokens == 2 + 7


def test_memory_that_runs_out_preempts_the_last_admitted_and_all_still_end() -> None:
    scheduler = Scheduler(Limits(3, 32, 32), BlockPool(9, SIZE))
    sequences = [Sequence(str(n), [n + 1] * 8, SamplingParams(max_tokens=20), 0) for n in range(3)]
    scheduler.add(iter(sequences))
    run_to_end(scheduler, Device())
    assert scheduler.preemptions > 0
    assert all(len(sequence.output_token_ids) == 20 for sequence in sequences)
    assert scheduler.pool.num_free == 9
