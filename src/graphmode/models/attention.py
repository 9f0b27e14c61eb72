"""The attention hook: transformers' models call it in every layer, over the paged KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from graphmode.graph import outside_graph
from graphmode.kernels import paged_attention, write_kv
from graphmode.models.errors import ModelError

ATTENTION_NAME = "graphmode"

# What models pass to their attention that changes nothing here: positions are in the queries and keys already, and
# dropout is for training.
_WITHOUT_EFFECT = frozenset({"dropout", "position_ids", "output_router_logits", "logits_to_keep"})


@dataclass(frozen=True)
class LayerCache:
    """The KV cache of one layer: keys and values, each ``[num_blocks, block_size, kv_heads, head_dim]``."""

    keys: torch.Tensor
    values: torch.Tensor


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
) -> torch.Tensor:
    """Write new keys and values to the cache, then attend to it.

    Args:
        query: ``[tokens, q_heads, head_dim]``.
        key: ``[tokens, kv_heads, head_dim]``.
        value: ``[tokens, kv_heads, head_dim]``.
        cache: the layer's.
        batch: the step's.
        scale: this and what follows as in :func:`~graphmode.kernels.paged_attention`.
        window: of sliding-window attention.
        soft_cap: of the scores.
        sinks: one logit of each query head.

    Returns:
        ``[tokens, q_heads, head_dim]``.
    """
    write_kv(key, value, cache.keys, cache.values, batch.slot_mapping)
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
    )
    return output


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
    attention_mask: torch.Tensor | None,
    *,
    attention_batch: AttentionBatch,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        module: the attention module, with its ``layer_idx``.
        query: ``[1, q_heads, tokens, head_dim]``, rotated.
        key: ``[1, kv_heads, tokens, head_dim]``, rotated.
        value: ``[1, kv_heads, tokens, head_dim]``.
        attention_mask: must be None; sequences are told apart by ``attention_batch``.
        attention_batch: the step's; the engine passes it through the model as a keyword.
        scaling: of the scores; default ``head_dim ** -0.5``.
        softcap: of the scores.
        s_aux: ``[q_heads]``: attention sinks.
        **kwargs: what the model asks for beyond that: ``sliding_window``, and what has no effect.

    Returns:
        ``[1, tokens, q_heads, head_dim]``, and no attention weights.

    Raises:
        ModelError: the model asks for something that the kernel does not do.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    cache = attention_batch.caches[layer]
    window = sliding_window(module, kwargs)
    _refuse_the_rest(module, key, value, attention_mask, cache, kwargs)
    attend = attention_batch.attend or cached_attention
    if attention_batch.piecewise:
        attend = outside_graph(attend)
    output = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cache,
        attention_batch,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        window,
        softcap,
        s_aux,
    )
    return output.unsqueeze(0), None


def sliding_window(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> int | None:
    """Return the layer's sliding window.

    Most models pass it. Some only build masks by it, which this attention does not get: then the configuration says.
    """
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[module.layer_idx] if layer_types else None
    if layer_type not in (None, "full_attention", "sliding_attention"):
        raise _refusal(module, f"is of type {layer_type!r}")
    window: int | None
    if "sliding_window" in kwargs:
        window = kwargs["sliding_window"]
    elif layer_type == "full_attention":
        window = None
    else:
        window = getattr(config, "sliding_window", None)
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
    cached = list(cache.keys.shape[2:])
    for name, tensor in (("keys", key), ("values", value)):
        shape = [tensor.shape[1], tensor.shape[3]]
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
