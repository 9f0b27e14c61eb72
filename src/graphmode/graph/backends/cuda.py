"""CUDA graphs, by ``torch.cuda.graph``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from graphmode.graph.backends.base import Capabilities, Graph
from graphmode.graph.errors import BackendError
from graphmode.graph.staging import Event

log = logging.getLogger(__name__)


@dataclass
class CudaPool:
    """A pool of the caching allocator.

    Attributes:
        handle: its id; another one after a capture that the driver refused.
        abandoned: graphs of failed captures. The allocator refuses a pool whose last graph is gone, so they stay.
    """

    handle: Any
    abandoned: list[torch.cuda.CUDAGraph] = field(default_factory=list)


class CudaBackend:
    """Graphs of one CUDA device. Captures on a stream of its own; other threads may use the device meanwhile."""

    capabilities = Capabilities(runs_while_capturing=False, shared_pool=True, random=True, pinned_host_memory=True)

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise BackendError("device 'cuda' was asked for, but torch sees none; use device='cpu'")
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise BackendError(f"device 'cuda:{index}' was asked for; torch sees {torch.cuda.device_count()}")
        self.device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.device)

    def make_pool(self) -> CudaPool:
        return CudaPool(torch.cuda.graph_pool_handle())

    def recording(self, pool: CudaPool) -> CudaRecording:
        return CudaRecording(pool, self._stream)

    @contextmanager
    def capture_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def event(self) -> Event:
        return torch.cuda.Event()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def memory_used(self, pool: CudaPool) -> int:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free


class CudaRecording:
    """One function being captured, segment by segment, on the backend's stream."""

    def __init__(self, pool: CudaPool, stream: torch.cuda.Stream) -> None:
        self._pool = pool
        self._stream = stream
        self._generators: Sequence[torch.Generator] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capture: AbstractContextManager[None] | None = None

    @contextmanager
    def installed(self, generators: Sequence[torch.Generator]) -> Iterator[None]:
        self._generators = generators
        yield

    def begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        capture = torch.cuda.graph(
            graph, pool=self._pool.handle, stream=self._stream, capture_error_mode="thread_local"
        )
        capture.__enter__()
        self._graph, self._capture = graph, capture

    def end(self) -> Graph:
        graph, capture = self._graph, self._capture
        assert graph is not None
        assert capture is not None
        self._graph = self._capture = None
        try:
            with warnings.catch_warnings():
                # A call outside the graph may stand first or last: the graph before or after it has nothing to do.
                warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
                capture.__exit__(None, None, None)
        except BaseException:
            self._forget(graph)
            raise
        return graph

    def abort(self) -> None:
        if self._graph is None:
            return
        graph = self._graph
        try:
            self.end()
        except Exception as error:
            log.warning("the broken capture ended with: %s", error)
        else:
            self._pool.abandoned.append(graph)

    def _forget(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what a capture that the driver refused leaves behind.

        The caching allocators still take it to be under way: the device's is told otherwise; the one for pinned host
        memory cannot be, and refuses the pool, so later captures get a new one.
        """
        self._pool.abandoned.append(graph)
        torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool.handle)
        self._pool.handle = torch.cuda.graph_pool_handle()

    def finish(self) -> None:
        """Do nothing: the caching allocator has shared the memory of what was let go already."""
