"""What surrounds a call and changes what a function computes is refused where graphs cannot follow it."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from graphmode.graph import GraphRunner, Input, InputError

INPUT = [Input("x", torch.float32, ("rows", 4))]


def make_runner(device: str) -> GraphRunner:
    layer = torch.nn.Linear(4, 4, device=device)
    return GraphRunner(lambda x: layer(x), INPUT, [2], backend=device)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda runner, x: runner(x=x),
        lambda runner, x: runner(x=x.repeat(3, 1)),
        lambda runner, x: runner.capture(),
        lambda runner, x: runner.recapture(),
        lambda runner, x: runner.run_eagerly(runner.keys[0], x=x),
        lambda runner, x: runner.verify(x=x),
    ],
    ids=["call", "eager", "capture", "recapture", "run_eagerly", "verify"],
)
def test_autocast_around_a_runner_is_refused(
    device: str, use: Callable[[GraphRunner, torch.Tensor], object], captured: bool
) -> None:
    runner, x = make_runner(device), torch.ones(2, 4)
    if captured:
        runner.capture()
    with torch.autocast(device, torch.bfloat16), pytest.raises(InputError, match="inside the captured function"):
        use(runner, x)
    with torch.autocast(device, torch.bfloat16, enabled=False):
        use(runner, x)


@pytest.mark.parametrize("cache", [True, False])
def test_autocast_inside_the_function_is_kept(device: str, cache: bool) -> None:
    layer = torch.nn.Linear(4, 4, device=device)

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, cache_enabled=cache):
            return layer(layer(x)).float()

    runner, x = GraphRunner(step, INPUT, [2], backend=device, strict=True), torch.randn(2, 4)
    for _ in range(2):
        assert torch.equal(runner(x=x), runner.run_eagerly(runner.keys[0], x=x))
        with torch.no_grad():
            layer.weight.mul_(2)  # the cast weight of the capture must not be what a replay reads
            assert torch.equal(runner(x=x).cpu(), step(x.to(device)).cpu())


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("changed", "named"), [(default_dtype, "float64"), (deterministic, "use_deterministic_algorithms is True")]
)
def test_state_that_graphs_keep_is_refused_where_it_has_changed(
    device: str, changed: Callable[[], contextlib.AbstractContextManager[None]], named: str
) -> None:
    runner, x = GraphRunner(lambda x: x + torch.ones(4, device=device), INPUT, [2], backend=device), torch.zeros(2, 4)
    runner(x=x)
    with changed():
        with pytest.raises(InputError, match=named):
            runner(x=x)
        runner.recapture()
        assert torch.equal(runner(x=x).cpu(), torch.ones(2, 4))
    with pytest.raises(InputError):
        runner(x=x)
