"""The runtime: any PyTorch function as a set of graphs, captured once and replayed ever after."""

from graphmode.errors import (
    BackendError,
    CaptureError,
    CaptureMemoryError,
    GraphModeError,
    InputError,
    StaleAddressError,
    UnsupportedOpError,
)
from graphmode.graph.backends.base import (
    Backend,
    Capabilities,
    Support,
    available_backends,
    device_support,
    get_backend,
)
from graphmode.graph.buckets import make_buckets
from graphmode.graph.dispatch import Decision, GraphKey, Mode, Reason
from graphmode.graph.host_arguments import HostArguments
from graphmode.graph.inputs import Input
from graphmode.graph.program import outside_graph
from graphmode.graph.runner import GraphRunner
from graphmode.graph.stats import CaptureFailure, RunnerStats
from graphmode.graph.verify import Comparison, Verification

__all__ = [
    "Backend",
    "BackendError",
    "Capabilities",
    "CaptureError",
    "CaptureFailure",
    "CaptureMemoryError",
    "Comparison",
    "Decision",
    "GraphKey",
    "GraphModeError",
    "GraphRunner",
    "HostArguments",
    "Input",
    "InputError",
    "Mode",
    "Reason",
    "RunnerStats",
    "StaleAddressError",
    "Support",
    "UnsupportedOpError",
    "Verification",
    "available_backends",
    "device_support",
    "get_backend",
    "make_buckets",
    "outside_graph",
]
