"""A runner is inference only: training inside its function is refused in one sentence, in graphs and in eager steps."""

from collections.abc import Callable

import pytest
import torch

from graphmode.graph import GraphRunner, Input, InputError, outside_graph

Fn = Callable[[torch.Tensor], torch.Tensor]
INPUT = [Input("x", torch.float32, ("rows", 4))]


def functions(device: str) -> dict[str, tuple[Fn, str]]:
    net = torch.nn.Linear(4, 4, device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for weight in net.parameters():
        weight.grad = torch.ones_like(weight)

    def backward(x: torch.Tensor) -> torch.Tensor:
        y = net(x)
        y.sum().backward()
        return y

    def backward_with_gradients_enabled(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            y = net(x)
            y.sum().backward()
        return y

    def grad_of_an_input(x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(net(x).sum(), x)[0]

    def grad_of_a_copy(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.requires_grad = True
        return torch.autograd.grad(net(x).sum(), x)[0]

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.step()
        return net(x)

    def whole(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        return x + loss

    return {
        "backward": (backward, "y.sum().backward()"),
        "enable_grad": (backward_with_gradients_enabled, "y.sum().backward()"),
        "autograd.grad": (lambda x: torch.autograd.grad(net(x).sum(), [net.weight])[0], "torch.autograd.grad(net(x)"),
        "autograd.backward": (lambda x: torch.autograd.backward(net(x).sum()) or x, "torch.autograd.backward(net(x)"),
        "grad of an input": (grad_of_an_input, "grad"),
        "grad of a copy": (grad_of_a_copy, "grad"),
        "requires_grad_": (lambda x: net(x.requires_grad_()), "requires_grad_"),
        "optimizer": (step, "optimizer.step()"),
        "training step": (whole, "loss.backward()"),
    }


@pytest.mark.parametrize("name", functions("cpu"))
def test_training_inside_is_refused_in_graphs_and_eager_steps(device: str, name: str) -> None:
    fn, named = functions(device)[name]
    x = torch.ones(2, 4)
    uses: dict[str, Callable[[], object]] = {
        "capture": lambda: GraphRunner(fn, INPUT, [2], backend=device).capture(),
        "first use": lambda: GraphRunner(fn, INPUT, [2], backend=device)(x=x),
        "strict": lambda: GraphRunner(fn, INPUT, [2], backend=device, strict=True)(x=x),
        "above the threshold": lambda: GraphRunner(fn, INPUT, [1], backend=device)(x=x),
        "disabled": lambda: GraphRunner(fn, INPUT, [2], backend=device, enabled=False)(x=x),
        "run_eagerly": lambda: (runner := GraphRunner(fn, INPUT, [2], backend=device)).run_eagerly(runner.keys[0], x=x),
    }
    for use, run in uses.items():
        with pytest.raises(InputError, match="inference only: train outside") as error:
            run()
        assert named in str(error.value), use
        assert not x.requires_grad


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, net: torch.func.grad(lambda row: net(row).sum())(x),
        lambda x, net: net(x.requires_grad_(False)),
        lambda x, net: net.requires_grad_(False)(x),
    ],
    ids=["torch.func.grad", "requires_grad_(False)", "frozen"],
)
def test_what_is_no_training_is_captured(device: str, fn: Callable[..., torch.Tensor]) -> None:
    net = torch.nn.Linear(4, 4, device=device)
    runner, x = GraphRunner(lambda x: fn(x, net), INPUT, [2], backend=device, strict=True), torch.randn(2, 4)
    assert torch.equal(runner(x=x), runner.run_eagerly(runner.keys[0], x=x))


def test_an_error_of_a_function_for_autograd_is_not_taken_for_training(device: str) -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no scale")

    with pytest.raises(RuntimeError, match="no scale"):
        GraphRunner(lambda x: Scale.apply(x), INPUT, [1], backend=device)(x=torch.ones(2, 4))


def test_training_outside_between_calls_goes_on(device: str) -> None:
    net = torch.nn.Linear(4, 4, device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    runner, x = GraphRunner(lambda x: net(x), INPUT, [2], backend=device, strict=True), torch.ones(2, 4)
    results = []
    for _ in range(3):
        results.append(runner(x=x, own=True))
        torch.testing.assert_close(results[-1], net(x.to(device)).detach())
        optimizer.zero_grad()
        net(x.to(device)).square().sum().backward()
        optimizer.step()
        runner.check_addresses()
    assert not torch.equal(results[0], results[2])


def test_a_result_takes_no_part_in_training(device: str) -> None:
    """As data it may; what asks for its gradient gets torch's own error, which says that there is none."""
    net = torch.nn.Linear(4, 4, device=device)
    runner, x = GraphRunner(lambda x: net(x), INPUT, [2], backend=device, strict=True), torch.ones(2, 4)
    for own in (True, False):
        with pytest.raises(RuntimeError, match="does not require grad"):
            runner(x=x, own=own).sum().backward()
    (net(x.to(device)) - runner(x=x, own=True)).square().sum().backward()
    assert net.weight.grad is not None


def test_what_runs_outside_the_graph_does_not_train_at_capture_either(device: str) -> None:
    net = torch.nn.Linear(4, 4, device=device)

    @outside_graph
    def train(x: torch.Tensor) -> torch.Tensor:
        net(x).sum().backward()
        return x

    with pytest.raises(InputError, match=r"(?s)inference only.*net\(x\)\.sum\(\)\.backward\(\)"):
        GraphRunner(lambda x: train(x) + 1, INPUT, [2], backend=device).capture()
