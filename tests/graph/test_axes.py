"""Several bucketed axes, and sizes that follow static arguments."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph import GraphKey, GraphRunner, Input, InputError, Reason
from graphmode.graph.axes import volume
from graphmode.graph.dispatch import DispatchPolicy, Mode, dispatch

INPUTS = [Input("x", torch.float32, ("batch", "length", 3)), Input("keep", torch.float32, ("batch", "length"))]


def pooled(x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the true tokens, which are those to keep, and all tokens with the axes exchanged."""
    return (x * keep.unsqueeze(-1)).sum(1), x.transpose(0, 1)


def test_batch_and_length_select_the_graph_together(device: str) -> None:
    runner = GraphRunner(pooled, INPUTS, {"batch": [1, 4], "length": [8, 16]}, backend=device, strict=True)
    runner.capture()
    assert [key.size for key in runner.keys] == [(4, 16), (4, 8), (1, 16), (1, 8)]
    for batch, length, bucket in ((3, 5, (4, 8)), (1, 9, (1, 16)), (1, 8, (1, 8)), (4, 16, (4, 16))):
        x, keep = torch.randn(batch, length, 3), torch.ones(batch, length)
        decision = runner.decide((batch, length))
        assert decision.key == GraphKey("default", bucket)
        assert decision.padding == volume(bucket) - batch * length
        sums, turned = runner(x=x, keep=keep, own=True)
        torch.testing.assert_close((sums.cpu(), turned.cpu()), pooled(x, keep))
        eager = runner.run_eagerly(decision.key, x=x, keep=keep)
        assert torch.equal(sums, eager[0])
        assert torch.equal(turned, eager[1])
    assert runner.stats.hit_rate == 1
    assert runner(x=torch.ones(5, 3, 3), keep=torch.ones(5, 3))[0].shape == (5, 3)
    assert runner.stats.misses == {Reason.ABOVE_THRESHOLD: 1}


def test_families_have_axes_of_their_own_buckets(device: str) -> None:
    runner = GraphRunner(
        lambda family, x, keep: x.sum(1) + (1 if family == "a" else 2),
        INPUTS,
        {"a": {"batch": 2, "length": [4]}, "b": {"batch": [3], "length": [8]}},
        backend=device,
    )
    runner.capture()
    assert {(key.family, key.size) for key in runner.keys} == {("a", (1, 4)), ("a", (2, 4)), ("b", (3, 8))}
    assert runner(family="b", x=torch.zeros(2, 5, 3), keep=torch.ones(2, 5)).tolist() == [[2.0] * 3] * 2


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(st.sets(sizes, min_size=1), sizes, st.data())
def test_the_smallest_graph_that_holds_all_axes_serves(buckets: set[tuple], size: tuple, data: st.DataObject) -> None:
    policy = DispatchPolicy({"f": tuple(sorted(buckets, key=lambda bucket: (volume(bucket), bucket)))})
    full = data.draw(st.sets(st.sampled_from(sorted(buckets))))
    captured = {GraphKey("f", bucket): None for bucket in buckets - full}
    failed = {GraphKey("f", bucket): Reason.OUT_OF_GRAPHS for bucket in full}
    decision = dispatch(size, policy, captured, failed, "f")
    holding = [bucket for bucket in buckets - full if all(map(int.__ge__, bucket, size))]
    if holding:
        assert decision.mode is Mode.REPLAY
        assert decision.key is not None
        assert decision.key.size in holding
        assert volume(decision.key.size) == min(map(volume, holding))
        assert decision.padding == volume(decision.key.size) - volume(size)
    else:
        assert decision.mode is Mode.EAGER
        assert decision.reason in (Reason.OUT_OF_GRAPHS, Reason.ABOVE_THRESHOLD)


def test_an_axis_may_follow_a_static_argument(device: str) -> None:
    runner = GraphRunner(
        lambda x, steps, width: x.sum() + steps.sum() * width,
        [Input("x", torch.float32, ("n",)), Input("steps", torch.float32, ("k",))],
        [4],
        axes={"k": lambda width: 2 * width},
        output_axes=[()],
        static={"width": (1, 3)},
        backend=device,
        strict=True,
    )
    runner.capture()
    assert runner(x=torch.ones(2), steps=torch.ones(6), width=3).item() == 20
    assert runner(x=torch.ones(2), steps=torch.ones(2), width=1).item() == 4
    with pytest.raises(InputError, match="axis 'k' has size 3; its limit at this bucket is 2"):
        runner(x=torch.ones(2), steps=torch.ones(3), width=1)


@pytest.mark.parametrize("rows", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("enabled", [True, False])
def test_no_rows_give_empty_outputs(device: str, rows: tuple[int, int], enabled: bool) -> None:
    """What still has elements, as the sums over no tokens, is computed; else nothing runs."""
    runner = GraphRunner(pooled, INPUTS, {"batch": [4], "length": [8]}, backend=device, enabled=enabled)
    runner(x=torch.ones(4, 8, 3), keep=torch.ones(4, 8))
    before = runner.stats.steps
    x, keep = torch.zeros(*rows, 3), torch.zeros(*rows)
    for got, expected in zip(runner(x=x, keep=keep), pooled(x, keep), strict=True):
        assert torch.equal(got.cpu(), expected)
    assert runner.stats.steps == before + (enabled and rows == (3, 0))


def test_a_sum_over_no_rows_is_zero(device: str) -> None:
    runner = GraphRunner(
        lambda x: (x.sum(0), x + 1), [Input("x", torch.float32, ("n", 2))], [4], backend=device, strict=True
    )
    assert runner(x=torch.ones(3, 2))[0].tolist() == [3.0, 3.0]
    total, rows = runner(x=torch.ones(0, 2))
    assert total.tolist() == [0.0, 0.0]
    assert rows.shape == (0, 2)
