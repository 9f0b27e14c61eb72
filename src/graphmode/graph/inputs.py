"""Declared inputs and their persistent buffers: what a graph reads, where it lies, and what its padding holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from graphmode.graph.backends.base import Backend
from graphmode.graph.errors import InputError
from graphmode.graph.staging import StagingRing
from graphmode.graph.trees import map_leaves, match

ALIGNMENT = 256
STAGING_SLOTS = 4


@dataclass(frozen=True)
class Input:
    """One input of a captured function, declared once.

    Attributes:
        name: the keyword by which the function takes it; in a tree of inputs, its name in messages.
        dtype: its dtype. Values of another dtype are refused, never cast.
        shape: one entry a dimension: an axis name (``"tokens"``) or a fixed size.
        padding: the value of every element beyond the true size. Choose one that reads and writes nothing.
        optional: whether a call may leave it out: then it is all padding, at no cost. An axis that no input gives a
            size then has size 0.
        carried: whether it is state that the function changes in place, as a counter or the hidden state of a recurrent
            network. It keeps its value from call to call, through warm-up and capture, and beyond the true size. It
            starts as padding; a call that passes it sets it. ``GraphRunner.carried`` has the tensor.
        size_of: an axis. Then the runner itself fills this input, of shape ``()``, with the true size of that axis in
            each call, and at capture with the graph's.
        example: its value for warm-up and capture, where a function cannot run on padding alone: a function of the
            sizes of all axes that returns a tensor of the input's full shape there.

    Raises:
        InputError: the padding does not fit the dtype, or the attributes contradict each other.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[str | int, ...]
    padding: float | int | bool = 0
    optional: bool = False
    carried: bool = False
    size_of: str | None = None
    example: Callable[[Mapping[str, int]], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype):
            raise InputError(f"input {self.name!r} is declared with dtype {self.dtype!r}; give a torch.dtype")
        for axis in self.shape:
            if not isinstance(axis, (str, int)) or isinstance(axis, bool) or (isinstance(axis, int) and axis < 0):
                raise InputError(
                    f"input {self.name!r} is declared with {axis!r} in its shape; each entry is the name of an axis or "
                    "a size of at least 0"
                )
        if not _holds(self.dtype, self.padding):
            raise InputError(f"input {self.name!r} is padded with {self.padding!r}, which {self.dtype} cannot hold")
        if self.size_of is not None and (self.shape or self.carried or self.dtype.is_floating_point):
            raise InputError(
                f"input {self.name!r} is the size of axis {self.size_of!r}: its shape must be () and its dtype an "
                "integer's, and it cannot be carried"
            )

    @property
    def required(self) -> bool:
        """Whether every call must pass it."""
        return not (self.optional or self.carried or self.size_of)


def _holds(dtype: torch.dtype, value: float | int | bool) -> bool:
    """Return whether ``dtype`` can hold ``value``; of a fraction, closely."""
    if dtype.is_floating_point and isinstance(value, (int, float)):
        return not math.isfinite(value) or abs(value) <= torch.finfo(dtype).max
    try:
        return bool(torch.tensor(value, dtype=dtype).item() == value)
    except (RuntimeError, OverflowError, ValueError, TypeError):
        return False


InputTree = Any
"""Inputs in dicts, tuples, lists and dataclasses."""


