"""Graphs of any device that registers them with torch, by ``torch.accelerator.Graph`` (torch 2.13)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from graphmode.graph.backends.base import Capabilities, Graph, Support
from graphmode.graph.backends.streams import GraphInterface, StreamBackend, StreamPool, StreamRecording
from graphmode.graph.host_arguments import HostArguments

SUPPORT = Support(
    captured="torch.accelerator.Graph(capture_error_mode='thread_local'), where the device registers it",
    parameters="tensors in fixed buffers, read at replay",
    limits="torch 2.13 or newer; the PyTorch reference kernels",
    verified="run on a toy PrivateUse1 device in C++ (a slow test), torch 2.13",
)


def registers_graphs() -> bool:
    """Return whether this torch has ``torch.accelerator.Graph`` and the current accelerator registers it."""
    if not hasattr(torch.accelerator, "Graph"):
        return False
    try:
        torch.accelerator.Graph()
    except RuntimeError:
        return False
    return True


class AcceleratorModule:
    """``torch.accelerator`` under the names that devices' own modules use."""

    Event = torch.Event

    def Stream(self, device: torch.device) -> torch.Stream:  # noqa: N802
        """Return a new stream of ``device``."""
        return torch.Stream(device)

    def stream(self, stream: torch.Stream) -> AbstractContextManager[object]:
        """Make ``stream`` current inside."""
        return stream

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        """Make ``device`` current inside."""
        before = torch.accelerator.current_device_index()
        torch.accelerator.set_device_index(device)
        try:
            yield
        finally:
            torch.accelerator.set_device_index(before)

    def current_device(self) -> int:
        """Return the index of the current device."""
        return torch.accelerator.current_device_index()

    def device_count(self) -> int:
        """Return the number of devices."""
        return torch.accelerator.device_count()

    def current_stream(self, device: torch.device) -> torch.Stream:
        """Return the current stream of ``device``."""
        return torch.accelerator.current_stream(device)

    def synchronize(self, device: torch.device) -> None:
        """Wait for all work put on ``device``."""
        torch.accelerator.synchronize(device)

    def empty_cache(self) -> None:
        """Give unused cached memory back."""
        torch.accelerator.empty_cache()

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        """Return free and total bytes of ``device``."""
        return torch.accelerator.get_memory_info(device)

    def memory_reserved(self, device: torch.device) -> int:
        """Return the bytes that the caching allocator holds."""
        return torch.accelerator.memory_reserved(device)

    def max_memory_reserved(self, device: torch.device) -> int:
        """Return the most that it held since :meth:`reset_peak_memory_stats`."""
        return torch.accelerator.max_memory_reserved(device)

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        """Start to count the most that it holds."""
        torch.accelerator.reset_peak_memory_stats(device)

    def graph_pool_handle(self) -> None:
        """Return None: the first graph that is captured makes the pool."""


class AcceleratorBackend(StreamBackend):
    """Graphs of the current accelerator, whatever it is: one for which :func:`registers_graphs`."""

    interface = GraphInterface("accelerator", "Graph")
    capabilities = Capabilities(runs_while_capturing=False, shared_pool=True, random=False, pinned_host_memory=False)

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, AcceleratorModule())

    def recording(self, pool: StreamPool, host_arguments: HostArguments | None) -> AcceleratorRecording:
        return AcceleratorRecording(self.module, self.interface, pool, self._stream)


class AcceleratorRecording(StreamRecording):
    """One function being captured, on the current stream."""

    def make_graph(self) -> Any:
        return torch.accelerator.Graph(pool=self.pool.handle, capture_error_mode="thread_local")

    @contextmanager
    def open_capture(self, graph: Any) -> Iterator[None]:
        """Capture without the graph's own context, which crashes on a device that has no pinned host memory."""
        graph.capture_begin()
        try:
            yield
        finally:
            graph.capture_end()

    def finished(self, graph: Any) -> Graph:
        if self.pool.handle is None:
            self.pool.handle = graph.pool()
        replayable: Graph = graph
        return replayable
