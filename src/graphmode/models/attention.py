"""The attention hook: transformers' models call it in every layer, over the paged KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from graphmode.graph import outside_graph
from graphmode.kernels import paged_attention, select_keys, write_kv
from graphmode.kernels._triton import runs_triton
from graphmode.kernels.parts import Parts, share_keys
from graphmode.models.errors import ModelError
from graphmode.models.latent import absorb_keys, expand_values, keeps_latents
from graphmode.models.sparse import BatchAsMask
from graphmode.models.transformers_versions import SPARSE_LAYER_TYPES

ATTENTION_NAME = "graphmode"

# What models pass to their attention that changes nothing here: positions are in the queries and keys already, and
# dropout is for training.
_WITHOUT_EFFECT = frozenset({"dropout", "position_ids", "output_router_logits", "logits_to_keep"})


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
    """

    keys: torch.Tensor
    values: torch.Tensor
    index_keys: torch.Tensor | None = None

    @property
    def new_keys(self) -> torch.Tensor:
        """Where new keys go: ``keys``, or what of them is no value."""
        values_in_keys = self.values.data_ptr() == self.keys.data_ptr()
        return self.keys[..., self.values.shape[3] :] if values_in_keys else self.keys


@dataclass(frozen=True)
class AttentionBatch:
    """What the attention of one step reads, beside queries, keys and values.

    Attributes:
        slot_mapping: int64 ``[tokens]``: where in the cache each token's key and value go; -1 for padding.
        block_tables: int32 ``[seqs, blocks]``: the cache blocks of each sequence, in order.
        cu_query_lens: int32 ``[seqs + 1]``: cumulative numbers of new tokens.
        kv_lens: int32 ``[seqs]``: length of each sequence with its new tokens; 0 for padding.
        max_query_len: 1 where every sequence has one new token, else the number of tokens of the step.
        caches: one for each layer.
        piecewise: whether attention runs outside the graph.
        attend: the device's attention; None for :func:`cached_attention`.
        host_arguments: lengths on the host, for a device whose attention takes them there.
        kept: int64 ``[kept]``: the tokens whose hidden states are wanted in the end, for a last layer that leaves out
            the others (:func:`~graphmode.models.fused.keeps_rows`). None for all.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    cu_query_lens: torch.Tensor
    kv_lens: torch.Tensor
    max_query_len: int
    caches: Sequence[LayerCache]
    piecewise: bool = False
    attend: Callable[..., torch.Tensor] | None = None
    host_arguments: Mapping[str, list[int]] = field(default_factory=dict)
    kept: torch.Tensor | None = None
    _parts: dict[tuple[int, int | None, int | None], Parts] = field(default_factory=dict, init=False)

    @property
    def row_lens(self) -> torch.Tensor | None:
        """``kv_lens`` where each row of the step is a sequence of its own, to tell padding; None elsewhere."""
        return self.kv_lens if self.max_query_len == 1 and self.kept is None else None

    def parts(self, kv_heads: int, window: int | None, top_k: int | None = None) -> Parts | None:
        """Return how decode is shared out among programs, computed once a step; None where each call computes it.

        Outside the graph a call is all that runs again, and what another one computed would be of an earlier step.
        """
        if self.max_query_len > 1 or self.piecewise or not runs_triton(self.kv_lens):
            return None
        key = kv_heads, window, top_k
        if key not in self._parts:
            self._parts[key] = share_keys(self.kv_lens, kv_heads, window=window, top_k=top_k)
        return self._parts[key]

    @property
    def attention(self) -> Callable[..., torch.Tensor]:
        """What a layer calls: the device's attention, outside of the graph where the step is piecewise."""
        attend = self.attend or cached_attention
        return outside_graph(attend) if self.piecewise else attend

    def select(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        """Cache index keys of a layer, then choose the keys that each token attends to.

        Args:
            layer: its index.
            query: the indexer's, ``[tokens, heads, dim]``.
            key: ``[tokens, 1, dim]``.
            weights: float32 ``[tokens, heads]``.
            top_k: how many are chosen at most.

        Returns:
            As of :func:`~graphmode.kernels.select_keys`.
        """
        index_keys = self.caches[layer].index_keys
        assert index_keys is not None
        select = _selection_outside_graph if self.piecewise else cached_selection
        return select(query, key, weights, index_keys, self, top_k)


def attend(
    query: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    selection: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the cache, which holds the new keys and values. Arguments and result as of :func:`cached_attention`."""
    output: torch.Tensor = paged_attention(
        query,
        cache.keys,
        cache.values,
        batch.block_tables,
        batch.cu_query_lens,
        batch.kv_lens,
        scale=scale,
        max_query_len=batch.max_query_len,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        selection=selection,
        parts=batch.parts(cache.keys.shape[2], window, None if selection is None else selection.shape[1]),
    )
    return output


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    selection: torch.Tensor | None,
) -> torch.Tensor:
    """Write new keys and values to the cache, then attend to it.

    Args:
        query: ``[tokens, q_heads, key_dim]``, as the cache's.
        key: what goes to the cache's ``new_keys``, ``[tokens, kv_heads, dim]``.
        value: ``[tokens, kv_heads, value_dim]``.
        cache: the layer's.
        batch: the step's.
        scale: this and what follows as in :func:`~graphmode.kernels.paged_attention`.
        window: of sliding-window attention.
        soft_cap: of the scores.
        sinks: one logit of each query head.
        selection: of keys, for sparse attention.

    Returns:
        ``[tokens, q_heads, value_dim]``.
    """
    write_kv(key, value, cache.new_keys, cache.values, batch.slot_mapping)
    return attend(query, cache, batch, scale, window, soft_cap, sinks, selection)


def cached_selection(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: torch.Tensor,
    index_keys: torch.Tensor,
    batch: AttentionBatch,
    top_k: int,
) -> torch.Tensor:
    """Write new index keys to the cache, then choose among its keys; arguments as of :meth:`AttentionBatch.select`."""
    write_kv(key, None, index_keys, None, batch.slot_mapping)
    return select_keys(
        query,
        weights,
        index_keys,
        batch.block_tables,
        batch.cu_query_lens,
        batch.kv_lens,
        top_k=top_k,
        max_query_len=batch.max_query_len,
    )


attend_outside_graph = outside_graph(attend)
_selection_outside_graph = outside_graph(cached_selection)


@dataclass(frozen=True)
class DeviceAttention:
    """How a device attends.

    Attributes:
        attend: does as :func:`cached_attention`.
        block_size: tokens in a block of the cache.
        host_lengths: where it takes lengths on the host: computes them, from the longest sequence there can be and what
            :class:`~graphmode.graph.HostArguments` gives. None where it reads them on the device.
    """

    attend: Callable[..., torch.Tensor]
    block_size: int
    host_lengths: Callable[[int, str, Mapping[str, int], Mapping[str, torch.Tensor]], dict[str, list[int]]] | None


PORTABLE_ATTENTION = DeviceAttention(cached_attention, 16, None)


def attention_hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BatchAsMask | None,
    *,
    attention_batch: AttentionBatch,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        module: the attention module, with its ``layer_idx``.
        query: ``[1, q_heads, tokens, key_dim]``, rotated.
        key: ``[1, kv_heads, tokens, key_dim]``, rotated; of a module that keeps latents their rotated part.
        value: ``[1, kv_heads, tokens, value_dim]``; of a module that keeps latents these.
        attention_mask: must be None, or the batch in its place; sequences are told apart by ``attention_batch``.
        attention_batch: the step's; the engine passes it through the model as a keyword.
        scaling: of the scores; default ``key_dim ** -0.5``.
        softcap: of the scores.
        s_aux: ``[q_heads]``: attention sinks.
        indices: int32 ``[1, tokens, top_k]``: the keys that an indexer picked.
        **kwargs: what the model asks for beyond that: ``sliding_window``, and what has no effect.

    Returns:
        ``[1, tokens, q_heads, value_dim]``, and no attention weights.

    Raises:
        ModelError: the model asks for something that the kernel does not do.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    cache = attention_batch.caches[layer]
    window = sliding_window(module, kwargs)
    if is_sparse(module) and indices is None:
        raise _refusal(module, "is sparse, and nothing picks its keys")
    mask = None if isinstance(attention_mask, BatchAsMask) else attention_mask
    _refuse_the_rest(module, key, value, mask, cache, kwargs)
    latent = keeps_latents(module)
    output = attention_batch.attention(
        (absorb_keys(module, query[0]) if latent else query[0]).transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cache,
        attention_batch,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        window,
        softcap,
        s_aux,
        None if indices is None else indices[0],
    )
    if latent:
        output = expand_values(module, output)
    return output.unsqueeze(0), None


def is_sparse(module: Any) -> bool:
    """Return whether the configuration says that the layer attends to picked keys alone."""
    return _layer_type(module) in SPARSE_LAYER_TYPES


def _layer_type(module: Any) -> str | None:
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    return layer_types[module.layer_idx] if layer_types else None


def sliding_window(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> int | None:
    """Return the layer's sliding window.

    Most models pass it. Some only build masks by it, which this attention does not get: then the configuration says.
    """
    layer_type = _layer_type(module)
    if layer_type not in (None, "full_attention", "sliding_attention", *SPARSE_LAYER_TYPES):
        raise _refusal(module, f"is of type {layer_type!r}")
    window: int | None
    if "sliding_window" in kwargs:
        window = kwargs["sliding_window"]
    elif layer_type in ("full_attention", *SPARSE_LAYER_TYPES):
        window = None
    else:
        window = getattr(getattr(module, "config", None), "sliding_window", None)
    return window


def _refuse_the_rest(
    module: torch.nn.Module,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: LayerCache,
    kwargs: Mapping[str, Any],
) -> None:
    """Raise ModelError for what would be silently wrong; arguments as of :func:`attention_hook`."""
    for name in kwargs.keys() - _WITHOUT_EFFECT - {"sliding_window", "is_causal"}:
        if kwargs[name] is not None and kwargs[name] is not False:
            raise _refusal(module, f"uses {name}={kwargs[name]!r}")
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise _refusal(module, "lets tokens see later ones (is_causal=False)")
    if attention_mask is not None:
        raise _refusal(module, "brings a mask of its own")
    for name, tensor, place in (("keys", key, cache.new_keys), ("values", value, cache.values)):
        shape, cached = [tensor.shape[1], tensor.shape[3]], list(place.shape[2:])
        if shape != cached:
            raise _refusal(
                module,
                f"has {name} of {shape[0]} heads of {shape[1]}, where the cache is made for {cached[0]} of {cached[1]}",
            )


def _refusal(module: torch.nn.Module, what: str) -> ModelError:
    return ModelError(
        f"{type(module).__name__} of layer {module.layer_idx} {what}, which graphmode's attention does not support yet"
    )


AttentionInterface.register(ATTENTION_NAME, attention_hook)
