"""The paged KV cache: its memory."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch

from graphmode.cache.specs import CacheShape, LayerCache


def block_bytes(caches: Sequence[CacheShape], dtype: torch.dtype, block_size: int) -> int:
    """Return the bytes of one block in all layers."""
    return block_size * sum(cache.elements for cache in caches) * dtype.itemsize


def make_cache(
    caches: Sequence[CacheShape], dtype: torch.dtype, num_blocks: int, device: torch.device, block_size: int
) -> list[LayerCache]:
    """Return the zeroed cache of every layer. On a host its pages are taken when they are first written."""

    def zeros(heads: int, dim: int) -> torch.Tensor:
        shape = (num_blocks, block_size, heads, dim)
        return _untouched(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)

    def make(cache: CacheShape) -> LayerCache:
        keys = zeros(cache.kv_heads, cache.key_dim)
        values = keys[..., : cache.value_dim] if cache.values_in_keys else zeros(cache.kv_heads, cache.value_dim)
        return LayerCache(keys, values, zeros(1, cache.index_dim) if cache.index_dim else None)

    return [make(cache) for cache in caches]


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros on the host whose pages the system gives at the first write; ``torch.zeros`` writes them all.

    They are mapped by themselves: an allocator would take what lies free in its heap, and write that.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, prod(shape) * dtype.itemsize, **private), dtype=dtype).view(shape)
