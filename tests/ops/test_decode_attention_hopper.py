"""Hopper's decode attention does what the plain one does; elsewhere it compiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from graphmode.ops import Scoring
from graphmode.ops._triton import compiles_hopper
from graphmode.ops.attention import decode_hopper
from graphmode.ops.attention.decode import rotate_and_attend_triton
from graphmode.ops.attention.split_kv import plan_split_kv
from graphmode.ops.dispatch import choose
from tests.ops.test_decode_attention import check, make_inputs


def check_hopper(inputs: dict, *, window: int | None = None, spare: int | None = None) -> None:
    qkv = inputs["qkv"]
    heads = inputs["inputs"].kind(qkv.shape[1])
    assert choose("rotate_and_attend", len(qkv), qkv, heads=heads) == "hopper"
    check(inputs, window=window, spare=spare, run=partial(rotate_and_attend_triton, hopper=True))


LENGTHS = [1, 2, 17, 300, 64, 65, 129]


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("spare", [1, 8, None])
@pytest.mark.parametrize("window", [None, 1, 5, 70])
def test_splits_and_windows(spare: int | None, window: int | None) -> None:
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


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
def test_splits_are_merged_again_and_again() -> None:
    """Layer after layer, by the same counters: long contexts in several splits among many short ones."""
    lengths = [4000, 3, 700] + [20] * 30 + [1999, 2000]
    inputs = make_inputs(lengths, head_dim=128, block_size=16, dtype=torch.bfloat16, device="cuda")
    kv_lens, kv_heads = inputs["batch"].kv_lens, inputs["inputs"].k_cache.shape[2]
    plan = plan_split_kv(kv_lens, kv_heads)
    assert plan.split_seqs[:, 2].max() > 8
    run = partial(rotate_and_attend_triton, **inputs, scoring=Scoring(0.3), hopper=True)
    expected = run(plan=plan_split_kv(kv_lens, kv_heads, spare=1))
    first = run(plan=plan)
    assert not plan.finished.any()
    assert all(torch.equal(first, run(plan=plan)) for _ in range(20))
    assert torch.allclose(first.float(), expected.float(), atol=0.02, rtol=0.02)


@pytest.mark.skipif(not compiles_hopper(), reason="needs a Triton that compiles the kernels for Hopper")
@pytest.mark.parametrize("sequences", [1, 20])
def test_its_kernel_is_launched_with_what_it_takes(monkeypatch: pytest.MonkeyPatch, sequences: int) -> None:
    kernel, *_ = decode_hopper.choose(sequences, sequences, 2, 128)
    given: list[str] = []

    class Recorder:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **kwargs: given.extend([*kernel.arg_names[: len(args)], *kwargs])

    monkeypatch.setattr(decode_hopper, "_rotate_and_attend_kernel", Recorder())
    inputs = make_inputs([10] * sequences, head_dim=128, block_size=16, padding=0)
    rotate_and_attend_triton(**inputs, scoring=Scoring(0.3), hopper=True)
    assert sorted(given) == sorted([*kernel.arg_names, "num_warps"])


COMPILE = r"""
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from graphmode.ops.attention import decode_hopper as hopper

for seqs, group, head_dim, kind in (1, 2, 128, "bf16"), (64, 16, 64, "fp16"), (10, 6, 256, "bf16"):
    kernel, _, constants = hopper.choose(seqs, 2 * seqs, 8, head_dim)
    warps, stages = constants.pop("num_warps"), constants["stages"]
    constants |= {"kv_heads": 8, "group": group, "block_size": 16, "early": True}
    signature = dict.fromkeys(("qkv", "q_norm", "k_norm", "k_cache", "v_cache", "out"), "*" + kind)
    signature |= dict.fromkeys(("cos", "sin", "accs", "tops", "sums"), "*fp32")
    signature |= dict.fromkeys(("positions", "slot_mapping"), "*i64") | {"eps": "fp32", "scale_log2": "fp32"}
    signature |= {"block_tables": "*i32", "splits": "*i32", "finished": "*i32", "table_stride": "i32"}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names)
               if signature.get(name, "").startswith("*")}
    signature |= dict.fromkeys(constants, "constexpr")
    source = GluonASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, aligned)
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    # Padding waits and ends; else all keys and values of the ring are asked for before the wait, 16 bytes a lane.
    padding, early, late = code.split("griddepcontrol.wait")
    assert "cp.async" not in padding
    copies = 2 * stages * 16 * head_dim * 2 // (32 * 16)
    assert len(re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*, 0x10,", early)) == copies, early
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" in late, late
"""


def test_compiles_without_a_gpu(compile_for_hopper: Callable[[str], None]) -> None:
    compile_for_hopper(COMPILE)
