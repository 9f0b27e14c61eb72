"""Hopper's decode attention does what the plain one does; elsewhere it compiles."""

from __future__ import annotations

import pytest
import torch

from graphmode.kernels import few_rows_hopper
from graphmode.kernels.decode_attention_hopper import rotate_and_attend_hopper, supports
from tests.kernels.test_decode_attention import check, make_inputs


@pytest.fixture
def on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0) or not few_rows_hopper.compiles():
        pytest.skip("needs Hopper and a Triton that compiles these kernels")


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
