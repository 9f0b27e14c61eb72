"""Hopper's decode attention does what the plain one does; elsewhere it compiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphmode.kernels.decode_attention_hopper import rotate_and_attend_hopper, supports
from tests.kernels.test_decode_attention import check, make_inputs


def check_hopper(inputs: dict, *, window: int | None = None, spare: int | None = None) -> None:
    assert supports(*(inputs[name] for name in ("qkv", "k_cache")))
    check(inputs, window=window, spare=spare, run=rotate_and_attend_hopper)


LENGTHS = [1, 2, 17, 300, 64, 65, 129]


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("spare", [1, 8, None])
@pytest.mark.parametrize("window", [None, 1, 5, 70])
def test_parts_and_windows(spare: int | None, window: int | None) -> None:
    inputs = make_inputs(LENGTHS, head_dim=128, dtype=torch.bfloat16, device="cuda")
    check_hopper(inputs, spare=spare, window=window)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [3, 16, 32])
@pytest.mark.parametrize("heads", [(1, 1, 128), (16, 2, 128), (16, 1, 64), (14, 2, 64), (6, 2, 256)])
def test_heads(heads: tuple[int, int, int], block_size: int, dtype: torch.dtype) -> None:
    q_heads, kv_heads, head_dim = heads
    sizes = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, "normed": head_dim == 128}
    check_hopper(make_inputs([40, 1, 9, 260], dtype=dtype, block_size=block_size, device="cuda", **sizes))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("sequences", [1, 8, 17, 64, 200])
def test_many_sequences(sequences: int) -> None:
    generator = torch.Generator().manual_seed(sequences)
    lengths = torch.randint(1, 500, (sequences,), generator=generator).tolist()
    check_hopper(make_inputs(lengths, head_dim=128, block_size=16, dtype=torch.bfloat16, device="cuda"))


COMPILE = r"""
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from graphmode.kernels import decode_attention_hopper as hopper

kernel = hopper._rotate_and_attend_kernel
for seqs, group, head_dim, kind in (1, 2, 128, "bf16"), (64, 16, 64, "fp16"), (10, 6, 256, "bf16"):
    tile = hopper.tiling(seqs, head_dim)
    constants = {"kv_heads": 8, "group": group, "head_dim": head_dim, "block_size": 16, "warp_keys": 16,
                 "stages": tile.stages, "heads_first": seqs > 16, "early": True}
    signature = dict.fromkeys(("qkv", "q_norm", "k_norm", "k_cache", "v_cache", "out"), "*" + kind)
    signature |= dict.fromkeys(("cos", "sin", "parts", "tops", "sums"), "*fp32")
    signature |= dict.fromkeys(("positions", "slot_mapping"), "*i64") | {"eps": "fp32", "scale_log2": "fp32"}
    signature |= {"block_tables": "*i32", "programs": "*i32", "table_stride": "i32"}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names)
               if signature.get(name, "").startswith("*")}
    signature |= dict.fromkeys(constants, "constexpr")
    source = GluonASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, aligned)
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.warps}).asm["ptx"]
    # All keys and values of the ring are asked for before the wait, 16 bytes a lane.
    early, late = code.split("griddepcontrol.wait")
    copies = 2 * tile.stages * 16 * head_dim * 2 // (32 * 16)
    assert len(re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*, 0x10,", early)) == copies, early
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" in late, late
"""


def test_compiles_without_a_gpu(compile_for_hopper: Callable[[str], None]) -> None:
    compile_for_hopper(COMPILE)
