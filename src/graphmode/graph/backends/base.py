"""What a device must offer: one small protocol, and the registry that finds the backend of a device type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import torch

from graphmode.errors import BackendError
from graphmode.graph.host_arguments import HostArguments
from graphmode.graph.staging import Event

ENTRY_POINT_GROUP = "graphmode.backends"


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do.

    Attributes:
        runs_while_capturing: capture also executes the work (the CPU tape), instead of only recording it.
        shared_pool: graphs of one pool share the memory of their intermediate results.
        random: random operators inside a graph give new numbers at each replay.
        pinned_host_memory: copies from the staging ring are asynchronous.
        host_memory: the device's memory is the host's, so a step's values are written where graphs read them.
        host_arguments: operators take lengths on the host, and graphs are updated with them at each replay.
        graph_limit: graphs that the device holds at most; None where none is known.
    """

    runs_while_capturing: bool
    shared_pool: bool
    random: bool
    pinned_host_memory: bool
    host_memory: bool = False
    host_arguments: bool = False
    graph_limit: int | None = None


@dataclass(frozen=True)
class Support:
    """How a device is supported, in words: for ``graphmode info`` and docs/devices.md.

    Attributes:
        captured: by which call work is captured.
        parameters: how a replay gets what changes from step to step.
        limits: what the device refuses or runs out of.
        verified: what the backend was written to, and where it has run.
    """

    captured: str
    parameters: str
    limits: str
    verified: str


@dataclass
class MemoryTaken:
    """Device memory that a capture took, in bytes; known when the capture has ended.

    Attributes:
        kept: what it still holds.
        peak: the most that it held at a time.
    """

    kept: int = 0
    peak: int = 0


class Graph(Protocol):
    """Recorded device work."""

    def replay(self) -> None:
        """Put the recorded work on the current stream."""


class Recording(Protocol):
    """One function being recorded, in one segment or, where calls break the graph, in several.

    Attributes:
        breaks_inside_operators: whether a segment can end while an operator is being called, so that the operator runs
            between two graphs.
    """

    breaks_inside_operators: bool

    def installed(self, generators: Sequence[torch.Generator]) -> AbstractContextManager[None]:
        """Surround the whole recording. ``generators``: those that the function draws from, except the default one."""

    def begin(self) -> None:
        """Start to record a segment."""

    def end(self) -> Graph | None:
        """Stop recording and return the segment; None where it is known that nothing was recorded."""

    def abort(self) -> None:
        """Drop what was recorded, the open segment included, and leave the device usable."""

    def own(self) -> Sequence[torch.Tensor]:
        """Return the tensors that the recording itself holds."""

    def finish(self) -> None:
        """End the recording. Memory that Python still holds is read later; from now on the rest may be shared."""


@runtime_checkable
class Backend(Protocol):
    """A device with graphs. One instance serves one device."""

    device: torch.device
    capabilities: Capabilities

    def make_pool(self) -> Any:
        """Return a new memory pool for recordings to share."""

    def recording(self, pool: Any, host_arguments: HostArguments | None) -> Recording:
        """Return a recording whose intermediate results live in ``pool``.

        If ``host_arguments`` are given, each replay takes their current values. An update must not reach a graph whose
        previous replay is still in flight. Only a backend with the capability ``host_arguments`` is ever given any.
        """

    def capture_stream(self) -> AbstractContextManager[None]:
        """Make the backend's capture stream current, after all work put on the current stream so far."""

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """Return uint8 ``[nbytes]`` on the host, pinned where that makes copies asynchronous."""

    def event(self) -> Event:
        """Return an event of this device."""

    def synchronize(self) -> None:
        """Wait for all work put on the device."""

    def measured(self, pool: Any) -> AbstractContextManager[MemoryTaken]:
        """Measure the memory that a capture inside takes; its figures are there afterwards."""

    def out_of_resources(self, error: BaseException) -> bool:
        """Return whether a capture failed because the device has no room for more graphs."""


# Device type to the module and the class of its backend. Modules are loaded when they are asked for.
_BUILT_IN = {
    "cpu": ("cpu", "CpuBackend"),
    "cuda": ("cuda", "CudaBackend"),
    "mlu": ("mlu", "MluBackend"),
    "npu": ("npu", "NpuBackend"),
    "xpu": ("xpu", "XpuBackend"),
}
_GENERIC = ("accelerator", "AcceleratorBackend")


def _load(module: str, name: str) -> Any:
    return getattr(import_module(f"{__package__}.{module}"), name)


def _opener(module: str, name: str) -> Callable[[torch.device], Backend]:
    def open_backend(device: torch.device) -> Backend:
        backend: Backend = _load(module, name)(device)
        return backend

    return open_backend


def device_support() -> dict[str, Support]:
    """Return how each device with a built-in backend is supported; ``other`` is for those without one."""
    return {device: _load(module, "SUPPORT") for device, (module, _) in {**_BUILT_IN, "other": _GENERIC}.items()}


def available_backends() -> dict[str, Callable[[torch.device], Backend]]:
    """Return the backend factories by device type: the built-in ones and those of installed packages.

    The current accelerator is among them if it registers graphs with torch (``torch.accelerator.Graph``, torch 2.13).

    A package adds one by the entry point group ``graphmode.backends``: the name is the device type, the object a
    callable that takes a ``torch.device`` and returns a :class:`Backend`.
    """
    plugins = {
        entry.name: lambda device, entry=entry: entry.load()(device) for entry in entry_points(group=ENTRY_POINT_GROUP)
    }
    known = {**{device_type: _opener(*where) for device_type, where in _BUILT_IN.items()}, **plugins}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type not in known and _load(_GENERIC[0], "registers_graphs")():
        known[accelerator.type] = _opener(*_GENERIC)
    return known


def default_device() -> torch.device:
    """Return the current accelerator if torch sees one that has a backend, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type in available_backends():
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def get_backend(device: str | torch.device | Backend = "auto") -> Backend:
    """Return the backend that serves ``device``: a device, a device type, or ``"auto"`` for the best one present.

    A backend object is returned as it is.

    Raises:
        BackendError: no backend is registered for the device type, or the device is not there.
    """
    if isinstance(device, Backend):
        return device
    resolved = default_device() if device == "auto" else _as_device(device)
    backends = available_backends()
    if resolved.type not in backends:
        raise BackendError(
            f"no backend for device type {resolved.type!r}; there are {sorted(backends)}. A device that registers "
            "graphs with torch needs none (torch.accelerator.Graph, torch 2.13 or newer), and a package can add one by "
            f"the entry point group {ENTRY_POINT_GROUP!r}"
        )
    return backends[resolved.type](resolved)


def _as_device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        backend = _BUILT_IN.get(str(device).partition(":")[0])
        interface = getattr(_load(*backend), "interface", None) if backend else None
        if interface is None or interface.package is None:
            raise BackendError(f"{device!r} is not a device that torch knows: {error}") from error
        interface.load()  # imports the package that makes the device known
        return torch.device(device)
