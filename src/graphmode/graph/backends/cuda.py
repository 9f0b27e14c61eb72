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

    def end(self) -> Graph | None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graph = super().end()
        empty = [each for each in caught if "The CUDA Graph is empty" in str(each.message)]
        for each in caught:
            if each not in empty:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        if not empty:
            return graph
        # A call outside the graph comes first or last, or follows another. The pool must not lose its last graph.
        self.pool.abandoned.append(self._ended.pop())
        return None

    def forget(self, graph: Any) -> None:
        """Undo what a capture that the driver refused leaves behind.

        The caching allocators still regard the capture as running. The device's is told that it has ended; the one for
        pinned host memory cannot be told and refuses the pool, so later captures get a new one. Random generators
        refuse to draw outside of a capture until a capture has ended normally: an empty one does.
        """
        torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool.handle)
        super().forget(graph)
        try:
            empty = self.registered(self.make_graph())
            with warnings.catch_warnings(action="ignore"), self.open_capture(empty):
                pass
        except Exception as error:
            log.warning("random generators may refuse to draw after the broken capture: %s", error)
