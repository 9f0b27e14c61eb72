"""The CPU tape: memory planning, and replays equal to eager over many operators."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph import GraphRunner, Input, outside_graph
from graphmode.graph.backends.cpu import ALIGNMENT, Lifetime, plan_memory

lifetimes = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 15), st.integers(0, 5000)).map(
        lambda case: Lifetime(case[0], case[0] + case[1], case[2])
    ),
    max_size=40,
)


@given(lifetimes)
def test_planned_memory_never_overlaps_while_alive(cases: list[Lifetime]) -> None:
    offsets, total = plan_memory(dict(enumerate(cases)))
    placed = [(offsets[index], case) for index, case in enumerate(cases)]
    for index, (offset, case) in enumerate(placed):
        assert offset % ALIGNMENT == 0
        assert offset + case.nbytes <= total
        for other_offset, other in placed[:index]:
            together = case.start <= other.end and other.start <= case.end
            apart = offset + case.nbytes <= other_offset or other_offset + other.nbytes <= offset
            assert not together or apart or not case.nbytes or not other.nbytes


@given(lifetimes)
def test_planned_memory_is_at_most_the_sum(cases: list[Lifetime]) -> None:
    _, total = plan_memory(dict(enumerate(cases)))
    assert total <= sum(-(-case.nbytes // ALIGNMENT) * ALIGNMENT for case in cases)


def test_a_chain_reuses_memory() -> None:
    chain = {index: Lifetime(index, index + 1, 1000) for index in range(100)}
    assert plan_memory(chain)[1] <= 3 * 1024


FUNCTIONS = {
    "views": lambda x: x.view(-1, 2, 4).transpose(1, 2)[:, 1:].flip(0).reshape(len(x), -1)[:, ::2],
    "in_place": lambda x: x.clone().mul_(2).add_(x).relu_(),
    "in_place_view": lambda x: torch.cat([x, x]).unsqueeze_(0).squeeze_(0)[: len(x)],
    "write_to_view": lambda x: torch.zeros(len(x), 8).index_copy_(1, torch.arange(8), x).fill_diagonal_(7),
    "slice_assign": lambda x: _assign(x),
    "many_results": lambda x: torch.cat(
        [x.max(1).values, x.sort(1).indices.float()[:, 0], *x.split(4, 1)[0].unbind(1)[:1]]
    )[: len(x)],
    "factories": lambda x: x + torch.arange(8) + torch.full((8,), 2.0) + torch.ones_like(x) + torch.eye(8)[0],
    "dtypes": lambda x: (x.double().to(torch.int32) + x.half()).float(),
    "reduce": lambda x: (x - x.mean(0)) / (x.var(0) + 1) + x.logsumexp(1, keepdim=True),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None]
    )[0, 0],
    "matmul": lambda x: torch.einsum("ij,kj->ik", x, x).softmax(1) @ x,
    "where": lambda x: torch.where(x > 0, x, -x).masked_fill(x > 1, 5.0),
    "norm": lambda x: torch.nn.functional.layer_norm(x, (8,)) + torch.nn.functional.rms_norm(x, (8,)),
    "index": lambda x: x[torch.tensor([1, 0, 1, 0])] + x.gather(1, torch.zeros(4, 8, dtype=torch.int64)),
    "conv": lambda x: torch.nn.functional.conv1d(x[:, None], torch.ones(2, 1, 3), padding=1)[:, 0],
    "noncontiguous": lambda x: (x.T + 1).T * x.T.contiguous().T,
    "empty": lambda x: torch.empty(4, 8).copy_(x) + torch.empty_like(x).fill_(1),
    "out": lambda x: torch.mul(x, 3, out=torch.empty(4, 8)),
    "dead": lambda x: (x.exp(), x.sin())[1],
    "input_returned": lambda x: x,
    "same_twice": lambda x: torch.stack([x, x, x * 2]).sum(0),
    "cumulative": lambda x: x.cumsum(0) + x.cumprod(1).clamp(-3, 3),
    "data": lambda x: (x * 2).data + (x + 1).data.sin(),
    "data_returned": lambda x: (x * 2).data,
    "foreach": lambda x: torch._foreach_add([x, x * 2], 1.0)[1],
}


def _assign(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(4, 8)
    y[:, 2:5] = x[:, 2:5]
    y[1] += 3
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replays_equal_eager_over_many_operators(name: str) -> None:
    runner = GraphRunner(FUNCTIONS[name], [Input("x", torch.float32, ("rows", 8))], [4], backend="cpu", strict=True)
    for _ in range(3):
        x = torch.randn(4, 8)
        assert torch.equal(runner(x=x), FUNCTIONS[name](x))


def test_the_graph_does_not_hold_memory_of_dead_results() -> None:
    """A hundred results of 4 KiB, each dead after the next: the pool is a few of them."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(100):
            x = x + 1
        return x

    runner = GraphRunner(fn, [Input("x", torch.float32, ("rows", 1024))], [1], backend="cpu")
    runner.capture()
    assert runner.stats.graph_bytes <= 4 * 4096
    assert runner.stats.capture_peak_bytes <= 6 * 4096, "recording holds what nothing reads any more"


