"""Calls that run between two graphs, and how graphs read what they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from graphmode.errors import CaptureError


@dataclass(frozen=True)
class Crossing:
    """A result of a call outside the graph that is copied to fixed memory, where the following graphs read it.

    Attributes:
        fixed: the fixed memory, in the result's shape.
        shared_with: the fixed memory of an earlier result of the call that this one must share its memory with, since
            the graphs write to one of them.
    """

    fixed: torch.Tensor
    shared_with: torch.Tensor | None = None


@dataclass(frozen=True)
class Alias:
    """A result of a call outside the graph that is not copied: it shares memory with an argument or a kept tensor.

    Attributes:
        tensor: the result at capture, whose memory the graphs write.
    """

    tensor: torch.Tensor


@dataclass(frozen=True)
class OutsideCall:
    """A call that runs between two graphs at every replay.

    Attributes:
        fn: the function, or the operator that the graph breaks around.
        arguments: its arguments, flat.
        spec: the structure of ``(args, kwargs)``.
        results: how graphs read its results; None for one that they do not read, or that lies in an argument.
    """

    fn: Callable[..., Any]
    arguments: list[Any]
    spec: TreeSpec
    results: list[Crossing | Alias | None]

    def replay(self) -> None:
        """Run the function and copy its results to where the next graph reads them.

        Raises:
            CaptureError: a result has another shape or dtype than at capture, or no longer shares memory that it must.
        """
        args, kwargs = tree_unflatten(self.arguments, self.spec)
        results, _ = tree_flatten(self.fn(*args, **kwargs))
        if len(results) != len(self.results):
            raise CaptureError(f"{name_of(self.fn)} returned {len(results)} values, {len(self.results)} at capture")
        moved: dict[int, int] = {}
        for expected, result in zip(self.results, results, strict=True):
            if expected is None:
                continue
            fixed = expected.tensor if isinstance(expected, Alias) else expected.fixed
            if not isinstance(result, torch.Tensor) or (result.shape, result.dtype) != (fixed.shape, fixed.dtype):
                now = f"{tuple(result.shape)} {result.dtype}" if isinstance(result, torch.Tensor) else repr(result)
                raise CaptureError(
                    f"{name_of(self.fn)} runs outside the graph and returned {now}; at capture it was "
                    f"{tuple(fixed.shape)} {fixed.dtype}. Results that graphs read must keep their shape: pad them"
                )
            if isinstance(expected, Alias):
                self._check_alias(_same_place(result, fixed))
                continue
            moved[fixed.data_ptr()] = result.data_ptr() - fixed.data_ptr()
            if expected.shared_with is not None:
                first = expected.shared_with.data_ptr()
                self._check_alias(moved[first] == moved[fixed.data_ptr()] and result.stride() == fixed.stride())
            if not _same_place(result, fixed):
                copy_to(fixed, result)

    def _check_alias(self, kept: bool) -> None:
        if not kept:
            raise CaptureError(
                f"{name_of(self.fn)} runs outside the graph and returned memory of its own; at capture its result "
                "shared memory with an argument, with another result or with a tensor that is kept, and the code after "
                "it writes there in place. Return the same memory at every call, or a copy at every call (clone())"
            )


def _same_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def extent(tensor: torch.Tensor) -> int:
    """Return the bytes from the first element of a tensor to the end of its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.dtype.itemsize if tensor.numel() else 0


def placed(memory: torch.Tensor, like: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return a tensor with the shape and strides of ``like`` in ``memory``, uint8, from byte ``offset`` on."""
    whole = memory[offset : offset + extent(like)].view(like.dtype)
    return whole.as_strided(like.shape, like.stride())


def copy_to(fixed: torch.Tensor, result: torch.Tensor) -> None:
    """Copy ``result`` to ``fixed``, whose elements may share a place by a stride of 0."""
    expanded = [index for index, stride in enumerate(fixed.stride()) if stride == 0 and fixed.shape[index] > 1]
    for index in expanded:
        fixed, result = fixed.narrow(index, 0, 1), result.narrow(index, 0, 1)
    fixed.copy_(result)


def range_of(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Return the range of bytes of their storage that tensors use together; the start is aligned for any dtype."""
    starts = [tensor.storage_offset() * tensor.dtype.itemsize for tensor in tensors]
    ends = [start + extent(tensor) for start, tensor in zip(starts, tensors, strict=True)]
    return int(min(starts)) // 16 * 16, int(max(ends))


def name_of(fn: Callable[..., Any]) -> str:
    """Return the name by which a function's author knows it."""
    if isinstance(fn, OpOverload):
        return str(fn.name())
    named = fn if hasattr(fn, "__qualname__") else getattr(fn, "func", type(fn))  # a partial, or an object
    return f"{named.__module__}.{getattr(named, '__qualname__', type(named).__qualname__)}"
