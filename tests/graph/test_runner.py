"""Replays are right: bitwise the eager run's of the same bucket, whatever padding held, however they interleave."""

import gc

import pytest
import torch

from graphmode.graph import GraphRunner, Input, InputError, Reason, StaleAddressError
from graphmode.graph.buffers import STAGING_BUFFERS

BUCKETS = [1, 2, 4, 8, 13]
SIZES = sorted(
    {size for below, bucket in zip([0, *BUCKETS], BUCKETS, strict=False) for size in (below + 1, bucket - 1, bucket)}
    - {0}
)


def network(device: str) -> torch.nn.Module:
    layers = [torch.nn.Linear(24, 64), torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 5)]
    return torch.nn.Sequential(*layers).to(device)


def make_runner(device: str, **options: object) -> GraphRunner:
    net = network(device)
    return GraphRunner(lambda x: net(x), [Input("x", torch.float32, ("rows", 24))], BUCKETS, backend=device, **options)


def test_replays_are_bitwise_the_eager_run_of_their_bucket(device: str) -> None:
    runner = make_runner(device)
    runner.capture()
    for step in range(200):
        x = torch.randn(SIZES[step % len(SIZES)], 24)
        key = runner.decide(len(x)).key
        assert key is not None
        replayed = runner(x=x, own=True)
        assert torch.equal(replayed, runner.run_eagerly(key, x=x))
    assert runner.stats.hit_rate == 1.0
    assert runner.stats.replays == 200


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -7.0])
def test_padding_changes_no_real_row(device: str, garbage: float) -> None:
    net = network(device)
    results = []
    for padding in (0.0, garbage):
        inputs = [Input("x", torch.float32, ("rows", 24), padding)]
        runner = GraphRunner(lambda x: net(x), inputs, BUCKETS, backend=device, strict=True)
        torch.manual_seed(1)
        results.append([runner(x=torch.randn(size, 24), own=True) for size in SIZES])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_values_on_the_device_and_on_the_host_are_the_same(device: str) -> None:
    inputs = [Input("x", torch.float32, ("rows", 24)), Input("y", torch.float32, ("rows", 24), padding=9)]
    runner = GraphRunner(lambda x, y: x * 2 + y, inputs, BUCKETS, backend=device)
    for size in (3, 13, 1, 6):
        x, y = torch.randn(size, 24), torch.randn(size, 24)
        expected = x * 2 + y
        for values in ({"x": x, "y": y}, {"x": x.to(device), "y": y}, {"x": x.to(device), "y": y.to(device)}):
            assert torch.equal(runner(**values).cpu(), expected)


def test_the_largest_is_captured_first_and_memory_is_shared(device: str) -> None:
    runner = make_runner(device)
    assert [key.size for key in runner.keys] == sorted(BUCKETS, reverse=True)
    runner.capture()
    alone = GraphRunner(runner._captures.fn, [Input("x", torch.float32, ("rows", 24))], [13], backend=device)
    alone.capture()
    assert runner.stats.graphs == len(BUCKETS)
    if device == "cpu":
        assert runner.stats.graph_bytes == alone.stats.graph_bytes > 0


def test_outputs_are_overwritten_by_the_next_call_unless_owned(device: str) -> None:
    runner = make_runner(device)
    borrowed, owned = runner(x=torch.zeros(4, 24)), runner(x=torch.zeros(4, 24), own=True)
    before = owned.clone()
    runner(x=torch.ones(4, 24))
    assert torch.equal(owned, before)
    assert not torch.equal(borrowed, before)


def test_any_structure_of_outputs_is_cut_to_the_true_sizes(device: str) -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> dict:
        return {"scores": x @ w.T, "pair": (x.sum(1), w.sum())}

    runner = GraphRunner(
        fn,
        [Input("x", torch.float32, ("rows", 3)), Input("w", torch.float32, ("cols", 3))],
        [4],
        axes={"cols": lambda rows: 2 * rows},
        output_axes=[("rows", "cols"), ("rows",), ()],
        backend=device,
    )
    x, w = torch.randn(3, 3), torch.randn(5, 3)
    out = runner(x=x, w=w)
    torch.testing.assert_close(out["scores"].cpu(), x @ w.T)
    torch.testing.assert_close(out["pair"][0].cpu(), x.sum(1))
    torch.testing.assert_close(out["pair"][1].cpu(), w.sum())


