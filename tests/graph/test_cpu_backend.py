"""The CPU tape: memory planning, and replays equal to eager over many operators."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph import GraphRunner, Input
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
