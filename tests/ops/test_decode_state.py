"""Keeping sampled tokens and moving sequences on, against plain Python, row by row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops import decode_state
from graphmode.ops.decode_state import SampledTokens

BLOCK_SIZES, BLOCKS, MAX_ROWS, MAX_STEPS = (4, 8), 5, 7, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensor(values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def kept_tokens(step: int) -> SampledTokens:
    return SampledTokens(
        torch.full((MAX_ROWS + 1,), -7, device=DEVICE),
        torch.full((MAX_STEPS, MAX_ROWS), -7, device=DEVICE),
        tensor([step]),
    )


@given(data=st.data(), rows=st.integers(1, MAX_ROWS), kinds=st.sampled_from([1, 3]), groups=st.integers(1, 2))
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_sequences_move_on_until_their_ends(
    data: st.DataObject, implementation: str, rows: int, kinds: int, groups: int
) -> None:
    def integers(low: int, high: int, count: int = rows) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    sizes = BLOCK_SIZES[:groups]
    lens = integers(0, sizes[0] * BLOCKS - 1)
    ends = [min(length + extra, sizes[0] * BLOCKS) for length, extra in zip(lens, integers(0, 3), strict=True)]
    tables = [[integers(0, 99, BLOCKS) for _ in range(rows)] for _ in range(groups)]
    positions = integers(0, 50)
    # Padding has no state; a sequence that draws nothing has none here, though it has a length.
    states = [
        index if length and draws else 0
        for index, length, draws in zip(
            data.draw(st.permutations(range(1, MAX_ROWS + 1))), lens, integers(0, 4), strict=False
        )
    ]
    step = data.draw(st.integers(0, MAX_STEPS + 1))
    kept = kept_tokens(step)
    decode = SimpleNamespace(
        token_sources=tensor([0] * rows),
        positions=tensor([[each] * kinds for each in positions]) if kinds > 1 else tensor(positions),
        slot_mapping=tensor([[-5] * (rows + 2)] * groups)[:, :rows],
        kv_lens=tensor(lens, torch.int32),
        logits_positions=tensor(lens, torch.int32),
        logits_state_indices=tensor(states),
        end_lens=tensor(ends, torch.int32),
    )
    last, logged = [-7] * (MAX_ROWS + 1), [[-7] * MAX_ROWS for _ in range(MAX_STEPS)]
    for _ in range(3):
        sampled = integers(0, 1000)
        getattr(decode_state, f"advance_decode_{implementation}")(
            tensor(sampled), decode.logits_state_indices, kept, decode, tensor(tables, torch.int32), sizes
        )
        for row, token in enumerate(sampled):
            if states[row]:
                last[states[row]] = token
            if step < MAX_STEPS:
                logged[step][row] = token
        step += 1
        assert kept.last.tolist() == last
        assert kept.log.tolist() == logged
        assert kept.step.tolist() == [step]
        assert decode.token_sources.tolist() == states
        for row in range(rows):
            goes_on = 0 < lens[row] < ends[row]
            for group, size in enumerate(sizes):
                block = tables[group][row][lens[row] // size] if goes_on else 0
                slot = block * size + lens[row] % size if goes_on else -1
                assert decode.slot_mapping[group, row] == slot
            positions[row] += goes_on
            states[row] *= goes_on
            lens[row] = lens[row] + 1 if goes_on else 0
        assert decode.positions.tolist() == (positions if kinds == 1 else [[each] * kinds for each in positions])
        assert decode.logits_state_indices.tolist() == states
        assert decode.kv_lens.tolist() == lens
        assert decode.logits_positions.tolist() == lens
        assert decode.end_lens.tolist() == ends


@given(data=st.data())
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_of_several_tokens_of_a_sequence_the_last_is_kept(data: st.DataObject, implementation: str) -> None:
    counts = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    states = [state for state, count in zip((2, 5), counts, strict=False) for _ in range(count)]
    nothing = data.draw(st.integers(0, MAX_ROWS - len(states)))
    sampled = list(range(100, 100 + len(states) + nothing))
    kept, before = kept_tokens(0), tensor([[[0]]], torch.int32)
    getattr(decode_state, f"advance_decode_{implementation}")(
        tensor(sampled), tensor(states + [0] * nothing), kept, None, before, [4]
    )
    expected = dict(zip(states, sampled, strict=False))
    assert kept.last.tolist() == [expected.get(state, -7) for state in range(MAX_ROWS + 1)]
    assert kept.log[0].tolist() == sampled + [-7] * (MAX_ROWS - len(sampled))
    assert kept.step.tolist() == [1]
