"""Calls: nested values, arrays, what an output is, threads, copies, and refusals by name."""

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from graphmode.graph import GraphKey, GraphModeError, GraphRunner, Input, InputError

X = Input("x", torch.float32, ("n",))


@dataclass(frozen=True)
class Observation:
    image: Any
    joints: Any


class Joints(NamedTuple):
    position: Any
    velocity: Any


def act(seen: Observation, goal: dict[str, torch.Tensor]) -> Observation:
    step = seen.joints.position + seen.image.sum(1) * goal["where"]
    return Observation(step, {"stop": step > 3, "joints": Joints(step, seen.joints.velocity * 2)})


NESTED = {
    "seen": Observation(
        Input("image", torch.float32, ("n", 3)),
        Joints(Input("position", torch.float32, ("n",)), Input("velocity", torch.float64, ("n",), optional=True)),
    ),
    "goal": {"where": Input("where", torch.float32, ("n",))},
}


def observation(rows: int) -> Observation:
    return Observation(torch.rand(rows, 3), Joints(torch.rand(rows), torch.rand(rows, dtype=torch.float64)))


def test_static_arguments_stand_beside_nested_inputs(device: str) -> None:
    def double_if(seen: Observation, goal: dict[str, torch.Tensor], double: bool) -> torch.Tensor:
        return seen.joints.position * (2 if double else 1)

    runner = GraphRunner(double_if, NESTED, [2, 4], static={"double": (False, True)}, backend=device, strict=True)
    seen, goal = observation(3), {"where": torch.rand(3)}
    for double in (False, True, False):
        got = runner(seen=seen, goal=goal, double=double, own=True)
        assert torch.equal(got.cpu(), seen.joints.position * (2 if double else 1))
    with pytest.raises(InputError, match="'other' is not declared"):
        runner(seen=seen, goal=goal, double=True, other=1)


def test_values_and_outputs_nest_as_declared(device: str) -> None:
    runner = GraphRunner(act, NESTED, [2, 4], backend=device, strict=True)
    for rows in (3, 2, 5):
        seen, goal = observation(rows), {"where": torch.rand(rows)}
        got, expected = runner(seen=seen, goal=goal, own=True), act(seen, goal)
        assert isinstance(got, Observation)
        assert isinstance(got.joints["joints"], Joints)
        torch.testing.assert_close(got.image.cpu(), expected.image)
        torch.testing.assert_close([each.cpu() for each in got.joints["joints"]], list(expected.joints["joints"]))
        assert got.joints["stop"].tolist() == expected.joints["stop"].tolist()
    seen = Observation(torch.ones(2, 3), Joints(torch.ones(2), None))
    assert runner(seen=seen, goal={"where": torch.ones(2)}).joints["joints"].velocity.tolist() == [0.0, 0.0]
    key = runner.keys[0]
    assert torch.equal(
        runner.run_eagerly(key, seen=seen, goal={"where": torch.ones(2)}).image.cpu(), torch.full((2,), 4.0)
    )
    assert runner.verify(seen=seen, goal={"where": torch.ones(2)}).ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seen": (1, 2)}, "input seen is a tuple of 2 values; it is declared as a Observation"),
        ({"seen": Observation(torch.ones(2, 3), (torch.ones(2),))}, "input seen.joints is a tuple of 1 values"),
        ({"goal": {"where": torch.ones(2), "when": 1}}, r"input goal has the keys \['when'\]"),
        ({"goal": {}}, r"missing: \['where'\]"),
        ({"goal": {"where": [1.0, 2.0]}}, "input 'where' is list"),
        ({"more": 1}, "argument 'more' is not declared"),
    ],
)
def test_values_that_nest_otherwise_are_refused_by_path(change: dict, message: str) -> None:
    runner = GraphRunner(act, NESTED, [2], backend="cpu")
    with pytest.raises(InputError, match=message):
        runner(**{"seen": observation(2), "goal": {"where": torch.ones(2)}, **change})


