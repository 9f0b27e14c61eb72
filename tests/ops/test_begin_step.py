"""The beginning of a step against plain Python: tokens from where they are, tables extended, in the step's order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops import begin_step as module
from graphmode.ops.begin_step import TableUpdate

STATES, BLOCKS = 6, 300
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["reference", "triton", *(["cpu"] if DEVICE == "cpu" else [])]


def tensor(values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def no_update(groups: int = 1) -> TableUpdate:
    tables = torch.zeros(groups, STATES, BLOCKS, dtype=torch.int32, device=DEVICE)
    changes = torch.zeros(0, groups, 3, dtype=torch.int32, device=DEVICE)
    return TableUpdate(tables, tables[:, :0], tensor([]), changes, tensor([], torch.int32))


@given(data=st.data())
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_are_taken_from_where_they_are(data: st.DataObject, implementation: str) -> None:
    last = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=5))
    known = data.draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, len(last) - 1)), max_size=700))
    token_ids, sources = (tensor(list(values)) for values in (zip(*known, strict=True) if known else ([], [])))
    begin = getattr(module, f"begin_step_{implementation}")
    taken = begin(token_ids, sources, tensor(last), no_update())
    assert taken.tolist() == [last[source] if source else token for token, source in known]


@given(data=st.data(), groups=st.integers(1, 2), padding=st.integers(0, 2))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tables_grow_by_the_new_blocks_and_lie_in_the_order_of_the_step(
    data: st.DataObject, implementation: str, groups: int, padding: int
) -> None:
    """Several steps, some of them run twice, as bursts run them; states change hands, and start with nothing."""
    tables = torch.full((groups, STATES, BLOCKS), -7, dtype=torch.int32, device=DEVICE)
    rows = torch.full((groups, STATES + 1, BLOCKS), -8, dtype=torch.int32, device=DEVICE)
    held: list[list[list[int]]] = [[[] for _ in range(groups)] for _ in range(STATES)]
    block = 0
    for _ in range(4):
        states = data.draw(st.lists(st.integers(1, STATES - 1), unique=True, max_size=STATES - 1))
        new_blocks: list[int] = []
        changes = []
        for state in states:
            if data.draw(st.booleans()):
                held[state] = [[] for _ in range(groups)]
            changes.append([])
            for table in held[state]:
                new = min(data.draw(st.sampled_from([0, 0, 1, 2, 290])), BLOCKS - len(table))
                changes[-1].append((len(table), new, len(new_blocks)))
                new_blocks += range(block, block + new)
                table += range(block, block + new)
                block += new
        seqs = len(states) + padding
        changes += [[(0, 0, 0)] * groups] * padding
        before = tables.clone(), rows.clone()
        update = TableUpdate(
            tables,
            rows[:, :seqs],
            tensor([*states, *[0] * padding]),
            tensor(changes, torch.int32).view(seqs, groups, 3),
            tensor(new_blocks, torch.int32),
        )
        for _ in range(data.draw(st.integers(1, 2))):
            getattr(module, f"begin_step_{implementation}")(tensor([3]), tensor([0]), tensor([0]), update)
        for group in range(groups):
            for state in range(STATES):
                here = held[state][group] if state in states else []
                assert tables[group, state, : len(here)].tolist() == here
                assert torch.equal(tables[group, state, len(here) :], before[0][group, state, len(here) :])
            for seq in range(len(rows[group])):
                here = held[states[seq]][group] if seq < len(states) else []
                assert rows[group, seq, : len(here)].tolist() == here
                assert torch.equal(rows[group, seq, len(here) :], before[1][group, seq, len(here) :])


def test_what_does_not_fit_is_refused_by_name() -> None:
    update = no_update()
    with pytest.raises(ValueError, match="token_sources has shape"):
        module.begin_step(tensor([1]), tensor([1, 2]), tensor([1]), update)
    with pytest.raises(ValueError, match="step_tables has shape"):
        module.begin_step(tensor([1]), tensor([0]), tensor([1]), update._replace(state_indices=tensor([1])))
