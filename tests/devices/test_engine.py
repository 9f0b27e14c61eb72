"""The whole engine over devices that are not here: it generates what it generates eagerly, and on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graphmode import LLM, SamplingParams
from graphmode.graph import Backend, InputError
from graphmode.graph.backends.cpu import CpuBackend
from graphmode.graph.backends.mlu import MluBackend
from graphmode.graph.backends.npu import NpuBackend
from graphmode.graph.backends.streams import StreamBackend
from tests.devices.conftest import fake_mlu, fake_npu
from tests.devices.fake import FakeDevice, on_cpu
from tests.engine.conftest import tiny  # noqa: F401

FAKES: dict[str, Callable[[], tuple[type[StreamBackend], FakeDevice]]] = {
    "mlu": lambda: (MluBackend, fake_mlu()),
    "npu": lambda: (NpuBackend, fake_npu()),
}
GENERATOR = torch.Generator().manual_seed(1)
PROMPTS = [
    {"prompt_token_ids": torch.randint(0, 199, (length,), generator=GENERATOR).tolist()}
    for length in (3, 1, 40, 7, 17, 1, 25)
]
PARAMS = [
    SamplingParams(max_tokens=8 + index, temperature=0.7 * (index % 2), seed=index, top_k=20 * (index % 3))
    for index in range(len(PROMPTS))
]


def generate(folder: Path, backend: Backend, **options: object) -> tuple[list[list[int]], LLM]:
    llm = LLM(
        folder,
        device=backend,
        dtype="bfloat16",
        max_num_seqs=4,
        max_num_batched_tokens=16,
        fuse="none",  # bfloat16 is rounded in other places then
        graph_sizes=None if options.get("graph_mode") == "none" else [1, 3, 8, 16],
        strict=True,
        **options,
    )
    outputs = llm.generate(PROMPTS, PARAMS)  # type: ignore[arg-type]
    return [output.outputs[0].token_ids for output in outputs], llm


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:  # noqa: F811
    return generate(tiny, CpuBackend(torch.device("cpu")), graph_mode="none")[0]


@pytest.mark.parametrize("device", list(FAKES))
@pytest.mark.parametrize("mode", ["none", "full", "piecewise", "full_and_piecewise", "full_decode_only"])
def test_every_mode_generates_the_same_tokens(
    tiny: Path,  # noqa: F811
    expected: list[list[int]],
    device: str,
    mode: str,
) -> None:
    backend_class, fake = FAKES[device]()
    tokens, llm = generate(tiny, on_cpu(backend_class, fake), graph_mode=mode)
    assert tokens == expected
    stats = llm.stats
    if mode == "none":
        assert not stats.graphs
    else:
        assert stats.replays
        assert set(stats.misses) <= {"not_captured_yet", "disabled"}
    full_mixed = mode == "full"
    updates = len(fake.named("update"))
    if device == "npu" and mode in ("full", "full_decode_only", "full_and_piecewise"):
        assert updates == stats.replays if full_mixed else 0 < updates <= stats.replays
    else:
        assert not updates


def test_without_updates_the_npu_s_tokens_are_wrong(
    tiny: Path,  # noqa: F811
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hazard that host arguments are there for."""
    record = NpuBackend.recording
    monkeypatch.setattr(NpuBackend, "recording", lambda self, pool, host: record(self, pool, None))
    assert generate(tiny, on_cpu(NpuBackend, fake_npu()))[0] != expected


def test_layers_are_not_compiled_where_attention_is_the_device_s(tiny: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match=r"'compile'.*'layers'"):
        LLM(tiny, device=on_cpu(NpuBackend, fake_npu()), fuse="compile")


def test_a_device_that_runs_out_of_graphs_generates_the_same_tokens(
    tiny: Path,  # noqa: F811
    expected: list[list[int]],
) -> None:
    fake = fake_npu(max_graphs=11)
    backend = on_cpu(NpuBackend, fake)
    llm = LLM(tiny, device=backend, dtype="bfloat16", max_num_seqs=4, max_num_batched_tokens=16, graph_mode="piecewise")
    assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)] == expected  # type: ignore[arg-type]
    assert llm.stats.graphs <= 11
    assert llm.engine.core.runner.graphs.stats.out_of_graphs
