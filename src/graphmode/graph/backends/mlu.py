"""MLU graphs of Cambricon devices, by ``torch.mlu.graph`` of torch_mlu."""

from __future__ import annotations

from graphmode.graph.backends.base import Capabilities, Support
from graphmode.graph.backends.streams import GraphInterface, StreamBackend

SUPPORT = Support(
    captured="torch.mlu.MLUGraph, torch.mlu.graph(capture_error_mode='relaxed')",
    parameters="tensors in fixed buffers, read at replay",
    limits="no Triton: the PyTorch reference kernels",
    verified="written to torch_mlu 1.24.0 (torch 2.1), by a fake device in CI; not run on hardware",
)


class MluBackend(StreamBackend):
    """Graphs of one MLU, in the error mode that torch_mlu takes by default."""

    interface = GraphInterface("mlu", "MLUGraph", "torch_mlu", {"capture_error_mode": "relaxed"})
    capabilities = Capabilities(runs_while_capturing=False, shared_pool=True, random=True, pinned_host_memory=True)
