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
# lengths, tables, the keys of tokens before. The kernels that write lengths and tables let none start.
gdc_launch_dependents: Any = getattr(_cuda, "gdc_launch_dependents", None)
gdc_wait: Any = getattr(_cuda, "gdc_wait", None)
_ampere: Any = _load("triton.experimental.gluon.language.nvidia.ampere")
# A product of matrices in registers (mma.sync), batched; copies to shared memory that are not waited for (cp.async).
mma_v2: Any = getattr(_ampere, "mma_v2", None)
_async_copy: Any = getattr(_ampere, "async_copy", None)
# By its name in newer versions of Triton, and in older ones.
copy_async: Any = getattr(_async_copy, "async_load", getattr(_async_copy, "async_copy_global_to_shared", None))
commit_group: Any = getattr(_async_copy, "commit_group", None)
wait_group: Any = getattr(_async_copy, "wait_group", None)

# Copies by descriptors (TMA), their barriers, and products of warpgroups (wgmma).
hopper: Any = _load("triton.experimental.gluon.nvidia.hopper")
_hopper_language: Any = _load("triton.experimental.gluon.language.nvidia.hopper")
mbarrier: Any = getattr(_hopper_language, "mbarrier", None)
_tma: Any = getattr(_hopper_language, "tma", None)
# By its newer or its older name.
async_load: Any = getattr(_tma, "async_load", getattr(_tma, "async_copy_global_to_shared", None))
warpgroup_mma: Any = getattr(_hopper_language, "warpgroup_mma", None)
warpgroup_mma_wait: Any = getattr(_hopper_language, "warpgroup_mma_wait", None)

if TYPE_CHECKING:
    constexpr: TypeAlias = Any
else:
    constexpr = tl and tl.constexpr  # annotates the compile-time parameters of kernels

# Gluon is experimental: only with these versions of Triton are the kernels known to compile.
_GLUON_VERSIONS = ("3.6", "3.7", "3.8", "3.9")

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


def compiles_hopper() -> bool:
    """Return whether the installed Triton compiles the kernels for Hopper, which are in Gluon."""
    return gl is not None and mma_v2 is not None and triton.__version__.rpartition(".")[0] in _GLUON_VERSIONS


def runs_hopper(tensor: torch.Tensor) -> bool:
    """Return whether the kernels for Hopper run where a tensor lies."""
    return tensor.device.type == "cuda" and compiles_hopper() and _is_hopper(tensor.device)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


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
