"""The keys of a decode batch are split whole, evenly, and among as many programs as a graph has."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops.attention.split_kv import plan_split_kv

TILE = 64


def share(lens: list[int], device: str, **options: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return what each program has, and the sequences of several splits."""
    plan = plan_split_kv(torch.tensor(lens, dtype=torch.int32, device=device), 8, **options)
    assert plan.finished.tolist() == [[0] * 8] * len(lens)
    return plan.splits.tolist(), plan.split_seqs.tolist()


@given(
    lens=st.lists(st.integers(0, 3000), min_size=1, max_size=20),
    limit=st.sampled_from([{}, {"window": 40}, {"window": 700}, {"top_k": 100}]),
    spare=st.integers(1, 33),
)
def test_every_key_is_in_one_split_and_no_split_has_more_than_its_share(
    lens: list[int], limit: dict[str, int], spare: int
) -> None:
    found, split_seqs = share(lens, "cuda" if torch.cuda.is_available() else "cpu", spare=spare, **limit)
    assert len(found) == len(lens) + spare
    real = [entry for entry in found if entry[3]]
    assert found[: len(real)] == real
    keys = [min([length, *limit.values()]) for length in lens]
    largest = max(math.ceil(sum(keys) / spare), TILE if len(lens) <= 16 else 256) + TILE
    expected = []
    for seq, (length, count) in enumerate(zip(lens, keys, strict=True)):
        mine = [(start, end) for which, start, end, *_ in real if which == seq]
        assert {splits for which, _, _, splits, *_ in real if which == seq} == {len(mine)}
        assert all(end - start < largest for start, end in mine)
        assert len(mine) == 1 or all(start < end for start, end in mine)
        at = length - count if "window" in limit else 0
        assert [start for start, _ in mine] + [at + count] == [at] + [end for _, end in mine]
        assert [entry[4] for entry in real if entry[0] == seq] == [0] * (len(mine) - 1) + [int(count > 0)]
        assert [entry[5] for entry in real if entry[0] == seq] == list(range(len(mine)))
        if len(mine) > 1:
            expected.append([seq, next(i for i, entry in enumerate(real) if entry[0] == seq), len(mine)])
    assert sorted(entry for entry in split_seqs if entry[2]) == expected


def test_a_long_context_beside_short_ones_is_spread(kernel_device: str) -> None:
    found, split_seqs = share([10] * 20 + [3200] + [10] * 20, kernel_device)
    assert split_seqs[0] == [20, 0, 13]
    assert all(entry[3] == 1 for entry in found if entry[0] != 20 and entry[3])


def test_even_contexts_stay_whole(kernel_device: str) -> None:
    found, split_seqs = share([200] * 64, kernel_device)
    assert found[:64] == [[seq, 0, 200, 1, 1, 0] for seq in range(64)]
    assert not any(entry[3] for entry in found[64:])
    assert not any(splits for *_, splits in split_seqs)


def test_one_sequence_is_spread_over_the_device(kernel_device: str) -> None:
    found, _ = share([1500], kernel_device)
    assert [entry[3] for entry in found if entry[3]] == [12] * 12
