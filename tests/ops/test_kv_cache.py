from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops import write_kv as public_write_kv
from graphmode.ops.kv_cache import write_kv_reference, write_kv_triton


def make_caches(
    num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches in which every element is a canary: distinct numbers, and NaN in slot 0."""
    shape = (num_blocks, block_size, kv_heads, head_dim)
    caches = []
    for sign in (1, -1):
        cache = (sign * torch.arange(1, 1 + torch.Size(shape).numel()).remainder(251)).view(shape).to(dtype)
        cache[0, 0] = float("nan")
        caches.append(cache.to(device))
    return caches[0], caches[1]


def write_one_by_one(rows: torch.Tensor, cache: torch.Tensor, slots: list[int]) -> torch.Tensor:
    cache = cache.clone()
    for row, slot in enumerate(slots):
        if slot != -1:
            cache[slot // cache.shape[1], slot % cache.shape[1]] = rows[row]
    return cache


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16).cpu()


def check(write, k: torch.Tensor, v: torch.Tensor, caches, slots: list[int]) -> None:
    k_cache, v_cache = caches
    expected = write_one_by_one(k, k_cache, slots), write_one_by_one(v, v_cache, slots)
    write(k, v, k_cache, v_cache, torch.tensor(slots, dtype=torch.int64, device=k.device))
    assert torch.equal(bits(k_cache), bits(expected[0]))
    assert torch.equal(bits(v_cache), bits(expected[1]))


SLOTS = {
    "all real": [5, 0, 23, 7, 16],
    "padding after": [3, 9, 10, -1, -1, -1],
    "padding after slot 0": [0, -1, -1],
    "padding between": [-1, 4, -1, -1, 23, 1, -1],
    "one token": [8],
    "no real row": [-1, -1, -1],
    "one padding row": [-1],
    "no row": [],
}


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_writes_real_rows_and_nothing_else(write_kv, kernel_device: str, slots: list[int], dtype: torch.dtype) -> None:
    k, v = torch.randn(2, len(slots), 3, 20, device=kernel_device).to(dtype)
    check(write_kv, k, v, make_caches(3, 8, 3, 20, dtype, kernel_device), slots)


@pytest.mark.parametrize(
    ("block_size", "kv_heads", "head_dim"), [(1, 1, 32), (16, 2, 80), (4, 7, 96), (32, 17, 128), (3, 1, 1)]
)
def test_cache_shapes(write_kv, kernel_device: str, block_size: int, kv_heads: int, head_dim: int) -> None:
    slots = [4 * block_size - 1, -1, 0, 2 * block_size]
    k, v = torch.randn(2, 4, kv_heads, head_dim, device=kernel_device)
    check(write_kv, k, v, make_caches(5, block_size, kv_heads, head_dim, torch.float32, kernel_device), slots)


def test_rows_may_be_strided(write_kv, kernel_device: str) -> None:
    slots = [11, 2, -1, 6]
    fused = torch.randn(4, 5 + 2 + 2, 16, device=kernel_device)
    _, k, v = fused.split([5, 2, 2], dim=1)
    check(write_kv, k, v, make_caches(2, 8, 2, 16, torch.float32, kernel_device), slots)
    check(write_kv, k.contiguous(), v, make_caches(2, 8, 2, 16, torch.float32, kernel_device), slots)
    heads_first = torch.randn(2, 2, 4, 16, device=kernel_device)
    k, v = heads_first.transpose(1, 2)
    check(write_kv, k, v, make_caches(2, 8, 2, 16, torch.float32, kernel_device), slots)
    dims_first = torch.randn(2, 16, 2, 4, device=kernel_device)
    k, v = dims_first.transpose(1, 3)
    check(write_kv, k, v, make_caches(2, 8, 2, 16, torch.float32, kernel_device), slots)


def test_padding_rows_may_hold_nan(write_kv, kernel_device: str) -> None:
    k, v = torch.randn(2, 6, 2, 16, device=kernel_device)
    k[3:], v[3:] = float("nan"), float("inf")
    check(write_kv, k, v, make_caches(2, 8, 2, 16, torch.float32, kernel_device), [9, 1, 4, -1, -1, -1])


@given(st.permutations(range(24)), st.lists(st.booleans(), min_size=1, max_size=24))
def test_any_mix_of_padding(slots: list[int], real: list[bool]) -> None:
    mix = [slot if keep else -1 for slot, keep in zip(slots, real, strict=False)]
    k, v = torch.randn(2, len(mix), 2, 8)
    check(write_kv_reference, k, v, make_caches(3, 8, 2, 8, torch.float32, "cpu"), mix)


def test_slot_beyond_the_cache(kernel_device: str) -> None:
    k, v = torch.randn(2, 1, 2, 16, device=kernel_device)
    slots = torch.tensor([16], device=kernel_device)
    memory = torch.zeros(2, 4, 8, 2, 16, device=kernel_device)
    write_kv_triton(k, v, memory[0, :2], memory[1, :2], slots)
    assert not memory.any()
    with pytest.raises(IndexError):
        write_kv_reference(k.cpu(), v.cpu(), memory[0, :2].cpu(), memory[1, :2].cpu(), slots.cpu())


def test_follows_the_slots_in_the_buffer(write_kv, kernel_device: str) -> None:
    slots = torch.tensor([1, -1], device=kernel_device)
    k, v = torch.randn(2, 2, 1, 16, device=kernel_device)
    k_cache, v_cache = torch.zeros(2, 1, 4, 1, 16, device=kernel_device)
    write_kv(k, v, k_cache, v_cache, slots)
    slots.copy_(torch.tensor([-1, 3]))
    write_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache[0, [1, 3]], k)
    assert torch.equal(v_cache[0, [1, 3]], v)
    assert not k_cache[0, [0, 2]].any()


def test_reference_reads_nothing_on_the_host() -> None:
    k, v = torch.empty(2, 4, 2, 16, device="meta")
    k_cache, v_cache = torch.empty(2, 3, 8, 2, 16, device="meta")
    write_kv_reference(k, v, k_cache, v_cache, torch.empty(4, dtype=torch.int64, device="meta"))
    assert k_cache.shape == (3, 8, 2, 16)


def test_public_function_takes_the_reference_on_cpu() -> None:
    k, v = torch.randn(2, 2, 2, 16)
    check(public_write_kv, k, v, make_caches(2, 8, 2, 16, torch.float32, "cpu"), [3, -1])


@pytest.mark.gpu
def test_public_function_on_a_gpu() -> None:
    k, v = torch.randn(2, 300, 8, 128, device="cuda").bfloat16()
    slots = [*torch.randperm(64 * 16)[:280].tolist(), *[-1] * 20]
    check(public_write_kv, k, v, make_caches(64, 16, 8, 128, torch.bfloat16, "cuda"), slots)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", torch.zeros(4, 32), r"k has shape \[4, 32\], expected \[any, any, any\]"),
        ("k", torch.zeros(4, 2, 16, dtype=torch.int8), "k is torch.int8, expected torch.float32 or"),
        ("v", torch.zeros(3, 2, 16), r"v has shape \[3, 2, 16\], expected \[4, any, any\]"),
        ("v", torch.zeros(4, 2, 16, dtype=torch.float16), "v is torch.float16, expected torch.float32"),
        ("k_cache", torch.zeros(3, 8, 4, 16), r"k_cache has shape .*, expected \[any, any, 2, 16\]"),
        ("k_cache", torch.zeros(3, 2, 8, 16).transpose(1, 2), "k_cache has strides .*, expected a contiguous"),
        ("v_cache", torch.zeros(4, 8, 2, 16), r"v_cache has shape .*, expected \[3, 8, 2, 16\]"),
        ("v_cache", torch.zeros(3, 8, 2, 16, dtype=torch.float16), "v_cache is torch.float16"),
        ("slot_mapping", torch.zeros(4, dtype=torch.int32), "slot_mapping is torch.int32, expected torch.int64"),
        ("slot_mapping", torch.zeros(5, dtype=torch.int64), r"slot_mapping has shape \[5\], expected \[4\]"),
        ("slot_mapping", torch.zeros(4, dtype=torch.int64, device="meta"), "slot_mapping is on meta, expected cpu"),
    ],
)
def test_refuses_what_does_not_fit(name: str, value: torch.Tensor, message: str) -> None:
    arguments = {
        "k": torch.zeros(4, 2, 16),
        "v": torch.zeros(4, 2, 16),
        "k_cache": torch.zeros(3, 8, 2, 16),
        "v_cache": torch.zeros(3, 8, 2, 16),
        "slot_mapping": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        public_write_kv(**{**arguments, name: value})


def test_rows_of_a_cache_may_have_two_parts(write_kv, kernel_device: str) -> None:
    """A latent and a rotated key, which one row of one cache holds."""
    slots = [11, 2, -1, 6]
    rotated, latent = torch.randn(4, 1, 6, device=kernel_device), torch.randn(4, 1, 20, device=kernel_device)
    cache, _ = make_caches(2, 8, 1, 26, torch.float32, kernel_device)
    expected = write_one_by_one(torch.cat([latent, rotated], dim=2), cache, slots)
    write_kv(rotated, latent, cache[..., 20:], cache[..., :20], torch.tensor(slots, device=kernel_device))
    assert torch.equal(bits(cache), bits(expected))


def test_keys_and_values_may_differ_in_size(write_kv, kernel_device: str) -> None:
    slots = [3, -1, 15]
    k, v = torch.randn(3, 2, 24, device=kernel_device), torch.randn(3, 4, 5, device=kernel_device)
    k_cache, _ = make_caches(2, 8, 2, 24, torch.float32, kernel_device)
    v_cache, _ = make_caches(2, 8, 4, 5, torch.float32, kernel_device)
    check(write_kv, k, v, (k_cache, v_cache), slots)


def test_keys_alone(write_kv, kernel_device: str) -> None:
    slots = [3, -1, 15]
    k = torch.randn(3, 1, 12, device=kernel_device)
    cache, _ = make_caches(2, 8, 1, 12, torch.float32, kernel_device)
    expected = write_one_by_one(k, cache, slots)
    write_kv(k, None, cache, None, torch.tensor(slots, device=kernel_device))
    assert torch.equal(bits(cache), bits(expected))
