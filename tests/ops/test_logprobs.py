from __future__ import annotations

import pytest
import torch

from graphmode.ops import log_probabilities as public_log_probabilities
from graphmode.ops.sampling.logprobs import log_probabilities_reference, log_probabilities_triton

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def compute(implementation: str):
    return {"reference": log_probabilities_reference, "triton": log_probabilities_triton}[implementation]


@pytest.fixture
def log_probabilities(compute):
    return lambda logits, tokens, top_n: compute(logits, tokens, all_wanted(logits, top_n), top_n)


def all_wanted(logits: torch.Tensor, top_n: int) -> torch.Tensor:
    return torch.full(logits.shape[:1], top_n, dtype=torch.int32, device=logits.device)


def test_each_row_gets_as_many_as_it_wants(compute, kernel_device: str) -> None:
    logits = torch.randn(6, 1000, device=kernel_device)
    tokens = torch.arange(6, device=kernel_device)
    wanted = torch.tensor([0, 1, 3, 4, 99, -(2**31)], dtype=torch.int32, device=kernel_device)
    result = compute(logits, tokens, wanted, 4)
    every = compute(logits, tokens, all_wanted(logits, 4), 4)
    for row, count in enumerate([0, 1, 3, 4, 4, 0]):
        assert torch.equal(result.top_ids[row, :count], every.top_ids[row, :count])
        assert torch.equal(result.top[row, :count], every.top[row, :count])
        assert set(result.top_ids[row, count:].tolist()) <= {-1}
        assert set(result.top[row, count:].tolist()) <= {-INF}
    assert torch.equal(result.chosen[:5], every.chosen[:5])
    assert torch.equal(result.rank[:5], every.rank[:5])
    assert result.chosen[5] == -INF
    assert result.rank[5] == 0


@pytest.mark.parametrize("top_n", [0, 1, 5])
@pytest.mark.parametrize("vocab", [5, 1000, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_rank_and_top(log_probabilities, kernel_device: str, vocab: int, dtype: torch.dtype, top_n: int) -> None:
    """bfloat16 logits have many equals; a stable sort puts lower indexes first."""
    logits = (torch.randn(4, vocab, device=kernel_device) * 3).to(dtype)
    tokens = torch.tensor([0, vocab - 1, vocab // 2, 3], device=kernel_device)
    result = log_probabilities(logits, tokens, top_n)
    logs = logits.double().log_softmax(1)
    order = logs.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(result.top_ids, order[:, :top_n])
    assert torch.equal(result.rank, (order == tokens.unsqueeze(1)).int().argmax(1) + 1)
    torch.testing.assert_close(
        result.chosen.double(), logs.gather(1, tokens.unsqueeze(1)).squeeze(1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(result.top.double(), logs.gather(1, order[:, :top_n]), rtol=1e-5, atol=1e-5)


def test_nan_and_minus_infinity_come_last(log_probabilities, kernel_device: str) -> None:
    logits = torch.tensor([[NAN, 1.0, -INF, 2.0, -0.0, 0.0]], device=kernel_device)
    result = log_probabilities(logits, torch.tensor([2], device=kernel_device), 6)
    assert result.top_ids.tolist() == [[3, 1, 4, 5, 0, 2]]
    assert result.rank.tolist() == [6]
    assert result.chosen.tolist() == [-INF]
    expected = torch.tensor([2.0, 1.0, 0.0, 0.0]).log_softmax(0)
    torch.testing.assert_close(result.top[0, :4].cpu(), expected)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # the interpreter's numpy
def test_a_row_does_not_depend_on_its_batch(log_probabilities, kernel_device: str) -> None:
    logits = torch.randn(8, 5000, device=kernel_device)
    logits[5], logits[6], logits[7] = NAN, INF, -INF
    tokens = torch.arange(8, device=kernel_device) * 99
    together = log_probabilities(logits, tokens, 4)
    for row in range(5):
        alone = log_probabilities(logits[row : row + 1], tokens[row : row + 1], 4)
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one, all_rows[row : row + 1])
    assert together.top_ids.min() >= 0
    assert together.top_ids.max() < 5000


def test_logits_may_be_strided(log_probabilities, kernel_device: str) -> None:
    logits = torch.randn(4, 1300, device=kernel_device)
    tokens = torch.arange(4, device=kernel_device)
    expected = log_probabilities(logits, tokens, 3)
    wide = torch.full((4, 1400), INF, device=kernel_device)
    wide[:, :1300] = logits
    for strided in (wide[:, :1300], logits.T.contiguous().T):
        for got, want in zip(log_probabilities(strided, tokens, 3), expected, strict=True):
            assert torch.equal(got, want)


def test_no_rows(log_probabilities, kernel_device: str) -> None:
    empty = torch.empty(0, 9, device=kernel_device)
    result = log_probabilities(empty, torch.empty(0, dtype=torch.int64, device=kernel_device), 2)
    assert [tuple(value.shape) for value in result] == [(0,), (0,), (0, 2), (0, 2)]


def test_reference_reads_nothing_on_the_host() -> None:
    logits, tokens = torch.empty(4, 100, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    assert log_probabilities_reference(logits, tokens, tokens.int(), 3).top.shape == (4, 3)


@pytest.mark.gpu
def test_public_function_on_a_gpu() -> None:
    logits = (torch.randn(32, 151_936, device="cuda") * 4).bfloat16()
    tokens = torch.randint(0, 151_936, (32,), device="cuda")
    wanted = all_wanted(logits, 20)
    result = public_log_probabilities(logits, tokens, wanted, 20)
    reference = log_probabilities_reference(logits.cpu(), tokens.cpu(), wanted.cpu(), 20)
    assert torch.equal(result.rank.cpu(), reference.rank)
    assert torch.equal(result.top_ids.cpu(), reference.top_ids)
    # float32 sums of that many terms, as the reference's, are not exact to 1e-5 themselves.
    exact = logits.double().log_softmax(1)
    for got, ids in ((result.chosen.unsqueeze(1), tokens.unsqueeze(1)), (result.top, result.top_ids)):
        torch.testing.assert_close(got.double(), exact.gather(1, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.zeros(4), r"logits has shape \[4\], expected \[any, any\]"),
        ("tokens", torch.zeros(4, dtype=torch.int32), "tokens is torch.int32, expected torch.int64"),
        ("tokens", torch.zeros(3, dtype=torch.int64), r"tokens has shape \[3\], expected \[4\]"),
        ("wanted", torch.zeros(4, dtype=torch.int64), "wanted is torch.int64, expected torch.int32"),
        ("top_n", 10, "top_n is 10, expected 0 to 9, the vocabulary"),
        ("top_n", -1, "top_n is -1, expected 0 to 9, the vocabulary"),
    ],
)
def test_refuses_what_does_not_fit(name: str, value: object, message: str) -> None:
    arguments = {
        "logits": torch.zeros(4, 9),
        "tokens": torch.zeros(4, dtype=torch.int64),
        "wanted": torch.zeros(4, dtype=torch.int32),
        "top_n": 2,
        name: value,
    }
    with pytest.raises(ValueError, match=message):
        public_log_probabilities(**arguments)
