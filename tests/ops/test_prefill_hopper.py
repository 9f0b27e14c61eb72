"""Prefill GEMMs with an epilogue: their references, and Hopper's kernels on a GPU; elsewhere that these compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphmode.ops.dispatch import choose, wave_efficiency
from graphmode.ops.linear.prefill import prefill_heads, prefill_swiglu
from graphmode.ops.rope import HeadInputs, Rotation, rotate_and_cache_reference
from tests.ops.test_fused import close

ROWS = [100, 1025, 3000]
# Qwen3 0.6B, 1.7B and 8B, and the smallest: inputs and outputs of a half.
GATED = [(1024, 3072), (2048, 6144), (4096, 12288), (128, 128)]


def check_swiglu(width: int, size: int, rows: int, dtype: torch.dtype, device: str) -> None:
    weight = (torch.randn(2 * size, width, device=device) * width**-0.5).to(dtype)
    x = torch.randn(rows, width, device=device).to(dtype)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    close(prefill_swiglu(x, weight), gate * gate.sigmoid() * up)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "size"), GATED)
def test_swiglu(width: int, size: int, dtype: torch.dtype) -> None:
    assert choose("prefill_swiglu", 100, torch.empty(2 * size, width, dtype=dtype, device="cuda")) == "hopper"
    for rows in ROWS:
        check_swiglu(width, size, rows, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_of_swiglu(dtype: torch.dtype) -> None:
    check_swiglu(40, 24, 9, dtype, "cpu")


def check_heads(
    width: int,
    q_heads: int,
    kv_heads: int,
    rows: int,
    dtype: torch.dtype,
    device: str,
    *,
    normed: bool,
    biased: bool,
    head_dim: int = 128,
) -> None:
    heads = q_heads + 2 * kv_heads

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    weight, bias = random(heads * head_dim, width, scale=width**-0.5), random(heads * head_dim) if biased else None
    norms = (random(head_dim), random(head_dim)) if normed else (None, None)
    angles = torch.rand(500, head_dim // 2, device=device) * 6
    rotation = Rotation(angles.cos(), angles.sin())
    x = random(rows, width)
    positions = torch.randint(500, (rows,), device=device)
    slots = torch.randperm(2 * rows, device=device)[:rows]
    slots[rows // 3 : rows // 2] = -1
    caches = torch.full((2, rows // 8 + 1, 16, kv_heads, head_dim), 7.0, device=device, dtype=dtype)
    expected_caches = caches.float()
    exact = x.double() @ weight.double().T
    if bias is not None:
        exact += bias.double()
    rest = (*norms, 1e-6, rotation, positions)
    expected = rotate_and_cache_reference(exact.float(), HeadInputs(*rest, *expected_caches, slots))
    close(prefill_heads(x, weight, bias, HeadInputs(*rest, *caches, slots)), expected.double())
    close(caches, expected_caches.double())
    untouched = torch.ones(caches.shape[1] * 16, dtype=torch.bool, device=device)
    untouched[slots[slots >= 0]] = False
    assert (caches.flatten(1, 2)[:, untouched] == 7.0).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("width", "q_heads", "kv_heads"), [(1024, 16, 8), (4096, 32, 8), (128, 2, 2)])
def test_heads(width: int, q_heads: int, kv_heads: int, normed: bool, biased: bool, dtype: torch.dtype) -> None:
    for rows in ROWS:
        check_heads(width, q_heads, kv_heads, rows, dtype, "cuda", normed=normed, biased=biased)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_the_reference_of_heads(normed: bool, biased: bool, dtype: torch.dtype) -> None:
    check_heads(40, 4, 2, 9, dtype, "cpu", normed=normed, biased=biased, head_dim=16)


def test_arguments_are_checked() -> None:
    x, weight = torch.zeros(3, 8), torch.zeros(64, 8)
    with pytest.raises(ValueError, match="of 5 rows, expected gate and up"):
        prefill_swiglu(x, torch.zeros(5, 8))
    with pytest.raises(ValueError, match=r"weight has shape \[64, 8\], expected \[any, 7\]"):
        prefill_swiglu(torch.zeros(3, 7), weight)
    angles, cache, positions = torch.zeros(9, 8), torch.zeros(2, 4, 1, 16), torch.zeros(3, dtype=torch.int64)
    inputs = HeadInputs(None, None, 0.0, Rotation(angles, angles), positions, cache, cache, positions)
    with pytest.raises(ValueError, match=r"positions has shape \[3\], expected \[2\]"):
        prefill_heads(x[:2], weight, None, inputs)
    with pytest.raises(ValueError, match="is 40, expected whole heads of 16 beside 1"):
        prefill_heads(x, weight[:40], None, inputs)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_rows_do_not_depend_on_each_other() -> None:
    x, weight = torch.randn(1500, 1024, device="cuda").bfloat16(), torch.randn(1024, 1024, device="cuda").bfloat16()
    clean = prefill_swiglu(x, weight)
    x[700:] = float("nan")
    assert torch.equal(prefill_swiglu(x, weight)[:700], clean[:700])


def inputs_of(angles: torch.Tensor, cache: torch.Tensor) -> HeadInputs:
    return HeadInputs(None, None, 0.0, Rotation(angles, angles), torch.empty(0), cache, cache, torch.empty(0))


def test_what_lies_elsewhere_is_not_taken() -> None:
    weight, cache, angles = torch.zeros(768, 128), torch.zeros(4, 16, 2, 128), torch.zeros(9, 64)
    assert choose("norm_swiglu", 2000, weight) == "torch"
    heads = inputs_of(angles, cache).kind(768)
    assert choose("norm_heads", 2000, weight, heads=heads) == "norm_linear"


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_takes_what_keeps_the_device_busy() -> None:
    # 0.6B: 24 tiles side by side for gate and up, 16 for heads.
    gate_up, qkv = (torch.empty(size, 1024, device="cuda", dtype=torch.bfloat16) for size in (6144, 4096))
    cache, angles = torch.empty(4, 16, 8, 128, device="cuda"), torch.empty(9, 64, device="cuda")
    count = torch.cuda.get_device_properties(0).multi_processor_count
    heads = inputs_of(angles, cache).kind(4096)
    # From 17 rows on: fewer take skinny GEMMs, up to 256 small-batch GEMMs of gate and up.
    for rows in (128 * tiles for tiles in (4, 8, 64)):
        full = [wave_efficiency(rows, size, count) >= 0.8 for size in (6144, 4096)]
        assert (choose("norm_swiglu", rows, gate_up) == "prefill") == full[0]
        assert (choose("norm_heads", rows, qkv, heads=heads) == "prefill") == full[1]


COMPILE = r"""
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from graphmode.ops.linear import prefill_hopper

