"""Hopper's linear layers of long steps: on a GPU against references, elsewhere that they compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops.linear import prefill_hopper as long
from graphmode.ops.rope import Rotation, rotate_and_cache_reference
from tests.ops.test_fused import close

ROWS = [100, 1025, 3000]
# Qwen3 0.6B, 1.7B and 8B, and the smallest: inputs and outputs of a half.
GATED = [(1024, 3072), (2048, 6144), (4096, 12288), (128, 128)]


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "size"), GATED)
def test_gated(width: int, size: int, dtype: torch.dtype) -> None:
    weight = (torch.randn(2 * size, width, device="cuda") * width**-0.5).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, width, device="cuda").to(dtype)
        gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
        close(long.gated_long(x, weight), gate * gate.sigmoid() * up)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("width", "q_heads", "kv_heads"), [(1024, 16, 8), (4096, 32, 8), (128, 2, 2)])
def test_heads(width: int, q_heads: int, kv_heads: int, normed: bool, biased: bool, dtype: torch.dtype) -> None:
    heads = q_heads + 2 * kv_heads

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    weight, bias = random(heads * 128, width, scale=width**-0.5), random(heads * 128) if biased else None
    norms = (random(128), random(128)) if normed else (None, None)
    angles = torch.rand(500, 64, device="cuda") * 6
    rotation = Rotation(angles.cos(), angles.sin())
    for rows in ROWS:
        x = random(rows, width)
        positions = torch.randint(500, (rows,), device="cuda")
        slots = torch.randperm(2 * rows, device="cuda")[:rows]
        slots[rows // 3 : rows // 2] = -1
        caches = torch.full((2, rows // 8 + 1, 16, kv_heads, 128), 7.0, device="cuda", dtype=dtype)
        expected_caches = caches.float()
        exact = x.double() @ weight.double().T
        if bias is not None:
            exact += bias.double()
        rest = (*norms, 1e-6, rotation, positions)
        expected = rotate_and_cache_reference(exact.float(), *rest, *expected_caches, slots)
        close(long.heads_long(x, weight, bias, *rest, *caches, slots), expected.double())
        close(caches, expected_caches.double())
        untouched = torch.ones(caches.shape[1] * 16, dtype=torch.bool, device="cuda")
        untouched[slots[slots >= 0]] = False
        assert (caches.flatten(1, 2)[:, untouched] == 7.0).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_rows_do_not_depend_on_each_other() -> None:
    x, weight = torch.randn(1500, 1024, device="cuda").bfloat16(), torch.randn(1024, 1024, device="cuda").bfloat16()
    clean = long.gated_long(x, weight)
    x[700:] = float("nan")
    assert torch.equal(long.gated_long(x, weight)[:700], clean[:700])


def test_what_lies_elsewhere_is_not_taken() -> None:
    x, weight = torch.zeros(2000, 128), torch.zeros(768, 128)
    cache, angles = torch.zeros(4, 16, 2, 128), torch.zeros(9, 64)
    assert not long.runs_long_rows(x, weight)
    assert not long.runs_heads_long(x, weight, Rotation(angles, angles), cache, cache)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_takes_what_keeps_the_device_busy() -> None:
    # 0.6B: 24 tiles side by side for gate and up, 16 for heads.
    gate_up, qkv = (torch.empty(size, 1024, device="cuda", dtype=torch.bfloat16) for size in (6144, 4096))
    cache, angles = torch.empty(4, 16, 8, 128, device="cuda"), torch.empty(9, 64, device="cuda")
    count = torch.cuda.get_device_properties(0).multi_processor_count
    for tiles in (1, 4, 8, 64):
        x = torch.empty(128 * tiles, 1024, device="cuda", dtype=torch.bfloat16)
        assert long.runs_long_rows(x, gate_up) == (long.wave_efficiency(len(x), 6144, count) >= 0.8)
        taken = long.runs_heads_long(x, qkv, Rotation(angles, angles), cache, cache)
        assert taken == (long.wave_efficiency(len(x), 4096, count) >= 0.8)


@given(st.integers(1, 20000), st.integers(1, 100), st.integers(1, 200))
def test_wave_efficiency_is_a_share(rows: int, columns: int, multiprocessors: int) -> None:
    efficiency = long.wave_efficiency(rows, 256 * columns, multiprocessors)
    assert 0 < efficiency <= 1
    assert efficiency > 0.5 or rows <= 128 * multiprocessors
    assert long.wave_efficiency(128 * multiprocessors, 256 * columns, multiprocessors) == 1


COMPILE = r"""
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from graphmode.ops.linear import prefill_hopper as long

layout = gl.NVMMASharedLayout(128, 16, rank=2)
tables = {"cos": "*fp32", "sin": "*fp32", "positions": "*i64", "slot_mapping": "*i64"}
for kernel, kind, tensors, constants in (
    (long._gated_kernel, "bf16", ("out",), {"size": 3072}),
    (long._heads_kernel, "bf16", ("q_norm", "k_norm"), {"q_heads": 16, "kv_heads": 8, "bias": None}),
    (long._heads_kernel, "fp16", ("bias",), {"q_heads": 14, "kv_heads": 2, "q_norm": None, "k_norm": None}),
):
    constants |= {"chunks": 16, "block_m": 128, "block_n": 128, "block_k": 64, "stages": 4, "early": True}
    signature = dict.fromkeys(("x_desc", "weight_desc"), f"tensordesc<{kind}[128, 64],{layout!r}>") | tables
    signature |= {"rows": "i32", "tiles": "i32", "eps": "fp32"} | dict.fromkeys(("k_cache", "v_cache"), "*" + kind)
    signature |= dict.fromkeys((*tensors, "queries"), "*" + kind) | dict.fromkeys(constants, "constexpr")
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names)
               if signature[name].startswith("*")}
    source = GluonASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, aligned)
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    # One product may be under way while the next is begun; results leave in 16 bytes.
    assert code.count("wgmma.wait_group.sync.aligned 1") == 1, code
    assert "st.global.v4.b32" in code and "st.global.b16" not in code, code
"""


def test_compiles_without_a_gpu(compile_for_hopper: Callable[[str], None]) -> None:
    compile_for_hopper(COMPILE)
