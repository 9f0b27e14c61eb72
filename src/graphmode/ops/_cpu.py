"""Operators for the CPU, where the host is the device: they read lengths when they run, so work follows the tokens.

A graph records each as one call. What they write is an argument, so that a replay writes where the capture did. Each is
given as a function that binds tensors and returns the call: tensors become arrays once, however often it is replayed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch


def runs_on_host(tensor: torch.Tensor) -> bool:
    """Return whether the public functions take the CPU's loops for a tensor: they are float32."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


@functools.cache
def loops() -> Any:
    """Return the compiled loops, :mod:`graphmode.ops._loops`; the first call compiles them or reads their cache."""
    return importlib.import_module("graphmode.ops._loops")


def cpu_operator(schema: str) -> Callable[[Callable[..., Callable[[], object]]], Callable[..., None]]:
    """Register an operator of CPU tensors, ``graphmode::NAME``, by the function that binds its arguments.

    The overload has the function as its attribute ``bind``, by which the CPU's graphs prepare their replays.

    Args:
        schema: as of ``torch.library.define``, without results; what a call writes is marked, as ``Tensor(a!)``.

    Returns:
        A decorator that gives the operator in place of the function.
    """
    name, arguments = schema.split("(", 1)

    def register(bind: Callable[..., Callable[[], object]]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            bind(*args)()

        torch.library.define(f"graphmode::{name}", f"({arguments} -> ()")
        torch.library.impl(f"graphmode::{name}", "CPU", run)
        torch.library.register_fake(f"graphmode::{name}", lambda *args: None)
        operator = getattr(torch.ops.graphmode, name).default
        operator.bind = bind
        return operator  # type: ignore[no-any-return]

    return register