@outside_graph
def total(*tensors: torch.Tensor) -> torch.Tensor:
    return sum(tensors, torch.zeros(4, 8))


# Each takes the tensors that are alive and may add, change or drop some.
MOVES: dict[str, Callable[[list[torch.Tensor]], None]] = {
    "compute": lambda alive: alive.append(alive[-1].sin() + alive[0]),
    "two_results": lambda alive: alive.append(alive[-1].sort(1).values),
    "view": lambda alive: alive.append(alive[-1].view(8, 4).t().t().view(4, 8)),
    "alias": lambda alive: alive.append(alive[-1].data),
    "in_place": lambda alive: alive[-1].mul_(0.5),
    "write_to_view": lambda alive: alive[-1][:1].add_(1),
    "outside": lambda alive: alive.append(total(*(tensor.sum(0) for tensor in alive))),
    "drop_first": lambda alive: alive.__delitem__(slice(len(alive) > 1)),
    "drop_last": lambda alive: alive.__delitem__(slice(max(1, len(alive) - 1), None)),
}


@given(st.lists(st.sampled_from(sorted(MOVES)), max_size=15), st.integers(0, 1000))
def test_memory_given_back_while_recording_harms_no_result(moves: list[str], seed: int) -> None:
    """Whatever a program keeps, aliases, changes in place and drops, its replays give what it gives."""

    def fn(x: torch.Tensor) -> list[torch.Tensor]:
        alive = [x + 1]
        for move in moves:
            MOVES[move](alive)
        return [tensor.sum() for tensor in alive]

    count = len(fn(torch.zeros(4, 8)))
    inputs = [Input("x", torch.float32, ("rows", 8))]
    runner = GraphRunner(fn, inputs, [4], output_axes=[()] * count, backend="cpu", strict=True)
    torch.manual_seed(seed)
    for _ in range(2):
        x = torch.randn(4, 8)
        torch.testing.assert_close(runner(x=x), fn(x))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell the most memory taken")
def test_what_capture_reports_is_what_the_process_took() -> None:
    """Twenty layers that widen 8 MiB to 32 MiB: the peak of the process and the reported one, within a factor.

    The process's counts the allocator's holes too. All results together would take 800 MiB.
    """

    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x + x.repeat(1, 4).relu_()[:, :256]
        return x

    runner = GraphRunner(fn, [Input("x", torch.float32, ("rows", 256))], [8, 8192], backend="cpu", strict=True)
    runner(x=torch.ones(8, 256))  # what the first capture loads, once
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most taken counts from here
    runner.capture()
    taken, reported = _resident("VmHWM") - before, runner.stats.capture_peak_bytes
    assert taken / 3 < reported < taken * 3
    assert reported < 128 << 20
    assert 48 << 20 <= runner.stats.graph_bytes <= reported


def _resident(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024
