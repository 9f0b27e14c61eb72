"""Argument checks of the public functions: shapes, dtypes, layouts and devices only, never a device read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError that names the argument, its value and what was expected, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} is {value}, expected {expected}")


def require_contiguous(**tensors: torch.Tensor) -> None:
    """Check that tensors, given by their names, are contiguous."""
    for name, tensor in tensors.items():
        require(tensor.is_contiguous(), name, f"of strides {tensor.stride()}", "a contiguous tensor")


def require_tensor(
    name: str,
    tensor: torch.Tensor,
    *,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    like: torch.Tensor,
) -> None:
    """Check a tensor's shape (None stands for any size), its dtype, and that it is on ``like``'s device."""
    actual = tensor.shape
    if len(actual) != len(shape) or any(
        want is not None and got != want for got, want in zip(actual, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(actual)}, expected [{wanted}]")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device} as the other arguments")


def require_cache(name: str, cache: torch.Tensor, *, shape: Sequence[int | None], like: torch.Tensor) -> None:
    """Check a KV cache: its shape, ``like``'s dtype and device, its strides.

    It is contiguous, or part of each slot of a contiguous tensor: the slots may lie further apart than they are long.
    """
    require_tensor(name, cache, shape=shape, dtypes=(like.dtype,), like=like)
    _, block_size, heads, dim = cache.shape
    slot = cache.stride(1)
    wanted = (block_size * slot, slot, dim, 1)
    # The stride of a dimension of size 1 means nothing.
    if slot < heads * dim or any(
        size > 1 and got != want for size, got, want in zip(cache.shape, cache.stride(), wanted, strict=True)
    ):
        raise ValueError(f"{name} has strides {cache.stride()}, expected a contiguous tensor or a part of its slots")
