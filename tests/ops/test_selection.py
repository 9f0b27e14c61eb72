"""Sparse attention's choice of keys: exact, with ties in the order of positions, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops import PagedBatch, select_keys
from graphmode.ops.attention import selection
from tests.ops.paged import PoisonedBatch, make_batch

BATCHES = {  # new tokens and lengths of real sequences, padded tokens, padded sequences
    "decode": ([1, 1, 1], [1, 70, 33], 3, 3),
    "decode with padding": ([1, 1], [64, 65], 4, 4),
    "prefill": ([19], [19], 19, 1),
    "mixed": ([1, 12, 1, 5], [40, 12, 1, 66], 19, 4),
    "mixed with padding": ([7, 1], [7, 130], 13, 5),
    "no real token": ([], [], 3, 2),
}


@pytest.fixture
def select(implementation_or_cpu: str):
    return getattr(selection, f"select_keys_{implementation_or_cpu}")


def make(
    lens: tuple[list[int], list[int], int, int], *, heads: int = 5, dim: int = 24, coarse: bool = False, **options
) -> tuple[PoisonedBatch, torch.Tensor]:
    """A batch with an index cache for keys, and the weights of its heads; ``coarse`` numbers give many equal scores."""
    query_lens, kv_lens, tokens, seqs = lens
    batch = make_batch(
        query_lens, kv_lens, tokens=tokens, seqs=seqs, q_heads=heads, kv_heads=1, head_dim=dim, max_len=144, **options
    )
    weights = torch.randn(tokens, heads, device=batch.q.device)
    if coarse:
        batch.q, batch.k_cache, weights = batch.q.round(), batch.k_cache.round(), weights.round()
    return batch, weights


def run(select, batch: PoisonedBatch, weights: torch.Tensor, top_k: int) -> torch.Tensor:
    return select(batch.q, weights, batch.k_cache, batch.paged, top_k=top_k)


def choose_one_by_one(batch: PoisonedBatch, weights: torch.Tensor, top_k: int) -> list[list[int]]:
    """What each real token chooses, by sorting its scores in float64."""
    chosen = []
    token = 0
    for seq, query_len in enumerate(batch.query_lens):
        keys = batch.k_cache.flatten(0, 2)[batch.slots_of(seq)].double()
        for position in range(len(keys) - query_len, len(keys)):
            scores = (batch.q[token].double() @ keys[: position + 1].T).relu().T @ weights[token].double()
            order = sorted((-score, key) for key, score in enumerate(scores.tolist()))
            chosen.append(sorted(key for _, key in order[:top_k]))
            token += 1
    return chosen


def check(select, batch: PoisonedBatch, weights: torch.Tensor, top_k: int) -> None:
    found = run(select, batch, weights, top_k)
    assert found.dtype == torch.int32
    width = min(top_k, batch.block_tables.shape[1] * batch.k_cache.shape[1])
    expected = [row + [-1] * (width - len(row)) for row in choose_one_by_one(batch, weights, top_k)]
    padding = [[-1] * width] * (len(found) - len(expected))
    assert found.tolist() == expected + padding


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct scores", "many equal scores"])
@pytest.mark.parametrize("top_k", [1, 8, 33, 500])
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
def test_the_best_keys_are_chosen(select, kernel_device: str, lens, top_k: int, coarse: bool) -> None:
    check(select, *make(lens, coarse=coarse, device=kernel_device), top_k)


@pytest.mark.parametrize(("heads", "dim", "block_size"), [(1, 16, 1), (64, 128, 16), (20, 40, 3)])
def test_sizes(select, kernel_device: str, heads: int, dim: int, block_size: int) -> None:
    lens = ([1, 6], [90, 50], 9, 4)
    batch, weights = make(lens, heads=heads, dim=dim, block_size=block_size, device=kernel_device)
    check(select, batch, weights, 12)


def test_scores_in_chunks_are_the_same(select, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, weights = make(BATCHES["mixed with padding"], device=kernel_device)
    whole = run(select, batch, weights, 9)
    monkeypatch.setattr(selection, "_SCORES_BYTES", 3 * 4 * 144)
    assert torch.equal(run(select, batch, weights, 9), whole)


def test_scores_that_are_zero_of_either_sign_are_equal(select, kernel_device: str) -> None:
    """All heads below zero is a common score: the earliest keys win."""
    batch, weights = make(([1], [100], 1, 1), device=kernel_device)
    batch.k_cache.fill_(-1.0)
    batch.q.fill_(1.0)
    weights.copy_(torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0]))
    assert run(select, batch, weights, 7).tolist() == [list(range(7))]


@given(st.data())
def test_the_choice_does_not_depend_on_the_batch(data) -> None:
    """Decode rows choose the same alone, together, and as part of a mixed batch."""
    kv_lens = data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=4))
    top_k = data.draw(st.integers(1, 30))
    batch, weights = make(([1] * len(kv_lens), kv_lens, len(kv_lens), len(kv_lens)), coarse=True)
    together = run(selection.select_keys_reference, batch, weights, top_k)
    paged = batch.paged._replace(max_query_len=2)
    mixed = selection.select_keys_reference(batch.q, weights, batch.k_cache, paged, top_k=top_k)
    assert torch.equal(mixed, together)
    for seq in range(len(kv_lens)):
        one = slice(seq, seq + 1)
        starts = torch.tensor([0, 1], dtype=torch.int32)
        paged = PagedBatch(batch.block_tables[one], starts, batch.kv_lens[one], 1)
        alone = selection.select_keys_reference(batch.q[one], weights[one], batch.k_cache, paged, top_k=top_k)
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("max_query_len", [1, 4])
def test_reference_reads_nothing_on_the_host(max_query_len: int) -> None:
    chosen = selection.select_keys_reference(
        torch.empty(4, 3, 16, device="meta"),
        torch.empty(4, 3, device="meta"),
        torch.empty(5, 8, 1, 16, device="meta"),
        PagedBatch(*(torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((4, 3), 5, 4)), max_query_len),
        top_k=6,
    )
    assert chosen.shape == (4, 6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights", torch.zeros(2, 4), r"weights has shape \[2, 4\], expected \[2, 3\]"),
        ("weights", torch.zeros(2, 3, dtype=torch.bfloat16), "weights is torch.bfloat16, expected torch.float32"),
        ("index_cache", torch.zeros(5, 8, 2, 16), r"index_cache has shape .*, expected \[any, any, 1, 16\]"),
        ("q", torch.zeros(2, 16, 3).transpose(1, 2), r"q.stride\(\) is .*, expected contiguous"),
        ("top_k", 0, "top_k is 0, expected 1 or more"),
    ],
)
def test_refuses_what_does_not_fit(name: str, value: object, message: str) -> None:
    arguments = {
        "q": torch.zeros(2, 3, 16),
        "weights": torch.zeros(2, 3),
        "index_cache": torch.zeros(5, 8, 1, 16),
        "batch": PagedBatch(*(torch.zeros(shape, dtype=torch.int32) for shape in ((2, 3), 3, 2)), 1),
        "top_k": 4,
    }
    with pytest.raises(ValueError, match=message):
        select_keys(**{**arguments, name: value})


@pytest.mark.gpu
def test_realistic_sizes_on_a_gpu() -> None:
    """DeepSeek-V3.2's indexer in bf16: what is chosen beats all that is not, but for rounding."""
    lens = ([1] * 4 + [300], [9000, 3000, 100, 2048, 5000], 320, 8)
    batch = make_batch(
        lens[0],
        lens[1],
        tokens=lens[2],
        seqs=lens[3],
        q_heads=64,
        kv_heads=1,
        head_dim=128,
        max_len=16384,
        dtype=torch.bfloat16,
        device="cuda",
    )
    weights = torch.randn(lens[2], 64, device="cuda")
    found = run(select_keys, batch, weights, 2048)
    token = 0
    for seq, query_len in enumerate(batch.query_lens):
        keys = batch.k_cache.flatten(0, 2)[batch.slots_of(seq)].float()
        for position in range(len(keys) - query_len, len(keys)):
            count = min(position + 1, 2048)
            row = found[token, :count].long()
            assert row.unique().numel() == count
            assert (found[token, count:] == -1).all()
            scores = (batch.q[token].float() @ keys[: position + 1].T).relu().T @ weights[token]
            left = torch.ones(position + 1, dtype=torch.bool, device="cuda").index_fill_(0, row, False)
            if left.any():
                assert scores[row].min() >= scores[left].max() - 1e-2 * scores.abs().max()
            token += 1
    assert (found[token:] == -1).all()
