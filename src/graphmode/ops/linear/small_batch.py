"""Small-batch GEMMs: linear layers of 17 to some hundred rows, whole or in split-K parts, with kernels for Hopper."""

from __future__ import annotations

import torch

from graphmode.ops._checks import require
from graphmode.ops.dispatch import choose
from graphmode.ops.linear.common import linear_reference, require_linear
from graphmode.ops.linear.small_batch_hopper import small_batch_linear_hopper, split_k_linear_hopper


def small_batch_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gated: bool = False
) -> torch.Tensor:
    """Return ``x @ weight.T + bias``, or SwiGLU of it.

    Args:
        x: ``[rows, width]``, float32, bfloat16 or float16, contiguous.
        weight: ``[out, width]`` in ``x``'s dtype, contiguous; with ``gated`` gate before up.
        bias: ``[out]`` in ``x``'s dtype; None for none.
        gated: whether the result is gate and up and goes through SwiGLU.

    Returns:
        ``[rows, out]``; with ``gated`` ``[rows, out / 2]``.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_linear("x", x, weight, bias)
    require(not gated or weight.shape[0] % 2 == 0, "weight", f"of {weight.shape[0]} rows", "gate and up, of one size")
    on_hopper = choose("small_batch_linear", len(x), weight) == "hopper"
    run = small_batch_linear_hopper if on_hopper else small_batch_linear_reference
    return run(x, weight, bias, gated=gated)


def split_k_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return parts that add up to ``x @ weight.T``: float32 ``[splits, rows, out]``.

    Arguments and errors as of :func:`small_batch_linear`.
    """
    require_linear("x", x, weight, None)
    on_hopper = choose("split_k_linear", len(x), weight) == "hopper"
    return (split_k_linear_hopper if on_hopper else split_k_linear_reference)(x, weight)


def small_batch_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gated: bool = False
) -> torch.Tensor:
    """Compute :func:`small_batch_linear` in PyTorch."""
    return linear_reference(x, weight, bias, gated=gated).to(x.dtype)


def split_k_linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute :func:`split_k_linear` in PyTorch, in one part."""
    return linear_reference(x, weight, None).unsqueeze(0)
