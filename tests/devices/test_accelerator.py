"""A device that torch knows only by ``torch.accelerator``: a toy in C++, with graphs of its own.

Compiling it needs a C++ compiler and ninja, so the tests are left out unless asked for (``-m slow``). A process that
has the device keeps it, so each test runs in its own.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graphmode.graph import BackendError, get_backend

LOAD = "import sys\nfrom tests.devices import toy\ntoy.load(sys.argv[1])\nimport torch\n"

RUNTIME = """
from graphmode.graph import GraphRunner, Input, Reason, get_backend, outside_graph

backend = get_backend("auto")
assert type(backend).__name__ == "AcceleratorBackend" and str(backend.device) == "toy:0"
state = torch.zeros(3, device="toy")

def full(x):
    state.add_(1)
    return (x @ torch.ones(3, 3, device="toy")).cumsum(0).softmax(-1) + x

@outside_graph
def rounded(x):
    return torch.tensor(x.cpu().round().tolist()).to("toy")

def piecewise(x):
    return rounded(x * 3).relu() - 1

def eager(fn, x):
    return fn(x.to("toy")).cpu()

for fn in (full, piecewise):
    runner = GraphRunner(fn, [Input("x", torch.float32, ("n", 3))], [1, 2, 4], backend=backend, strict=True)
    runner.capture(progress=False)
    for size in (1, 2, 3, 4, 1, 3):
        x = torch.randn(size, 3)
        before = state.cpu()
        out = runner(x=x).cpu()
        assert fn is piecewise or torch.equal(state.cpu(), before + 1), "a replay runs once, a capture not at all"
        torch.testing.assert_close(out, eager(fn, x))
    assert runner.stats.hit_rate == 1 and runner.stats.graphs == (3 if fn is full else 6)

broken = GraphRunner(lambda x: x * x.sum().item(), [Input("x", torch.float32, ("n", 3))], [2], backend=backend)
broken.capture(progress=False)
assert list(broken.failed.values()) == [Reason.UNSUPPORTED_OP]
assert broken(x=torch.ones(2, 3)).cpu().tolist() == [[6.0] * 3] * 2
"""

ENGINE = """
from graphmode import LLM, SamplingParams
params = SamplingParams(max_tokens=12, temperature=0)
prompts = ["ROMEO.", "What light through yonder", "O"]
texts = {}
for device in ("cpu", "toy"):
    for mode in ("none", "full", "piecewise"):
        llm = LLM(device=device, dtype="float32", graph_mode=mode, max_num_seqs=3, max_num_batched_tokens=8,
                  max_model_len=64, kv_cache_memory=1 << 24, graph_sizes=None if mode == "none" else [1, 3, 8])
        texts[device, mode] = [output.outputs[0].text for output in llm.generate(prompts, params)]
        assert mode == "none" or (llm.stats.graphs and not llm.stats.misses), llm.stats
assert len({tuple(text) for text in texts.values()}) == 1, texts
"""


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.accelerator, "Graph"), reason="needs torch 2.13")
@pytest.mark.parametrize("code", [RUNTIME, ENGINE], ids=["runtime", "engine"])
def test_a_device_with_graphs_of_its_own(code: str, build_folder: Path) -> None:
    subprocess.run([sys.executable, "-c", LOAD + code, str(build_folder)], check=True)


def test_an_accelerator_without_graphs_is_left_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    assert get_backend("auto").device.type == "cpu"
    with pytest.raises(BackendError, match=r"'mps'.*torch\.accelerator\.Graph, torch 2\.13"):
        get_backend("mps")
    monkeypatch.delattr(torch.accelerator, "Graph", raising=False)
    assert get_backend("auto").device.type == "cpu"
