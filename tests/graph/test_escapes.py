"""What a function makes and keeps is refused by name and undone; constants that it makes once are not."""

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphmode.graph import CaptureError, GraphRunner, Input, Reason, StaleAddressError, outside_graph

INPUT = [Input("x", torch.float32, ("rows", 4), padding=1)]
GLOBAL: Any = None


class Slotted:
    __slots__ = ("h",)


class Class:
    h: Any = None


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("h", torch.zeros(2, 4))


def attribute(state: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: state.h, lambda value: setattr(state, "h", value)


def element(state: Any, key: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: state[key], lambda value: state.__setitem__(key, value)


def closure() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    kept: Any = None

    def write(value: Any) -> None:
        nonlocal kept
        kept = value

    return lambda: kept, write


def a_global() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    def write(value: Any) -> None:
        global GLOBAL
        GLOBAL = value

    return lambda: GLOBAL, write


def nested() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    state = SimpleNamespace(pair=None)
    return lambda: state.pair and state.pair[0], lambda value: setattr(state, "pair", (value, value + 1))


# Where a result is kept, and what the message says of it.
PLACES: dict[str, tuple[Callable[[], tuple[Callable[[], Any], Callable[[Any], None]]], str]] = {
    "attribute": (lambda: attribute(SimpleNamespace(h=None)), r"state\.h"),
    "slot": (lambda: attribute(Slotted()), r"state\.h"),
    "class": (lambda: attribute(Class), r"Class\.h"),
    "buffer": (lambda: attribute(Module()), r"state\.h"),
    "dict": (lambda: element({"h": None}, "h"), r"state\['h'\]"),
    "list": (lambda: element([None], 0), r"state\[0\]"),
    "deque": (lambda: element(deque([None]), 0), r"state\[0\]"),
    "closure": (closure, "kept"),
    "global": (a_global, "GLOBAL"),
    "tuple": (nested, r"state\.pair"),
}


def step_over(read: Callable[[], Any], write: Callable[[Any], None]) -> Callable[..., torch.Tensor]:
    def step(x: torch.Tensor) -> torch.Tensor:
        write(torch.tanh(read() + x))
        return read() * 1

    return step


@pytest.mark.parametrize("name", PLACES)
def test_state_that_is_replaced_is_refused_by_name_and_then_eager_steps_are_right(device: str, name: str) -> None:
    make, named = PLACES[name]
    read, write = make()
    write(torch.zeros(2, 4, device=device))
    with pytest.raises(CaptureError, match=rf"{named} is a result that outlives the call: aten::(tanh|add)"):
        GraphRunner(step_over(read, write), INPUT, [2], backend=device, strict=True).capture()
    assert torch.equal(read().cpu(), torch.zeros(2, 4)), "the warm-up's value is put back"
    runner = GraphRunner(step_over(read, write), INPUT, [2], backend=device)
    expected = torch.zeros(2, 4, device=device)
    for _ in range(3):
        x = torch.randn(2, 4)
        expected = torch.tanh(expected + x.to(device))
        assert torch.equal(runner(x=x), expected)
    assert runner.stats.misses == {Reason.CAPTURE_FAILED: 3}


def test_two_states_of_one_shape_are_put_back_each(device: str) -> None:
    state = SimpleNamespace(h=torch.zeros(2, 4, device=device), c=torch.ones(2, 4, device=device), count=0)

    def step(x: torch.Tensor) -> torch.Tensor:
        state.count += 1
        state.h, state.c = state.c * x, state.h + x
        return state.h * state.c

    runner = GraphRunner(step, INPUT, [2], backend=device)
    x = torch.full((2, 4), 3.0)
    assert torch.equal(runner(x=x).cpu(), torch.full((2, 4), 9.0))
    assert state.count == 1


def test_state_is_put_back_whatever_the_capture_failed_of(device: str) -> None:
    state = SimpleNamespace(h=torch.zeros(2, 4, device=device))

    def step(x: torch.Tensor) -> torch.Tensor:
        state.h = state.h + x
        return state.h * x.sum().item()

    runner = GraphRunner(step, INPUT, [2], backend=device)
    assert torch.equal(runner(x=torch.ones(2, 4)).cpu(), torch.full((2, 4), 8.0))
    assert torch.equal(runner(x=torch.ones(2, 4)).cpu(), torch.full((2, 4), 16.0))


def _append(kept: Any, value: Any) -> None:
    kept.append(value)


KEEP: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "also_returned": lambda kept, x: (y := x * 2, _append(kept, y))[0],
    "view": lambda kept, x: (y := x * 2, _append(kept, y[:1]))[0] + 1,
    "data": lambda kept, x: (y := x * 2, _append(kept, y.data))[0] + 1,
    "storage_of_an_object": lambda kept, x: (y := x * 2, _append(kept, SimpleNamespace(y=y)))[0] + 1,
    "constant_each_time": lambda kept, x: (y := torch.ones_like(x), _append(kept, y))[0] + x,
    "cycle": lambda kept, x: (y := x * 2, holder := [y], holder.append(holder), _append(kept, holder))[0] + 1,
}


@pytest.mark.parametrize("name", KEEP)
def test_results_that_are_kept_are_refused(device: str, name: str) -> None:
    kept: list[Any] = []
    with pytest.raises(CaptureError, match="outlives the call"):
        GraphRunner(lambda x: KEEP[name](kept, x), INPUT, [2], backend=device, strict=True).capture()
    assert not kept or name == "constant_each_time"


def test_cycles_that_nobody_holds_are_no_escape(device: str) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        holder: list[Any] = [y]
        holder.append(holder)
        return y + 1

    runner = GraphRunner(fn, INPUT, [2], backend=device, strict=True)
    assert torch.equal(runner(x=torch.ones(2, 4)).cpu(), torch.full((2, 4), 3.0))


CONSTANTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "arange": lambda x: torch.arange(4, device=x.device, dtype=x.dtype),
    "mask": lambda x: torch.ones_like(x[0, :, None] * x[0]).tril().logical_not(),
    "rotary": lambda x: torch.outer(torch.arange(4.0, device=x.device), x.new_ones(4) / 7).cos(),
    "filled": lambda x: x.new_zeros(4).fill_(3),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_made_at_the_first_run_are_kept(device: str, name: str) -> None:
    state = SimpleNamespace(cached=None)

    def fn(x: torch.Tensor) -> torch.Tensor:
        if state.cached is None:
            state.cached = CONSTANTS[name](x)
        return x @ (state.cached + torch.zeros(4, 4, device=x.device))

    runner = GraphRunner(fn, INPUT, [2, 4], backend=device, strict=True)
    runner.capture()
    for rows in (2, 4, 1):
        x = torch.randn(rows, 4)
        key = runner.decide(rows).key
        assert key is not None
        assert torch.equal(runner(x=x, own=True), runner.run_eagerly(key, x=x))


def test_what_the_first_run_computes_from_its_inputs_is_no_constant(device: str) -> None:
    state = SimpleNamespace(first=None)

    def fn(x: torch.Tensor) -> torch.Tensor:
        if state.first is None:
            state.first = x.mean()
        return x - state.first

    runner = GraphRunner(fn, INPUT, [2], backend=device)
    assert torch.equal(runner(x=torch.full((2, 4), 3.0)).cpu(), torch.zeros(2, 4))
    assert torch.equal(runner(x=torch.full((2, 4), 4.0)).cpu(), torch.ones(2, 4))
    assert "state.first is a result" in runner.stats.capture_failures[0].message


@pytest.mark.parametrize("each_time", [True, False])
def test_a_buffer_made_at_the_first_run_must_be_written_at_each(device: str, each_time: bool) -> None:
    state = SimpleNamespace(buffer=None)

    def fn(x: torch.Tensor) -> torch.Tensor:
        new = state.buffer is None
        if new:
            state.buffer = torch.zeros(2, 4, device=x.device)
        if new or each_time:
            state.buffer.copy_(x)
        return state.buffer + 1

    runner = GraphRunner(fn, INPUT, [2], backend=device)
    for value in (3.0, 5.0):
        seen = value if each_time else 3.0
        assert torch.equal(runner(x=torch.full((2, 4), value)).cpu(), torch.full((2, 4), seen + 1))
    assert bool(runner.failed) is not each_time


def test_results_of_calls_outside_the_graph_may_not_outlive_the_call_either(device: str) -> None:
    state = SimpleNamespace(h=torch.zeros(2, 4, device=device))

    @outside_graph
    def outside(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def fn(x: torch.Tensor) -> torch.Tensor:
        state.h = outside(state.h + x)
        return state.h * 1

    with pytest.raises(CaptureError, match=r"state\.h is a result that outlives the call"):
        GraphRunner(fn, INPUT, [2], backend=device, strict=True).capture()


def test_a_function_outside_the_graph_may_keep_state_but_not_its_arguments(device: str) -> None:
    state = SimpleNamespace(h=torch.zeros(2, 4, device=device))
    kept: list[torch.Tensor] = []

    @outside_graph
    def add(x: torch.Tensor) -> torch.Tensor:
        state.h = state.h + x
        return state.h

    @outside_graph
    def keep(x: torch.Tensor) -> None:
        kept.append(x)

    runner = GraphRunner(lambda x: add(x * 1) * 2, INPUT, [2], backend=device, strict=True)
    runner.capture()
    state.h = torch.zeros(2, 4, device=device)
    for total in (1.0, 2.0, 3.0):
        assert torch.equal(runner(x=torch.ones(2, 4)).cpu(), torch.full((2, 4), 2 * total))

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        keep(y)
        return y + 1

    with pytest.raises(CaptureError, match=r"kept\[\d\] is a result that outlives the call"):
        GraphRunner(fn, INPUT, [2], backend=device, strict=True).capture()


class Registry(dict):
    """It makes what it is asked for, as some packages load modules: nothing may be asked of it in passing."""

    def __getitem__(self, key: object) -> object:
        raise RuntimeError("made")

    keys = items = values = __iter__ = __contains__ = __getitem__  # type: ignore[assignment]


def test_a_mapping_that_makes_what_it_is_asked_for_is_left_alone(device: str) -> None:
    registry = Registry()
    dict.__setitem__(registry, "weight", torch.ones(4, device=device))

    def fn(x: torch.Tensor) -> torch.Tensor:
        return x + dict.__getitem__(registry, "weight")

    runner = GraphRunner(fn, INPUT, [2], backend=device, strict=True)
    for _ in range(2):
        assert torch.equal(runner(x=torch.ones(2, 4)).cpu(), torch.full((2, 4), 2.0))
    dict.__setitem__(registry, "weight", torch.zeros(4, device=device))
    with pytest.raises(StaleAddressError, match="registry\\['weight'\\]"):
        runner.check_addresses()
