"""A marked function breaks the graph: graph, call, graph, ... with the same results as eager."""

from dataclasses import dataclass

import pytest
import torch

from graphmode.graph import CaptureError, GraphRunner, Input, outside_graph


@outside_graph
def scale_by_largest(x: torch.Tensor) -> torch.Tensor:
    """Reads a value on the host and chooses by it."""
    largest = x.max().item()
    return x * 2 if largest > 1 else x / max(largest, 1e-3)


def layered(x: torch.Tensor) -> torch.Tensor:
    """Two breaks; ``residual`` and ``x`` cross both."""
    residual = x.tanh()
    y = scale_by_largest(x + 1)
    z = scale_by_largest(y.sin() + residual)
    return z + residual + x


INPUT = [Input("x", torch.float32, ("rows", 6))]


def test_piecewise_matches_eager_and_keeps_its_order(device: str) -> None:
    runner = GraphRunner(layered, INPUT, [2, 4, 8], backend=device, strict=True)
    runner.capture()
    assert runner.stats.graphs == 3 * 3
    for step in range(60):
        x = torch.randn((2, 4, 8)[step % 3], 6) * (step % 5)
        replayed = runner(x=x, own=True)
        key = runner.decide(len(x)).key
        assert key is not None
        assert torch.equal(replayed, runner.run_eagerly(key, x=x))
        torch.testing.assert_close(replayed.cpu(), layered(x))
    assert runner.stats.hit_rate == 1.0


def test_nothing_marked_gives_one_graph(device: str) -> None:
    runner = GraphRunner(lambda x: x.sin().cos(), INPUT, [2], backend=device)
    runner.capture()
    assert runner.stats.graphs == 1


def test_the_outside_runs_once_a_replay_with_the_values_of_that_replay(device: str) -> None:
    seen = []

    @outside_graph
    def look(x: torch.Tensor) -> None:
        seen.append(x.sum().item())

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        look(y)
        return y + 1

    runner = GraphRunner(fn, INPUT, [1], backend=device, strict=True)
    runner.capture()
    seen.clear()
    for value in (1.0, 2.0, 3.0):
        runner(x=torch.full((1, 6), value))
    assert seen == [12.0, 24.0, 36.0]


def test_the_outside_may_write_what_the_next_graph_reads(device: str) -> None:
    @outside_graph
    def clear_negatives(x: torch.Tensor) -> None:
        x[x < 0] = 0

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        clear_negatives(y)
        return y * 3

    runner = GraphRunner(fn, INPUT, [2], backend=device, strict=True)
    x = torch.randn(2, 6)
    assert torch.equal(runner(x=x).cpu(), x.clamp(min=0) * 3)


def test_the_outside_may_read_whatever_python_still_holds(device: str) -> None:
    """Tensors inside an object or a closure are not seen as arguments, yet their memory must not be used again."""

    @dataclass
    class Held:
        early: torch.Tensor

    def fn(x: torch.Tensor) -> torch.Tensor:
        held, closed_over = Held(x + 1), x.cos()

        @outside_graph
        def combine(busy: torch.Tensor, held: Held) -> torch.Tensor:
            return busy + held.early * closed_over

        busy = x
        for _ in range(20):
            busy = busy.sin() + x
        return combine(busy, held) * 2

    runner = GraphRunner(fn, INPUT, [2], backend=device, strict=True)
    for _ in range(5):
        x = torch.randn(2, 6)
        torch.testing.assert_close(runner(x=x).cpu(), fn(x))


def test_a_python_value_from_outside_is_refused(device: str) -> None:
    @outside_graph
    def count(x: torch.Tensor) -> float:
        return x.sum().item()

    runner = GraphRunner(lambda x: x * count(x), INPUT, [2], backend=device, strict=True)
    with pytest.raises(CaptureError, match=r"count runs outside the graph and returned 0\.0, a float"):
        runner(x=torch.ones(2, 6))


def test_a_result_that_changes_its_shape_is_an_error(device: str) -> None:
    @outside_graph
    def positives(x: torch.Tensor) -> torch.Tensor:
        return x[x >= 0]

    runner = GraphRunner(lambda x: positives(x) + 1, INPUT, [2], backend=device, output_axes=[()])
    runner.capture()
    with pytest.raises(CaptureError, match=r"returned \(11,\).*at capture it was \(12,\)"):
        runner(x=torch.tensor([[-1.0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))


def test_an_error_outside_the_graph_reaches_the_caller_and_does_no_harm(device: str) -> None:
    @outside_graph
    def checked(x: torch.Tensor) -> torch.Tensor:
        if x.max().item() > 100:
            raise ArithmeticError("too large")
        return x

    runner = GraphRunner(lambda x: checked(x) + 1, INPUT, [2], backend=device, strict=True)
    x = torch.ones(2, 6)
    assert torch.equal(runner(x=x).cpu(), x + 1)
    with pytest.raises(ArithmeticError, match="too large"):
        runner(x=x * 1000)
    assert torch.equal(runner(x=x).cpu(), x + 1)