layout = gl.NVMMASharedLayout(128, 16, rank=2)
tables = {"cos": "*fp32", "sin": "*fp32", "positions": "*i64", "slot_mapping": "*i64"}
for kernel, kind, tensors, constants in (
    (prefill_hopper._swiglu_kernel, "bf16", ("out",), {"size": 3072}),
    (prefill_hopper._heads_kernel, "bf16", ("q_norm", "k_norm"), {"q_heads": 16, "kv_heads": 8, "bias": None}),
    (prefill_hopper._heads_kernel, "fp16", ("bias",), {"q_heads": 14, "kv_heads": 2, "q_norm": None, "k_norm": None}),
):
    constants |= {"chunks": 16, "block_m": 128, "block_n": 128, "block_k": 64, "stages": 4, "early": True}
    signature = dict.fromkeys(("x_desc", "weight_desc"), f"tensordesc<{kind}[128, 64],{layout!r}>") | tables
    signature |= {"rows": "i32", "tiles": "i32", "eps": "fp32"} | dict.fromkeys(("k_cache", "v_cache"), "*" + kind)
    signature |= dict.fromkeys((*tensors, "queries"), "*" + kind) | dict.fromkeys(constants, "constexpr")
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names)
               if signature[name].startswith("*")}
    source = GluonASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, aligned)
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    # One product may be in flight while the next is begun; results leave in 16 bytes.
    assert code.count("wgmma.wait_group.sync.aligned 1") == 1, code
    assert "st.global.v4.b32" in code and "st.global.b16" not in code, code
"""


def test_compiles_without_a_gpu(compile_for_hopper: Callable[[str], None]) -> None:
    compile_for_hopper(COMPILE)
