"""What the layers of a model keep in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheShape:
    """What one layer caches of a token.

    Attributes:
        kv_heads: heads of keys and values.
        key_dim: elements of a key.
        value_dim: elements of a value.
        values_in_keys: whether a value is the first elements of its key, as of latents; then it is not stored again.
        index_dim: elements of the key that the layer's indexer picks keys by; 0 without one.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    values_in_keys: bool = False
    index_dim: int = 0

    @property
    def elements(self) -> int:
        """Elements stored of a token."""
        return self.kv_heads * (self.key_dim + (0 if self.values_in_keys else self.value_dim)) + self.index_dim


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer.

    Attributes:
        keys: ``[num_blocks, block_size, kv_heads, key_dim]``.
        values: ``[num_blocks, block_size, kv_heads, value_dim]``; of latents a view, ``keys[..., :value_dim]``.
        index_keys: ``[num_blocks, block_size, 1, index_dim]``: what its indexer picks keys by; None without one.
        group: the cache group whose block tables and slots it uses.
    """

    keys: torch.Tensor
    values: torch.Tensor
    index_keys: torch.Tensor | None = None
    group: int = 0

    @property
    def new_keys(self) -> torch.Tensor:
        """Where new keys go: ``keys``, or what of them is no value."""
        values_in_keys = self.values.data_ptr() == self.keys.data_ptr()
        return self.keys[..., self.values.shape[3] :] if values_in_keys else self.keys
