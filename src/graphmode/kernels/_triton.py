"""Triton where it is installed. Without it every module here still imports, and only launching a kernel fails."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


triton: Any = _load("triton")
tl: Any = _load("triton.language")
gluon: Any = _load("triton.experimental.gluon")
gl: Any = _load("triton.experimental.gluon.language")

_cuda: Any = _load("triton.language.extra.cuda")
# Programmatic dependent launch (CUDA programming guide): let the next kernel start; wait for the one before. Kernels
# let the next one start at once, so before it waits a kernel may read only what none of this chain writes: weights,
# lengths, tables, the keys of tokens before. The kernels that write lengths let none start.
gdc_launch_dependents: Any = getattr(_cuda, "gdc_launch_dependents", None)
gdc_wait: Any = getattr(_cuda, "gdc_wait", None)
# A product of matrices in registers (mma.sync), batched.
mma_v2: Any = getattr(_load("triton.experimental.gluon.language.nvidia.ampere"), "mma_v2", None)

if TYPE_CHECKING:
    constexpr: TypeAlias = Any
else:
    constexpr = tl and tl.constexpr  # annotates the compile-time parameters of kernels

# Where Triton compiles to. On other devices the public functions take the PyTorch reference.
_TRITON_DEVICES = frozenset({"cuda", "xpu"})


class _MissingKernel:
    """Stands for a kernel on an install without Triton: launching it says what to do."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: object) -> Callable[..., None]:
        raise RuntimeError(f"{self._name} is a Triton kernel and Triton is not installed: pip install triton")


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` with its options; without Triton, the kernel raises RuntimeError when it is launched."""
    return _jit(triton, options)


def gluon_jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``gluon.jit`` with its options, as :func:`jit`."""
    return _jit(gluon, options)


def _jit(compiler: Any, options: dict[str, Any]) -> Callable[[Callable[..., Any]], Any]:
    if compiler is None:
        return lambda kernel: _MissingKernel(kernel.__name__)
    decorator: Callable[[Callable[..., Any]], Any] = compiler.jit(**options)
    return decorator


def runs_triton(tensor: torch.Tensor) -> bool:
    """Return whether the public functions take the Triton kernel for tensors on this tensor's device."""
    return triton is not None and tensor.device.type in _TRITON_DEVICES


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Return whether kernels on a device may start before the one ahead has ended, and wait for it themselves."""
    if gdc_wait is None or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device) -> dict[str, bool]:
    """Return the options with which a kernel that waits for the one before it is launched on a device."""
    return {"early": True, "launch_pdl": True} if launches_early(device) else {"early": False}


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``, for ``n >= 1``."""
    return 1 << (n - 1).bit_length()
