"""XPU graphs of Intel GPUs, by ``torch.xpu.graph``, which knows no error mode."""

from __future__ import annotations

from graphmode.graph.backends.base import Capabilities, Support
from graphmode.graph.backends.streams import GraphInterface, StreamBackend

SUPPORT = Support(
    captured="torch.xpu.XPUGraph, torch.xpu.graph",
    parameters="tensors in fixed buffers, read at replay",
    limits="a torch that has torch.xpu.XPUGraph, and no error mode: let no other thread use the device during capture",
    verified="written to torch 2.13, by a fake device with its signatures in CI; not run on hardware",
)


class XpuBackend(StreamBackend):
    """Graphs of one Intel GPU."""

    interface = GraphInterface("xpu", "XPUGraph")
    capabilities = Capabilities(runs_while_capturing=False, shared_pool=True, random=True, pinned_host_memory=True)
