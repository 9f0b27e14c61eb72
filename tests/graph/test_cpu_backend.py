"""The CPU tape: memory planning, and replays equal to eager over many operators."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph import CaptureError, GraphRunner, Input, UnsupportedOpError, outside_graph
from graphmode.graph.backends.cpu import ALIGNMENT, Lifetime, plan_memory
from graphmode.ops.norm.rms_norm import rms_norm

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
    "loss": lambda x: x * torch.nn.functional.binary_cross_entropy(x.sigmoid(), x.abs().clamp(max=1)),
    "out of no size": lambda x: torch.mul(x, 3, out=torch.empty(0)) + torch.add(x, x, out=torch.empty(0)),
    "in place beside a view in place": lambda x: _unsqueezed(x),
    "memory shared by results": lambda x: x * torch.linalg.qr(x.T @ x).R.sum(),
}


def _unsqueezed(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.unsqueeze_(0).mul_(torch.full((1, 4, 8), 3.0))
    return y.squeeze_(0).add_(x)


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


WRONG_FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "other results": lambda x, out: out.copy_(x * 2.0001),
    "other where padding is not": lambda x, out: out.copy_(torch.where(x == 0, x, x * 3)),
    "other zeros": lambda x, out: out.copy_(torch.where(x == 0, -0.0, x * 2)),
    "reads what it overwrites": lambda x, out: out.add_(x * 2).sub_(0),
    "writes nothing": lambda x, out: None,
    "writes before": lambda x, out: out.copy_(x * 2) and out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(7),
    "writes beyond": lambda x, out: (
        out.copy_(x * 2) and out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(7)
    ),
    "exchanges memory": lambda x, out: out.set_(x * 2),
    "resizes": lambda x, out: out.resize_(8, 8)[: len(x)].copy_(x * 2),
    "transposes": lambda x, out: out.t_().copy_((x * 2).t()),
    "draws": lambda x, out: out.copy_(x * 2) and torch.rand(3),
    "raises": lambda x, out: 1 / 0,
}


@pytest.mark.parametrize("name", WRONG_FORMS)
def test_an_out_form_that_is_not_the_operator_is_not_taken(name: str) -> None:
    operator = f"graphmode_tests::twice_{name.replace(' ', '_')}"
    torch.library.define(operator, "(Tensor x) -> Tensor")
    torch.library.define(f"{operator}.out", "(Tensor x, *, Tensor(a!) out) -> Tensor(a!)")
    torch.library.impl(operator, "CPU", lambda x: x * 2)
    torch.library.impl(f"{operator}.out", "CPU", lambda x, out: (WRONG_FORMS[name](x, out), out)[1])
    twice = getattr(torch.ops.graphmode_tests, operator.partition("::")[2])

    def fn(x: torch.Tensor) -> torch.Tensor:
        before, y = x + 1, twice(x)
        after = x + 3
        return torch.cat([before, y, after], 1)

    x = torch.cat([torch.zeros(1, 8), torch.randn(3, 8)])
    runner = GraphRunner(fn, [Input("x", torch.float32, ("rows", 8))], [4], backend="cpu", strict=True)
    state = torch.get_rng_state()
    for values in (x, x.flip(0), x):
        result = runner(x=values)
        assert torch.equal(result, fn(values))
        assert torch.equal(result.signbit(), fn(values).signbit())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_out_form_is_tried_once_for_all_layers_and_captures_alike() -> None:
    calls = []

    def write(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        calls.append(out.data_ptr())
        return out.copy_(x * 2)

    torch.library.define("graphmode_tests::counted", "(Tensor x) -> Tensor")
    torch.library.define("graphmode_tests::counted.out", "(Tensor x, *, Tensor(a!) out) -> Tensor(a!)")
    torch.library.impl("graphmode_tests::counted", "CPU", lambda x: x * 2)
    torch.library.impl("graphmode_tests::counted.out", "CPU", write)

    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = torch.ops.graphmode_tests.counted(x)
        return x

    for _ in range(3):
        GraphRunner(fn, [Input("x", torch.float32, ("rows", 8))], [4], backend="cpu", strict=True).capture()
    assert len(calls) == 2  # with the arguments, padding, and with others


def test_random_operators_draw_in_a_replay_what_they_draw_eagerly() -> None:
    def fn(x: torch.Tensor) -> list[torch.Tensor]:
        return [
            torch.rand_like(x),
            torch.randn(4, 8),
            torch.randint(9, (4, 8)),
            torch.bernoulli(x.sigmoid()),
            torch.nn.functional.dropout(x + 1),
            torch.multinomial(x.abs() + 1, 8, replacement=True),
            (x + 1).exponential_(),
            torch.normal(x, x.abs()),
        ]

    runner = GraphRunner(fn, [Input("x", torch.float32, ("rows", 8))], [4], backend="cpu", strict=True)
    runner.capture()
    for seed in range(3):
        x = torch.randn(4, 8)
        torch.manual_seed(seed)
        replayed = [result.clone() for result in runner(x=x)]
        torch.manual_seed(seed)
        assert all(map(torch.equal, replayed, fn(x)))


SEEDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "manual_seed": lambda x: torch.manual_seed(3) and torch.rand(4, 8),
    "set_rng_state": lambda x: torch.set_rng_state(torch.get_rng_state()) or torch.rand(4, 8),
    "fork_rng": lambda x: _forked(),
    "generator": lambda x: torch.rand(4, 8, generator=torch.Generator().manual_seed(3)),
    "generator seeded": lambda x: torch.rand(4, 8, generator=GENERATOR.manual_seed(3)),
}
GENERATOR = torch.Generator()


def _forked() -> torch.Tensor:
    with torch.random.fork_rng():
        return torch.rand(4, 8)


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_that_a_replay_would_not_set_again_is_refused(name: str) -> None:
    GENERATOR.manual_seed(7)
    runner = GraphRunner(SEEDS[name], [Input("x", torch.float32, ("rows", 8))], [4], backend="cpu", strict=True)
    with pytest.raises(UnsupportedOpError, match="random generator"):
        runner.capture()


def test_a_generator_from_outside_goes_on_with_each_replay() -> None:
    generator, same = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    inputs = [Input("x", torch.float32, ("rows", 8))]
    runner = GraphRunner(lambda x: x + torch.rand(4, 8, generator=generator), inputs, [4], backend="cpu", strict=True)
    runner.capture()
    generator.set_state(same.get_state())
    for _ in range(3):
        assert torch.equal(runner(x=torch.zeros(4, 8)), torch.rand(4, 8, generator=same))


def test_a_shape_that_depends_on_data_unseen_is_an_error_at_replay_and_not_a_wrong_result() -> None:
    torch.library.define("graphmode_tests::as_many_as_positive", "(Tensor x) -> Tensor")
    torch.library.impl("graphmode_tests::as_many_as_positive", "CPU", lambda x: x[x > 0])
    positive = torch.ops.graphmode_tests.as_many_as_positive
    runner = GraphRunner(
        lambda x: x + positive(x).sum(), [Input("x", torch.float32, ("rows", 8), padding=1)], [4], backend="cpu"
    )
    runner.capture()
    with pytest.raises(CaptureError, match=r"as_many_as_positive.*returned \(4,\).*at capture it was \(32,\)"):
        runner(x=torch.eye(4, 8))


def test_a_tensor_that_an_operator_in_place_enlarges_is_refused() -> None:
    inputs = [Input("x", torch.float32, ("rows", 8))]
    matrices = torch.ones(2, 4, 3), torch.ones(2, 3, 8)
    runner = GraphRunner(lambda x: x.sum(0)[:1].addbmm_(*matrices) + x, inputs, [4], backend="cpu", strict=True)
    with pytest.raises(UnsupportedOpError, match="resizes a tensor"):
        runner.capture()


@pytest.mark.parametrize(
    "compute", [lambda x: x + 1, lambda x: rms_norm(x, torch.ones(1024), 1e-6)], ids=["torch", "a loop on arrays"]
)
def test_the_graph_does_not_hold_memory_of_dead_results(compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A hundred results of 4 KiB, each dead after the next: the pool is a few of them."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(100):
            x = compute(x)
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
    taken, reported = _peak_of(runner.capture), runner.stats.capture_peak_bytes
    assert taken / 3 < reported < taken * 3
    assert reported < 128 << 20
    assert 48 << 20 <= runner.stats.graph_bytes <= reported


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell the most memory taken")
def test_a_capture_copies_no_weight() -> None:
    weight = torch.rand(65536, 256)
    runner = GraphRunner(
        lambda x: torch.mm(x, weight.t()).sum(1), [Input("x", torch.float32, ("rows", 256))], [1, 2], backend="cpu"
    )
    runner(x=torch.ones(1, 256))  # what the first capture loads, once
    assert _peak_of(runner.capture) < weight.nbytes / 2


def _peak_of(call: Callable[[], object]) -> int:
    """Return the most bytes that the process took for a call at a time."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most taken counts from here
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024
