"""Hopper's linear layers of some dozen to some hundred rows: on a GPU against float64, elsewhere that they compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops.linear import small_batch_hopper as many
from tests.ops.test_fused import close

ROWS = [17, 40, 64, 65, 128, 129, 256]
# Qwen3 0.6B, 1.7B and 8B, and the smallest: inputs and outputs, of a gate one half of them.
SIZES = [(1024, 4096), (2048, 6144), (4096, 12288), (128, 64), (2048, 1024), (3072, 1024), (12288, 4096), (384, 192)]


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "bias", "gated", "parts"])
@pytest.mark.parametrize(("width", "size"), SIZES)
def test_products(width: int, size: int, kind: str, dtype: torch.dtype) -> None:
    gated = kind == "gated"
    weight = (torch.randn(2 * size if gated else size, width, device="cuda") * width**-0.5).to(dtype)
    bias = torch.randn(size, device="cuda").to(dtype) if kind == "bias" else None
    assert many.runs_products(torch.empty(64, width), weight)
    for rows in ROWS:
        x = torch.randn(rows, width, device="cuda").to(dtype)
        expected = x.double() @ weight.double().T
        if bias is not None:
            expected += bias.double()
        if gated:
            gate, up = expected.chunk(2, dim=1)
            expected = gate * gate.sigmoid() * up
        if kind == "parts":
            parts = many.many_rows_parts(x, weight)
            assert parts.dtype == torch.float32
            close(parts.sum(0), expected)
        else:
            close(many.many_rows(x, weight, bias, gated=gated), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_rows_do_not_depend_on_each_other() -> None:
    x, weight = torch.randn(64, 1024, device="cuda").bfloat16(), torch.randn(512, 1024, device="cuda").bfloat16()
    clean = many.many_rows(x, weight)
    x[20:] = float("nan")
    assert torch.equal(many.many_rows(x, weight)[:20], clean[:20])


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_a_captured_call_follows_its_inputs() -> None:
    x, weight = torch.randn(40, 1024, device="cuda").bfloat16(), torch.randn(512, 1024, device="cuda").bfloat16()
    many.many_rows(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = many.many_rows(x, weight)
    x.normal_()
    graph.replay()
    assert torch.equal(out, many.many_rows(x, weight))


def test_weights_elsewhere_are_not_taken() -> None:
    x, weight = torch.zeros(40, 128), torch.zeros(64, 128, dtype=torch.bfloat16)
    assert not many.runs_products(x, weight)
    assert not many.runs_parts(x, weight)


@given(st.integers(1, 1000), st.integers(1, 120), st.integers(17, 256), st.sampled_from(["plain", "gated", "parts"]))
def test_tilings_cover_the_weights(size_64: int, width_128: int, rows: int, kind: str) -> None:
    size, width = 64 * size_64 // (2 if kind == "gated" else 1), 128 * width_128
    tile = many.tiling(size, width, rows, gated=kind == "gated", splits=kind == "parts")
    assert size % tile.block_n == 0
    assert width % (tile.block_k * tile.splits) == 0
    assert tile.splits == 1 or kind == "parts"
    assert 1 <= tile.stages <= width // tile.block_k // tile.splits
    assert tile.block_n >= 32
    assert tile.block_m == 64 or (tile.block_m == 128 and rows > 64)


COMPILE = r"""
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from graphmode.ops.linear import small_batch_hopper as many

layout = gl.NVMMASharedLayout(128, 16, rank=2)
for size, width, rows, gated, splits, dtype in (
    (3072, 1024, 64, True, False, "bf16"), (6144, 2048, 128, True, False, "bf16"),
    (192, 384, 200, False, False, "fp16"), (1024, 3072, 17, False, True, "bf16"),
    (1024, 3072, 100, False, True, "bf16"),
):
    tile = many.tiling(size, width, rows, gated=gated, splits=splits)
    constants = {"chunks": width // tile.splits // tile.block_k, "gated": gated, "block_m": tile.block_m, "early": True,
                 "block_n": tile.block_n, "block_k": tile.block_k, "stages": tile.stages, "size": size, "bias": None}
    described = {"x_desc": tile.block_m, "weight_desc": tile.block_n}
    signature = {name: f"tensordesc<{dtype}[{block}, {tile.block_k}],{layout!r}>" for name, block in described.items()}
    signature |= {"out": "*fp32" if splits else "*" + dtype, "rows": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    kernel = many._many_rows_kernel
    source = GluonASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, {})
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.block_m // 16}).asm["ptx"]
    # Weights are asked for before the wait.
    assert code.index("cp.async.bulk.tensor") < code.index("griddepcontrol.wait") < code.index("wgmma"), code
"""


def test_compiles_without_a_gpu(compile_for_hopper: Callable[[str], None]) -> None:
    compile_for_hopper(COMPILE)
