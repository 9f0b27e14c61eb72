"""The attention hook: transformers' models call it in every layer, over the paged KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AttentionInterface

from graphmode.cache.specs import LayerCache
from graphmode.errors import ModelError
from graphmode.layers.attention import AttentionBatch
from graphmode.models.hf.latent import absorb_keys, expand_values, keeps_latents
from graphmode.models.hf.sparse import BatchAsMask
from graphmode.models.hf.versions import SPARSE_LAYER_TYPES
from graphmode.ops import Scoring

ATTENTION_NAME = "graphmode"

# What models pass to their attention that changes nothing here: positions are in the queries and keys already, and
# dropout is for training.
_WITHOUT_EFFECT = frozenset({"dropout", "position_ids", "output_router_logits", "logits_to_keep"})


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
    cache.check_window(window)
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
        Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap, s_aux),
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

    Most models pass it. Some only build masks with it, which this attention does not get; then the configuration says.
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
