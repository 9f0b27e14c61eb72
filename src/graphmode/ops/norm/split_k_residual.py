"""The residual stream takes in what several programs of a linear layer left, and is normalised for the next one."""

from __future__ import annotations

import torch

from graphmode.ops._checks import FLOATS, require, require_tensor
from graphmode.ops._triton import (
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    runs_triton,
    tl,
)
from graphmode.ops.norm.rms_norm import rms_norm_reference


def add_parts(x: torch.Tensor, parts: torch.Tensor) -> None:
    """Add the sum of ``parts`` to ``x``, in place, rounded once.

    Args:
        x: ``[rows, hidden]``, float32, bfloat16 or float16, contiguous.
        parts: float32 ``[splits, rows, hidden]``, contiguous.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    _require(x, parts)
    run = add_parts_triton if runs_triton(x) else add_parts_reference
    run(x, parts)


def add_parts_and_norm(x: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Do :func:`add_parts`, and return :func:`~graphmode.ops.rms_norm` of the result, ``[rows, hidden]``.

    Args:
        x: as of :func:`add_parts`.
        parts: as there.
        weight: ``[hidden]`` in ``x``'s dtype, of the norm.
        eps: added to the mean of squares.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    _require(x, parts)
    require_tensor("weight", weight, shape=x.shape[1:], dtypes=(x.dtype,), like=x)
    run = add_parts_and_norm_triton if runs_triton(x) else add_parts_and_norm_reference
    return run(x, parts, weight, eps)


def _require(x: torch.Tensor, parts: torch.Tensor) -> None:
    require_tensor("x", x, shape=(None, None), dtypes=FLOATS, like=x)
    require_tensor("parts", parts, shape=(None, *x.shape), dtypes=(torch.float32,), like=x)
    for name, tensor in (("x", x), ("parts", parts)):
        require(tensor.is_contiguous(), name, f"of strides {tensor.stride()}", "a contiguous tensor")


def add_parts_reference(x: torch.Tensor, parts: torch.Tensor) -> None:
    """Do as :func:`add_parts` in PyTorch."""
    x.copy_(x.float() + parts.sum(0))


def add_parts_and_norm_reference(
    x: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Do as :func:`add_parts_and_norm` in PyTorch."""
    add_parts_reference(x, parts)
    return rms_norm_reference(x, weight, eps)


def add_parts_triton(x: torch.Tensor, parts: torch.Tensor) -> None:
    """Do as :func:`add_parts` in Triton, a program a row."""
    _launch(x, parts, None, None, 0.0)


def add_parts_and_norm_triton(x: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Do as :func:`add_parts_and_norm` in Triton, a program a row."""
    out = torch.empty_like(x)
    _launch(x, parts, weight, out, eps)
    return out


def _launch(
    x: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor | None, out: torch.Tensor | None, eps: float
) -> None:
    rows, hidden = x.shape
    if rows:
        block = next_power_of_2(hidden)
        _add_parts_kernel[(rows,)](
            x,
            parts,
            weight,
            out,
            eps,
            rows,
            hidden,
            splits=len(parts),
            block=block,
            num_warps=min(max(block // 256, 1), 8),
            **launch_options(x.device),
        )


@jit(do_not_specialize=["rows"])
def _add_parts_kernel(  # type: ignore[no-untyped-def]
    x, parts, weight, out, eps, rows, hidden, splits: constexpr, block: constexpr, early: constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < hidden
    if weight is not None:
        scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if early:
        gdc_launch_dependents()
        gdc_wait()
    place = x + row * hidden + at
    values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([block], tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(parts + (split * rows + row) * hidden + at, mask=inside, other=0.0)
    rounded = (values + total).to(x.dtype.element_ty)
    tl.store(place, rounded, mask=inside)
    if weight is not None:
        values = rounded.to(tl.float32)
        values = values * (1.0 / tl.sqrt(tl.sum(values * values, 0) / hidden + eps)) * scale
        tl.store(out + row * hidden + at, values.to(out.dtype.element_ty), mask=inside)
