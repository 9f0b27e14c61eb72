"""What all linear layers check, and the reference that they are held against."""

from __future__ import annotations

import torch

from graphmode.ops._checks import FLOATS, require, require_tensor


def require_linear(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Check rows ``[rows, in]``, a weight ``[out, in]`` and a bias ``[out]``: of one dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor(name, x, shape=(None, None), dtypes=FLOATS, like=x)
    require_tensor("weight", weight, shape=(None, x.shape[1]), dtypes=(x.dtype,), like=x)
    for each, tensor in ((name, x), ("weight", weight)):
        require(tensor.is_contiguous(), each, f"of strides {tensor.stride()}", "a contiguous tensor")
    if bias is not None:
        require_tensor("bias", bias, shape=weight.shape[:1], dtypes=(x.dtype,), like=x)


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool = False
) -> torch.Tensor:
    """Return ``x @ weight.T + bias``, with ``gated`` SwiGLU of it, in float32 and not rounded."""
    result = x.float() @ weight.float().T
    if bias is not None:
        result = result + bias.float()
    if gated:
        gate, up = result.chunk(2, dim=1)
        result = torch.nn.functional.silu(gate) * up
    return result
