"""Graphs by stream capture, as torch offers them on every device: what CUDA, NPU, MLU and XPU have in common.

Each device has a module (``torch.cuda``, ``torch.npu``, ...) with a graph class and a context manager ``graph`` that
captures what is put on a stream. A :class:`GraphInterface` says what differs in name and keyword; what differs in kind
is a subclass in the device's own file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import torch

from graphmode.errors import BackendError
from graphmode.graph.backends.base import Capabilities, Graph, MemoryTaken
from graphmode.graph.host_arguments import HostArguments
from graphmode.graph.staging import Event

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphInterface:
    """What differs between devices in the calls that capture.

    Attributes:
        device_type: the device's name, and that of its module under ``torch``.
        graph: the graph class in that module.
        package: what must be imported before torch has the module; None where torch brings it.
        options: keyword arguments of the module's ``graph``, other than the graph, ``pool`` and ``stream``.
        exhausted: texts of errors that say that the device has no room for more graphs.
    """

    device_type: str
    graph: str
    package: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    exhausted: tuple[str, ...] = ()

    def load(self) -> Any:
        """Return the device's module.

        Raises:
            BackendError: the package is not installed, this torch has no graphs for the device, or no device is there.
        """
        name = self.device_type
        if self.package is not None:
            try:
                import_module(self.package)
            except ImportError as error:
                raise BackendError(
                    f"device {name!r} was asked for, but its package {self.package} cannot be imported ({error}); "
                    "install the version made for this torch, or use device='cpu'"
                ) from error
        module = getattr(torch, name, None)
        if module is None or not module.is_available():
            raise BackendError(f"device {name!r} was asked for, but torch sees none; use device='cpu'")
        if not hasattr(module, self.graph):
            raise BackendError(
                f"device {name!r} was asked for, but torch {torch.__version__} has no torch.{name}.{self.graph}; use a "
                "newer torch, or device='cpu'"
            )
        return module


@dataclass
class StreamPool:
    """A pool of the device's caching allocator.

    Attributes:
        handle: its id; a new one after a capture that the device refused.
        abandoned: graphs of failed captures. An allocator refuses a pool whose last graph is gone, so they stay.
    """

    handle: Any
    abandoned: list[Any] = field(default_factory=list)


class StreamBackend:
    """Graphs of one device. Captures on a stream of its own.

    Args:
        device: which; without an index, the current one.
        module: the device's module; default: what torch has under the device's name.

    Raises:
        BackendError: the device is not there, or has no graphs.
    """

    interface: ClassVar[GraphInterface]
    capabilities: ClassVar[Capabilities]

    def __init__(self, device: torch.device, module: Any = None) -> None:
        self.module = self.interface.load() if module is None else module
        index = self.module.current_device() if device.index is None else device.index
        if index >= self.module.device_count():
            raise BackendError(f"device '{device.type}:{index}' was asked for; torch sees {self.module.device_count()}")
        self.device = torch.device(device.type, index)
        self._stream = self.module.Stream(device=self.device)

    def make_pool(self) -> StreamPool:
        return StreamPool(self.module.graph_pool_handle())

    def recording(self, pool: StreamPool, host_arguments: HostArguments | None) -> StreamRecording:
        return StreamRecording(self.module, self.interface, pool, self._stream)

    @contextmanager
    def capture_stream(self) -> Iterator[None]:
        current = self.module.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with self.module.device(self.device), self.module.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=self.capabilities.pinned_host_memory)

    def event(self) -> Event:
        event: Event = self.module.Event()
        return event

    def synchronize(self) -> None:
        self.module.synchronize(self.device)

    @contextmanager
    def measured(self, pool: StreamPool) -> Iterator[MemoryTaken]:
        """Measure by the device what is kept, graphs' own memory too, and by the caching allocator what was taken."""
        taken, module = MemoryTaken(), self.module
        self.synchronize()
        module.empty_cache()
        free, reserved = module.mem_get_info(self.device)[0], module.memory_reserved(self.device)
        module.reset_peak_memory_stats(self.device)
        try:
            yield taken
        finally:
            self.synchronize()
            peak = module.max_memory_reserved(self.device) - reserved
            module.empty_cache()
            taken.kept = free - module.mem_get_info(self.device)[0]
            taken.peak = max(peak, taken.kept)

    def out_of_resources(self, error: BaseException) -> bool:
        return any(text in str(error) for text in self.interface.exhausted)


class StreamRecording:
    """One function being captured, segment by segment, on the backend's stream."""

    breaks_inside_operators = True

    def __init__(self, module: Any, interface: GraphInterface, pool: StreamPool, stream: Any) -> None:
        self.module = module
        self.interface = interface
        self.pool = pool
        self.stream = stream
        self._generators: Sequence[torch.Generator] = ()
        self._graph: Any = None
        self._capture: AbstractContextManager[object] | None = None
        self._ended: list[Any] = []

    @contextmanager
    def installed(self, generators: Sequence[torch.Generator]) -> Iterator[None]:
        self._generators = generators
        yield

    def begin(self) -> None:
        graph = self.registered(self.make_graph())
        capture = self.open_capture(graph)
        try:
            capture.__enter__()
        except BaseException:
            self.forget(graph)
            raise
        self._graph, self._capture = graph, capture

    def end(self) -> Graph | None:
        graph, capture = self._graph, self._capture
        assert capture is not None
        self._graph = self._capture = None
        try:
            capture.__exit__(None, None, None)
        except BaseException:
            self.forget(graph)
            raise
        self._ended.append(graph)
        return self.finished(graph)

    def abort(self) -> None:
        if self._graph is not None:
            try:
                self.end()
            except Exception as error:
                log.warning("the broken capture ended with: %s", error)
        self.pool.abandoned += self._ended
        self._ended = []

    def own(self) -> Sequence[torch.Tensor]:
        """Return nothing: a device's graph holds addresses alone."""
        return ()

    def finish(self) -> None:
        """Do nothing: the caching allocator reuses freed memory already."""

    def make_graph(self) -> Any:
        """Return an empty graph."""
        return getattr(self.module, self.interface.graph)()

    def registered(self, graph: Any) -> Any:
        """Return a graph that knows the generators that the function draws from."""
        for generator in self._generators:
            graph.register_generator_state(generator)
        return graph

    def open_capture(self, graph: Any) -> AbstractContextManager[object]:
        """Return the context in which ``graph`` captures."""
        capture: AbstractContextManager[object] = self.module.graph(
            graph, pool=self.pool.handle, stream=self.stream, **self.interface.options
        )
        return capture

    def finished(self, graph: Any) -> Graph:
        """Return the object that replays a captured graph."""
        replayable: Graph = graph
        return replayable

    def forget(self, graph: Any) -> None:
        """Undo what a capture that the device refused leaves behind. Later captures get a new pool."""
        self.pool.abandoned.append(graph)
        self.pool.handle = self.module.graph_pool_handle()
