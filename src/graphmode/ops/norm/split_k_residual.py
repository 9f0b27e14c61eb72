"""The residual stream takes in the parts that a split-K linear layer left, and is normalised for the next layer."""

from __future__ import annotations

import torch

from graphmode.ops._checks import FLOATS, require, require_tensor
from graphmode.ops._device import rms_factor
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
from graphmode.ops.norm.rms_norm import rms_norm_reference


def add_split_k(x: torch.Tensor, parts: torch.Tensor) -> None:
    """Add the sum of ``parts`` to ``x``, in place, rounded once.

    Args:
        x: ``[rows, hidden]``, float32, bfloat16 or float16, contiguous.
        parts: float32 ``[splits, rows, hidden]``, contiguous.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    _require(x, parts)
    run = {"triton": add_split_k_triton, "reference": add_split_k_reference}[choose("add_split_k", len(x), x)]
    run(x, parts)


def add_split_k_and_norm(x: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add the sum of ``parts`` to ``x``, in place, and return the RMS norm of the result, ``[rows, hidden]``.

    Args:
        x: ``[rows, hidden]``, float32, bfloat16 or float16, contiguous.
        parts: float32 ``[splits, rows, hidden]``, contiguous.
        weight: ``[hidden]`` in ``x``'s dtype, of the norm.
        eps: added to the mean of squares.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    _require(x, parts)
    require_tensor("weight", weight, shape=x.shape[1:], dtypes=(x.dtype,), like=x)
    run = {"triton": add_split_k_and_norm_triton, "reference": add_split_k_and_norm_reference}[
        choose("add_split_k_and_norm", len(x), x)
    ]
    return run(x, parts, weight, eps)


def _require(x: torch.Tensor, parts: torch.Tensor) -> None:
    require_tensor("x", x, shape=(None, None), dtypes=FLOATS, like=x)
    require_tensor("parts", parts, shape=(None, *x.shape), dtypes=(torch.float32,), like=x)
    for name, tensor in (("x", x), ("parts", parts)):
        require(tensor.is_contiguous(), name, f"of strides {tensor.stride()}", "a contiguous tensor")


def add_split_k_reference(x: torch.Tensor, parts: torch.Tensor) -> None:
    """Compute :func:`add_split_k` in PyTorch."""
    x.copy_(x.float() + parts.sum(0))


def add_split_k_and_norm_reference(
    x: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Compute :func:`add_split_k_and_norm` in PyTorch."""
    add_split_k_reference(x, parts)
    return rms_norm_reference(x, weight, eps)


def add_split_k_triton(x: torch.Tensor, parts: torch.Tensor) -> None:
    """Compute :func:`add_split_k` in Triton, a program a row."""
    _launch(x, parts, None, None, 0.0)


def add_split_k_and_norm_triton(x: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute :func:`add_split_k_and_norm` in Triton, a program a row."""
    out = torch.empty_like(x)
    _launch(x, parts, weight, out, eps)
    return out


def _launch(
    x: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor | None, out: torch.Tensor | None, eps: float
) -> None:
    rows, hidden = x.shape
    if rows:
        block = next_power_of_2(hidden)
        _add_split_k_kernel[(rows,)](
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
def _add_split_k_kernel(  # type: ignore[no-untyped-def]
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
        values = values * rms_factor(tl.sum(values * values, 0), hidden, eps) * scale
        tl.store(out + row * hidden + at, values.to(out.dtype.element_ty), mask=inside)
