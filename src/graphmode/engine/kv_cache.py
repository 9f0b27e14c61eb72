"""The paged KV cache: its memory and how much of it there is."""

from __future__ import annotations

import torch

from graphmode.engine.scheduler import Limits
from graphmode.graph.errors import InputError
from graphmode.models.attention import CacheShape, LayerCache
from graphmode.models.loader import ModelShape

# Left free beside the KV cache, for the graphs' pool and the libraries: a share of the device's memory.
_RESERVE = 0.15
_CPU_LIMIT = 2 << 30


def block_bytes(shape: ModelShape, dtype: torch.dtype, block_size: int) -> int:
    """Return the bytes of one block in all layers."""
    return block_size * sum(cache.elements for cache in shape.caches) * dtype.itemsize


def choose_num_blocks(
    shape: ModelShape,
    dtype: torch.dtype,
    limits: Limits,
    device: torch.device,
    kv_cache_memory: int | None,
    block_size: int,
) -> int:
    """Return the number of blocks: enough for every row at full length, or what the memory allows.

    Raises:
        InputError: not even one sequence of ``max_model_len`` fits.
    """
    each = -(-limits.max_model_len // block_size)
    wanted = each * limits.max_num_seqs
    if kv_cache_memory is None:
        if device.type == "cpu":
            memory = _CPU_LIMIT
        else:
            free, total = torch.accelerator.get_memory_info(device)
            memory = max(0, int(free - _RESERVE * total))
    else:
        memory = kv_cache_memory
    block = block_bytes(shape, dtype, block_size)
    blocks = min(wanted, memory // block)
    if blocks < each:
        raise InputError(
            f"the KV cache may take {memory} bytes, {blocks} blocks; one sequence of max_model_len="
            f"{limits.max_model_len} needs {each * block} bytes, {each} blocks. Lower max_model_len"
            + ("" if kv_cache_memory is None else ", or raise kv_cache_memory")
        )
    return blocks


def make_cache(
    shape: ModelShape, dtype: torch.dtype, num_blocks: int, device: torch.device, block_size: int
) -> list[LayerCache]:
    """Return the zeroed cache of every layer."""

    def zeros(heads: int, dim: int) -> torch.Tensor:
        return torch.zeros((num_blocks, block_size, heads, dim), dtype=dtype, device=device)

    def make(cache: CacheShape) -> LayerCache:
        keys = zeros(cache.kv_heads, cache.key_dim)
        values = keys[..., : cache.value_dim] if cache.values_in_keys else zeros(cache.kv_heads, cache.value_dim)
        return LayerCache(keys, values, zeros(1, cache.index_dim) if cache.index_dim else None)

    return [make(cache) for cache in shape.caches]
