"""Each comparison of ``verify`` finds what it is there for, and finds nothing where nothing is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from graphmode.graph import GraphRunner, Input, Reason, Verification, outside_graph

X = Input("x", torch.float32, ("n", 4))
ROWS = Input("rows", torch.int64, ("n",))


def check(fn: Callable[..., Any], inputs: list[Input], device: str, rows: int = 5, **options: Any) -> Verification:
    """Verify ``rows`` rows in a bucket of 8: positive numbers, and indices that are not 0 in the last row."""
    runner = GraphRunner(fn, inputs, [8], backend=device, strict=True, **options)
    values = {
        "x": torch.rand(rows, 4, generator=torch.Generator().manual_seed(0)) + 1,
        "rows": torch.arange(rows).flip(0) % 4,
        "keep": torch.arange(rows) % 2 == 0,
    }
    return runner.verify(**{spec.name: values[spec.name] for spec in inputs})


def test_a_clean_function_is_proven_and_nothing_is_counted(device: str) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.GELU(), torch.nn.Linear(16, 3)).to(device)
    runner = GraphRunner(lambda x: {"y": net(x), "ids": x.argmax(1)}, [X], [2, 8], backend=device)
    runner.capture()
    runner(x=torch.randn(3, 4))
    before, state = copy.deepcopy(runner.stats), torch.get_rng_state()
    found = runner.verify(x=torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
    assert found.ok
    assert (found.replay.passed, found.padding.passed, found.unpadded.passed) == (True, True, True)
    assert found.replay.largest == found.padding.largest == 0 <= found.unpadded.largest < 1e-5
    assert found.key == runner.decide(5).key
    assert "not proven" not in str(found)
    assert runner.stats == before
    assert torch.equal(torch.get_rng_state(), state)


def batch_norm(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.batch_norm(x, None, None, training=True)


def write_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x).index_reduce(0, rows, x, "amin", include_self=False)


HAZARDS = {
    "mean over the batch": (lambda x: x - x.mean(0), [X]),
    "softmax over the batch": (lambda x: x.softmax(0), [X]),
    "batch norm in training mode": (batch_norm, [X]),
    "cumulative sum from behind": (lambda x: (x * 2 + 1).flip(0).cumsum(0).flip(0), [X]),
    "sort over the rows": (lambda x: x.sort(0).values, [X]),
    "a neighbour": (lambda x: x + x.roll(-1, 0), [X]),
    "an index of 0 that writes a live row": (write_rows, [X, ROWS]),
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_padding_that_leaks_is_found_by_another_padding_and_by_the_unpadded_call(hazard: str, device: str) -> None:
    fn, inputs = HAZARDS[hazard]
    found = check(fn, inputs, device)
    assert not found.ok
    assert found.replay.passed, "the replay is right: the function is not"
    assert found.padding.passed is False
    assert "x" in found.padding.inputs
    assert found.unpadded.passed is False
    assert found.unpadded.largest > 0.01
    assert "elements differ" in str(found)
    assert "Mismatched elements" in str(found)


@pytest.mark.parametrize(
    ("fn", "padding"),
    [
        (lambda x: x.argmax(0), 0.0),  # right for positive numbers alone
        (lambda x: x.sum(0), 0.0),
        (lambda x: x.softmax(0).amax(0), -torch.inf),
        (lambda x: x.flip(0).cumsum(0).amax(0), 0.0),
    ],
)
def test_a_result_that_relies_on_the_declared_padding_differs_with_another_alone(
    fn: Callable[..., torch.Tensor], padding: float, device: str
) -> None:
    found = check(fn, [Input("x", torch.float32, ("n", 4), padding)], device, output_axes=[(None,)])
    assert (found.replay.passed, found.padding.passed, found.unpadded.passed) == (True, False, True)
    assert found.padding.inputs == ("x",)
    assert not found.ok


@pytest.mark.parametrize(("bias", "relied"), [(1, ("keep",)), (0, ("x", "keep"))])
def test_the_inputs_whose_padding_matters_are_named(bias: int, relied: tuple[str, ...], device: str) -> None:
    """Without the bias, padding rows that the mask lets through are still zeros: only both together show."""

    def masked_sum(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return ((x + bias) * keep[:, None]).sum(0)

    found = check(masked_sum, [X, Input("keep", torch.bool, ("n",))], device, output_axes=[(None,)])
    assert (found.padding.passed, found.padding.inputs) == (False, relied)
    assert found.unpadded.passed


def test_numbers_that_are_only_multiplied_by_zero_are_no_leak(device: str) -> None:
    def with_nothing_added(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x + (x * (rows < 0)[:, None]).sum(0)

    found = check(with_nothing_added, [X, ROWS], device)
    assert found.ok
    assert "the padding of 'x' must not be NaN" in found.padding.note


def test_a_sort_that_is_right_for_negative_numbers_alone_is_found(device: str) -> None:
    """NaN is sorted like padding of 0 here; a large number is not."""
    runner = GraphRunner(lambda x: x.sort(0).values, [X], [8], backend=device, strict=True)
    found = runner.verify(x=-torch.rand(5, 4) - 1)
    assert (found.padding.passed, found.unpadded.passed) == (False, True)


def test_an_input_that_is_left_out_is_not_varied(device: str) -> None:
    def shifted(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return x + shift.amax(0)

    inputs = [X, Input("shift", torch.float32, ("m", 4), padding=-1.0, optional=True)]
    runner = GraphRunner(shifted, inputs, [8], axes={"m": 3}, output_axes=[("n",)], backend=device, strict=True)
    found = runner.verify(x=torch.ones(5, 4))
    assert (found.replay.passed, found.padding.passed) == (True, True)


def test_padding_that_writes_to_memory_outside_is_found(device: str) -> None:
    table = torch.zeros(4, 4, device=device)

    def remember(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        table.index_reduce_(0, rows, x, "amin")
        return x * 2

    runner = GraphRunner(remember, [X, ROWS], [8], backend=device, strict=True)
    runner.capture()
    table.fill_(1)
    found = runner.verify(x=torch.rand(3, 4), rows=torch.tensor([3, 0, 2]))
    assert (found.replay.passed, found.padding.passed, found.unpadded.passed) == (True, False, False)
    assert not found.unpadded.differences, "what it returns is right"
    assert "tensor of shape (4, 4) that it changes" in found.unpadded.memory[0]
    assert torch.equal(table.cpu(), torch.ones(4, 4)), "what a function changes is put back"


def test_running_statistics_are_compared_and_put_back(device: str) -> None:
    norm = torch.nn.BatchNorm1d(4).to(device)
    runner = GraphRunner(lambda x: norm(x), [X], [8], backend=device, strict=True)
    runner.capture()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    found = runner.verify(x=torch.rand(5, 4) + 3)
    assert found.unpadded.passed is False
    assert len(found.unpadded.memory) == 2
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_state_that_a_function_changes_is_the_same_for_every_run(device: str) -> None:
    total = torch.zeros(8, 4, device=device)

    def add(x: torch.Tensor) -> torch.Tensor:
        return total[: len(x)].add_(x) * 1

    runner = GraphRunner(add, [X], [8], backend=device, strict=True)
    runner(x=torch.ones(8, 4))
    before = total.clone()
    found = runner.verify(x=torch.ones(5, 4))
    assert found.replay.passed
    assert found.unpadded.passed
    assert torch.equal(total, before)


def test_random_numbers_are_the_same_for_every_run(device: str) -> None:
    generator = torch.Generator(device)

    def drawing(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x) + torch.rand(4, device=device, generator=generator)

    runner = GraphRunner(drawing, [X], [8], backend=device, strict=True)
    runner.capture()
    states = torch.get_rng_state(), generator.get_state()
    found = runner.verify(x=torch.ones(5, 4))
    assert found.replay.passed
    assert found.padding.passed
    assert found.unpadded.passed is not False, "an unpadded call draws others, which is no fault"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.uint8])
def test_dtypes(dtype: torch.dtype, device: str) -> None:
    runner = GraphRunner(lambda x: x * 2, [Input("x", dtype, ("n", 4))], [8], backend=device, strict=True)
    assert runner.verify(x=torch.ones(5, 4).to(dtype)).ok


def test_a_call_that_fills_its_graph_has_no_padding_to_vary(device: str) -> None:
    found = check(lambda x: x.softmax(0), [X], device, rows=8)
    assert (found.replay.passed, found.padding.passed, found.unpadded.passed) == (True, None, True)
    assert "fills its graph" in str(found)


def test_integers_that_are_all_padding_are_not_made_up(device: str) -> None:
    runner = GraphRunner(lambda rows: rows + 1, [ROWS], [8], backend=device, strict=True)
    found = runner.verify(rows=torch.zeros(5, dtype=torch.int64))
    assert found.padding.passed is None
    assert "no other value is known to be allowed" in str(found)


def test_an_input_whose_padding_is_not_varied_is_named(device: str) -> None:
    runner = GraphRunner(write_rows, [X, ROWS], [8], backend=device, strict=True)
    found = runner.verify(x=torch.ones(1, 4), rows=torch.zeros(1, dtype=torch.int64))
    assert found.padding.passed is False, "the row that 0 names is written by x's padding"
    runner = GraphRunner(lambda x, rows: x + rows[:, None], [X, ROWS], [8], backend=device, strict=True)
    found = runner.verify(x=torch.ones(1, 4), rows=torch.zeros(1, dtype=torch.int64))
    assert found.ok
    assert "the padding of 'rows' was not varied" in found.padding.note


def test_outputs_are_named_by_where_they_stand(device: str) -> None:
    def fn(x: torch.Tensor) -> dict[str, Any]:
        return {"good": x * 2, "bad": [x, x.cumsum(0).flip(0)]}

    found = check(fn, [X], device)
    assert len(found.unpadded.differences) == 1
    assert found.unpadded.differences[0].startswith("output ['bad'][1]: ")


def test_an_error_of_the_unpadded_call_is_reported(device: str) -> None:
    def eights(x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 4, 4).sum(0).repeat(2, 1)

    found = check(eights, [X], device, output_axes=[("n",)])
    assert found.unpadded.passed is False
    assert "it raised RuntimeError: " in str(found.unpadded)
    assert found.replay.passed


def test_a_wrong_output_axis_is_found_by_the_unpadded_call(device: str) -> None:
    runner = GraphRunner(
        lambda x: x.T @ x, [Input("x", torch.float32, ("n", 8))], [8], backend=device, output_axes=[("n",)]
    )
    found = runner.verify(x=torch.ones(5, 8))
    assert found.unpadded.passed is False
    assert "(5, 8)" in str(found)
    assert "(8, 8)" in str(found)


@pytest.mark.parametrize(
    ("options", "rows", "reason"),
    [
        ({"enabled": False}, 5, Reason.DISABLED),
        ({}, 9, Reason.ABOVE_THRESHOLD),
        ({"max_padding_ratio": 0.1}, 5, Reason.PADDING_RATIO),
        ({"capture_on_first_use": False}, 5, Reason.NOT_CAPTURED_YET),
    ],
)
def test_a_call_without_a_graph_says_why(options: dict[str, Any], rows: int, reason: Reason, device: str) -> None:
    runner = GraphRunner(lambda x: x + 1, [X], [8], backend=device, **options)
    found = runner.verify(x=torch.ones(rows, 4))
    assert found.key is None
    assert not found.ok
    assert {found.replay.passed, found.padding.passed, found.unpadded.passed} == {None}
    assert reason in str(found)
    assert runner.stats.steps == 0


def test_a_call_whose_capture_fails_says_why(device: str) -> None:
    runner = GraphRunner(lambda x: x[x > 0], [X], [8], backend=device)
    assert Reason.UNSUPPORTED_OP in str(runner.verify(x=torch.ones(5, 4)))


def test_families_static_arguments_and_breaks(device: str) -> None:
    @outside_graph
    def limit(x: torch.Tensor) -> torch.Tensor:
        return x / 2 if x[0, 0].item() > 1 else x

    def fn(family: str, scale: int, x: torch.Tensor) -> torch.Tensor:
        return limit(x * scale) + (1 if family == "a" else 2)

    runner = GraphRunner(fn, [X], {"a": [4], "b": [8]}, static={"scale": (1, 3)}, backend=device, strict=True)
    for family, rows in (("a", 3), ("b", 5)):
        found = runner.verify(family=family, scale=3, x=torch.ones(rows, 4))
        assert found.ok, str(found)
        assert found.key is not None
        assert found.key.family == family


def test_a_call_without_rows_proves_nothing(device: str) -> None:
    runner = GraphRunner(lambda x: x + 1, [X], [8], backend=device, strict=True)
    found = runner.verify(x=torch.ones(0, 4))
    assert found.key is None
    assert not found.ok
    assert "no row" in str(found)


HIDDEN = Input("hidden", torch.float32, ("n", 4), carried=True)


def test_carried_state_is_kept(device: str) -> None:
    def step(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.mul_(0.5).add_(x) * 1

    runner = GraphRunner(step, [X, HIDDEN], [8], backend=device, strict=True)
    runner(x=torch.ones(8, 4))
    before = runner.carried["hidden"].clone()
    found = runner.verify(x=torch.ones(5, 4))
    assert found.ok, str(found)
    assert torch.equal(runner.carried["hidden"], before)
    assert runner.verify(x=torch.ones(5, 4), hidden=torch.zeros(5, 4)).ok
    assert torch.equal(runner.carried["hidden"], before)


def test_padding_that_leaks_into_carried_state_is_found(device: str) -> None:
    def step(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        hidden.add_(x.mean(0))
        return x * 2

    runner = GraphRunner(step, [X, HIDDEN], [8], output_axes=[("n",)], backend=device, strict=True)
    found = runner.verify(x=torch.ones(5, 4))
    assert (found.replay.passed, found.padding.passed, found.unpadded.passed) == (True, False, False)
    assert found.unpadded.differences[0].startswith("carried input 'hidden': ")


@pytest.mark.parametrize(("rows", "length"), [(3, 5), (4, 5), (3, 8)])
def test_two_axes_and_true_sizes(rows: int, length: int, device: str) -> None:
    """A mean over true tokens alone does not leak; one over all tokens does."""

    def means(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        inside = torch.arange(x.shape[1], device=x.device) < tokens
        return (x * inside).sum(1) / tokens

    inputs = [Input("x", torch.float32, ("n", "t")), Input("tokens", torch.int64, (), size_of="t")]
    runner = GraphRunner(means, inputs, {"n": [4], "t": [8]}, backend=device, strict=True)
    found = runner.verify(x=torch.rand(rows, length))
    assert found.ok, str(found)
    leaky = GraphRunner(lambda x: x.mean(1), inputs[:1], {"n": [4], "t": [8]}, backend=device, strict=True)
    assert leaky.verify(x=torch.rand(rows, length) + 1).ok == (length == 8)


def test_a_weight_that_was_replaced_differs_from_run_eagerly(device: str) -> None:
    layer = torch.nn.Linear(4, 4, device=device)
    runner = GraphRunner(lambda x: layer(x), [X], [8], backend=device, strict=True)
    runner(x=torch.ones(5, 4))
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight))
    found = runner.verify(x=torch.ones(5, 4))
    assert (found.replay.passed, found.padding.passed, found.unpadded.passed) == (False, True, False)


# Seeded faults of the runtime itself.


@dataclass
class Wrong:
    """A graph that does something else at its replays."""

    graph: Any
    fault: Callable[[Any], None]

    def replay(self) -> None:
        self.fault(self.graph)


def seed(runner: GraphRunner, fault: Callable[[Any], None]) -> None:
    """Exchange the graphs of a runner for wrong ones."""
    runner.capture()
    for program in runner._captures.programs.values():
        program.steps[:] = [Wrong(step, fault) for step in program.steps]


def skip(graph: Any) -> None:
    """Lose the last replay's work: outputs stay as they were."""