class DeclaredInputs:
    """What a function takes: inputs by name, or trees of them.

    Attributes:
        flat: all inputs, in order.

    Args:
        inputs: a list of inputs, each an argument of its own; or a mapping from arguments to inputs or trees of them.

    Raises:
        InputError: two inputs share a name.
    """

    def __init__(self, inputs: Sequence[Input] | Mapping[str, InputTree]) -> None:
        self.flat: tuple[Input, ...]
        self._trees: dict[str, InputTree] = {}
        if isinstance(inputs, Mapping):
            found: list[Input] = []
            for argument, tree in inputs.items():
                map_leaves(tree, Input, found.append)
                if not isinstance(tree, Input) or tree.name != argument:
                    self._trees[argument] = tree
            self.flat = tuple(found)
            self.arguments = tuple(inputs)
        else:
            self.flat = tuple(inputs)
            self.arguments = tuple(spec.name for spec in self.flat if isinstance(spec, Input))
        for spec in self.flat:
            if not isinstance(spec, Input):
                raise InputError(f"{spec!r} stands among the inputs; declare each as an Input")
        names = [spec.name for spec in self.flat]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise InputError(f"inputs declared twice: {sorted(repeated)}; names must differ")
        self.axes = tuple(dict.fromkeys(axis for spec in self.flat for axis in spec.shape if isinstance(axis, str)))

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a call by the names of their inputs: trees taken apart, arrays made tensors.

        Raises:
            InputError: a value nests otherwise than declared.
        """
        values: dict[str, Any] = {}

        def take(spec: Input, value: Any) -> None:
            if value is not None:
                values[spec.name] = value

        for argument, value in given.items():
            if argument in self._trees:
                match(self._trees[argument], Input, value, argument, take)
            elif not self._trees or argument in self.arguments:
                values[argument] = value
            else:
                raise InputError(f"argument {argument!r} is not declared; declared are {list(self.arguments)}")
        return {name: _as_tensor(value) for name, value in values.items()}

    def as_arguments(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        """Return the function's arguments: ``tensors`` by input name, put into their trees."""
        if not self._trees:
            return tensors
        return {
            argument: map_leaves(self._trees[argument], Input, lambda spec: tensors[spec.name])
            if argument in self._trees
            else tensors[argument]
            for argument in self.arguments
        }


def _as_tensor(value: Any) -> Any:
    """Return a numpy array or scalar as a tensor over the same memory, and anything else as it is."""
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        return torch.from_numpy(array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy())
    return value


def true_sizes(inputs: Sequence[Input], values: Mapping[str, Any], device: torch.device) -> dict[str, int]:
    """Check ``values`` against their declarations and return the size of every axis that they give.

    Values lie on ``device`` or on the host.

    Raises:
        InputError: naming the input: missing, unknown, wrong dtype, rank, device or size, or axes that disagree.
    """
    known = {spec.name: spec for spec in inputs}
    missing = [spec.name for spec in inputs if spec.required and spec.name not in values]
    unknown = [name for name in values if name not in known or known[name].size_of is not None]
    if missing or unknown:
        raise InputError(f"inputs missing: {missing}, unknown: {unknown}; declared are {sorted(known)}")
    sizes: dict[str, int] = {}
    for spec in inputs:
        if spec.name not in values:
            continue
        value = values[spec.name]
        if not isinstance(value, torch.Tensor):
            raise InputError(f"input {spec.name!r} is {type(value).__name__}; pass a tensor of {spec.dtype}")
        if value.layout != torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise InputError(f"input {spec.name!r} is a {kind} tensor; graphs read dense memory: pass a dense tensor")
        if value.dtype != spec.dtype:
            raise InputError(f"input {spec.name!r} has dtype {value.dtype}; it is declared {spec.dtype}")
        if value.device.type != "cpu" and value.device != device:
            raise InputError(f"input {spec.name!r} is on {value.device}; pass it on the host or on {device}")
        if value.dim() != len(spec.shape):
            raise InputError(
                f"input {spec.name!r} has {value.dim()} dimensions, shape {tuple(value.shape)}; declared {spec.shape}"
            )
        for size, axis in zip(value.shape, spec.shape, strict=True):
            expected = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            if size != expected:
                raise InputError(
                    f"input {spec.name!r} has shape {tuple(value.shape)}; declared {spec.shape}, and axis {axis!r} "
                    f"is {expected} here"
                )
    return sizes


def check_fit(sizes: Mapping[str, int], limits: Mapping[str, int]) -> None:
    """Check that every axis fits the graph.

    Raises:
        InputError: an axis is larger than its limit.
    """
    for axis, size in sizes.items():
        if size > limits[axis]:
            raise InputError(f"axis {axis!r} has size {size}; its limit at this bucket is {limits[axis]}")


