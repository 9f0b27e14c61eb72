"""Dependent launches become programmatic edges of the captured graph: kernels start before the one ahead has ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Qwen3Config

from graphmode import LLM
from graphmode.engine.sampler import SamplingLevel
from graphmode.ops import (
    HeadInputs,
    PagedBatch,
    Rotation,
    Scoring,
    _triton,
    paged_attention,
    rms_norm,
    rotate_and_attend,
    rotate_and_cache,
    sample,
    silu_mul,
    skinny_linear_add,
    skinny_norm_linear,
)

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTER, VOCAB, BLOCK_SIZE = 4, 2, 64, 256, 512, 1024, 16


@pytest.fixture
def driver() -> Any:
    """The driver's functions, where they tell what kind an edge is and the device has edges of that kind."""
    if not _triton.launches_early(torch.device("cuda")):
        pytest.skip("needs dependent launches: compute capability 9, and a Triton that has them")
    bindings = pytest.importorskip("cuda.bindings", reason="needs the package cuda-bindings")
    if int(bindings.__version__.split(".")[0]) < 13:
        pytest.skip(f"needs cuda-bindings 13, whose cuGraphGetEdges returns edge data; this is {bindings.__version__}")
    return pytest.importorskip("cuda.bindings.driver")


class Edge(NamedTuple):
    """An edge between two kernels of a graph, by their names."""

    before: str
    after: str
    programmatic: bool


def ask(driver: Any, function: str, *arguments: Any) -> Any:
    error, *results = getattr(driver, function)(*arguments)
    assert error == driver.CUresult.CUDA_SUCCESS, f"{function}: {error}"
    return results[0] if len(results) == 1 else results


def kernel_name(driver: Any, node: Any) -> str | None:
    """The name of a kernel node's kernel; None of another node."""
    if ask(driver, "cuGraphNodeGetType", node) != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
        return None
    parameters = ask(driver, "cuGraphKernelNodeGetParams", node)
    by_function = int(parameters.func) != 0
    name = ask(
        driver,
        "cuFuncGetName" if by_function else "cuKernelGetName",
        parameters.func if by_function else parameters.kern,
    )
    return str(name.decode())


def captured(driver: Any, function: Callable[[], Any]) -> tuple[list[str], list[Edge]]:
    """Capture what a function does; return the names of its kernels, and the edges between two of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            function()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=stream):
            function()
    raw = driver.CUgraph(graph.raw_cuda_graph())
    _, count = ask(driver, "cuGraphGetNodes", raw, 0)
    nodes, _ = ask(driver, "cuGraphGetNodes", raw, count)
    names = {int(node): kernel_name(driver, node) for node in nodes}
    *_, count = ask(driver, "cuGraphGetEdges", raw, 0)
    before, after, data, _ = ask(driver, "cuGraphGetEdges", raw, count) if count else ([], [], [], 0)
    programmatic = int(driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC)
    edges = [
        Edge(first, second, int(each.type) == programmatic)
        for first, second, each in zip(
            (names[int(node)] for node in before), (names[int(node)] for node in after), data, strict=True
        )
        if first is not None and second is not None
    ]
    return [name for name in names.values() if name is not None], edges


def kernels_of_a_layer(rows: int) -> tuple[Callable[[], None], int]:
    """A function that runs the kernels of a layer and of sampling one after the other, and how many they are at least.

    Up to 16 rows they are skinny GEMMs; beyond, those that stand between matrix products.
    """
    device, dtype = "cuda", torch.bfloat16
    size = (HEADS + 2 * KV_HEADS) * HEAD_DIM

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, scale = random(rows, HIDDEN), random(HIDDEN)
    qkv_weight, output, gate_up, down = (
        random(size, HIDDEN),
        random(HIDDEN, HEADS * HEAD_DIM),
        random(2 * INTER, HIDDEN),
        random(HIDDEN, INTER),
    )
    qkv, pairs, logits = random(rows, size), random(rows, 2 * INTER), random(rows, VOCAB)
    rotation = Rotation(*torch.rand(2, 64, HEAD_DIM // 2, device=device))
    positions = torch.zeros(rows, dtype=torch.int64, device=device)
    caches = [torch.zeros(rows, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype, device=device) for _ in range(2)]
    slots = torch.arange(rows, device=device) * BLOCK_SIZE
    block_tables = torch.arange(rows, dtype=torch.int32, device=device).unsqueeze(1)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
    batch = PagedBatch(block_tables, starts, torch.ones(rows, dtype=torch.int32, device=device), 1)
    scoring = Scoring(0.1)
    inputs = HeadInputs(None, None, 0.0, rotation, positions, *caches, slots)
    temperature = torch.ones(rows, device=device)

    def few() -> None:
        new = skinny_norm_linear(x, scale, qkv_weight, None, 1e-6)
        heads = rotate_and_attend(new, inputs, batch, scoring)
        skinny_linear_add(x, heads.flatten(1), output)
        skinny_linear_add(x, skinny_norm_linear(x, scale, gate_up, None, 1e-6, gated=True), down)
        sample(logits, temperature, positions, positions)

    def many() -> None:
        rms_norm(x, scale, 1e-6)
        queries = rotate_and_cache(qkv, inputs)
        paged_attention(queries, *caches, batch, scoring)
        silu_mul(pairs)
        sample(logits, temperature, positions, positions)

    return (few, 7) if rows <= 16 else (many, 6)


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_edges_between_our_kernels_are_programmatic(driver: Any, rows: int) -> None:
    function, least = kernels_of_a_layer(rows)
    names, edges = captured(driver, function)
    assert len(names) >= least, names
    assert len(edges) >= len(names) - 1
    assert [edge for edge in edges if not edge.programmatic] == []


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_plain_launches_make_no_programmatic_edge(driver: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "launches_early", lambda device: False)
    function, least = kernels_of_a_layer(rows)
    names, edges = captured(driver, function)
    assert len(names) >= least, names
    assert len(edges) >= len(names) - 1
    assert [edge for edge in edges if edge.programmatic] == []


LAYERS = 3
# Of a step of one sequence: norm and projections, attention, output projection, norm and gate, down projection.
KERNELS_OF_A_LAYER = 5
THEIR_NAMES = {"_skinny_kernel", "_row_kernel", "_rotate_and_attend_kernel"}


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    Qwen3Config(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=INTER,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    return LLM(tmp_path, device="cuda", load_format="dummy", max_model_len=64, max_num_seqs=4, enforce_eager=True)


@pytest.mark.parametrize("early", [True, False])
def test_a_decode_step_has_a_programmatic_edge_before_each_kernel_of_its_layers(
    driver: Any, llm: LLM, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not early:
        monkeypatch.setattr(_triton, "launches_early", lambda device: False)
    assert llm.engine.core.fused_layers == LAYERS
    runner = llm.engine.core.runner
    step = runner.padding({"tokens": 1, "seqs": 1, "logits": 1, "scored": 1, "new_blocks": 1})
    names, edges = captured(driver, lambda: runner.forward("decode", SamplingLevel.PLAIN, step))
    into = [edge for edge in edges if edge.after in THEIR_NAMES]
    # Also into the first: what comes before it, and is not ours, lets it start by ending.
    assert len(into) >= LAYERS * KERNELS_OF_A_LAYER, names
    assert [edge for edge in into if edge.programmatic != early] == []