def test_arrays_are_taken_as_tensors_are(device: str) -> None:
    runner = GraphRunner(lambda x, k: x * k, [X, Input("k", torch.int64, ())], [4], backend=device)
    read_only = np.arange(3, dtype=np.float32)
    read_only.flags.writeable = False
    for x in (np.arange(3, dtype=np.float32), np.arange(3, dtype=np.float32)[::-1], read_only):
        assert runner(x=x, k=np.int64(2)).tolist() == (2 * x).tolist()
    with pytest.raises(InputError, match=r"'x' has dtype torch\.float64"):
        runner(x=np.zeros(3), k=np.int64(2))


class Trained(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight, x * self.weight.sum()


@pytest.mark.parametrize("own", [True, False])
def test_a_step_without_a_graph_returns_the_same_kind_of_tensor(device: str, own: bool) -> None:
    net = Trained().to(device)
    runner = GraphRunner(lambda x: net(x), [X], [4], output_axes=[(), ("n",)], backend=device)
    for replayed, eager in zip(runner(x=torch.ones(3), own=own), runner(x=torch.ones(9), own=own), strict=True):
        for output in (replayed, eager):
            assert type(output) is torch.Tensor
            assert not output.requires_grad
            assert output.device.type == device
            assert not own or output.data_ptr() != net.weight.data_ptr()
        assert replayed.is_inference() == eager.is_inference()


def test_static_values_of_different_types_have_graphs_of_their_own(device: str) -> None:
    values = (1, 1.0, True, 0.0, -0.0, (1,), (1.0,), None, "1")
    seen = []

    def fn(x: torch.Tensor, k: object) -> torch.Tensor:
        seen.append(repr(k))
        return x + len(set(seen))

    runner = GraphRunner(fn, [X], [2], static={"k": values}, output_axes=[("n",)], backend=device, strict=True)
    first = [runner(x=torch.zeros(1), k=value).item() for value in values]
    assert first == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [runner(x=torch.zeros(1), k=value).item() for value in values] == first
    assert runner.stats.captures == len(values)


def test_threads_that_own_their_outputs_take_turns(device: str) -> None:
    runner = GraphRunner(lambda x: (x * 3 + 1).relu() - 1, [X], [1, 2, 4, 8], backend=device)
    wrong: list[object] = []

    def work(number: int) -> None:
        for at in range(60):
            x = torch.full((1 + (at + number) % 9,), float(number * 100 + at))
            try:
                if not torch.equal(runner(x=x, own=True).cpu(), x * 3):
                    wrong.append((number, at))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert runner.stats.steps == 240


def test_outputs_that_a_thread_still_holds_are_not_overwritten_by_another(device: str) -> None:
    runner = GraphRunner(lambda x: x + 1, [X], [2], backend=device)
    held = runner(x=torch.zeros(2))
    errors: list[Exception] = []

    def call() -> None:
        try:
            runner(x=torch.ones(2))
        except GraphModeError as error:
            errors.append(error)

    def in_a_thread() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    in_a_thread()
    assert "called from two threads" in str(errors[0])
    assert held.tolist() == [1.0, 1.0]
    del held
    in_a_thread()
    assert len(errors) == 1, "nobody holds them any more"
    eager = runner(x=torch.zeros(3))
    in_a_thread()
    assert len(errors) == 1, "no call overwrites what an eager step returned"
    assert eager.tolist() == [1.0] * 3


def test_a_runner_that_its_own_function_calls_is_refused(device: str) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return runner(x=x)

    runner = GraphRunner(fn, [X], [2], backend=device, enabled=False)
    with pytest.raises(GraphModeError, match="inside of its own call"):
        runner(x=torch.zeros(2))
    runner._captures.fn = lambda x: x + 1
    assert runner(x=torch.zeros(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_runner_cannot_be_copied(make: Callable[[object], object]) -> None:
    module = torch.nn.Linear(3, 3)
    module.runner = GraphRunner(module.forward, [Input("input", torch.float32, ("n", 3))], [2], backend="cpu")
    with pytest.raises(GraphModeError, match=r"Linear\.forward cannot be copied or pickled"):
        make(module.runner if make is copy.copy else module)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "an input called own": (lambda: GraphRunner(print, [Input("own", torch.float32, ("n",))], [2]), "'own'"),
    "a static called repeats": (lambda: GraphRunner(print, [X], [2], static={"repeats": (1,)}), "'repeats'"),
    "a name twice": (lambda: GraphRunner(print, [X], [2], static={"x": (1,)}), "both as inputs and as static"),
    "unhashable": (
        lambda: GraphRunner(print, [X], [2], static={"k": ([1],)}),
        r"\[1\], a list, which cannot be hashed",
    ),
    "no values": (lambda: GraphRunner(print, [X], [2], static={"k": ()}), "'k' is declared without values"),
    "no input": (lambda: GraphRunner(print, ["x"], [2]), "'x' is among the inputs"),
    "no leaf": (lambda: GraphRunner(print, {"x": (X, 3)}, [2]), "3 stands in a tree of inputs"),
    "another signature": (lambda: GraphRunner(lambda y: y, [X], [2]), "missing a required argument: 'y'"),
    "sparse": (lambda: runner_of_x()(x=torch.ones(2).to_sparse()), "is a sparse_coo tensor"),
    "nested": (lambda: runner_of_x()(x=torch.nested.nested_tensor([torch.ones(2)])), "is a nested tensor"),
    "an unknown static": (lambda: runner_of_x().capture(level=3), "'level' is not declared"),
    "letters for a shape": (lambda: Input("x", torch.float32, "batch"), r"shape 'batch'; give a tuple"),
    "a number for a shape": (lambda: Input("x", torch.float32, 3), "shape 3; give a tuple"),
    "a number for a name": (lambda: Input(3, torch.float32, ("n",)), "an input is called 3"),
    "infinity that is none": (
        lambda: Input("x", torch.float8_e4m3fn, ("n",), padding=torch.inf),
        "padded with inf, which torch.float8_e4m3fn cannot hold",
    ),
    "no bucketed axis": (lambda: GraphRunner(print, [Input("x", torch.float32, (3,))], [1]), r"buckets=\[3\]"),
    "a fraction for buckets": (lambda: GraphRunner(print, [X], 4.0), "buckets are 4.0; give a list of sizes"),
    "a text for buckets": (lambda: GraphRunner(print, [X], "4"), "buckets are '4'; give a list of sizes"),
    "no axis of that name": (
        lambda: GraphRunner(lambda x: x, [X], {"m": [2]}),
        r"the keys of buckets=\['m'\] are not the bucketed axes",
    ),
    "a foreign array": (lambda: runner_of_x()(x=np.ones(2, ">f4")), "'x' is an array of .*no tensor can hold"),
    "an array of objects": (lambda: runner_of_x()(x=np.array([None, 1])), "'x' is an array of dtype"),
    "no repeats": (lambda: runner_of_x()(x=torch.ones(2), repeats=0), "repeats is 0"),
    "a fraction of repeats": (lambda: runner_of_x()(x=torch.ones(2), repeats=1.5), "repeats is 1.5"),
    "a fraction for a size": (lambda: runner_of_x().decide(1.5), r"size is 1.5; give a number of .* \['n'\]"),
    "two numbers for a size": (lambda: runner_of_x().decide((1, 2)), r"size is \(1, 2\); give a number"),
    "a negative size": (lambda: runner_of_x().decide(-1), "size is -1"),
    "a size for a key": (lambda: runner_of_x().run_eagerly(2, x=torch.ones(2)), "2 is no key of this runner"),
    "a key of no bucket": (
        lambda: runner_of_x().run_eagerly(GraphKey("default", 3), x=torch.ones(2)),
        "size=3.* is no key of this runner",
    ),
    "an unhashable static value": (
        lambda: GraphRunner(lambda x, k: x, [X], [2], static={"k": (1,)}, backend="cpu")(x=torch.ones(2), k=[1]),
        r"'k' is \[1\], a list; declared values are \(1,\)",
    ),
}


def runner_of_x() -> GraphRunner:
    return GraphRunner(lambda x: x, [X], [2], backend="cpu")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        make()