def test_families_and_static_arguments_have_graphs_of_their_own(device: str) -> None:
    def fn(family: str, scale: int, x: torch.Tensor) -> torch.Tensor:
        return x * scale + (1 if family == "a" else 2)

    runner = GraphRunner(
        fn, [Input("x", torch.float32, ("n",))], {"a": [2], "b": 8}, static={"scale": (1, 3)}, backend=device
    )
    runner.capture()
    assert runner.stats.captures == 2 * (1 + 4)
    x = torch.arange(2.0)
    for family, add in (("a", 1), ("b", 2)):
        for scale in (1, 3):
            assert torch.equal(runner(family=family, scale=scale, x=x).cpu(), x * scale + add)
    assert runner.stats.hit_rate == 1.0
    for wrong in ({"family": "c", "scale": 1}, {"family": "a", "scale": 2}, {"family": "a"}):
        with pytest.raises(InputError):
            runner(x=x, **wrong)


def test_misses_are_counted_by_reason(device: str) -> None:
    runner = make_runner(device, max_padding_ratio=0.2, capture_on_first_use=False)
    for size in (14, 5, 4, 4, 14):
        runner(x=torch.zeros(size, 24))
    assert runner.stats.misses == {Reason.ABOVE_THRESHOLD: 2, Reason.PADDING_RATIO: 1, Reason.NOT_CAPTURED_YET: 2}
    assert runner.stats.eager_steps == runner.stats.steps == 5
    assert runner.stats.replay_seconds == 0
    off = make_runner(device, enabled=False)
    off.capture()
    off(x=torch.zeros(2, 24))
    assert off.stats.misses == {Reason.DISABLED: 1}
    assert off.stats.graphs == 0


def test_a_first_use_captures_and_the_next_is_a_hit(device: str) -> None:
    runner = make_runner(device)
    x = torch.randn(3, 24)
    first, second = runner(x=x, own=True), runner(x=x, own=True)
    assert torch.equal(first, second)
    assert runner.stats.misses == {Reason.NOT_CAPTURED_YET: 1}
    assert runner.stats.replays == 2
    assert runner.stats.padding_ratio == 0.25
    assert runner.stats.replay_seconds > 0
    runner.stats.reset_steps()
    assert runner.stats.replay_seconds == 0
    assert runner.stats.graphs == 1


# Hazards: what a graph repeats although the program around it has moved on.


def test_a_python_scalar_stays_what_it_was_at_capture(device: str) -> None:
    state = {"scale": 2.0}
    runner = GraphRunner(lambda x: x * state["scale"], [Input("x", torch.float32, ("n",))], [2], backend=device)
    x = torch.ones(2)
    assert runner(x=x).tolist() == [2.0, 2.0]
    state["scale"] = 3.0
    assert runner(x=x).tolist() == [2.0, 2.0]


def test_an_input_not_copied_into_its_buffer_is_not_seen(device: str) -> None:
    runner = GraphRunner(lambda x: x + 1, [Input("x", torch.float32, ("n",))], [2], backend=device)
    x = torch.zeros(2)
    first = runner(x=x, own=True)
    x += 5
    assert first.tolist() == [1.0, 1.0]
    assert runner(x=x).tolist() == [6.0, 6.0]


def test_state_on_the_device_advances_with_every_replay(device: str) -> None:
    state = torch.zeros(2, device=device)
    runner = GraphRunner(lambda x: state.add_(x).clone(), [Input("x", torch.float32, ("n",))], [2], backend=device)
    runner.capture()
    assert state.tolist() == [0.0, 0.0], "capture ran with padding alone"
    for step in range(1, 4):
        assert runner(x=torch.ones(2)).tolist() == [step, step]


