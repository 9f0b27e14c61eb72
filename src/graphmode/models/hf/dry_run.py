"""A dry run: what a model asks of attention, and whether its tokens stay apart everywhere else.

A step holds tokens of many sequences in one row, with their positions, and only attention tells the sequences apart. A
model that mixes tokens elsewhere (a recurrence, a convolution), numbers positions by itself or has attention of another
kind would give wrong tokens and no error. So a loaded model is run on three tokens with a recorder in place of
attention, and refused where it does any of that. This looks at what the model does, not at what it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from graphmode.cache.specs import CacheShape
from graphmode.errors import ModelError
from graphmode.models.hf.attention import is_sparse, sliding_window
from graphmode.models.hf.grid_positions import has_grid_positions
from graphmode.models.hf.latent import expand, keeps_latents
from graphmode.models.hf.sparse import BatchAsMask
from graphmode.models.hf.versions import layers_that_forget

DRY_RUN_NAME = "graphmode_dry_run"


@dataclass(frozen=True)
class AttentionCall:
    """One layer's call of attention.

    Attributes:
        layer: the layer's index; None where the module has none.
        query: ``[q_heads, tokens, key_dim]``.
        key: ``[kv_heads, tokens, key_dim]``.
        value: ``[kv_heads, tokens, value_dim]``.
        index: the queries, keys and weights of the indexer that picks the layer's keys, ``[tokens, ...]``; else empty.
        cache: what the layer caches, and how many tokens each attends to, as the true hook reads it.
        mask: what the model handed over as its mask, of those that :func:`dry_run_mask` makes or of its own.
        causal: whether a token attends to none after it.
    """

    layer: int | None
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    index: tuple[torch.Tensor, ...]
    cache: CacheShape
    mask: torch.Tensor | None
    causal: bool


@dataclass
class _Recorder:
    """Stands for the step's attention batch.

    Attributes:
        slot_mapping: as of :class:`~graphmode.models.hf.attention.AttentionBatch`; the experts read it.
        calls: of attention, in order.
        index: what the last indexer chose by, until the layer's call of attention takes it.
    """

    slot_mapping: tuple[torch.Tensor, ...]
    calls: list[AttentionCall] = field(default_factory=list)
    index: tuple[torch.Tensor, ...] = ()

    def select(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        """Record an indexer's choice. Arguments and result as of the true batch."""
        self.index = (query, key, weights)
        return torch.zeros((query.shape[0], 1), dtype=torch.int32, device=query.device)


