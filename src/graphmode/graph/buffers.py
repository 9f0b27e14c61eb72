"""The persistent buffers of inputs: where graphs read a step's values, and how values and padding get there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import EllipsisType

import numpy as np
import torch

from graphmode.graph.backends.base import Backend
from graphmode.graph.inputs import Input, all_padding, as_tensor, shape_at
from graphmode.graph.staging import StagingRing

ALIGNMENT = 256
STAGING_BUFFERS = 4

_Place = tuple[slice, ...] | EllipsisType


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
        nbytes: length of the arena's prefix that holds them; carried inputs are not in it.
    """

    sizes: dict[str, int]
    views: dict[str, torch.Tensor]
    nbytes: int


Value = torch.Tensor | np.ndarray
"""What a call gives for an input: a tensor, or an array on the host of its dtype."""


class _HostMemory:
    """A part of an input's memory on the host. Where numpy has its dtype, numpy writes it: with less work a call.

    Args:
        view: the memory.
        padding: the input's.
    """

    def __init__(self, view: torch.Tensor, padding: float | int | bool) -> None:
        self._view, self._padding = view, padding
        try:
            self._array: np.ndarray | None = view.numpy()
        except TypeError:  # numpy has no bfloat16 and no float8
            self._array = None

    def write(self, value: Value, place: _Place = ...) -> None:
        """Write a value of the place's shape."""
        if isinstance(value, torch.Tensor):
            self._view[place].copy_(value)
        else:
            assert self._array is not None
            self._array[place] = value

    def pad(self, place: _Place = ...) -> None:
        """Fill a place with padding."""
        if self._array is None:
            self._view[place].fill_(self._padding)
        else:
            self._array[place] = self._padding


class _Staged:
    """One input in one staging buffer: a leading corner holds values, the rest its padding.

    Args:
        region: which input.
        memory: of the staging buffer, uint8 ``[bytes]``.
    """

    def __init__(self, region: _Region, memory: torch.Tensor) -> None:
        self._memory = _HostMemory(region.view(memory, region.shape), region.spec.padding)
        self._memory.pad()
        self._corner: tuple[slice, ...] | None = None

    def write(self, value: Value | None, corner: tuple[slice, ...] | None) -> None:
        """Write a value to its corner, or None for padding alone. Only what held values before is padded again."""
        before, self._corner = self._corner, corner
        if before is not None and (
            corner is None or any(old.stop > new.stop for old, new in zip(before, corner, strict=True))
        ):
            self._memory.pad(before)
        if value is not None and corner is not None:
            self._memory.write(value, corner)


class InputBuffers:
    """A persistent buffer of maximum size for each input; all but the carried ones lie in one arena on the device.

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
        shapes = {spec.name: shape_at(spec, limits) for spec in inputs}
        self._carried = {spec.name: spec for spec in inputs if spec.carried}
        self.carried = {name: all_padding(spec, limits, backend.device) for name, spec in self._carried.items()}
        in_arena = [spec for spec in inputs if not spec.carried]
        for spec in sorted(in_arena, key=lambda spec: prod(shapes[spec.name]) * spec.dtype.itemsize):
            self._regions.append(_Region(spec, offset, shapes[spec.name]))
            offset += -(-prod(shapes[spec.name]) * spec.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.arena = torch.zeros(offset, dtype=torch.uint8, device=backend.device)
        self._ring: StagingRing | None = None
        if not backend.capabilities.host_memory:
            self._ring = StagingRing(offset, STAGING_BUFFERS, backend.host_buffer, backend.event)
            self._staged = [
                {region.spec.name: _Staged(region, buffer.memory) for region in self._regions}
                for buffer in self._ring.buffers
            ]

    def bind(self, sizes: dict[str, int]) -> BoundInputs:
        """Return the view of every buffer at the axis ``sizes``."""
        views = {
            region.spec.name: region.view(self.arena, shape_at(region.spec, sizes)) for region in self._regions
        } | self.bind_carried(sizes)
        ends = (region.end(shape_at(region.spec, sizes)) for region in self._regions)
        return BoundInputs(sizes=sizes, views=views, nbytes=max(ends, default=0))

    def bind_carried(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Return the view of every carried input at the axis ``sizes``."""
        return {name: self.carried[name][_slices(shape_at(spec, sizes))] for name, spec in self._carried.items()}

    def loader(self, bound: BoundInputs, like: Mapping[str, Value]) -> Callable[[Mapping[str, Value]], None]:
        """Return a function that copies values to the buffers of ``bound`` and refills their padding.

        Host values go through one staging buffer and one copy; device values are copied on the device. An input without
        a value becomes all padding, or keeps its value if it is carried. All work is put on the current stream.

        Args:
            bound: where to.
            like: values such as the function takes: on the same devices, of the same shapes.
        """
        corners = {name: _slices(value.shape) for name, value in like.items()}
        if self._ring is not None:
            return self._staged_loader(self._ring, bound, like, corners)
        writes = []
        for name, view in bound.views.items():
            padding = self._padding(name)
            rest = outside_corner(view, like[name].shape) if name in like else [view]
            corner = _HostMemory(view[corners[name]], padding) if name in corners else None
            writes.append((name, corner, [_HostMemory(each, padding) for each in rest if name not in self._carried]))

        def load(values: Mapping[str, Value]) -> None:
            for name, corner, rest in writes:
                if corner is not None:
                    corner.write(values[name])
                for each in rest:
                    each.pad()

        return load

    def load(self, bound: BoundInputs, values: Mapping[str, Value]) -> None:
        """Copy ``values`` into the buffers that ``bound`` sees, as :meth:`loader` says."""
        self.loader(bound, values)(values)

    def _padding(self, name: str) -> float | int | bool:
        specs = {region.spec.name: region.spec for region in self._regions} | self._carried
        return specs[name].padding

    def _staged_loader(
        self,
        ring: StagingRing,
        bound: BoundInputs,
        like: Mapping[str, Value],
        corners: Mapping[str, tuple[slice, ...]],
    ) -> Callable[[Mapping[str, Value]], None]:
        on_device = {
            name for name, value in like.items() if isinstance(value, torch.Tensor) and value.device.type != "cpu"
        }
        staged_names = [region.spec.name for region in self._regions if region.spec.name not in on_device]
        device_names = [region.spec.name for region in self._regions if region.spec.name in on_device]
        target = self.arena[: bound.nbytes]

        def load(values: Mapping[str, Value]) -> None:
            if staged_names:
                buffer = ring.acquire()
                staged = self._staged[buffer.index]
                for name in staged_names:
                    staged[name].write(values.get(name), corners.get(name))
                target.copy_(buffer.memory[: bound.nbytes], non_blocking=True)
                ring.release(buffer)
            for name in device_names:
                fill(bound.views[name], as_tensor(name, values[name]), self._padding(name))
            for name in self._carried:
                if name in corners:
                    bound.views[name][corners[name]].copy_(as_tensor(name, values[name]))

        return load

    @contextmanager
    def carried_kept(self) -> Iterator[None]:
        """Restore all carried inputs afterwards."""
        before = {name: tensor.clone() for name, tensor in self.carried.items()}
        try:
            yield
        finally:
            for name, tensor in before.items():
                self.carried[name].copy_(tensor)

    def beyond(self, bound: BoundInputs, sizes: Mapping[str, int]) -> list[torch.Tensor]:
        """Return the parts of the carried inputs of ``bound`` that lie beyond the true ``sizes``."""
        return [
            view
            for name, spec in self._carried.items()
            for view in outside_corner(bound.views[name], shape_at(spec, sizes))
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


def _slices(corner: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in corner)
