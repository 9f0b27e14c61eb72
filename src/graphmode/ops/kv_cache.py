"""Write the new tokens' keys and values into the paged KV cache.

The cache of one layer is tensors ``[num_blocks, block_size, heads, dim]``. A slot is one token's place in each of them:
slot ``s`` lies at ``(s // block_size, s % block_size)``. A padding row has slot -1 and writes nothing, anywhere.
"""

from __future__ import annotations

import torch

from graphmode.ops._checks import FLOATS, require, require_cache, require_tensor
from graphmode.ops._triton import constexpr, jit, next_power_of_2, runs_triton, tl

# Elements of one token that one Triton program copies: 16 heads of 128.
_MAX_BLOCK = 2048


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
) -> None:
    """Write row ``i`` of ``k`` and ``v`` into slot ``slot_mapping[i]`` of the caches, in place.

    Args:
        k: ``[tokens, kv_heads, key_dim]``, float32, bfloat16 or float16, with any strides: a slice of a fused
            projection will do.
        v: ``[tokens, value_heads, value_dim]`` in ``k``'s dtype, any strides; None writes ``k`` alone.
        k_cache: ``[num_blocks, block_size, kv_heads, key_dim]`` in ``k``'s dtype, contiguous, or part of each slot of a
            contiguous tensor: both caches may be parts of one.
        v_cache: ``[num_blocks, block_size, value_heads, value_dim]``, as ``k_cache``; None with ``v``.
        slot_mapping: int64 ``[tokens]``: distinct slots inside the cache, and -1 for padding rows, which write
            nothing. Read on the device.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor("k", k, shape=(None, None, None), dtypes=FLOATS, like=k)
    require_cache("k_cache", k_cache, shape=(None, None, *k.shape[1:]), like=k)
    if v is not None and v_cache is not None:
        require_tensor("v", v, shape=(k.shape[0], None, None), dtypes=(k.dtype,), like=k)
        require_cache("v_cache", v_cache, shape=(*k_cache.shape[:2], *v.shape[1:]), like=k)
    else:
        require(v is None and v_cache is None, "v_cache", "None" if v_cache is None else "given", "given with v")
    require_tensor("slot_mapping", slot_mapping, shape=k.shape[:1], dtypes=(torch.int64,), like=k)
    write = write_kv_triton if runs_triton(k) else write_kv_reference
    write(k, v, k_cache, v_cache, slot_mapping)


def write_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
) -> None:
    """Run :func:`write_kv` in PyTorch, with fixed shapes: every row is written somewhere.

    A padding row repeats a real one: the same value to the same slot, so that it does not matter which write comes
    last. Where no row is real, all of them give slot 0 the value that it has. A slot beyond the cache raises IndexError
    on CPU.
    """
    if k.shape[0] == 0:
        return
    real = slot_mapping >= 0
    top_slot, top_row = slot_mapping.max(dim=0, keepdim=True)
    any_real = (top_slot >= 0).view(1, 1, 1)
    slots = torch.where(real, slot_mapping, top_slot.clamp(min=0))
    real = real.view(-1, 1, 1)
    for rows, cache in ((k, k_cache), (v, v_cache)):
        if rows is None or cache is None:
            continue
        by_slot = cache.view(-1, *cache.shape[2:])
        filler = torch.where(any_real, rows.index_select(0, top_row), by_slot[:1])
        by_slot.index_copy_(0, slots, torch.where(real, rows, filler))


def write_kv_triton(
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
) -> None:
    """Run :func:`write_kv` in Triton: one program for each token (and each 2,048 elements of it).

    A slot beyond the cache, which is the caller's error, writes nothing rather than someone else's memory.
    """
    tokens = k.shape[0]
    if tokens == 0:
        return
    k_row = k.shape[1] * k.shape[2]
    v_row = 0 if v is None else v.shape[1] * v.shape[2]
    block = min(next_power_of_2(max(k_row, v_row)), _MAX_BLOCK)
    _write_kv_kernel[(tokens, -(-max(k_row, v_row) // block))](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        k_cache.shape[0] * k_cache.shape[1],
        *k.stride(),
        *((0, 0, 0) if v is None else v.stride()),
        k_row=k_row,
        v_row=v_row,
        k_dim=k.shape[2],
        v_dim=1 if v is None else v.shape[2],
        k_slot=k_cache.stride(1),
        v_slot=0 if v_cache is None else v_cache.stride(1),
        block=block,
    )


@jit(do_not_specialize=["num_slots"])
def _write_kv_kernel(  # type: ignore[no-untyped-def]
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    num_slots,
    k_stride_token,
    k_stride_head,
    k_stride_dim,
    v_stride_token,
    v_stride_head,
    v_stride_dim,
    k_row: constexpr,
    v_row: constexpr,
    k_dim: constexpr,
    v_dim: constexpr,
    k_slot: constexpr,
    v_slot: constexpr,
    block: constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if (slot < 0) | (slot >= num_slots):
        return
    offset = tl.program_id(1) * block + tl.arange(0, block)
    _copy_row(k + token * k_stride_token, k_stride_head, k_stride_dim, k_cache + slot * k_slot, offset, k_row, k_dim)
    if v is not None:
        _copy_row(
            v + token * v_stride_token, v_stride_head, v_stride_dim, v_cache + slot * v_slot, offset, v_row, v_dim
        )


@jit()
def _copy_row(row, stride_head, stride_dim, place, offset, size: constexpr, dim: constexpr):  # type: ignore[no-untyped-def]
    inside = offset < size
    values = tl.load(row + offset // dim * stride_head + offset % dim * stride_dim, mask=inside)
    tl.store(place + offset, values, mask=inside)
