"""Shared fixtures. Without a GPU, Triton kernels run in Triton's interpreter and tests marked gpu are skipped."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores
    torch.set_num_threads(1)

# Time decides no test: a busy machine must not fail one.
settings.register_profile("graphmode", parent=settings(), deadline=None)
settings.load_profile("graphmode")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    without_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    asked_for = config.option.markexpr or ""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(without_gpu)
        for kind in ("slow", "real"):
            if item.get_closest_marker(kind) and kind not in asked_for:
                item.add_marker(pytest.mark.skip(reason=f"{kind}; run with -m {kind}"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that has a backend here."""
    torch.manual_seed(0)
    return request.param
