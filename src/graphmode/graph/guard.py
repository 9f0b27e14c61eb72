"""The guard: while a function is captured, it refuses what no graph can hold and notes what the graph reads."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from graphmode.graph.addresses import OutsideMemory
from graphmode.graph.errors import UnsupportedOpError

_OWN_CODE = os.path.dirname(os.path.abspath(__file__))
_TORCH_CODE = os.path.dirname(os.path.abspath(torch.__file__))

# Python methods that read memory on the host without an operator that a dispatch mode would see.
_HOST_READS: dict[Callable[..., Any], str] = {
    torch.Tensor.tolist: "Tensor.tolist",
    torch.Tensor.numpy: "Tensor.numpy",
    torch.Tensor.__array__: "Tensor.__array__",
    torch.Tensor.__repr__: "Tensor.__repr__",
}

_MARK = "compute it with tensor operators, or move the code into a function marked @outside_graph"


def tensors_in(tree: object) -> list[torch.Tensor]:
    """Return the tensors among the arguments or results of an operator, in order."""
    found: list[torch.Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: object, found: list[torch.Tensor]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for leaf in tree:
            _collect(leaf, found)
    elif isinstance(tree, dict):
        for leaf in tree.values():
            _collect(leaf, found)


@cache
def is_composite(func: Any) -> bool:
    """Return whether an operator is made of others, which a dispatch mode sees only if it takes it apart."""
    composite: bool = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return composite


_MASKABLE = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


@cache
def _always_unsupported(func: Any) -> str | None:
    """Return why no graph can hold an operator whatever its arguments are, or None."""
    if func.overloadpacket in _MASKABLE:
        return None
    if torch.Tag.data_dependent_output in func.tags:
        return "it reads a tensor's value into Python, which a replay would not read again"
    if torch.Tag.dynamic_output_shape in func.tags:
        return "its result's shape depends on data"
    if func.overloadpacket in (torch.ops.aten.resize_, torch.ops.aten.set_):
        return "it exchanges a tensor's memory, which a replay would not do again"
    return None


def why_unsupported(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Return why no graph can hold this operator call, or None where one can."""
    if reason := _always_unsupported(func):
        sized = func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None
        return None if sized else reason
    packet = func.overloadpacket
    if packet in _MASKABLE:
        masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        fills = packet is not torch.ops.aten.index and args[2].numel() == 1
        return "a boolean mask selects a number of elements that depends on data" if masks and not fills else None
    if packet is torch.ops.aten._to_copy and _leaves_device(args[0], kwargs.get("device")):
        return "it copies to the host and waits for the device"
    return None


def _leaves_device(source: torch.Tensor, device: torch.device | None) -> bool:
    return device is not None and device.type == "cpu" and source.device.type != "cpu"


def user_location(error: BaseException) -> str | None:
    """Return ``file:line: code`` of the innermost frame of ``error`` that is neither torch's nor the runtime's."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith((_OWN_CODE, _TORCH_CODE, "<")):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return None


class Guard:
    """Installed while a function is warmed up or captured.

    Composite operators are taken apart, so that a host read inside one is seen too; each operator is checked before
    it runs; and the memory that comes from outside of the function is noted, to be checked while the graph is in use.

    Attributes:
        device: where the work is captured.
        operator: the last operator that ran, for the message of a capture that fails inside one.
        generators: random generators other than the default one that operators used.
        reads: the memory from outside of the function that operators read or write.
    """

    def __init__(self, device: torch.device) -> None:
        self.operator: str | None = None
        self.generators: list[torch.Generator] = []
        self.device = device
        self.reads = OutsideMemory()
        self._outside = 0
        self._produced: set[int] = set()

    @contextmanager
    def installed(self) -> Iterator[Guard]:
        """Check every operator that runs inside."""
        with _FunctionGuard(self), _DispatchGuard(self):
            yield self

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let everything run unchecked: a call outside the graph."""
        self._outside += 1
        try:
            yield
        finally:
            self._outside -= 1

    @property
    def active(self) -> bool:
        """Whether operators are being checked."""
        return self._outside == 0

    def note_arguments(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Note the memory and the generators that an operator call takes."""
        generator = kwargs.get("generator")
        if generator is not None and all(generator is not known for known in self.generators):
            self.generators.append(generator)
        for tensor in tensors_in((args, kwargs)):
            if tensor.device.type == self.device.type and tensor.untyped_storage()._cdata not in self._produced:
                self.reads.note(tensor, func.name())

    def note_results(self, results: object) -> None:
        """Note the memory that an operator call made."""
        for tensor in tensors_in(results):
            key = tensor.untyped_storage()._cdata
            if key in self.reads:
                self.reads.note_view(tensor)
            else:
                self._produced.add(key)


class _FunctionGuard(TorchFunctionMode):
    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._guard.active and func in _HOST_READS:
            raise UnsupportedOpError(
                f"{_HOST_READS[func]} cannot be captured: it reads a tensor's value into Python, which a replay would "
                f"not read again; {_MARK}",
                operator=_HOST_READS[func],
            )
        return func(*args, **(kwargs or {}))


class _DispatchGuard(TorchDispatchMode):
    def __init__(self, guard: Guard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._guard = guard

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        guard = self._guard
        if not guard.active:
            return func(*args, **kwargs)
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        guard.operator = func.name()
        if reason := why_unsupported(func, args, kwargs):
            raise UnsupportedOpError(f"{func.name()} cannot be captured: {reason}; {_MARK}", operator=func.name())
        guard.note_arguments(func, args, kwargs)
        results = func(*args, **kwargs)
        guard.note_results(results)
        return results
