"""Shared fixtures. Without a GPU, Triton kernels run in Triton's interpreter and tests marked gpu are skipped."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

# A shell lets what it puts in the background ignore interrupts, and so does all that this starts; some tests send them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Time decides no test: a busy machine must not fail one. `make test-properties` asks for many more examples.
settings.register_profile("graphmode", parent=settings(), deadline=None, max_examples=20)
settings.register_profile("thorough", parent=settings(), deadline=None, max_examples=300)
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


@pytest.fixture(scope="session", autouse=True)
def few_graphs() -> Iterator[None]:
    """Engines that are told no sizes capture few graphs on a CPU: captures are most of what small tests take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "graphmode.engine.config.powers_of_two",
            lambda maximum: (*(size for size in (1, 8, 64) if size < maximum), maximum),
        )
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that has a backend here."""
    torch.manual_seed(0)
    return request.param
