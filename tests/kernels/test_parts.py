"""The keys of a decode batch are shared out whole, evenly, and among as many programs as a graph has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.kernels._triton import constexpr, jit, tl
from graphmode.kernels.parts import find_part, spare_parts

BLOCK_N = 16


@jit()
def _find_kernel(  # type: ignore[no-untyped-def]
    kv_lens, found, seqs, most, spare: constexpr, block_n: constexpr, block_seqs: constexpr
):
    number = tl.program_id(0)
    seq, count, part = find_part(number, kv_lens, seqs, most, spare, block_n, block_seqs)
    tl.store(found + 3 * number, seq)
    tl.store(found + 3 * number + 1, count)
    tl.store(found + 3 * number + 2, part)


def find(lens: list[int], most: int, spare: int, device: str) -> list[tuple[int, int, int]]:
    """Return sequence, number of parts and part of each program."""
    programs = len(lens) + spare
    found = torch.full((programs, 3), -1, dtype=torch.int32, device=device)
    kv_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    block_seqs = 1 << (len(lens) - 1).bit_length()
    _find_kernel[(programs,)](kv_lens, found, len(lens), most, spare=spare, block_n=BLOCK_N, block_seqs=block_seqs)
    return [tuple(row) for row in found.tolist()]


@pytest.fixture(scope="module")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@given(st.lists(st.integers(0, 600), min_size=1, max_size=9), st.sampled_from([40, 10_000]), st.integers(1, 33))
def test_every_key_is_in_one_part_and_no_part_has_more_than_its_share(lens: list[int], most: int, spare: int) -> None:
    found = find(lens, most, spare, "cuda" if torch.cuda.is_available() else "cpu")
    keys = [min(length, most) for length in lens]
    share = max(math.ceil(sum(keys) / spare), 1)
    real = [entry for entry in found if entry[1]]
    assert found[: len(real)] == real
    expected = []
    for seq in range(len(lens)):
        count = next(entry[1] for entry in real if entry[0] == seq)
        expected += [(seq, count, part) for part in range(count)]
        part_keys = math.ceil(keys[seq] / count / BLOCK_N) * BLOCK_N
        assert part_keys < share + BLOCK_N
        assert count == 1 or part_keys * (count - 1) < keys[seq] <= part_keys * count
    assert real == expected


def test_a_long_context_beside_short_ones_is_spread(device: str) -> None:
    found = find([10] * 20 + [3200] + [10] * 20, 10_000, 32, device)
    assert [entry for entry in found if entry[0] == 20] == [(20, 25, part) for part in range(25)]
    assert all(count == 1 for seq, count, _ in found if seq != 20 and count)


def test_even_contexts_stay_whole(device: str) -> None:
    assert [count for _, count, _ in find([200] * 64, 10_000, 32, device)] == [1] * 64 + [0] * 32


def test_one_sequence_is_spread_over_the_device(device: str) -> None:
    assert [count for _, count, _ in find([2000], 10_000, spare_parts(8), device) if count] == [32] * 32
