"""What the layers of a model keep in the KV cache, and the groups that they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from graphmode.errors import ModelError

CacheKind = Literal["full", "window", "latent"]


@dataclass(frozen=True)
class CacheShape:
    """What one layer caches of a token.

    Attributes:
        kv_heads: heads of keys and values.
        key_dim: elements of a key.
        value_dim: elements of a value.
        values_in_keys: whether a value is the first elements of its key, as of latents; then it is not stored again.
        index_dim: elements of the key that the layer's indexer picks keys by; 0 without one.
        window: how many tokens a token sees, its own among them; None for all.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    values_in_keys: bool = False
    index_dim: int = 0
    window: int | None = None

    @property
    def elements(self) -> int:
        """Elements stored of a token."""
        return self.kv_heads * (self.key_dim + (0 if self.values_in_keys else self.value_dim)) + self.index_dim

    @property
    def kind(self) -> CacheKind:
        """The kind of group that the layer belongs to."""
        if self.window is not None:
            return "window"
        return "latent" if self.values_in_keys else "full"


@dataclass(frozen=True)
class CacheGroup:
    """Layers that keep the same tokens: they share block numbers, so a sequence has one block table for them all.

    Kinds differ in one thing, :meth:`first_read`: what no later token reads is given back. A recurrent state fits in as
    a further kind: ``block_bytes`` are those of one state, the place of a block holds the state after the block's last
    token, and ``first_read(position)`` is ``position - 1``: a sequence then holds the block that it is in and the one
    before, and a prefix is found wherever a state was kept.

    Attributes:
        kind: ``full`` (a token reads all tokens before it), ``window`` (the last ones alone) or ``latent`` (all of
            them, as latents that are key and value in one).
        layers: the indices of its layers.
        dtype: of what it caches.
        block_size: tokens in a block.
        block_bytes: bytes of a block in all of its layers.
        window: how many tokens a token sees; None for all.
    """

    kind: CacheKind
    layers: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    block_bytes: int
    window: int | None = None

    def first_read(self, position: int) -> int:
        """Return the first position that the token at ``position`` reads. Later tokens read none before it."""
        return 0 if self.window is None else max(0, position + 1 - self.window)

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold ``tokens`` tokens."""
        return -(-tokens // self.block_size)

    def most_blocks(self, length: int, step_tokens: int, decode_steps: int, sequences: int = 1) -> int:
        """Return the most blocks that sequences hold at a time.

        Args:
            length: the most tokens of each.
            step_tokens: the most tokens of a step.
            decode_steps: the most tokens that a sequence makes in steps launched together.
            sequences: how many there are.
        """
        all_tokens = sequences * self.blocks_for(length)
        if self.window is None:
            return all_tokens
        # Before the next token: what it reads, and what was kept while tokens in flight were not known yet. From it on:
        # what is launched together. A run of tokens that starts anywhere may touch one block more than it fills.
        run = self.window - 1 + 2 * decode_steps - 1
        touched = (run + self.block_size - 2) // self.block_size + 1
        return min(all_tokens, sequences * touched + self.blocks_for(step_tokens))


def group_layers(shapes: Sequence[CacheShape], dtype: torch.dtype, block_size: int) -> tuple[CacheGroup, ...]:
    """Return the groups of a model's layers: those of one kind and window are in one group.

    Args:
        shapes: what each layer caches.
        dtype: of what they cache.
        block_size: tokens in a block.
    """
    layers: dict[tuple[CacheKind, int | None], list[int]] = {}
    for layer, shape in enumerate(shapes):
        layers.setdefault((shape.kind, shape.window), []).append(layer)
    return tuple(
        CacheGroup(
            kind,
            tuple(members),
            dtype,
            block_size,
            block_size * dtype.itemsize * sum(shapes[layer].elements for layer in members),
            window,
        )
        for (kind, window), members in layers.items()
    )


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer.

    Attributes:
        keys: ``[num_blocks, block_size, kv_heads, key_dim]``.
        values: ``[num_blocks, block_size, kv_heads, value_dim]``; of latents a view, ``keys[..., :value_dim]``.
        index_keys: ``[num_blocks, block_size, 1, index_dim]``: what its indexer picks keys by; None without one.
        group: the cache group whose block tables and slots it uses.
        window: how many tokens a token may see; earlier ones may have been given back. None for all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    index_keys: torch.Tensor | None = None
    group: int = 0
    window: int | None = None

    @property
    def new_keys(self) -> torch.Tensor:
        """Where new keys go: ``keys``, or what of them is no value."""
        values_in_keys = self.values.data_ptr() == self.keys.data_ptr()
        return self.keys[..., self.values.shape[3] :] if values_in_keys else self.keys

    def check_window(self, window: int | None) -> None:
        """Check that a layer reads no token that may have been given back.

        Args:
            window: how many tokens each of its tokens sees; None for all.

        Raises:
            ModelError: it sees more than it did when the model was loaded.
        """
        if self.window is not None and (window is None or window > self.window):
            seen = "all tokens" if window is None else f"the last {window} tokens"
            raise ModelError(
                f"a layer attends to {seen}, and to the last {self.window} when the model was loaded: the cache keeps "
                "no more of them. graphmode does not run models whose windows change"
            )
