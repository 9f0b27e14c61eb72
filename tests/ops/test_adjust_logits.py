from __future__ import annotations

import pytest
import torch

from graphmode.ops import Adjustments
from graphmode.ops import adjust_logits as public_adjust_logits
from graphmode.ops.sampling import adjust_logits as module
from graphmode.ops.sampling.adjust_logits import adjust_logits_reference
from graphmode.ops.sampling.sample import sample_reference
from tests.ops.distributions import check_drawn_from

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def adjust_logits(implementation: str):
    return getattr(module, f"adjust_logits_{implementation}")


def off(rows: int, max_bias: int = 3, max_stop: int = 2) -> Adjustments:
    return Adjustments(
        repetition_penalty=torch.ones(rows),
        presence_penalty=torch.zeros(rows),
        frequency_penalty=torch.zeros(rows),
        bias_ids=torch.full((rows, max_bias), -1),
        bias=torch.zeros(rows, max_bias),
        stop_ids=torch.full((rows, max_stop), -1),
        stop_from=torch.zeros(rows, dtype=torch.int64),
    )


def random_step(rows: int, vocab: int, max_bias: int = 3, max_stop: int = 2) -> dict[str, object]:
    """Arguments in which each adjustment concerns some rows, and lists name the same token now and then."""
    adjustments = off(rows, max_bias, max_stop)
    adjustments.repetition_penalty.uniform_(0.5, 2)
    adjustments.presence_penalty.uniform_(-1, 1)
    adjustments.frequency_penalty.uniform_(-1, 1)
    places = min(max_bias, vocab)
    for row in range(rows):
        adjustments.bias_ids[row, :places] = torch.randperm(vocab)[:places]
    adjustments.bias_ids[1::2, 1:] = -1
    adjustments.bias.normal_(0, 5)
    if max_stop:
        adjustments.stop_ids[:, 0] = adjustments.bias_ids[:, 0] if max_bias else 0
    adjustments.stop_from.random_(0, 20)
    return {
        "logits": torch.randn(rows, vocab) * 3,
        "positions": torch.full((rows,), 10),
        "history": torch.randint(-6, 6, (rows + 1, vocab), dtype=torch.int32).clamp(min=0),
        "state_indices": torch.where(torch.arange(rows) % 3 == 2, -1, torch.arange(rows).flip(0)),
        "adjustments": adjustments,
    }


def to(step: dict[str, object], device: str) -> dict[str, object]:
    return {
        name: Adjustments(*(tensor.to(device) for tensor in value)) if name == "adjustments" else value.to(device)
        for name, value in step.items()
    }


def adjust_one_by_one(logits, positions, history, state_indices, adjustments: Adjustments) -> torch.Tensor:
    """The documented rules, token by token, in Python's floats."""
    rows = logits.tolist()
    for row, values in enumerate(rows):
        state = int(state_indices[row])
        for token, bias in zip(adjustments.bias_ids[row].tolist(), adjustments.bias[row].tolist(), strict=True):
            if token >= 0:
                values[token] += bias
        for token, had in enumerate(history[state].tolist() if state >= 0 else []):
            penalty = adjustments.repetition_penalty[row].item() if had else 1.0
            values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
            values[token] -= had // 2 * adjustments.frequency_penalty[row].item()
            values[token] -= (had > 1) * adjustments.presence_penalty[row].item()
        for token in adjustments.stop_ids[row].tolist():
            if token >= 0 and positions[row] < adjustments.stop_from[row]:
                values[token] = -INF
    return torch.tensor(rows)


