"""The scheduler as a state machine: whatever comes, no limit is broken, nobody starves, nothing is lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graphmode.engine.block_allocator import BlockAllocator
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.scheduler import Batch, Limits, Scheduler
from graphmode.engine.sequence import Sequence
from graphmode.graph import InputError

EOS = 7


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(seqs=st.integers(1, 5), extra=st.integers(0, 20), length=st.integers(2, 60), blocks=st.integers(0, 20))
    def start(self, seqs: int, extra: int, length: int, blocks: int) -> None:
        self.limits = Limits(seqs, seqs + extra, length)
        self.total = -(-length // 4) + blocks
        self.allocator = BlockAllocator(self.total, 4)
        self.scheduler = Scheduler(self.limits, self.allocator)
        self.sequences: list[Sequence] = []
        self.aborted: set[int] = set()

    @rule(prompt=st.integers(1, 70), answer=st.integers(1, 30), ignore_eos=st.booleans())
    def add(self, prompt: int, answer: int, ignore_eos: bool) -> None:
        params = SamplingParams(max_tokens=answer, ignore_eos=ignore_eos)
        sequence = Sequence(len(self.sequences), [1] * prompt, params, 0)
        if prompt >= self.limits.max_model_len:
            with pytest.raises(InputError, match=str(prompt)):
                self.scheduler.add(sequence)
        else:
            self.scheduler.add(sequence)
            self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 1000))
    def abort(self, which: int) -> None:
        sequence = self.sequences[which % len(self.sequences)]
        if sequence.finish_reason is None:
            self.aborted.add(sequence.request_id)
        self.scheduler.abort(sequence)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        batch = self.scheduler.schedule()
        if batch is None:
            assert not self.scheduler.has_work
            return
        self.check(batch)
        tokens = data.draw(st.lists(st.sampled_from([1, EOS]), min_size=len(batch.rows), max_size=len(batch.rows)))
        before = {id(row.sequence): len(row.sequence.token_ids) for row in batch.rows}
        changed = self.scheduler.update(batch, tokens, frozenset({EOS}))
        for row in batch.rows:
            grown = len(row.sequence.token_ids) - before[id(row.sequence)]
            assert grown == int(row.samples) == int(row.sequence in changed)

    def check(self, batch: Batch) -> None:
        assert batch.rows
        assert len(batch.rows) <= self.limits.max_num_seqs
        assert batch.num_tokens == sum(row.num_tokens for row in batch.rows) <= self.limits.max_num_batched_tokens
        assert (batch.family == "decode") == all(row.num_tokens == 1 for row in batch.rows)
        assert len({id(row.sequence) for row in batch.rows}) == len(batch.rows)
        for row in batch.rows:
            assert row.num_tokens >= 1
            assert row.start == row.sequence.num_computed
            assert row.start + row.num_tokens <= len(row.sequence.token_ids)
            assert row.samples == (row.start + row.num_tokens == len(row.sequence.token_ids))
            assert row.start + row.num_tokens <= len(row.sequence.blocks) * 4
        # A sequence that is answering never waits for another's prompt.
        in_batch = {id(row.sequence) for row in batch.rows}
        assert all(id(s) in in_batch for s in self.scheduler.running if s.num_pending == 1)

    @invariant()
    def blocks_have_one_owner_and_are_all_accounted_for(self) -> None:
        if hasattr(self, "scheduler"):
            held = [block for sequence in self.sequences for block in sequence.blocks]
            assert len(held) == len(set(held)) == self.total - self.allocator.num_free

    def teardown(self) -> None:
        """Run dry: every request ends, in bounded steps, with the tokens that its limits allow, and all blocks back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(100 * (1 + len(self.sequences))):
            batch = self.scheduler.schedule()
            if batch is None:
                break
            self.check(batch)
            self.scheduler.update(batch, [1] * len(batch.rows), frozenset({EOS}))
        assert not self.scheduler.has_work
        assert self.allocator.num_free == self.total
        for sequence in self.sequences:
            answer = sequence.output_token_ids
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
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_long_prompt_is_cut_into_chunks_and_does_not_hold_up_others() -> None:
    scheduler = Scheduler(Limits(4, 16, 100), BlockAllocator(64, 4))
    first = Sequence(0, [1, 2, 3], SamplingParams(max_tokens=10), 0)
    scheduler.add(first)
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.update(batch, [1], frozenset())
    scheduler.add(Sequence(1, list(range(40)), SamplingParams(max_tokens=2), 0))
    chunks = []
    for _ in range(3):
        batch = scheduler.schedule()
        assert batch is not None
        assert batch.family == "mixed"
        assert batch.rows[0].sequence is first
        chunks.append(batch.rows[1].num_tokens)
        scheduler.update(batch, [1, 1], frozenset())
    assert chunks == [15, 15, 10]
