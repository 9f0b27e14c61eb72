"""Small-batch GEMMs: their references, and Hopper's kernels on a GPU; elsewhere that these compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops.dispatch import choose
from graphmode.ops.linear import small_batch_hopper
from graphmode.ops.linear.small_batch import small_batch_linear, split_k_linear
from tests.ops.test_fused import close

ROWS = [17, 40, 64, 65, 128, 129, 256]
# Qwen3 0.6B, 1.7B and 8B, and the smallest: inputs and outputs, of a gate one half of them.
SIZES = [(1024, 4096), (2048, 6144), (4096, 12288), (128, 64), (2048, 1024), (3072, 1024), (12288, 4096), (384, 192)]


def check(width: int, size: int, kind: str, dtype: torch.dtype, device: str) -> None:
    gated = kind == "gated"
    weight = (torch.randn(2 * size if gated else size, width, device=device) * width**-0.5).to(dtype)
    bias = torch.randn(size, device=device).to(dtype) if kind == "bias" else None
    for rows in ROWS:
        x = torch.randn(rows, width, device=device).to(dtype)
        expected = x.double() @ weight.double().T
        if bias is not None:
            expected += bias.double()
        if gated:
            gate, up = expected.chunk(2, dim=1)
            expected = gate * gate.sigmoid() * up
        if kind == "parts":
            parts = split_k_linear(x, weight)
            assert parts.dtype == torch.float32
            close(parts.sum(0), expected)
        else:
            close(small_batch_linear(x, weight, bias, gated=gated), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "bias", "gated", "parts"])
@pytest.mark.parametrize(("width", "size"), SIZES)
def test_products(width: int, size: int, kind: str, dtype: torch.dtype) -> None:
    weight = torch.empty(2 * size if kind == "gated" else size, width, device="cuda", dtype=dtype)
    assert choose("norm_linear", 64, weight) == "small_batch"
    assert choose("split_k_linear" if kind == "parts" else "small_batch_linear", 64, weight) == "hopper"
    check(width, size, kind, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "bias", "gated", "parts"])
def test_references(kind: str, dtype: torch.dtype) -> None:
    check(48, 20, kind, dtype, "cpu")


def test_arguments_are_checked() -> None:
    x, weight = torch.zeros(3, 8), torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"weight has shape \[5, 8\], expected \[any, 7\]"):
        small_batch_linear(torch.zeros(3, 7), weight)
    with pytest.raises(ValueError, match=r"weight is torch.float32, expected torch.bfloat16"):
        split_k_linear(x.bfloat16(), weight)
    with pytest.raises(ValueError, match="x is of strides"):
        small_batch_linear(torch.zeros(8, 3).T, weight)
    with pytest.raises(ValueError, match=r"bias has shape \[4\], expected \[5\]"):
        small_batch_linear(x, weight, torch.zeros(4))
    with pytest.raises(ValueError, match="of 5 rows, expected gate and up"):
        small_batch_linear(x, weight, gated=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_rows_do_not_depend_on_each_other() -> None:
    x, weight = torch.randn(64, 1024, device="cuda").bfloat16(), torch.randn(512, 1024, device="cuda").bfloat16()
    clean = small_batch_linear(x, weight)
    x[20:] = float("nan")
    assert torch.equal(small_batch_linear(x, weight)[:20], clean[:20])


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_a_captured_call_follows_its_inputs() -> None:
    x, weight = torch.randn(40, 1024, device="cuda").bfloat16(), torch.randn(512, 1024, device="cuda").bfloat16()
    small_batch_linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = small_batch_linear(x, weight)
    x.normal_()
    graph.replay()
    assert torch.equal(out, small_batch_linear(x, weight))


def test_weights_elsewhere_are_not_taken() -> None:
    weight = torch.zeros(64, 128, dtype=torch.bfloat16)
    assert choose("norm_linear", 40, weight) == choose("residual", 40, weight, weight) == "torch"


@given(st.integers(1, 1000), st.integers(1, 120), st.integers(17, 256), st.sampled_from(["plain", "gated", "parts"]))
def test_tilings_cover_the_weights(size_64: int, width_128: int, rows: int, kind: str) -> None:
    size, width = 64 * size_64 // (2 if kind == "gated" else 1), 128 * width_128
    tile = small_batch_hopper.tiling(size, width, rows, gated=kind == "gated", splits=kind == "parts")
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
from graphmode.ops.dispatch import choose
from graphmode.ops.linear import small_batch_hopper
from graphmode.ops.linear.small_batch import small_batch_linear, split_k_linear

layout = gl.NVMMASharedLayout(128, 16, rank=2)
for size, width, rows, gated, splits, dtype in (
    (3072, 1024, 64, True, False, "bf16"), (6144, 2048, 128, True, False, "bf16"),
    (192, 384, 200, False, False, "fp16"), (1024, 3072, 17, False, True, "bf16"),
    (1024, 3072, 100, False, True, "bf16"),
):
    tile = small_batch_hopper.tiling(size, width, rows, gated=gated, splits=splits)
    constants = {"chunks": width // tile.splits // tile.block_k, "gated": gated, "block_m": tile.block_m, "early": True,
                 "block_n": tile.block_n, "block_k": tile.block_k, "stages": tile.stages, "size": size, "bias": None}
    described = {"x_desc": tile.block_m, "weight_desc": tile.block_n}
    signature = {name: f"tensordesc<{dtype}[{block}, {tile.block_k}],{layout!r}>" for name, block in described.items()}
    signature |= {"out": "*fp32" if splits else "*" + dtype, "rows": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    kernel = small_batch_hopper._small_batch_kernel
    source = GluonASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, {})
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.block_m // 16}).asm["ptx"]
    # The first weights are loaded before the wait.
    assert code.index("cp.async.bulk.tensor") < code.index("griddepcontrol.wait") < code.index("wgmma"), code
"""


def test_compiles_without_a_gpu(compile_for_hopper: Callable[[str], None]) -> None:
    compile_for_hopper(COMPILE)
