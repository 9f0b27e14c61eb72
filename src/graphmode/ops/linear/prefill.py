"""Prefill GEMMs with an epilogue: linear layers of many tokens and what follows them, in one kernel on Hopper."""

from __future__ import annotations

import torch

from graphmode.ops._checks import require
from graphmode.ops.dispatch import choose
from graphmode.ops.linear.common import linear_reference, require_linear
from graphmode.ops.linear.prefill_hopper import prefill_heads_hopper, prefill_swiglu_hopper
from graphmode.ops.rope import HeadInputs, rotate_and_cache_reference


def prefill_swiglu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return SwiGLU of ``x @ weight.T``.

    Args:
        x: ``[rows, width]``, float32, bfloat16 or float16, contiguous.
        weight: ``[2 * size, width]`` in ``x``'s dtype, contiguous, gate before up.

    Returns:
        ``[rows, size]``.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_linear("x", x, weight, None)
    require(weight.shape[0] % 2 == 0, "weight", f"of {weight.shape[0]} rows", "gate and up, of one size")
    on_hopper = choose("prefill_swiglu", len(x), weight) == "hopper"
    return (prefill_swiglu_hopper if on_hopper else prefill_swiglu_reference)(x, weight)


def prefill_heads(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    inputs: HeadInputs,
) -> torch.Tensor:
    """Compute :func:`~graphmode.ops.rotate_and_cache` of ``x @ weight.T + bias``, which is not rounded in between.

    Args:
        x: ``[rows, width]``, float32, bfloat16 or float16, contiguous.
        weight: ``[(q_heads + 2 * kv_heads) * head_dim, width]`` in ``x``'s dtype, contiguous.
        bias: ``[(q_heads + 2 * kv_heads) * head_dim]`` in ``x``'s dtype; None for none.
        inputs: as of :func:`~graphmode.ops.rotate_and_cache`.

    Returns:
        The queries, ``[rows, q_heads, head_dim]``.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_linear("x", x, weight, bias)
    inputs.require(x, weight.shape[0])
    on_hopper = choose("prefill_heads", len(x), weight, heads=inputs.kind(weight.shape[0])) == "hopper"
    return (prefill_heads_hopper if on_hopper else prefill_heads_reference)(x, weight, bias, inputs)


def prefill_swiglu_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute :func:`prefill_swiglu` in PyTorch."""
    return linear_reference(x, weight, None, gated=True).to(x.dtype)


def prefill_heads_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    inputs: HeadInputs,
) -> torch.Tensor:
    """Compute :func:`prefill_heads` in PyTorch."""
    return rotate_and_cache_reference(linear_reference(x, weight, bias), inputs).to(x.dtype)