@pytest.mark.parametrize("lists", [(3, 2), (0, 0), (5, 0), (0, 1)])
@pytest.mark.parametrize("vocab", [1, 7, 1025])
def test_adjusts_as_documented(adjust_logits, kernel_device: str, vocab: int, lists: tuple[int, int]) -> None:
    step = random_step(7, vocab, *lists)
    adjusted = adjust_logits(**to(step, kernel_device)).cpu()
    torch.testing.assert_close(adjusted, adjust_one_by_one(**step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_adjustments_keep_their_logits(adjust_logits, kernel_device: str, dtype: torch.dtype) -> None:
    step = random_step(4, 1500) | {"adjustments": off(4)}
    step["logits"] = step["logits"].to(dtype)
    step["logits"][0, :3] = torch.tensor([INF, -INF, 0.0])
    adjusted = adjust_logits(**to(step, kernel_device))
    assert adjusted.dtype == torch.float32
    assert torch.equal(adjusted.cpu(), step["logits"].float())


def test_a_row_does_not_depend_on_its_batch(adjust_logits, kernel_device: str) -> None:
    step = to(random_step(6, 1100), kernel_device)
    adjusted = adjust_logits(**step)
    for row in range(6):
        alone = {name: step[name][row : row + 1] for name in ("logits", "positions", "state_indices")}
        one = Adjustments(*(value[row : row + 1] for value in step["adjustments"]))
        assert torch.equal(adjust_logits(**alone, history=step["history"], adjustments=one), adjusted[row : row + 1])


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # the interpreter's numpy
def test_padding_rows_do_no_harm(adjust_logits, kernel_device: str) -> None:
    step = random_step(5, 1100)
    expected = adjust_logits(**to(step, kernel_device))[:3]
    step["logits"][3:] = NAN
    step["state_indices"][3:] = -1
    for value in step["adjustments"][:3]:
        value[3:] = torch.tensor([NAN, 0.0])
    step["adjustments"].bias[3:] = NAN
    step["adjustments"].stop_from[3:] = 2**63 - 1
    assert torch.equal(adjust_logits(**to(step, kernel_device))[:3], expected)


def test_unused_places_hold_anything(adjust_logits, kernel_device: str) -> None:
    step = random_step(2, 50) | {"adjustments": off(2)}
    step["adjustments"].bias.fill_(NAN)
    assert torch.equal(adjust_logits(**to(step, kernel_device)).cpu(), step["logits"])


def test_logits_may_be_strided(adjust_logits, kernel_device: str) -> None:
    step = to(random_step(4, 1300), kernel_device)
    expected = adjust_logits(**step)
    wide = torch.full((4, 1400), INF, device=kernel_device)
    wide[:, :1300] = step["logits"]
    for logits in (wide[:, :1300], step["logits"].T.contiguous().T):
        assert torch.equal(adjust_logits(**{**step, "logits": logits}), expected)


def test_leaves_its_inputs_alone(adjust_logits, kernel_device: str) -> None:
    step = to(random_step(4, 100), kernel_device)
    tensors = [*(value for value in step.values() if isinstance(value, torch.Tensor)), *step["adjustments"]]
    before = [value.clone() for value in tensors]
    adjust_logits(**step)
    assert all(torch.equal(value, copy) for value, copy in zip(tensors, before, strict=True))


def test_draws_from_the_adjusted_softmax() -> None:
    count, vocab = 20_000, 30
    step = random_step(1, vocab)
    step["state_indices"][:] = 0
    expected = (adjust_one_by_one(**step).double() / 1.5).softmax(1)[0]
    adjusted = adjust_logits_reference(**step).expand(count, vocab)
    numbers = torch.arange(count)
    check_drawn_from(expected, sample_reference(adjusted, torch.full((count,), 1.5), numbers, numbers % 77 + 1))


def test_reference_reads_nothing_on_the_host() -> None:
    assert adjust_logits_reference(**to(random_step(4, 100), "meta")).shape == (4, 100)


@pytest.mark.gpu
def test_public_function_on_a_gpu() -> None:
    step = random_step(32, 151_936, 300, 8)
    adjusted = public_adjust_logits(**to(step, "cuda")).cpu()
    torch.testing.assert_close(adjusted, adjust_logits_reference(**step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.zeros(4, 9, dtype=torch.float64), "logits is torch.float64"),
        ("positions", torch.zeros(4), "positions is torch.float32, expected torch.int64"),
        ("history", torch.zeros(3, 8, dtype=torch.int32), r"history has shape \[3, 8\], expected \[any, 9\]"),
        ("state_indices", torch.zeros(3, dtype=torch.int64), r"state_indices has shape \[3\], expected \[4\]"),
        ("presence_penalty", torch.zeros(4, dtype=torch.float16), "presence_penalty is torch.float16"),
        ("bias_ids", torch.zeros(4, 3, dtype=torch.int32), "bias_ids is torch.int32, expected torch.int64"),
        ("bias", torch.zeros(4, 2), r"bias has shape \[4, 2\], expected \[4, 3\]"),
        ("stop_ids", torch.zeros(2, 2, dtype=torch.int64), r"stop_ids has shape \[2, 2\], expected \[4, any\]"),
        ("stop_from", torch.zeros(4, dtype=torch.int64, device="meta"), "stop_from is on meta, expected cpu"),
    ],
)
def test_refuses_what_does_not_fit(name: str, value: torch.Tensor, message: str) -> None:
    step = random_step(4, 9)
    if name in step:
        step[name] = value
    else:
        step["adjustments"] = step["adjustments"]._replace(**{name: value})
    with pytest.raises(ValueError, match=message):
        public_adjust_logits(**step)
