"""A runner inside the function of another is refused by name while that is captured, and works everywhere else."""

from collections.abc import Callable

import pytest
import torch

from graphmode.graph import CaptureError, GraphRunner, Input, Reason, outside_graph

INPUT = [Input("x", torch.float32, ("rows", 4))]


def inner_step(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@pytest.mark.parametrize("captured_before", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda runner, x: runner(x=x),
        lambda runner, x: runner.run_eagerly(runner.keys[0], x=x),
        lambda runner, x: (runner.capture(progress=False), x)[1],
    ],
    ids=["call", "run_eagerly", "capture"],
)
def test_a_runner_inside_a_captured_function_is_refused_by_name(
    device: str, call: Callable[[GraphRunner, torch.Tensor], torch.Tensor], captured_before: bool
) -> None:
    inner = GraphRunner(inner_step, INPUT, [2], backend=device)
    if captured_before:
        inner.capture()
    outer = GraphRunner(lambda x: call(inner, x) + 1, INPUT, [2], backend=device, strict=True)
    with pytest.raises(CaptureError, match=r"GraphRunner of .*inner_step was called.*[cC]all the function itself"):
        outer.capture()


def test_not_strict_it_runs_eagerly_and_right(device: str) -> None:
    inner = GraphRunner(inner_step, INPUT, [2], backend=device)
    outer = GraphRunner(lambda x: inner(x=x) + 1, INPUT, [2], backend=device)
    for value in (1.0, 2.0, 5.0):
        x = torch.full((2, 4), value)
        assert torch.equal(outer(x=x).cpu(), x * 3 + 1)
    assert outer.stats.misses == {Reason.CAPTURE_FAILED: 3}
    assert inner.stats.replays == 3


def test_outside_the_graph_a_runner_works(device: str) -> None:
    inner = GraphRunner(inner_step, INPUT, [2], backend=device, strict=True)

    @outside_graph
    def call_inner(x: torch.Tensor) -> torch.Tensor:
        return inner(x=x)

    outer = GraphRunner(lambda x: call_inner(x + 1).sin() - x, INPUT, [2], backend=device, strict=True)
    for _ in range(4):
        x = torch.randn(2, 4)
        replayed = outer(x=x, own=True)
        assert torch.equal(replayed, outer.run_eagerly(outer.keys[0], x=x))
        torch.testing.assert_close(replayed.cpu(), ((x + 1) * 3).sin() - x)
    assert outer.stats.graphs == 2
    assert (inner.stats.captures, inner.stats.eager_steps) == (1, 0)


def test_the_function_of_the_inner_runner_may_break_its_own_graph(device: str) -> None:
    """Recordings inside a call outside the graph nest: each knows what is outside of itself."""

    @outside_graph
    def largest(x: torch.Tensor) -> torch.Tensor:
        return x / max(x.max().item(), 1.0)

    inner = GraphRunner(lambda x: largest(x * 2) + 1, INPUT, [2], backend=device, strict=True)

    @outside_graph
    def call_inner(x: torch.Tensor) -> torch.Tensor:
        return inner(x=x)

    outer = GraphRunner(lambda x: call_inner(x) * 2, INPUT, [2], backend=device, strict=True)
    for scale in (0.1, 1.0, 10.0):
        x = torch.rand(2, 4) * scale
        torch.testing.assert_close(outer(x=x).cpu(), (x * 2 / max((x * 2).max().item(), 1.0) + 1) * 2)


def test_the_name_is_found_of_objects_too() -> None:
    inner = GraphRunner(torch.nn.Linear(4, 4), [Input("input", torch.float32, ("rows", 4))], [2], backend="cpu")
    outer = GraphRunner(lambda x: inner(input=x), INPUT, [2], backend="cpu", strict=True)
    with pytest.raises(CaptureError, match=r"GraphRunner of torch\.nn\.modules\.linear\.Linear"):
        outer.capture()