def dry_run_hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BatchAsMask | None,
    *,
    attention_batch: _Recorder | None = None,
    indices: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Record a call of attention, and let each token attend to itself. Shapes as of the true hook.

    Raises:
        ModelError: the model does not hand its keyword arguments on to attention.
    """
    if attention_batch is None:
        raise ModelError("it does not hand keyword arguments on to attention, which needs the step's batch")
    layer = getattr(module, "layer_idx", None)
    causal = options.pop("is_causal", None)
    if is_sparse(module) and indices is None:
        raise ModelError("its attention is sparse, and nothing picks its keys")
    index, attention_batch.index = attention_batch.index, ()
    index_dim = index[1].shape[2] if index else 0
    window = sliding_window(module, options)
    if keeps_latents(module):
        rank, rope = value.shape[3], key.shape[3]
        key, value = expand(module, key, value)
        cache = CacheShape(1, rank + rope, rank, values_in_keys=True, index_dim=index_dim, window=window)
    else:
        cache = CacheShape(key.shape[1], key.shape[3], value.shape[3], index_dim=index_dim, window=window)
    attention_batch.calls.append(
        AttentionCall(
            layer if isinstance(layer, int) else None,
            query[0],
            key[0],
            value[0],
            index,
            cache,
            mask=None if isinstance(attention_mask, BatchAsMask) else attention_mask,
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        )
    )
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


def dry_run_mask(
    *, batch_size: int, q_length: int, kv_length: int, local_size: int | None = None, **options: Any
) -> torch.Tensor | None:
    """Make a mask as transformers' models ask for it: None if it is causal, else filled with its window's length."""
    if local_size is None:
        return None
    return torch.full((batch_size, 1, q_length, kv_length), local_size, device=options.get("device"))


AttentionInterface.register(DRY_RUN_NAME, dry_run_hook)
AttentionMaskInterface.register(DRY_RUN_NAME, dry_run_mask)


def cache_shapes(model: PreTrainedModel) -> tuple[CacheShape, ...]:
    """Run a model dry and return what each of its layers caches.

    Raises:
        ModelError: graphmode cannot run it; why, in words that follow the model's name.
    """
    implementation = model.config._attn_implementation
    model.set_attn_implementation(DRY_RUN_NAME)
    try:
        shapes = _check_calls(model)
        _check_positions(model)
        _check_tokens_apart(model)
    finally:
        model.set_attn_implementation(implementation)
    return shapes


def check_features_apart(model: PreTrainedModel, tokens: Mapping[str, Any]) -> None:
    """Refuse models in which the features of an image reach other tokens than by attention.

    Args:
        model: the model.
        tokens: what it takes in place of three token ids; the features of the second one are NaN.

    Raises:
        ModelError: graphmode cannot run it; why, in words that follow the model's name.
    """
    text: Any = model.base_model.language_model
    implementation = text.config._attn_implementation
    text.set_attn_implementation(DRY_RUN_NAME)
    try:
        logits, calls = _run(model, [0, 1, 2], tokens=tokens)
    finally:
        text.set_attn_implementation(implementation)
    if calls[-1].value[:, 1].isfinite().any():
        raise ModelError("it does not take the features of images in place of embeddings")
    if not logits.isfinite().all():
        raise ModelError("the features of an image reach tokens that do not stand for it")


def check_class(cls: type[PreTrainedModel], config: PretrainedConfig) -> None:
    """Refuse what a class and a configuration say, before any weight is read.

    Raises:
        ModelError: graphmode cannot run it; why, in words that follow the model's name.
    """
    if config.is_encoder_decoder:
        raise ModelError("it is an encoder and a decoder, and graphmode runs decoders alone")
    if cls._is_stateful:
        raise ModelError("it keeps a state beside keys and values, which graphmode's cache does not hold")
    if not cls._supports_attention_backend:
        raise ModelError("it does not call transformers' attention interface, so its KV cache cannot be paged")
    parameters = inspect.signature(cls.forward).parameters
    if "position_ids" not in parameters:
        raise ModelError("it takes no position_ids: it numbers tokens by itself, as if all were one sequence")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise ModelError("it takes no keyword arguments for attention, which needs the step's batch")


def _run(
    model: PreTrainedModel, positions: list[int], *, tokens: list[int] | Mapping[str, Any]
) -> tuple[torch.Tensor, list[AttentionCall]]:
    """Return the logits of the first and the last of three tokens, ``[2, vocab]``, and the attention calls."""
    recorder = _Recorder((torch.arange(3, device=model.device),))
    position_ids = torch.tensor([positions], device=model.device)
    if has_grid_positions(model):
        position_ids = position_ids.expand(3, 1, 3)
    given = tokens if isinstance(tokens, Mapping) else {"input_ids": torch.tensor([tokens], device=model.device)}
    try:
        with torch.no_grad():
            output = model(
                **given,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=torch.tensor([0, 2], device=model.device),
                attention_batch=recorder,
            )
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"it cannot run tokens without a cache of its own: {type(error).__name__}: {error}") from error
    logits = output.logits
    if logits.shape[:2] != (1, 2):
        raise ModelError("it cannot compute the logits of chosen tokens alone (logits_to_keep)")
    return logits[0], recorder.calls


def _check_calls(model: PreTrainedModel) -> tuple[CacheShape, ...]:
    """Refuse attention that is not causal softmax attention over each layer's own keys and values."""
    config = model.config.get_text_config()
    logits, calls = _run(model, [0, 1, 2], tokens=[1, 2, 3])
    if not logits.isfinite().all():
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(f"its logits are beyond the range of {dtype}; use dtype='bfloat16' or 'float32'")
    layers = config.num_hidden_layers
    called = [call.layer for call in calls]
    if missing := sorted(set(range(layers)) - set(called)):
        raise ModelError(f"{len(missing)} of its {layers} layers keep a state of another kind than keys and values")
    if called != list(range(layers)):
        raise ModelError(f"its layers call attention in the order {called}, not once each")
    for call, forgets in zip(calls, layers_that_forget(config, layers), strict=True):
        if not call.causal:
            raise ModelError("its attention is not causal")
        if call.mask is not None and (call.cache.window is None or (call.mask != call.cache.window).any()):
            raise ModelError("it limits or weighs attention by a mask of its own")
        if (call.mask is None and call.cache.window is not None) or (call.cache.window is None and forgets):
            raise ModelError("its mask and its own cache do not agree on how far a token sees")
        if call.key.shape[1] != call.query.shape[1]:
            raise ModelError("its keys are not those of the tokens alone")
    return tuple(call.cache for call in calls)


def _check_positions(model: PreTrainedModel) -> None:
    """Refuse models that know a token's place by more than ``position_ids``: same token and place, same result."""
    logits, calls = _run(model, [0, 0, 0], tokens=[1, 1, 1])
    tolerance = 1e-3 if model.dtype == torch.float32 else 2e-2
    by_token = [part.transpose(0, 1) for call in calls for part in (call.query, call.key, call.value)]
    for tensor in [logits, *by_token, *(part for call in calls for part in call.index)]:
        apart = (tensor - tensor[:1]).float().norm()
        if apart > tolerance * tensor.float().norm():
            raise ModelError("it numbers positions by itself, as if all tokens of a step were one sequence")


def _check_tokens_apart(model: PreTrainedModel) -> None:
    """Refuse models that mix tokens outside of attention: one that is NaN must not reach any other."""

    def spoil(module: torch.nn.Module, args: object, embeddings: torch.Tensor) -> torch.Tensor:
        embeddings = embeddings.clone()
        embeddings[:, 1] = torch.nan
        return embeddings

    hook = model.get_input_embeddings().register_forward_hook(spoil)
    try:
        logits, calls = _run(model, [0, 1, 2], tokens=[1, 2, 3])
    finally:
        hook.remove()
    if calls[0].value[:, 1].isfinite().any():
        raise ModelError("its tokens do not come from its embedding alone")
    if not logits.isfinite().all():
        raise ModelError("it mixes tokens outside of attention")
