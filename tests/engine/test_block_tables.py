"""Block tables on the device follow those of the sequences, whatever comes and goes, and a step sends what is new."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.engine.block_tables import BlockTables
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.sequence import Sequence
from graphmode.engine.step_inputs import StepInputs, step_inputs
from graphmode.engine.types import Batch, Limits, ScheduledSequence
from graphmode.graph import get_backend
from graphmode.graph.buffers import InputBuffers
from graphmode.ops.begin_step import TableUpdate, begin_step
from tests.steps import as_tensors

SEQS, LENGTH = 4, 100


@given(data=st.data(), sizes=st.sampled_from([(4,), (4, 8)]))
def test_tables_on_the_device_are_those_of_the_sequences(data: st.DataObject, sizes: tuple[int, ...]) -> None:
    """Sequences come with long cached prefixes, grow, end, and leave their state index and blocks to others."""
    limits = Limits(SEQS, 8, LENGTH)
    tables = BlockTables(get_backend("cpu"), limits, sizes)
    running: dict[int, Sequence] = {}
    ends: dict[int, int] = {}
    block = 0
    for _ in range(6):
        for state in list(running):
            if data.draw(st.booleans()) or ends[state] > LENGTH - 3:
                del running[state]
        admitted = []
        for state in range(1, SEQS + 1):
            if state not in running and data.draw(st.booleans()):
                running[state] = Sequence("", [0], SamplingParams(), 0, state_index=state)
                running[state].block_tables = [[] for _ in sizes]
                ends[state] = data.draw(st.sampled_from([0, 0, 32, 80]))  # found in the cache
                admitted.append(running[state])
        parts = []
        for state in data.draw(st.permutations(list(running))):
            tokens = data.draw(st.integers(1, 2))
            part = ScheduledSequence(running[state], ends[state], tokens, 1)
            ends[state] += tokens
            running[state].token_ids = [0] * ends[state]
            for table, size in zip(running[state].block_tables, sizes, strict=True):
                while len(table) * size < ends[state]:
                    table.append(block := block + 1)
            parts.append(part)
        if not parts:
            continue
        batch = Batch("mixed", tuple(parts), sum(part.num_tokens for part in parts), tuple(admitted))
        step = as_tensors(step_inputs(batch, tables))
        assert len(step.new_blocks) <= tables.room(batch.num_tokens)
        rows = tables.step_tables[:, : len(parts)]
        update = TableUpdate(tables.tables, rows, step.state_indices, step.table_changes, step.new_blocks)
        begin_step(step.token_ids, step.token_sources, torch.zeros(SEQS + 1, dtype=torch.int64), update)
        at = 0
        for row, part in enumerate(parts):
            for group, size in enumerate(sizes):
                table = part.sequence.block_tables[group]
                needed = -(-(part.start + part.num_tokens) // size)
                assert rows[group, row, :needed].tolist() == table[:needed]
                slots = [table[p // size] * size + p % size for p in range(part.start, part.start + part.num_tokens)]
                assert step.slot_mapping[group, at : at + part.num_tokens].tolist() == slots
            at += part.num_tokens


@pytest.mark.parametrize(("seqs", "length"), [(256, 131_072), (64, 1000)])
def test_a_decode_step_sends_bytes_for_its_tokens_and_none_for_its_context(seqs: int, length: int) -> None:
    limits = Limits(seqs, 2048, length + 8, decode_steps=8)
    tables = BlockTables(get_backend("cpu"), limits, [16])
    parts = []
    for index in range(seqs):
        sequence = Sequence("", [0], SamplingParams(), 0, state_index=index + 1)
        sequence.token_ids = [0] * length
        sequence.block_tables = [[0] * (-(-(length + 8) // 16))]
        parts.append(ScheduledSequence(sequence, length - 1, 1, 1))
    # What admission sent is on the device already.
    tables._known[1:, 0] = -(-(length - 1) // 16)
    step = step_inputs(Batch("decode", tuple(parts), seqs), tables)
    sent = sum(value.nbytes for value in vars(step).values() if value is not None)
    assert sent <= 128 * seqs
    sizes = {"tokens": seqs, "seqs": seqs, "logits": seqs, "scored": seqs, "new_blocks": tables.room(seqs)}
    most = {**sizes, "tokens": 2048, "new_blocks": tables.room(2048)}
    bound = InputBuffers([*vars(StepInputs.declared()).values()], most, get_backend("cpu")).bind(sizes)
    print(f"{seqs} x {length}: values {sent} bytes, one copy {bound.nbytes} bytes")
    assert bound.nbytes < 48 * 2048 + 256 * seqs
    assert np.prod(step.new_blocks.shape) <= seqs
