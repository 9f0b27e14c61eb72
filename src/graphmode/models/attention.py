"""The attention hook: transformers' models call it in every layer, over the paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from graphmode.graph import outside_graph
from graphmode.kernels import paged_attention, write_kv
from graphmode.models.errors import ModelError

ATTENTION_NAME = "graphmode"

# What models pass to attention and the kernel does not do yet, where it is set.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "sinks", "cum_seq_lens_q")


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
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    cu_query_lens: torch.Tensor
    kv_lens: torch.Tensor
    max_query_len: int
    caches: Sequence[LayerCache]
    piecewise: bool = False


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    scale: float,
    batch: AttentionBatch,
) -> torch.Tensor:
    """Write new keys and values to the cache, then attend to it.

    Args:
        query: ``[tokens, q_heads, head_dim]``.
        key: ``[tokens, kv_heads, head_dim]``.
        value: ``[tokens, kv_heads, head_dim]``.
        cache: the layer's.
        scale: of the scores.
        batch: the step's.

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
    )
    return output


_attention_outside_graph = outside_graph(cached_attention)


def attention_hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_batch: AttentionBatch,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        module: the attention module, with its ``layer_idx``.
        query: ``[1, q_heads, tokens, head_dim]``, rotated.
        key: ``[1, kv_heads, tokens, head_dim]``, rotated.
        value: ``[1, kv_heads, tokens, head_dim]``.
        attention_mask: unused; sequences are told apart by ``attention_batch``.
        attention_batch: the step's; the engine passes it through the model as a keyword.
        scaling: of the scores; default ``head_dim ** -0.5``.
        **kwargs: what the model asks for beyond that.

    Returns:
        ``[1, tokens, q_heads, head_dim]``, and no attention weights.

    Raises:
        ModelError: the model asks for something that the kernel does not do.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} of layer {module.layer_idx} uses {name}={kwargs[name]!r}, which graphmode's "
                "attention does not support yet"
            )
    attend = _attention_outside_graph if attention_batch.piecewise else cached_attention
    layer = module.layer_idx
    assert isinstance(layer, int)
    output = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        attention_batch.caches[layer],
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        attention_batch,
    )
    return output.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, attention_hook)
