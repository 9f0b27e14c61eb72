"""Carried inputs are state: warm-up, capture and padding leave them as they are."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph import GraphRunner, Input, InputError, outside_graph

COUNT = [
    Input("x", torch.float32, ("n",)),
    Input("total", torch.int64, (), carried=True),
    Input("rows", torch.int64, (), size_of="n"),
]


def count(x: torch.Tensor, total: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    total.add_(rows)
    return x + total


@pytest.mark.parametrize("enabled", [True, False])
def test_a_counter_counts_true_rows_however_steps_run(device: str, enabled: bool) -> None:
    """Captured at first use, replayed with padding, and run eagerly above the threshold."""
    runner = GraphRunner(count, COUNT, [2, 4], backend=device, enabled=enabled)
    seen = [runner(x=torch.zeros(rows), own=True)[0].item() for rows in (1, 2, 3, 5, 1, 4)]
    assert seen == [1, 3, 6, 11, 12, 16]
    runner.capture()
    assert runner(x=torch.zeros(1), repeats=3, own=True).item() == 19
    assert runner(x=torch.zeros(1), total=torch.tensor(5)).item() == 6, "a call may set it"
    runner.carried["total"].zero_()
    assert runner(x=torch.zeros(2))[0].item() == 2
    assert runner(x=torch.zeros(0)).shape == (0,)
    assert runner.carried["total"].item() == 2


def recurrent(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    h.mul_(0.5).add_(x + 1)
    return h * 2


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3))


@given(st.lists(SIZES, min_size=1, max_size=12), st.booleans())
def test_rows_beyond_the_true_size_keep_their_state(steps: list[tuple[int, int]], captured: bool) -> None:
    inputs = [Input("x", torch.float32, ("n", "m")), Input("h", torch.float32, ("n", "m"), padding=3.0, carried=True)]
    runner = GraphRunner(recurrent, inputs, {"n": [2, 4], "m": [3]}, backend="cpu", strict=True)
    if captured:
        runner.capture()
    state = torch.full((4, 3), 3.0)
    for rows, columns in steps:
        x = torch.randn(rows, columns)
        expected = recurrent(x, state[:rows, :columns])
        assert torch.equal(runner(x=x), expected)
        assert torch.equal(runner.carried["h"], state)


def test_streams_come_and_go_in_a_batch_of_recurrent_states(device: str) -> None:
    cell = torch.nn.GRUCell(3, 5).to(device)

    def step(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return h.copy_(cell(x, h)).clone()

    inputs = [Input("x", torch.float32, ("n", 3)), Input("h", torch.float32, ("n", 5), carried=True)]
    runner = GraphRunner(step, inputs, [1, 2, 4], backend=device, strict=True)
    state = torch.zeros(4, 5, device=device)
    with torch.inference_mode():
        for rows in (4, 3, 1, 2, 4):
            x = torch.randn(rows, 3, device=device)
            torch.testing.assert_close(runner(x=x), step(x, state[:rows]))
        runner.carried["h"][1].zero_()
        state[1].zero_()
        x = torch.randn(2, 3)
        torch.testing.assert_close(runner(x=x), step(x.to(device), state[:2]))


def test_an_error_in_a_step_leaves_rows_beyond_its_own_alone(device: str) -> None:
    @outside_graph
    def check(x: torch.Tensor) -> torch.Tensor:
        if x.max().item() > 9:
            raise ArithmeticError("too large")
        return x.clone()

    inputs = [Input("x", torch.float32, ("n",)), Input("h", torch.float32, ("n",), carried=True)]
    runner = GraphRunner(lambda x, h: check(h.add_(1) + x), inputs, [4], backend=device, strict=True)
    runner(x=torch.zeros(4))
    with pytest.raises(ArithmeticError):
        runner(x=torch.full((2,), 10.0))
    assert runner.carried["h"][2:].tolist() == [1.0, 1.0]


def test_run_eagerly_takes_the_same_step(device: str) -> None:
    runner = GraphRunner(count, COUNT, [4], backend=device)
    first = runner(x=torch.zeros(3), own=True)
    runner.carried["total"].zero_()
    assert torch.equal(runner.run_eagerly(runner.keys[0], x=torch.zeros(3)), first)
    assert runner.carried["total"].item() == 3


def test_verify_leaves_state_as_it_was(device: str) -> None:
    runner = GraphRunner(count, COUNT, [4], backend=device)
    runner(x=torch.zeros(3))
    assert runner.verify(x=torch.zeros(2)).ok
    assert runner.carried["total"].item() == 3


def test_more_rows_than_the_state_has_are_refused(device: str) -> None:
    inputs = [Input("x", torch.float32, ("n",)), Input("h", torch.float32, ("n",), carried=True)]
    runner = GraphRunner(recurrent, inputs, [2, 4], backend=device)
    with pytest.raises(InputError, match="axis 'n' has size 5; carried inputs have room for 4"):
        runner(x=torch.zeros(5))
    with pytest.raises(InputError, match=r"missing: \['x'\]"):
        runner()


def test_a_function_that_padding_alone_cannot_run_is_captured_on_its_example(device: str) -> None:
    bag = torch.nn.EmbeddingBag(10, 4, mode="sum", include_last_offset=True).to(device)

    def offsets_at(sizes: dict[str, int]) -> torch.Tensor:
        return torch.linspace(0, sizes["ids"], sizes["bags"]).long()

    inputs = [
        Input("ids", torch.int64, ("ids",)),
        Input("offsets", torch.int64, ("bags",), padding=16, example=offsets_at),
    ]
    runner = GraphRunner(
        lambda ids, offsets: bag(ids, offsets), inputs, [2, 5], axes={"ids": 16}, backend=device, strict=True
    )
    ids, offsets = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 4])
    torch.testing.assert_close(runner(ids=ids, offsets=offsets), bag(ids.to(device), offsets.to(device)).detach())


WRONG: dict[str, Callable[[], Input]] = {
    "a state that is a size": lambda: Input("x", torch.int64, (), carried=True, size_of="n"),
    "a size with a shape": lambda: Input("x", torch.int64, ("n",), size_of="n"),
    "a size in floats": lambda: Input("x", torch.float32, (), size_of="n"),
    "padding above the range": lambda: Input("x", torch.int8, ("n",), padding=300),
    "negative padding": lambda: Input("x", torch.uint8, ("n",), padding=-1),
    "a fraction": lambda: Input("x", torch.int64, ("n",), padding=0.5),
    "NaN in integers": lambda: Input("x", torch.int64, ("n",), padding=float("nan")),
    "above a half's range": lambda: Input("x", torch.float16, ("n",), padding=1e6),
    "a truth value of 2": lambda: Input("x", torch.bool, ("n",), padding=2),
    "no dtype": lambda: Input("x", float, ("n",)),
    "an axis that is no name": lambda: Input("x", torch.float32, (None,)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_declaration_that_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="input 'x'"):
        WRONG[name]()


def test_an_example_of_another_shape_is_refused(device: str) -> None:
    inputs = [Input("x", torch.float32, ("n",), example=lambda sizes: torch.zeros(3))]
    with pytest.raises(InputError, match=r"example of input 'x' is torch.float32 \(3,\).*\(2,\)"):
        GraphRunner(lambda x: x, inputs, [2], backend=device).capture()
