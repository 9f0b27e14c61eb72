"""CUDA graphs, by ``torch.cuda.graph``."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from graphmode.graph.backends.base import Capabilities, Graph, Support
from graphmode.graph.backends.streams import GraphInterface, StreamBackend, StreamPool, StreamRecording
from graphmode.graph.host_arguments import HostArguments

log = logging.getLogger(__name__)

SUPPORT = Support(
    captured="torch.cuda.CUDAGraph, torch.cuda.graph(capture_error_mode='thread_local')",
    parameters="tensors, read at replay",
    limits="device memory",
    verified="run on NVIDIA H100, torch 2.11; its calls also by a fake device in CI",
)


class CudaBackend(StreamBackend):
    """Graphs of one CUDA device. Other threads may use the device while one captures."""

    interface = GraphInterface("cuda", "CUDAGraph", options={"capture_error_mode": "thread_local"})
    capabilities = Capabilities(runs_while_capturing=False, shared_pool=True, random=True, pinned_host_memory=True)

    def recording(self, pool: StreamPool, host_arguments: HostArguments | None) -> CudaRecording:
        return CudaRecording(self.module, self.interface, pool, self._stream)


class CudaRecording(StreamRecording):
    """One function being captured by CUDA."""

    def end(self) -> Graph:
        with warnings.catch_warnings():
            # A call outside the graph may stand first or last: the graph before or after it has nothing to do.
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            return super().end()

    def forget(self, graph: Any) -> None:
        """Undo what a capture that the driver refused leaves behind.

        The caching allocators still take it to be under way: the device's is told otherwise; the one for pinned host
        memory cannot be, and refuses the pool, so later captures get a new one. Random generators draw nothing outside
        of a capture until one has ended in order: an empty one.
        """
        torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool.handle)
        super().forget(graph)
        try:
            empty = self.registered(self.make_graph())
            with warnings.catch_warnings(action="ignore"), self.open_capture(empty):
                pass
        except Exception as error:
            log.warning("random generators may refuse to draw after the broken capture: %s", error)
