"""A graph breaks by itself around an operator that no graph holds but whose results have fixed shapes."""

import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph import CaptureError, GraphRunner, Input, UnsupportedOpError, outside_graph
from graphmode.graph.backends.mlu import MluBackend
from tests.devices.conftest import fake_mlu
from tests.devices.fake import on_cpu

INPUT = [Input("x", torch.float32, ("rows", 4), padding=1)]


@torch.library.custom_op("graphmode_breaks::normalised", mutates_args=())
def normalised(x: torch.Tensor) -> torch.Tensor:
    return x / max(x.abs().max().item(), 1.0)


@torch.library.custom_op("graphmode_breaks::normalise_", mutates_args=("x",))
def normalise_(x: torch.Tensor) -> None:
    x.div_(max(x.abs().max().item(), 1.0))


@torch.library.custom_op("graphmode_breaks::inner", mutates_args=())
def inner(x: torch.Tensor) -> torch.Tensor:
    return normalised(x) + 1


@torch.library.custom_op("graphmode_breaks::count", mutates_args=())
def count(x: torch.Tensor) -> int:
    return int((x > 0).sum().item())


def write_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 3
    view = y[:1]
    normalise_(view)
    return y + view


BREAKS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, int], int]] = {
    "host_read": (lambda x: normalised(x.sin() * 3) + 1, {"graphmode_breaks::normalised": 1}, 2),
    "in_place_on_a_view": (write_view, {"graphmode_breaks::normalise_": 1}, 2),
    "nested": (lambda x: inner(x * 3).sin(), {"graphmode_breaks::inner": 1}, 2),
    "mask_put": (
        lambda x: (x * 2).index_put_((x.abs() > -1,), x.flatten()) + 1,
        {"aten::index_put_": 1},
        2,
    ),
    "linalg": (
        lambda x: torch.linalg.inv(x[:, :1] @ x[:, :1].T + 9 * torch.eye(len(x), device=x.device)) @ x,
        {"aten::_linalg_check_errors": 1},
        2,
    ),
    "first_and_last": (lambda x: normalised(normalised(x).sin()), {"graphmode_breaks::normalised": 2}, 1),
    "one_after_another": (lambda x: normalised(normalised(x + 1)), {"graphmode_breaks::normalised": 2}, 1),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_graph_breaks_around_the_operator(device: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    fn, breaks, graphs = BREAKS[name]
    runner = GraphRunner(fn, INPUT, [2, 4], backend=device, strict=True)
    with caplog.at_level(logging.WARNING):
        runner.capture()
    assert runner.stats.breaks == {operator: 2 * times for operator, times in breaks.items()}
    assert runner.stats.graphs == 2 * graphs
    [record] = [record for record in caplog.records if "break around" in record.message]
    assert next(iter(breaks)) in record.message
    assert __file__ in record.message
    runner.recapture()
    assert runner.stats.breaks == {operator: 2 * times for operator, times in breaks.items()}
    for rows in (2, 4, 3, 2):
        x = torch.randn(rows, 4) * 2
        key = runner.decide(rows).key
        assert key is not None
        replayed = runner(x=x, own=True)
        assert torch.equal(replayed, runner.run_eagerly(key, x=x))
    assert runner.stats.hit_rate == 1


def test_what_decides_python_s_next_step_is_refused(device: str) -> None:
    with pytest.raises(UnsupportedOpError, match="graphmode_breaks::count cannot be captured"):
        GraphRunner(lambda x: x * count(x), INPUT, [2], backend=device, strict=True).capture()


def test_an_operator_that_the_device_refuses_is_learnt() -> None:
    """Nothing in warm-up tells that the operator waits for the device; the capture does."""
    fake = fake_mlu()
    torch.library.define("graphmode_breaks::waits", "(Tensor x) -> Tensor")

    @torch.library.impl("graphmode_breaks::waits", "CPU")
    def waits(x: torch.Tensor) -> torch.Tensor:
        fake.synchronize()
        return x * 2

    runner = GraphRunner(
        lambda x: torch.ops.graphmode_breaks.waits(x + 1).sin(),
        INPUT,
        [2, 4],
        backend=on_cpu(MluBackend, fake),
        strict=True,
    )
    runner.capture()
    assert runner.stats.breaks == {"graphmode_breaks::waits": 2}
    assert runner.stats.graphs == 4
    for rows in (2, 4, 1):
        x = torch.randn(rows, 4)
        assert torch.equal(runner(x=x), ((x + 1) * 2).sin())


@pytest.mark.gpu
def test_an_operator_that_cuda_refuses_is_learnt() -> None:
    torch.library.define("graphmode_breaks::synchronises", "(Tensor x) -> Tensor")

    @torch.library.impl("graphmode_breaks::synchronises", "CUDA")
    def synchronises(x: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()
        return x * 2

    fn = lambda x: torch.ops.graphmode_breaks.synchronises(x + 1).sin()  # noqa: E731
    runner = GraphRunner(fn, INPUT, [2], backend="cuda", strict=True)
    for _ in range(3):
        x = torch.randn(2, 4)
        assert torch.equal(runner(x=x, own=True), runner.run_eagerly(runner.keys[0], x=x))
    assert runner.stats.breaks == {"graphmode_breaks::synchronises": 1}


@pytest.mark.gpu
def test_what_is_computed_on_the_host_and_comes_back_runs_outside() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        on_host = (x.cpu() + 1).sum(1, keepdim=True)
        on_host.mul_(2)
        return x * on_host.to(x.device) + x.max().cpu()

    runner = GraphRunner(fn, INPUT, [2], backend="cuda", strict=True)
    for _ in range(4):
        x = torch.randn(2, 4)
        assert torch.equal(runner(x=x, own=True), runner.run_eagerly(runner.keys[0], x=x))
    assert runner.stats.breaks["aten::_to_copy"] == 3


# Aliases of results of calls outside the graph.


@outside_graph
def scale_(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(0.5)


@outside_graph
def add_(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1)


@outside_graph
def second_row(x: torch.Tensor) -> torch.Tensor:
    return x[1:]


@outside_graph
def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    new = x * 3
    return new[:, :2], new[:, 1:]


@outside_graph
def at_most_one(x: torch.Tensor) -> torch.Tensor:
    peak = x.max()
    return x / peak if peak > 1 else x


def chain(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    z = scale_(y)
    add_(z)
    return y


def of_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    second_row(y).add_(10)
    return y


def among_results(x: torch.Tensor) -> torch.Tensor:
    left, right = halves(x + 1)
    left.add_(10)
    return right * 1


def to_the_argument(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    z = scale_(y)
    y.add_(10)
    return z


ALIASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "argument": lambda x: (y := x * 1, scale_(y).add_(10), y)[-1],
    "written_at_the_argument": to_the_argument,
    "view": of_a_view,
    "results": among_results,
    "chain": chain,
    "sometimes": lambda x: at_most_one(x * 1) + x,
}


@pytest.mark.parametrize("name", ALIASES)
def test_results_that_are_aliases_stay_what_they_are(device: str, name: str) -> None:
    runner = GraphRunner(ALIASES[name], INPUT, [2], backend=device, strict=True)
    for scale in (1.0, 0.1, 3.0, 5.0):
        x = torch.randn(2, 4) * scale
        replayed = runner(x=x, own=True)
        assert torch.equal(replayed, runner.run_eagerly(runner.keys[0], x=x))
        torch.testing.assert_close(replayed.cpu(), ALIASES[name](x))


def test_an_alias_of_a_buffer_that_is_kept(device: str) -> None:
    buffer = torch.zeros(2, 4, device=device)

    @outside_graph
    def the_buffer() -> torch.Tensor:
        return buffer

    def fn(x: torch.Tensor) -> torch.Tensor:
        kept = the_buffer()
        kept.add_(x)
        return kept * 1

    runner = GraphRunner(fn, INPUT, [2], backend=device, strict=True)
    runner.capture()
    buffer.zero_()
    for total in (1.0, 2.0, 3.0):
        assert torch.equal(runner(x=torch.ones(2, 4)).cpu(), torch.full((2, 4), total))
    assert torch.equal(buffer.cpu(), torch.full((2, 4), 3.0))


def test_an_alias_that_is_written_to_must_stay_one(device: str) -> None:
    runner = GraphRunner(lambda x: at_most_one(x * 1).add_(1), INPUT, [2], backend=device, strict=True)
    runner.capture()
    assert torch.equal(runner(x=torch.zeros(2, 4)).cpu(), torch.ones(2, 4))
    with pytest.raises(Exception, match=r"at_most_one runs outside the graph and returned memory of its own"):
        runner(x=torch.full((2, 4), 3.0))


def test_results_keep_their_strides(device: str) -> None:
    @outside_graph
    def laid_out(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        return y.t(), y[:, ::2], y[:1].expand(3, 4), y.new_empty(0, 4)

    def fn(x: torch.Tensor) -> list[torch.Tensor]:
        results = laid_out(x + 1)
        assert [each.stride() for each in results[:3]] == [(1, 4), (4, 2), (0, 1)]
        return [each.sum() for each in results]

    runner = GraphRunner(fn, INPUT, [2], output_axes=[()] * 4, backend=device, strict=True)
    for _ in range(3):
        x = torch.randn(2, 4)
        for replayed, eager in zip(runner(x=x, own=True), runner.run_eagerly(runner.keys[0], x=x), strict=True):
            assert torch.equal(replayed, eager)


# Each takes the tensors that are alive and may add, change or drop some.
MOVES: dict[str, Callable[[list[torch.Tensor]], None]] = {
    "compute": lambda alive: alive.append(alive[-1].sin() + alive[0]),
    "constant": lambda alive: alive.append(alive[-1] * 0.7 + torch.arange(8.0).view(2, 4)),
    "view": lambda alive: alive.append(alive[-1].view(4, 2).view(2, 4)),
    "in_place": lambda alive: _drop(alive[-1].mul_(0.5)),
    "in_place_on_a_view": lambda alive: _drop(alive[0][:1].add_(1)),
    "outside": lambda alive: alive.append(at_most_one(alive[-1] * 3)),
    "outside_in_place": lambda alive: alive.append(scale_(alive[-1])),
    "outside_view": lambda alive: _drop(second_row(alive[-1]).add_(2)),
    "outside_pair": lambda alive: _drop(halves(alive[-1])[0].add_(1)),
    "break": lambda alive: alive.append(normalised(alive[-1] * 2)),
    "break_in_place": lambda alive: normalise_(alive[-1]),
    "mask_put": lambda alive: _drop(alive[-1].index_put_((alive[0].abs() > -1,), alive[-1].sin().flatten())),
    "drop_first": lambda alive: alive.__delitem__(slice(len(alive) > 1)),
}


def _drop(_: object) -> None:
    """Let go of a value."""


@given(st.lists(st.sampled_from(sorted(MOVES)), max_size=10), st.integers(0, 1000))
def test_random_functions_replay_as_they_run(moves: list[str], seed: int) -> None:
    """Operators in place, views, aliases and breaks, in any order: bitwise what runs eagerly, replay after replay."""

    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        alive = [x + 1]
        for move in moves:
            MOVES[move](alive)
        return tuple(tensor * 1 for tensor in alive)

    axes: list[tuple[str | None, ...]] = [(None, None)] * len(fn(torch.ones(2, 4)))
    runner = GraphRunner(fn, INPUT, [2], output_axes=axes, backend="cpu", strict=True)
    torch.manual_seed(seed)
    runner.capture()
    for scale in (0.0, 0.3, 2.0):
        x = torch.rand(2, 4) * scale
        try:
            replayed = runner(x=x, own=True)
        except CaptureError as error:
            if "returned memory of its own" not in str(error):  # where its argument was written to at capture
                raise
            continue
        for one, other in zip(replayed, runner.run_eagerly(runner.keys[0], x=x), strict=True):
            assert torch.equal(one, other)
