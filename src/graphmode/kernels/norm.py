"""Root mean square normalisation and the gated activation of feed-forward layers."""

from __future__ import annotations

import torch

from graphmode.kernels._arguments import FLOATS, require_tensor
from graphmode.kernels._triton import (
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    runs_triton,
    tl,
)


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
    if not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}, expected a contiguous tensor")
    normalise = rms_norm_triton if runs_triton(x) else rms_norm_reference
    return normalise(x, weight, eps)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Do as :func:`rms_norm` in PyTorch."""
    values = x.float()
    scale = values.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (values * scale * weight.float()).to(x.dtype)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Do as :func:`rms_norm` in Triton, a program a row."""
    rows, hidden = x.shape
    out = torch.empty_like(x)
    block = next_power_of_2(hidden)
    if rows:
        _rms_norm_kernel[(rows,)](
            x, weight, out, eps, hidden, block=block, num_warps=min(max(block // 512, 1), 8), **launch_options(x.device)
        )
    return out


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
    if gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(
            f"gate_up has shape {list(gate_up.shape)} and strides {gate_up.stride()}, expected two halves, contiguous"
        )
    multiply = silu_mul_triton if runs_triton(gate_up) else silu_mul_reference
    return multiply(gate_up)


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Do as :func:`silu_mul` in PyTorch."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


_SILU_BLOCK = 1024


def silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """Do as :func:`silu_mul` in Triton."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_mul_kernel[(rows, -(-size // _SILU_BLOCK))](
            gate_up, out, size, block=_SILU_BLOCK, num_warps=4, **launch_options(gate_up.device)
        )
    return out


@jit()
def _rms_norm_kernel(x, weight, out, eps, hidden, block: constexpr, early: constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < hidden
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if early:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(x + row * hidden + at, mask=inside, other=0.0).to(tl.float32)
    values = values * (1.0 / tl.sqrt(tl.sum(values * values, 0) / hidden + eps)) * scale
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
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + at, value.to(out.dtype.element_ty), mask=inside)
