"""Handing tokens on and moving rows on, against plain Python, row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops import decode_state as advance
from graphmode.ops.decode_state import DecodeRows, Handover

BLOCK, BLOCKS, MAX_ROWS, MAX_STEPS = 4, 5, 7, 3


@given(data=st.data())
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_tokens_are_taken_from_where_they_are(data: st.DataObject, implementation: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    last = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=5))
    known = data.draw(st.lists(st.tuples(st.integers(0, 99), st.integers(-1, len(last) - 1)), max_size=700))
    tensors = [torch.tensor(values, dtype=torch.int64, device=device) for values in zip(*known, strict=True)]
    token_ids, sources = tensors or [torch.empty(0, dtype=torch.int64, device=device)] * 2
    taken = getattr(advance, f"take_tokens_{implementation}")(token_ids, sources, torch.tensor(last, device=device))
    assert taken.tolist() == [token if source < 0 else last[source] for token, source in known]


@given(data=st.data(), rows=st.integers(1, MAX_ROWS), kinds=st.sampled_from([0, 1, 3]))
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_rows_move_on_until_their_limits(data: st.DataObject, implementation: str, rows: int, kinds: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def integers(low: int, high: int, count: int = rows) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    lens = integers(0, BLOCK * BLOCKS - 1)
    limits = [min(length + extra, BLOCK * BLOCKS) for length, extra in zip(lens, integers(0, 3), strict=True)]
    tables = [integers(0, 99, BLOCKS) for _ in range(rows)]
    slots, positions = integers(0, 9), integers(0, 50)
    step = data.draw(st.integers(0, MAX_STEPS + 1))

    def tensor(values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    handover = Handover(
        torch.full((MAX_ROWS,), -7, device=device), torch.full((MAX_STEPS, MAX_ROWS), -7, device=device), tensor([step])
    )
    kv_lens = tensor(lens, torch.int32)
    decode = DecodeRows(
        token_sources=tensor([-1] * rows),
        positions=tensor([[each] * kinds for each in positions]) if kinds > 1 else tensor(positions),
        slot_mapping=tensor([-5] * rows),
        kv_lens=kv_lens,
        slots=tensor(slots),
        limits=tensor(limits, torch.int32),
        block_tables=tensor(tables, torch.int32),
    )
    last, logged = [-7] * MAX_ROWS, [[-7] * MAX_ROWS for _ in range(MAX_STEPS)]
    for _ in range(3):
        sampled = integers(0, 1000)
        getattr(advance, f"hand_on_{implementation}")(
            tensor(sampled), kv_lens, handover, decode if kinds else None, BLOCK
        )
        for row, token in enumerate(sampled):
            last[row] = token if lens[row] else last[row]
            if step < MAX_STEPS:
                logged[step][row] = token
        step += 1
        assert handover.last.tolist() == last
        assert handover.log.tolist() == logged
        assert handover.step.tolist() == [step]
        if not kinds:
            assert decode.token_sources.tolist() == [-1] * rows
            continue
        for row in range(rows):
            goes_on = 0 < lens[row] < limits[row]
            slot = tables[row][lens[row] // BLOCK] * BLOCK + lens[row] % BLOCK if goes_on else -1
            positions[row] += goes_on
            slots[row] *= goes_on
            lens[row] = lens[row] + 1 if goes_on else 0
            assert decode.slot_mapping[row] == slot
        assert decode.token_sources.tolist() == list(range(rows))
        assert decode.positions.tolist() == (positions if kinds == 1 else [[each] * kinds for each in positions])
        assert decode.slots.tolist() == slots
        assert decode.kv_lens.tolist() == lens
        assert decode.limits.tolist() == limits
        assert decode.block_tables.tolist() == tables