@dataclass(frozen=True)
class _Region:
    """Where an input lies in the arena, at its maximum shape."""

    spec: Input
    offset: int
    shape: tuple[int, ...]

    def view(self, memory: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the leading corner ``shape`` of this region of ``memory``, uint8 ``[bytes]``."""
        itemsize = self.spec.dtype.itemsize
        flat = memory[self.offset : self.offset + prod(self.shape) * itemsize].view(self.spec.dtype)
        return flat.view(self.shape)[_slices(shape)]

    def end(self, shape: tuple[int, ...]) -> int:
        """Return the byte after the last one that the leading corner ``shape`` touches."""
        last = 0
        for size, full in zip(shape, self.shape, strict=True):
            last = last * full + size - 1
        return self.offset + (last + 1) * self.spec.dtype.itemsize


@dataclass(frozen=True)
class BoundInputs:
    """The inputs as one graph sees them.

    Attributes:
        sizes: the size of every axis.
        views: each input's prefix of its persistent buffer, on the device.
        nbytes: length of the arena's prefix that holds all of them but those that are carried.
    """

    sizes: dict[str, int]
    views: dict[str, torch.Tensor]
    nbytes: int


class _Staged:
    """One input in one slot of the staging ring: a leading corner holds values, all else its padding.

    Args:
        region: which input.
        memory: of the slot, uint8 ``[bytes]``.
    """

    def __init__(self, region: _Region, memory: torch.Tensor) -> None:
        self._padding = region.spec.padding
        self._buffer = region.view(memory, region.shape).fill_(self._padding)
        self._corner: torch.Size | None = None

    def write(self, value: torch.Tensor | None) -> None:
        """Write a value, None for nothing but padding. Only what held values before is padded again."""
        before, self._corner = self._corner, None if value is None else value.shape
        if before is not None and (
            value is None or any(old > new for old, new in zip(before, value.shape, strict=True))
        ):
            self._buffer[_slices(before)].fill_(self._padding)
        if value is not None:
            self._buffer[_slices(value.shape)].copy_(value)


class InputBuffers:
    """One persistent buffer of maximum size per input: those of each step in one arena on the device.

    The largest inputs lie last, so that a small step copies a small prefix of the arena. Where the device's memory is
    the host's, values are written where graphs read them.

    Attributes:
        arena: uint8 ``[bytes]``.
        carried: the buffers of carried inputs by name, at their largest shape.

    Args:
        inputs: the declarations.
        limits: the largest size of every axis.
        backend: allocates the arena, the host buffers and the events.
    """

    def __init__(self, inputs: Sequence[Input], limits: Mapping[str, int], backend: Backend) -> None:
        offset, self._regions = 0, list[_Region]()
        self._device = backend.device
        shapes = {spec.name: _shape(spec, limits) for spec in inputs}
        self._carried = {spec.name: spec for spec in inputs if spec.carried}
        self.carried = {name: all_padding(spec, limits, backend.device) for name, spec in self._carried.items()}
        in_arena = [spec for spec in inputs if not spec.carried]
        for spec in sorted(in_arena, key=lambda spec: prod(shapes[spec.name]) * spec.dtype.itemsize):
            self._regions.append(_Region(spec, offset, shapes[spec.name]))
            offset += -(-prod(shapes[spec.name]) * spec.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.arena = torch.zeros(offset, dtype=torch.uint8, device=backend.device)
        self._ring: StagingRing | None = None
        if not backend.capabilities.host_memory:
            self._ring = StagingRing(offset, STAGING_SLOTS, backend.host_buffer, backend.event)
            self._staged = [
                {region.spec.name: _Staged(region, slot.memory) for region in self._regions}
                for slot in self._ring.slots
            ]

    def bind(self, sizes: dict[str, int]) -> BoundInputs:
        """Return the view of every buffer at the axis ``sizes``."""
        views = {
            region.spec.name: region.view(self.arena, _shape(region.spec, sizes)) for region in self._regions
        } | self.bind_carried(sizes)
        ends = (region.end(_shape(region.spec, sizes)) for region in self._regions)
        return BoundInputs(sizes=sizes, views=views, nbytes=max(ends, default=0))

    def bind_carried(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Return the view of every carried input at the axis ``sizes``."""
        return {name: self.carried[name][_slices(_shape(spec, sizes))] for name, spec in self._carried.items()}

    def loader(
        self, bound: BoundInputs, shapes: Mapping[str, Sequence[int]]
    ) -> Callable[[Mapping[str, torch.Tensor]], None]:
        """Return what copies values of ``shapes`` into the buffers that ``bound`` sees and refills their padding.

        Host values go through one slot of the staging ring and one copy; device values are copied on the device. An
        input without a shape is all padding, or what it was if it is carried. Everything is put on the current stream.
        """
        if self._ring is not None:
            return lambda values: self._load_staged(bound, values)
        writes = []
        for name, view in bound.views.items():
            if name in self._carried:
                rest: list[torch.Tensor] = []
            else:
                rest = outside_corner(view, shapes[name]) if name in shapes else [view]
            corner = view[_slices(shapes[name])] if name in shapes else None
            padding = self._padding(name)
            writes.append((name, corner, rest, padding))

        def load(values: Mapping[str, torch.Tensor]) -> None:
            for name, corner, rest, padding in writes:
                if corner is not None:
                    corner.copy_(values[name])
                for view in rest:
                    view.fill_(padding)

        return load

    def load(self, bound: BoundInputs, values: Mapping[str, torch.Tensor]) -> None:
        """Copy ``values`` into the buffers that ``bound`` sees, as :meth:`loader` says."""
        self.loader(bound, {name: value.shape for name, value in values.items()})(values)

    def _padding(self, name: str) -> float | int | bool:
        specs = {region.spec.name: region.spec for region in self._regions} | self._carried
        return specs[name].padding

    def _load_staged(self, bound: BoundInputs, values: Mapping[str, torch.Tensor]) -> None:
        assert self._ring is not None
        on_device = {name: value for name, value in values.items() if value.device.type != "cpu"}
        if any(region.spec.name not in on_device for region in self._regions):
            slot = self._ring.acquire()
            for name, staged in self._staged[slot.index].items():
                if name not in on_device:
                    staged.write(values.get(name))
            self.arena[: bound.nbytes].copy_(slot.memory[: bound.nbytes], non_blocking=True)
            self._ring.release(slot)
        for region in self._regions:
            name = region.spec.name
            if name in on_device:
                fill(bound.views[name], on_device[name], region.spec.padding)
        for name in self._carried:
            if name in values:
                bound.views[name][_slices(values[name].shape)].copy_(values[name])

    @contextmanager
    def carried_kept(self) -> Iterator[None]:
        """Put all carried inputs back to what they were."""
        before = {name: tensor.clone() for name, tensor in self.carried.items()}
        try:
            yield
        finally:
            for name, tensor in before.items():
                self.carried[name].copy_(tensor)

    def beyond(self, bound: BoundInputs, sizes: Mapping[str, int]) -> list[torch.Tensor]:
        """Return what of the carried inputs that ``bound`` sees lies beyond the true ``sizes``."""
        return [
            view
            for name, spec in self._carried.items()
            for view in outside_corner(bound.views[name], _shape(spec, sizes))
        ]


def outside_corner(tensor: torch.Tensor, corner: Sequence[int]) -> list[torch.Tensor]:
    """Return views that cover all of ``tensor`` but its leading corner, each element once."""
    views = []
    for dim, size in enumerate(corner):
        if size < tensor.shape[dim]:
            views.append(tensor[(*_slices(corner[:dim]), slice(size, None))])
    return [view for view in views if view.numel()]


def fill(target: torch.Tensor, value: torch.Tensor, padding: float | int | bool) -> None:
    """Write ``value`` into the leading corner of ``target`` and ``padding`` everywhere else."""
    target[_slices(value.shape)].copy_(value)
    for view in outside_corner(target, value.shape):
        view.fill_(padding)


def all_padding(spec: Input, sizes: Mapping[str, int], device: torch.device) -> torch.Tensor:
    """Return an input that holds nothing but padding, at the axis ``sizes``."""
    return torch.full(_shape(spec, sizes), spec.padding, dtype=spec.dtype, device=device)


def examples(inputs: Sequence[Input], sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return the values for warm-up and capture at the axis ``sizes``, where padding alone does not do.

    Raises:
        InputError: an example has another shape or dtype than its input.
    """
    values = {spec.name: torch.tensor(sizes[spec.size_of], dtype=spec.dtype) for spec in inputs if spec.size_of}
    for spec in inputs:
        if spec.example is not None:
            value = _as_tensor(spec.example(sizes))
            if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (_shape(spec, sizes), spec.dtype):
                found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                raise InputError(
                    f"the example of input {spec.name!r} is {found}; at the axes {dict(sizes)} it must be "
                    f"{spec.dtype} {_shape(spec, sizes)}"
                )
            values[spec.name] = value
    return values


def _slices(corner: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in corner)


def _shape(spec: Input, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
