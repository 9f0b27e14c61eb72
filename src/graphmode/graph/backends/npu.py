"""ACL graphs of Ascend NPUs, by ``torch.npu.graph`` of torch_npu.

Attention there takes lengths as lists on the host. Captured with ``auto_dispatch_capture``, such an operator becomes a
group of tasks that waits for an event before it runs. An update, issued on a stream of its own during the replay, gives
the group its new arguments and records the event, so the replay runs up to the operator meanwhile.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode

from graphmode.graph.backends.base import Capabilities, Graph, Support
from graphmode.graph.backends.streams import GraphInterface, StreamBackend, StreamPool, StreamRecording
from graphmode.graph.host_arguments import HostArguments

# Of 2,048 streams, what vLLM-Ascend found that graphs may take.
_USABLE_STREAMS = 1800
_STREAMS_A_GROUP = 40

SUPPORT = Support(
    captured="torch.npu.NPUGraph, torch.npu.graph(auto_dispatch_capture=, capture_error_mode='thread_local')",
    parameters="tensors, read at replay; lengths of attention by NPUGraph.update on its own stream",
    limits=f"2,048 streams: {_USABLE_STREAMS:,} graphs are captured at most; one kernel path a graph",
    verified="written to torch_npu 2.14.0, by a fake device with its signatures in CI; not run on hardware",
)


def graph_limit(communication_groups: int = 0) -> int:
    """Return how many graphs have streams on one NPU.

    A graph takes one stream and two for each group that its collectives run on, and each group takes some of its own.
    A piecewise size is as many graphs as the model has layers, and one. Source: vLLM-Ascend's former rule for the
    sizes that fit (``update_aclgraph_sizes``).
    """
    return max(0, (_USABLE_STREAMS - _STREAMS_A_GROUP * communication_groups) // (1 + 2 * communication_groups))


class NpuBackend(StreamBackend):
    """Graphs of one NPU."""

    interface = GraphInterface(
        "npu",
        "NPUGraph",
        "torch_npu",
        {"capture_error_mode": "thread_local"},
        # Insufficient streams; allocation of a resource failed, which the driver says when an event needs a stream.
        exhausted=("207008", "207005", "Insufficient_Stream_Resources", "Alloc sq cq fail"),
    )
    capabilities = Capabilities(
        runs_while_capturing=False,
        shared_pool=True,
        random=True,
        pinned_host_memory=True,
        host_arguments=True,
        graph_limit=graph_limit(),
    )

    def recording(self, pool: StreamPool, host_arguments: HostArguments | None) -> NpuRecording:
        return NpuRecording(self.module, self.interface, pool, self._stream, host_arguments)


class UpdatedGraph:
    """A graph some of whose operators get their host arguments at each replay."""

    def __init__(self, graph: Any, module: Any, host_arguments: HostArguments) -> None:
        self._graph = graph
        self._module = module
        self._host_arguments = host_arguments

    def replay(self) -> None:
        """Replay, and update while the replay runs.

        The update stream first waits for all work before this replay: an update that ran ahead would give the wrong
        lengths to the replay before. It must not wait for this replay, which waits for the update.
        """
        self._graph.graph_dispatch_mode.update_stream.wait_stream(self._module.current_stream())
        self._graph.replay()
        self._graph.update(cpu_update_input=[dict(self._host_arguments.current)])


class NpuRecording(StreamRecording):
    """One function being captured on an NPU."""

    def __init__(
        self,
        module: Any,
        interface: GraphInterface,
        pool: StreamPool,
        stream: Any,
        host_arguments: HostArguments | None,
    ) -> None:
        super().__init__(module, interface, pool, stream)
        self._host_arguments = host_arguments
        # Its own dispatch mode, which ends with the capture, is active when the guard is called.
        self.breaks_inside_operators = host_arguments is None

    def open_capture(self, graph: Any) -> AbstractContextManager[object]:
        # By keyword: the fourth parameter is not the error mode, as it is elsewhere.
        capture: AbstractContextManager[object] = self.module.graph(
            graph,
            pool=self.pool.handle,
            stream=self.stream,
            auto_dispatch_capture=self._host_arguments is not None,
            **self.interface.options,
        )
        return capture

    def finished(self, graph: Any) -> Graph:
        replayable: Graph = graph
        if self._host_arguments is not None and graph.graph_dispatch_mode.graph_dispatch_records:
            replayable = UpdatedGraph(graph, self.module, self._host_arguments)
        return replayable

    def forget(self, graph: Any) -> None:
        """Undo what a refused capture leaves behind: a dispatch mode that still records, and a pool."""
        still_there = _get_current_dispatch_mode() is graph.graph_dispatch_mode
        if still_there:
            graph.graph_dispatch_mode.__exit__(None, None, None)
        super().forget(graph)
