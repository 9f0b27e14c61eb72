"""Every device that has a backend and is not here, as a fake."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from graphmode.graph.backends.cuda import CudaBackend
from graphmode.graph.backends.mlu import MluBackend
from graphmode.graph.backends.npu import NpuBackend
from graphmode.graph.backends.streams import StreamBackend
from graphmode.graph.backends.xpu import XpuBackend
from tests.devices.fake import MLU_SIGNATURES, NPU_INTERFACE, FakeDevice, installed_signatures, on_cpu
from tests.devices.fake_npu_attention import UPDATABLE


def fake_npu(max_graphs: int = 10000) -> FakeDevice:
    """An Ascend NPU."""
    return FakeDevice("NPUGraph", NPU_INTERFACE["signatures"], updatable=UPDATABLE, max_graphs=max_graphs)


def fake_mlu() -> FakeDevice:
    """A Cambricon MLU."""
    return FakeDevice("MLUGraph", MLU_SIGNATURES)


def fake_xpu() -> FakeDevice:
    """An Intel GPU."""
    if not hasattr(torch.xpu, "XPUGraph"):
        pytest.skip(f"torch {torch.__version__} has no torch.xpu.XPUGraph")
    return FakeDevice("XPUGraph", installed_signatures(torch.xpu, "XPUGraph"))


def fake_cuda() -> FakeDevice:
    """An NVIDIA GPU."""
    return FakeDevice("CUDAGraph", installed_signatures(torch.cuda, "CUDAGraph"))


DEVICES: dict[str, tuple[type[StreamBackend], Callable[[], FakeDevice]]] = {
    "cuda": (CudaBackend, fake_cuda),
    "mlu": (MluBackend, fake_mlu),
    "npu": (NpuBackend, fake_npu),
    "xpu": (XpuBackend, fake_xpu),
}


@pytest.fixture(autouse=True)
def memory_is_the_host_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures need not pass Python's collector to free memory of the device: a fake has none."""
    monkeypatch.setattr("graphmode.graph.captures.gc", SimpleNamespace(collect=lambda: 0))


@pytest.fixture(params=list(DEVICES))
def name(request: pytest.FixtureRequest) -> str:
    """A device type."""
    return str(request.param)


@pytest.fixture
def fake(name: str, monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Its module."""
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: None, raising=False)
    return DEVICES[name][1]()


@pytest.fixture
def backend(name: str, fake: FakeDevice) -> StreamBackend:
    """Its backend, over the fake."""
    return on_cpu(DEVICES[name][0], fake)
