"""Training inside a function of a runner is refused: graphs and eager steps are inference only."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from graphmode.errors import TrainingError
from graphmode.graph.locations import location_of

_METHODS: dict[Callable[..., Any], str] = {
    torch.Tensor.backward: "Tensor.backward",
    torch.autograd.backward: "torch.autograd.backward",
    torch.autograd.grad: "torch.autograd.grad",
    torch.Tensor.requires_grad_: "Tensor.requires_grad_",
    torch.Tensor.requires_grad.__set__: "an assignment to requires_grad",  # type: ignore[attr-defined]
}
_AUTOGRAD = tuple(os.path.join(os.path.dirname(torch.autograd.__file__), file) for file in ("__init__.py", "graph.py"))

_inside: ContextVar[bool] = ContextVar("inside", default=False)


def refuse_training(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call, as a function mode sees it, that only training makes.

    Raises:
        TrainingError: naming the call.
    """
    if func not in _METHODS or torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func does it by itself
        return
    sets = func in (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
    if not sets or kwargs.get("requires_grad", args[1] if len(args) > 1 else True):
        raise TrainingError(_METHODS[func])


@contextmanager
def inference_only(inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Run a function inside, in inference mode, and refuse training.

    Args:
        inputs: what the function is called with.

    Raises:
        TrainingError: the function asks autograd for gradients, makes a step of an optimizer, or makes an input require
            gradients.
    """
    token = _inside.set(True)
    try:
        yield
    except TrainingError as error:
        raise TrainingError(error.what, location_of(error)) from error
    except RuntimeError as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _AUTOGRAD]
        if frames:
            raise TrainingError(f"torch.autograd.{frames[0].name}", location_of(error)) from error
        raise
    finally:
        _inside.reset(token)
        changed = [name for name, value in inputs.items() if value.requires_grad]
        for name in changed:
            inputs[name].requires_grad_(False)
    if changed:
        raise TrainingError(f"requires_grad_() of input {changed[0]!r}")


def _refuse_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _inside.get():
        raise TrainingError(f"{type(optimizer).__name__}.step")


register_optimizer_step_pre_hook(_refuse_step)