def test_random_operators_give_new_numbers_at_each_replay(device: str) -> None:
    runner = GraphRunner(lambda x: x + torch.rand_like(x), [Input("x", torch.float32, ("n",))], [64], backend=device)
    runner.capture()
    torch.manual_seed(3)
    draws = [runner(x=torch.zeros(64), own=True) for _ in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    torch.manual_seed(3)
    assert torch.equal(runner(x=torch.zeros(64)), draws[0])


def test_a_capture_draws_no_random_numbers(device: str) -> None:
    """A seeded call that captures, and finds its outputs' axes, is the plain function as later calls are."""
    runner = GraphRunner(
        lambda x: x + torch.rand_like(x), [Input("x", torch.float32, ("n",))], [4], backend=device, strict=True
    )
    x = torch.zeros(4, device=device)
    for _ in range(3):
        torch.manual_seed(1)
        drawn = runner(x=x, own=True)
        torch.manual_seed(1)
        assert torch.equal(drawn, x + torch.rand_like(x))
        runner(x=x[:3])


def test_weights_changed_in_place_are_seen(device: str) -> None:
    weight = torch.eye(3, device=device)
    runner = GraphRunner(lambda x: x @ weight.T, [Input("x", torch.float32, ("n", 3))], [2], backend=device)
    runner.capture()
    weight.mul_(4)
    assert torch.equal(runner(x=torch.ones(2, 3)).cpu(), torch.full((2, 3), 4.0))


def test_weights_moved_after_capture_are_an_error(device: str) -> None:
    layer = torch.nn.Linear(3, 3, device=device)
    runner = GraphRunner(lambda x: layer(x), [Input("x", torch.float32, ("n", 3))], [2], backend=device)
    runner.capture()
    layer.weight.data = torch.zeros(3, 3, device=device)
    with pytest.raises(StaleAddressError, match=r"shape \(3, 3\).* moved"):
        runner(x=torch.ones(2, 3))


@pytest.mark.gpu
def test_memory_freed_after_capture_is_an_error() -> None:
    box = [torch.ones(3, device="cuda")]
    runner = GraphRunner(lambda x: x + box[0], [Input("x", torch.float32, ("n", 3))], [2], backend="cuda")
    runner.capture()
    box.clear()
    gc.collect()
    with pytest.raises(StaleAddressError, match="freed"):
        runner(x=torch.ones(2, 3))


def test_first_use_in_the_middle_leaves_other_graphs_right(device: str) -> None:
    """A larger graph captured late must not move or overwrite what earlier ones use."""
    runner = make_runner(device)
    x = {size: torch.randn(size, 24) for size in BUCKETS}
    before = {size: runner(x=x[size], own=True) for size in BUCKETS}
    for size in reversed(BUCKETS):
        assert torch.equal(runner(x=x[size]), before[size])


def test_a_step_that_leaves_the_next_ones_inputs_can_be_repeated(device: str) -> None:
    """A recurrence: each run adds its input to a sum and doubles the input in place."""
    total = torch.zeros(4, device=device)

    def step(x: torch.Tensor) -> torch.Tensor:
        total[: len(x)].add_(x)
        x.mul_(2)
        return x + 0

    inputs = [Input("x", torch.float32, ("n",))]
    runner = GraphRunner(step, inputs, [2, 4], backend=device)
    runner.capture()
    for size, repeats in ((3, 4), (1, 1), (2, 3)):
        for enabled in (True, False):
            each = runner if enabled else GraphRunner(step, inputs, [4], backend=device, enabled=False)
            total.zero_()
            x = torch.arange(1.0, size + 1)
            last = each(x=x, repeats=repeats, own=True)
            assert torch.equal(last.cpu(), x * 2**repeats)
            assert torch.equal(total[:size].cpu(), x * (2**repeats - 1))
            assert torch.equal(x, torch.arange(1.0, size + 1)), "the caller's tensor was changed"
    assert runner.stats.steps == runner.stats.replays == 8
    assert runner.stats.rows == 3 * 4 + 1 + 2 * 3


def test_an_optional_input_that_is_left_out_is_padding(device: str) -> None:
    inputs = [
        Input("x", torch.float32, ("n",)),
        Input("extra", torch.float32, ("n",), padding=5.0, optional=True),
        Input("others", torch.int64, ("m",), padding=-1, optional=True),
    ]

    def step(x: torch.Tensor, extra: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return x + extra + (others >= 0).sum()

    for enabled in (True, False):
        runner = GraphRunner(step, inputs, [4], axes={"m": 3}, backend=device, enabled=enabled)
        x, extra, others = torch.ones(2), torch.full((2,), 10.0), torch.tensor([7, 8])
        for _ in range(STAGING_BUFFERS + 1):
            assert runner(x=x, own=True).tolist() == [6.0, 6.0]
            assert runner(x=x, extra=extra, own=True).tolist() == [11.0, 11.0]
            assert runner(x=x, others=others, own=True).tolist() == [8.0, 8.0]
        with pytest.raises(InputError, match="missing: \\['x'\\]"):
            runner(extra=extra)
