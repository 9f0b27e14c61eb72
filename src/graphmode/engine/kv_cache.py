"""The paged KV cache: its memory."""

from __future__ import annotations

from math import prod

import numpy as np
import torch

from graphmode.models.attention import CacheShape, LayerCache
from graphmode.models.loader import ModelShape

_ALIGNMENT = 64


def block_bytes(shape: ModelShape, dtype: torch.dtype, block_size: int) -> int:
    """Return the bytes of one block in all layers."""
    return block_size * sum(cache.elements for cache in shape.caches) * dtype.itemsize


def make_cache(
    shape: ModelShape, dtype: torch.dtype, num_blocks: int, device: torch.device, block_size: int
) -> list[LayerCache]:
    """Return the zeroed cache of every layer. On a host its pages are taken when they are first written."""

    def zeros(heads: int, dim: int) -> torch.Tensor:
        shape = (num_blocks, block_size, heads, dim)
        return _untouched(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)

    def make(cache: CacheShape) -> LayerCache:
        keys = zeros(cache.kv_heads, cache.key_dim)
        values = keys[..., : cache.value_dim] if cache.values_in_keys else zeros(cache.kv_heads, cache.value_dim)
        return LayerCache(keys, values, zeros(1, cache.index_dim) if cache.index_dim else None)

    return [make(cache) for cache in shape.caches]


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros on the host whose pages the system gives at the first write; ``torch.zeros`` writes them all."""
    nbytes = prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(nbytes + _ALIGNMENT, np.uint8))
    start = -memory.data_ptr() % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).view(shape)
