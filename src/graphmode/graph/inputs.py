"""Declared inputs and their persistent buffers: what a graph reads, where it lies, and what its padding holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from graphmode.graph.backends.base import Backend
from graphmode.graph.errors import InputError
from graphmode.graph.staging import StagingRing

ALIGNMENT = 256
STAGING_SLOTS = 4

AxisSize = int | Callable[[int], int]


@dataclass(frozen=True)
class Input:
    """One input of a captured function, declared once.

    Attributes:
        name: the keyword by which the function takes it.
        dtype: its dtype. Values of another dtype are refused, never cast.
        shape: one entry a dimension: an axis name (``"tokens"``) or a fixed size.
        padding: the value of every element beyond the true size. Choose one that reads and writes nothing.
        optional: whether a call may leave it out: then it is all padding, at no cost. An axis that no input gives a
            size then has size 0.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[str | int, ...]
    padding: float | int | bool = 0
    optional: bool = False


@dataclass(frozen=True)
class Axes:
    """The sizes of all axes as a function of the bucket.

    Attributes:
        bucketed: the axis whose size selects the graph.
        sizes: the size of every other axis: fixed, or computed from the bucket.
    """

    bucketed: str
    sizes: Mapping[str, AxisSize]

    def at(self, bucket: int) -> dict[str, int]:
        """Return the size of every axis in the graph of ``bucket``."""
        rest = {name: size(bucket) if callable(size) else size for name, size in self.sizes.items()}
        return {self.bucketed: bucket, **rest}


def resolve_axes(inputs: Sequence[Input], sizes: Mapping[str, AxisSize]) -> Axes:
    """Find the bucketed axis: the one axis of ``inputs`` that ``sizes`` does not fix.

    Raises:
        InputError: two inputs share a name, or not exactly one axis is left to be bucketed.
    """
    names = [spec.name for spec in inputs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise InputError(f"inputs declared twice: {sorted(repeated)}; names must differ")
    used = dict.fromkeys(axis for spec in inputs for axis in spec.shape if isinstance(axis, str))
    free = [axis for axis in used if axis not in sizes]
    if len(free) != 1:
        raise InputError(
            f"axes {free} have no size in axes={dict(sizes)}; exactly one axis, the bucketed one, must be left out"
        )
    return Axes(free[0], dict(sizes))


def true_sizes(inputs: Sequence[Input], values: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, int]:
    """Check ``values`` against their declarations and return the true size of every axis.

    Values lie on ``device`` or on the host.

    Raises:
        InputError: naming the input: missing, unknown, wrong dtype, rank, device or size, or axes that disagree.
    """
    given = [spec for spec in inputs if spec.name in values or not spec.optional]
    if len(values) != len(given):
        declared, required = {spec.name for spec in inputs}, {spec.name for spec in inputs if not spec.optional}
        missing, unknown = sorted(required - values.keys()), sorted(values.keys() - declared)
        raise InputError(f"inputs missing: {missing}, unknown: {unknown}; declared are {sorted(declared)}")
    sizes: dict[str, int] = {}
    for spec in given:
        value = values.get(spec.name)
        if not isinstance(value, torch.Tensor):
            raise InputError(f"input {spec.name!r} is {type(value).__name__}; pass a tensor of {spec.dtype}")
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
    if len(given) < len(inputs):
        for axis in (axis for spec in inputs for axis in spec.shape if isinstance(axis, str)):
            sizes.setdefault(axis, 0)
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
        nbytes: length of the arena's prefix that holds all of them.
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
    """One persistent buffer of maximum size per input, all in one arena on the device.

    The largest inputs lie last, so that a small step copies a small prefix of the arena.

    Args:
        inputs: the declarations.
        limits: the largest size of every axis.
        backend: allocates the arena, the host buffers and the events.
    """

    def __init__(self, inputs: Sequence[Input], limits: Mapping[str, int], backend: Backend) -> None:
        offset, self._regions = 0, list[_Region]()
        shapes = {spec.name: _shape(spec, limits) for spec in inputs}
        for spec in sorted(inputs, key=lambda spec: prod(shapes[spec.name]) * spec.dtype.itemsize):
            self._regions.append(_Region(spec, offset, shapes[spec.name]))
            offset += -(-prod(shapes[spec.name]) * spec.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.arena = torch.zeros(offset, dtype=torch.uint8, device=backend.device)
        self.ring = StagingRing(offset, STAGING_SLOTS, backend.host_buffer, backend.event)
        self._staged = [
            {region.spec.name: _Staged(region, slot.memory) for region in self._regions} for slot in self.ring.slots
        ]

    def bind(self, sizes: dict[str, int]) -> BoundInputs:
        """Return the view of every buffer at the axis ``sizes``."""
        shapes = {region.spec.name: _shape(region.spec, sizes) for region in self._regions}
        return BoundInputs(
            sizes=sizes,
            views={region.spec.name: region.view(self.arena, shapes[region.spec.name]) for region in self._regions},
            nbytes=max(region.end(shapes[region.spec.name]) for region in self._regions),
        )

    def load(self, bound: BoundInputs, values: Mapping[str, torch.Tensor]) -> None:
        """Copy ``values`` into the buffers that ``bound`` sees and refill their padding.

        Host values go through one slot of the staging ring and one copy; device values are copied on the device.
        An input that ``values`` lacks is all padding. Everything is put on the current stream.
        """
        on_device = {name: value for name, value in values.items() if value.device.type != "cpu"}
        if len(on_device) < len(self._regions):
            slot = self.ring.acquire()
            for name, staged in self._staged[slot.index].items():
                if name not in on_device:
                    staged.write(values.get(name))
            self.arena[: bound.nbytes].copy_(slot.memory[: bound.nbytes], non_blocking=True)
            self.ring.release(slot)
        for region in self._regions:
            name = region.spec.name
            if name in on_device:
                fill(bound.views[name], on_device[name], region.spec.padding)


def fill(target: torch.Tensor, value: torch.Tensor, padding: float | int | bool) -> None:
    """Write ``value`` into the leading corner of ``target`` and ``padding`` everywhere else."""
    if value.shape == target.shape:
        target.copy_(value)
    elif value.shape[1:] == target.shape[1:]:
        target[: value.shape[0]].copy_(value)
        target[value.shape[0] :].fill_(padding)
    else:
        target.fill_(padding)
        target[_slices(value.shape)].copy_(value)


def all_padding(spec: Input, sizes: Mapping[str, int], device: torch.device) -> torch.Tensor:
    """Return an input that holds nothing but padding, at the axis ``sizes``."""
    return torch.full(_shape(spec, sizes), spec.padding, dtype=spec.dtype, device=device)


def _slices(corner: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in corner)


def _shape(spec: Input, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
