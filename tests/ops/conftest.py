import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from graphmode.ops import kv_cache
from graphmode.ops._triton import compiles_hopper, runs_hopper
from graphmode.ops.attention.cpu import paged_attention_cpu
from graphmode.ops.attention.paged_reference import paged_attention_reference
from graphmode.ops.attention.paged_triton import paged_attention_triton
from graphmode.ops.sampling import sample as sampling


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter() -> Iterator[None]:
    """Triton's interpreter without what takes half of its time and changes nothing.

    It looks for overflow, whose findings it drops unless it debugs, and prepares ``triton.language`` anew for every
    call of a device function.
    """
    if torch.cuda.is_available() or not find_spec("triton"):
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang

    def prepare_once(fn: Callable[..., object]) -> object:
        languages = [each for each in (language, language.core) if any(each is one for one in fn.__globals__.values())]
        if any(language.core.is_builtin(each.program_id) for each in languages):
            return prepare(fn)
        return interpreter._LangPatchScope()

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernel_device() -> str:
    """Where the Triton functions run: the GPU, or Triton's interpreter over CPU tensors where there is none."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["reference", "cpu", "triton"])
def implementation_or_cpu(request: pytest.FixtureRequest, kernel_device: str) -> str:
    """As ``implementation``, for functions that have a loop or an operator of their own for the CPU."""
    if request.param == "cpu" and kernel_device != "cpu":
        pytest.skip("tensors lie on the GPU")
    return request.param


@pytest.fixture
def write_kv(implementation: str):
    return getattr(kv_cache, f"write_kv_{implementation}")


@pytest.fixture
def paged_attention(implementation_or_cpu: str):
    by_name = {"reference": paged_attention_reference, "cpu": paged_attention_cpu, "triton": paged_attention_triton}
    return by_name[implementation_or_cpu]


@pytest.fixture
def sample(implementation_or_cpu: str):
    return getattr(sampling, f"sample_{implementation_or_cpu}")


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh float memory holds NaN, so that what is read without being written shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture
def on_hopper() -> None:
    if not runs_hopper(torch.empty(0, device="cuda")):
        pytest.skip("needs Hopper and a Triton that compiles its kernels")


@pytest.fixture
def compile_for_hopper(tmp_path: Path) -> Callable[[str], None]:
    """Runs a script that compiles kernels, in a process where Triton compiles instead of interpreting."""
    if not compiles_hopper():
        pytest.skip("needs a Triton that compiles the kernels for Hopper")

    def run(script: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path)
        result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]

    return run