def twice(graph: Any) -> None:
    graph.replay()
    graph.replay()


@pytest.mark.parametrize("fault", [skip, twice])
def test_a_wrong_replay_differs_from_run_eagerly(fault: Callable[[Any], None], device: str) -> None:
    total = torch.zeros(8, 4, device=device)
    runner = GraphRunner(lambda x: total[: len(x)].add_(x) * 1, [X], [8], backend=device, strict=True)
    seed(runner, fault)
    found = runner.verify(x=torch.ones(5, 4))
    assert found.replay.passed is False
    assert found.unpadded.passed is False
    assert not found.ok


def test_padding_that_is_not_refilled_differs_from_run_eagerly(device: str) -> None:
    buffers = []

    def with_neighbour(x: torch.Tensor) -> torch.Tensor:
        buffers.append(x)
        return x + x.roll(-1, 0)

    def after_a_longer_call(graph: Any) -> None:
        captured[5:].fill_(7)
        graph.replay()

    runner = GraphRunner(with_neighbour, [X], [8], output_axes=[("n",)], backend=device, strict=True)
    seed(runner, after_a_longer_call)
    captured = buffers[-1]
    found = runner.verify(x=torch.ones(5, 4))
    assert found.replay.passed is False
    assert found.unpadded.passed is False
