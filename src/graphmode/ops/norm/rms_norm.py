"""Root mean square normalisation and the gated activation of feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from graphmode.ops._checks import FLOATS, require, require_tensor
from graphmode.ops._cpu import cpu_operator, loops
from graphmode.ops._device import rms_factor, swiglu
from graphmode.ops._triton import (
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    tl,
)
from graphmode.ops.dispatch import choose


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x / sqrt(mean(x ** 2) + eps) * weight`` of each row (arXiv 1910.07467), rounded once.

    Args:
        x: ``[rows, hidden]``, float32, bfloat16 or float16, contiguous.
        weight: ``[hidden]`` in ``x``'s dtype.
        eps: added to the mean of squares.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor("x", x, shape=(None, None), dtypes=FLOATS, like=x)
    require_tensor("weight", weight, shape=x.shape[1:], dtypes=(x.dtype,), like=x)
    require(x.is_contiguous(), "x", f"of strides {x.stride()}", "a contiguous tensor")
    run = {"triton": rms_norm_triton, "cpu": rms_norm_cpu, "reference": rms_norm_reference}[
        choose("rms_norm", len(x), x)
    ]
    return run(x, weight, eps)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute :func:`rms_norm` in PyTorch."""
    return _normalised(x, weight, eps).to(x.dtype)


@cpu_operator("rms_norm_on_cpu(Tensor x, Tensor weight, float eps, bool add, Tensor(a!) out)")
def _rms_norm_on_cpu(
    x: torch.Tensor, weight: torch.Tensor, eps: float, add: bool, out: torch.Tensor
) -> Callable[[], object]:
    return partial(loops().rms_norm, x.numpy(), weight.numpy(), eps, out.numpy(), add)


def rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute :func:`rms_norm` by a loop on the CPU, in float32."""
    out = torch.empty_like(x)
    _rms_norm_on_cpu(x, weight, eps, False, out)
    return out


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    values = x.float()
    scale = values.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return values * scale * weight.float()


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute :func:`rms_norm` in Triton, a program a row."""
    out = torch.empty_like(x)
    _launch_rms_norm(x, weight, out, eps, add=False)
    return out


def add_rms_norm(x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Add :func:`rms_norm` of ``h`` to ``x``, in place: the second norm of Sandwich-LN (CogView, arXiv 2105.13290).

    Args:
        x: ``[rows, hidden]``, float32, bfloat16 or float16, contiguous.
        h: as ``x``.
        weight: ``[hidden]`` in ``x``'s dtype.
        eps: added to the mean of squares.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor("x", x, shape=(None, None), dtypes=FLOATS, like=x)
    require_tensor("h", h, shape=x.shape, dtypes=(x.dtype,), like=x)
    require_tensor("weight", weight, shape=x.shape[1:], dtypes=(x.dtype,), like=x)
    for name, tensor in (("x", x), ("h", h)):
        require(tensor.is_contiguous(), name, f"of strides {tensor.stride()}", "a contiguous tensor")
    run = {"triton": add_rms_norm_triton, "cpu": add_rms_norm_cpu, "reference": add_rms_norm_reference}[
        choose("add_rms_norm", len(x), x)
    ]
    run(x, h, weight, eps)


def add_rms_norm_reference(x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Compute :func:`add_rms_norm` in PyTorch."""
    x.copy_(x.float() + _normalised(h, weight, eps))


def add_rms_norm_cpu(x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Compute :func:`add_rms_norm` by a loop on the CPU, in float32."""
    _rms_norm_on_cpu(h, weight, eps, True, x)


def add_rms_norm_triton(x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Compute :func:`add_rms_norm` in Triton, a program a row."""
    _launch_rms_norm(h, weight, x, eps, add=True)


def _launch_rms_norm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, *, add: bool) -> None:
    rows, hidden = x.shape
    block = next_power_of_2(hidden)
    if rows:
        _rms_norm_kernel[(rows,)](
            x,
            weight,
            out,
            eps,
            hidden,
            add=add,
            block=block,
            num_warps=min(max(block // 512, 1), 8),
            **launch_options(x.device),
        )


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` (SwiGLU, arXiv 2002.05202), rounded once.

    Args:
        gate_up: ``[rows, 2 * size]``, gate before up, float32, bfloat16 or float16, contiguous.

    Returns:
        ``[rows, size]``.

    Raises:
        ValueError: a shape, dtype or layout does not fit.
    """
    require_tensor("gate_up", gate_up, shape=(None, None), dtypes=FLOATS, like=gate_up)
    given = f"of shape {list(gate_up.shape)} and strides {gate_up.stride()}"
    require(gate_up.shape[1] % 2 == 0 and gate_up.is_contiguous(), "gate_up", given, "two halves, contiguous")
    run = {"triton": silu_mul_triton, "cpu": silu_mul_cpu, "reference": silu_mul_reference}[
        choose("silu_mul", len(gate_up), gate_up)
    ]
    return run(gate_up)


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute :func:`silu_mul` in PyTorch."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


@cpu_operator("silu_mul_on_cpu(Tensor gate_up, Tensor(a!) out)")
def _silu_mul_on_cpu(gate_up: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    return partial(loops().silu_mul, gate_up.numpy(), out.numpy())


def silu_mul_cpu(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute :func:`silu_mul` by a loop on the CPU, in float32."""
    out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _silu_mul_on_cpu(gate_up, out)
    return out


_SILU_BLOCK = 1024


def silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute :func:`silu_mul` in Triton."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_mul_kernel[(rows, -(-size // _SILU_BLOCK))](
            gate_up, out, size, block=_SILU_BLOCK, num_warps=4, **launch_options(gate_up.device)
        )
    return out


@jit()
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x, weight, out, eps, hidden, add: constexpr, block: constexpr, early: constexpr
):
    """Write the norm of a row to ``out``, or add it to what is there."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < hidden
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if early:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(x + row * hidden + at, mask=inside, other=0.0).to(tl.float32)
    values = values * rms_factor(tl.sum(values * values, 0), hidden, eps) * scale
    if add:
        values += tl.load(out + row * hidden + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + at, values.to(out.dtype.element_ty), mask=inside)


@jit()
def _silu_mul_kernel(gate_up, out, size, block: constexpr, early: constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < size
    if early:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    value = swiglu(gate, up)
    tl.store(out + row * size + at, value.to(out.dtype.element_ty), mask=inside)
