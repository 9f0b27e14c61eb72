"""The paged KV cache: how its memory is shared out among groups, and made."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch

from graphmode.cache.specs import CacheGroup, CacheShape, LayerCache


def needed_bytes(
    groups: Sequence[CacheGroup], length: int, step_tokens: int, decode_steps: int, sequences: int = 1
) -> int:
    """Return the most bytes that sequences hold at a time; arguments as of :meth:`CacheGroup.most_blocks`."""
    return sum(group.block_bytes * group.most_blocks(length, step_tokens, decode_steps, sequences) for group in groups)


def longest_that_fits(
    groups: Sequence[CacheGroup], nbytes: int, length: int, step_tokens: int, decode_steps: int
) -> int:
    """Return the most tokens, up to ``length``, that one sequence may have in a cache of ``nbytes``."""
    needed = partial(needed_bytes, groups, step_tokens=step_tokens, decode_steps=decode_steps)
    return bisect_right(range(1, length + 1), nbytes, key=needed)


def share_out(
    groups: Sequence[CacheGroup], nbytes: int, *, length: int, step_tokens: int, decode_steps: int, sequences: int
) -> tuple[int, ...]:
    """Return the number of blocks of each group: as many as ``sequences`` of full length need, or fit in ``nbytes``.

    How far short sequences would fill a group is not known before they come. Where all are short, each group holds as
    many tokens as any other; where all have the full length, a group with a window holds what windows need. Each group
    gets the mean of both: half of the best for either at least. Without windows both are the same. One sequence of full
    length always fits.

    Args:
        groups: the cache's.
        nbytes: what all of them may take: :func:`needed_bytes` of one sequence at least.
        length: the most tokens of a sequence.
        step_tokens: the most tokens of a step.
        decode_steps: the most tokens that a sequence makes in steps launched together.
        sequences: the most that run at a time.
    """
    least = [group.most_blocks(length, step_tokens, decode_steps) for group in groups]
    most = [group.most_blocks(length, step_tokens, decode_steps, sequences) for group in groups]
    all_tokens = max(count * group.block_size for count, group in zip(most, groups, strict=True))

    def largest(blocks_at: Callable[[int, int], int]) -> list[int]:
        """Return the blocks at the largest number of tokens at which all groups together fit."""

        def counts(tokens: int) -> list[int]:
            return [min(max(blocks_at(at, tokens), least[at]), most[at]) for at in range(len(groups))]

        def total(tokens: int) -> int:
            return sum(count * group.block_bytes for count, group in zip(counts(tokens), groups, strict=True))

        return counts(bisect_right(range(1, all_tokens + 1), nbytes, key=total))

    short = largest(lambda at, tokens: groups[at].blocks_for(tokens))
    long = largest(lambda at, tokens: -(-most[at] * tokens // all_tokens))
    return tuple((a + b) // 2 for a, b in zip(short, long, strict=True))


def make_cache(
    groups: Sequence[CacheGroup], shapes: Sequence[CacheShape], num_blocks: Sequence[int], device: torch.device
) -> list[LayerCache]:
    """Return the zeroed cache of every layer. On a host its pages are taken when they are first written.

    Args:
        groups: the layers' groups.
        shapes: what each layer caches.
        num_blocks: of each group.
        device: where it lies.
    """
    group_of = {layer: index for index, group in enumerate(groups) for layer in group.layers}

    def make(layer: int, shape: CacheShape) -> LayerCache:
        index = group_of[layer]
        group = groups[index]

        def zeros(heads: int, dim: int) -> torch.Tensor:
            size = (num_blocks[index], group.block_size, heads, dim)
            if device.type == "cpu":
                return _untouched(size, group.dtype)
            return torch.zeros(size, dtype=group.dtype, device=device)

        keys = zeros(shape.kv_heads, shape.key_dim)
        values = keys[..., : shape.value_dim] if shape.values_in_keys else zeros(shape.kv_heads, shape.value_dim)
        index_keys = zeros(1, shape.index_dim) if shape.index_dim else None
        return LayerCache(keys, values, index_keys, index, group.window)

    return [make(layer, shape) for layer, shape in enumerate(shapes)]


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros on the host whose pages the system gives at the first write; ``torch.zeros`` writes them all.

    They are mapped by themselves: an allocator would take what lies free in its heap, and write that.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, prod(shape) * dtype.itemsize, **private), dtype=dtype).view(shape)
