import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from graphmode.graph import Backend, BackendError, GraphRunner, Input, available_backends, get_backend
from graphmode.graph.backends import base
from graphmode.graph.backends.cpu import CpuBackend


def test_a_backend_is_found_by_device_and_a_device_without_one_is_refused() -> None:
    assert isinstance(get_backend("cpu"), Backend)
    assert get_backend("auto").device == base.default_device()
    with pytest.raises(BackendError, match=r"meta.*cpu.*cuda.*graphmode\.backends"):
        get_backend("meta")
    for device in ("toaster", "cpu:first", "cuda:first"):
        with pytest.raises(BackendError, match=f"'{device}' is not a device"):
            get_backend(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(BackendError, match="torch sees none"):
        get_backend("cuda")


class PluginBackend(CpuBackend):
    """What a package might bring."""


def test_a_package_adds_a_backend_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("meta", f"{__name__}:PluginBackend", base.ENTRY_POINT_GROUP)
    monkeypatch.setattr(base, "entry_points", lambda group: [entry] if group == base.ENTRY_POINT_GROUP else [])
    assert "meta" in available_backends()
    assert type(get_backend("meta")).__name__ == "PluginBackend"


def test_a_backend_object_serves_a_runner() -> None:
    backend = CpuBackend(torch.device("cpu"))
    runner = GraphRunner(lambda x: x + 1, [Input("x", torch.float32, ("n",))], [2], backend=backend)
    assert runner.backend is backend
    assert get_backend(backend) is backend
    assert runner(x=torch.zeros(1)).tolist() == [1.0]


@pytest.mark.gpu
def test_two_threads_use_the_device_while_one_captures() -> None:
    """The error mode is thread-local: work of other threads does not break a capture."""
    code = """
import threading, torch
from graphmode.graph import GraphRunner, Input
stop = threading.Event()
def busy():
    while not stop.is_set():
        torch.ones(1 << 16, device="cuda").sum().item()
thread = threading.Thread(target=busy)
thread.start()
runner = GraphRunner(lambda x: (x * 2).cumsum(0), [Input("x", torch.float32, ("n",))], 64, backend="cuda", strict=True)
runner.capture()
stop.set()
thread.join()
assert runner(x=torch.ones(3)).tolist() == [2.0, 4.0, 6.0]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
