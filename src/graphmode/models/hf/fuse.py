"""Fused layers: decoder layers of transformers that are recognised compute as :mod:`graphmode.layers` does.

A layer is recognised by its parts, and replaced only if it gives what its own code gives: both run on a few random
tokens when a model is loaded. Its modules stay, with their weights as views of merged ones; only what their ``forward``
does changes.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from graphmode.cache.specs import LayerCache
from graphmode.layers.attention import Attention, AttentionBatch, cached_attention
from graphmode.layers.decoder import DecoderLayer, Head, decoder_layer
from graphmode.layers.linear import Linear
from graphmode.layers.mlp import MLP
from graphmode.layers.moe import MoE
from graphmode.layers.residual import Norm
from graphmode.models.hf.attention import sliding_window
from graphmode.models.hf.experts import real_rows
from graphmode.models.hf.routers import fuse_routers
from graphmode.ops import Rotation, Scoring, embed

log = logging.getLogger(__name__)

_CHECK_TOKENS = 5


def fuse(model: PreTrainedModel, max_model_len: int) -> int:
    """Fuse the layers of a model, if all are recognised and give what they gave; else log why not.

    Args:
        model: a decoder of transformers, on its device, with graphmode's attention.
        max_model_len: the positions that rotation is computed for, from 0.

    Returns:
        How many layers are fused.
    """
    text: Any = getattr(model, model.base_model_prefix, None)
    if reason := _why_not(model, text):
        log.info("layers are not fused: %s", reason)
        return 0
    for index, layer in enumerate(text.layers):
        if reason := _why_not_layer(layer):
            log.info("layers are not fused: of layer %d, %s", index, reason)
            return 0
    head: Any = model.get_output_embeddings()
    fused_head = Head(_norm(text.norm), Linear(head.weight.data))
    if not _head_agrees(text.norm, head, fused_head):
        log.info("layers are not fused: the head gives other results when it is")
        return 0
    rotations = _rotations(text.rotary_emb, model, max_model_len)
    fused: list[DecoderLayer] = []
    for index, layer in enumerate(text.layers):
        merged = _merge(layer, index, rotations[0])
        positions = torch.arange(max_model_len - _CHECK_TOKENS, max_model_len, device=model.device).clamp(min=0)
        rotated = (replace(merged, attention=replace(merged.attention, rotation=each)) for each in rotations)
        found = next((each for each in rotated if _agrees(layer, each, text.rotary_emb, positions)), None)
        if found is None:
            log.info("layers are not fused: layer %d gives other results when it is", index)
            return 0
        fused.append(found)
    for layer, own in zip(text.layers, fused, strict=True):
        layer.forward = own
        if isinstance(own.mlp, MoE):
            fuse_routers(layer.mlp, own.attention.qkv.weight.dtype)
    rotation = fused[0].attention.rotation
    text.rotary_emb.forward = lambda *args, **kwargs: rotation
    head.forward = fused_head
    text.norm.forward = _unchanged
    plain = type(text.embed_tokens) is nn.Embedding and text.embed_tokens.max_norm is None
    if plain:
        text.embed_tokens.forward = partial(embed, weight=text.embed_tokens.weight.data)
    log.info("%d layers are fused", len(fused))
    return len(fused)


def keeps_rows(model: PreTrainedModel) -> bool:
    """Return whether the last layer leaves out tokens that a batch does not keep: it is fused, and has no experts."""
    layers = getattr(getattr(model, model.base_model_prefix, None), "layers", None)
    last = getattr(layers[-1], "forward", None) if isinstance(layers, nn.ModuleList) else None
    return isinstance(last, DecoderLayer) and isinstance(last.mlp, MLP)


def _unchanged(hidden_states: torch.Tensor) -> torch.Tensor:
    """Take the place of the final norm, which the head computes."""
    return hidden_states


def _why_not(model: Any, text: Any) -> str:
    """Return what in a model's outermost parts keeps it from being fused; empty if nothing does."""
    for name in ("layers", "norm", "rotary_emb", "embed_tokens"):
        if not isinstance(getattr(text, name, None), nn.Module):
            return f"the model has no {name}"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        return "the head is not one matrix"
    if not _is_norm(text.norm, text.norm.weight.shape[0] if hasattr(text.norm, "weight") else 0):
        return f"the final norm is {type(text.norm).__name__}"
    if list(inspect.signature(text.rotary_emb.forward).parameters) != ["x", "position_ids"]:
        return "rotation is of several kinds"
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in rope or any(isinstance(value, dict) for value in rope.values()):
        return "positions are of several kinds"
    return ""


_PARTS = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_OUTPUT_NORMS = frozenset({"post_self_attn_layernorm", "post_mlp_layernorm"})


def _why_not_layer(layer: Any) -> str:
    """Return which parts of a layer differ from those of :mod:`graphmode.layers`; empty if none do."""
    names = {name for name, module in layer.named_children() if not isinstance(module, nn.Dropout)}
    if not _PARTS <= names <= _PARTS | _OUTPUT_NORMS:
        return f"its parts are {', '.join(sorted(names))}"
    attention = layer.self_attn
    parts = dict(attention.named_children())
    projections = {"qkv_proj"} if "qkv_proj" in parts else {"q_proj", "k_proj", "v_proj"}
    if not projections | {"o_proj"} <= parts.keys() <= projections | {"o_proj", "q_norm", "k_norm"}:
        return f"its attention has {', '.join(sorted(parts))}"
    for name in sorted(projections | {"o_proj"}):
        if type(parts[name]) is not nn.Linear:
            return f"its {name} is {type(parts[name]).__name__}"
    biased = {parts[name].bias is not None for name in projections}
    if attention.o_proj.bias is not None or len(biased) > 1:
        return "its projections have biases of another kind"
    if not isinstance(getattr(attention, "head_dim", None), int) or not hasattr(attention, "scaling"):
        return "its attention does not say its head_dim and scaling"
    if ("q_norm" in parts) != ("k_norm" in parts):
        return "only queries or only keys have a norm"
    if "q_norm" in parts and not all(_is_norm(parts[name], attention.head_dim) for name in ("q_norm", "k_norm")):
        return "its norms of heads are of another kind"
    for name in sorted(names - {"self_attn", "mlp"}):
        if not _is_norm(getattr(layer, name), attention.o_proj.out_features):
            return f"its {name} is of another kind"
    return ""


def _is_norm(module: nn.Module, size: int) -> bool:
    """Return whether a module has the parts of an RMS norm of ``size`` elements."""
    names = dict(module.named_parameters())
    return names.keys() == {"weight"} and names["weight"].shape == (size,) and hasattr(module, "variance_epsilon")


def _gate_and_up(mlp: Any) -> list[Any] | None:
    """Return the projections to gate and up, in one module or two, of a gated network; None for another kind."""
    parts = dict(mlp.named_children())
    names = ["gate_up_proj"] if "gate_up_proj" in parts else ["gate_proj", "up_proj"]
    others = [module for name, module in parts.items() if name not in (*names, "down_proj")]
    if len(parts) != len(names) + 2 or len(others) != 1 or not isinstance(others[0], (nn.SiLU, type(ACT2FN["silu"]))):
        return None
    if any(type(parts[name]) is not nn.Linear or parts[name].bias is not None for name in (*names, "down_proj")):
        return None
    return [parts[name] for name in names]


def _merge(layer: Any, index: int, rotation: Rotation) -> DecoderLayer:
    """Return a recognised layer as one of ours; its own weights become views of the merged ones."""
    own, mlp = layer.self_attn, layer.mlp
    projections = [own.qkv_proj] if hasattr(own, "qkv_proj") else [own.q_proj, own.k_proj, own.v_proj]
    passed = {"sliding_window": own.sliding_window} if hasattr(own, "sliding_window") else {}
    output_norm, down_norm = (
        _norm(getattr(layer, name)) if hasattr(layer, name) else None
        for name in ("post_self_attn_layernorm", "post_mlp_layernorm")
    )
    attention = Attention(
        norm=_norm(layer.input_layernorm),
        qkv=_linear(projections),
        head_norms=(_norm(own.q_norm), _norm(own.k_norm)) if hasattr(own, "q_norm") else None,
        rotation=rotation,
        scale=own.scaling,
        window=sliding_window(own, passed),
        output=Linear(own.o_proj.weight.data),
        output_norm=output_norm,
    )
    norm, gate_and_up = _norm(layer.post_attention_layernorm), _gate_and_up(mlp)
    if gate_and_up is None:
        return decoder_layer(index, attention, MoE(norm, mlp, down_norm))
    gated = MLP(norm, _linear(gate_and_up), Linear(mlp.down_proj.weight.data), down_norm)
    return decoder_layer(index, attention, gated)


def _linear(modules: list[Any]) -> Linear:
    """Return linear modules as one."""
    bias = None if modules[0].bias is None else _merged(modules, "bias")
    return Linear(_merged(modules, "weight"), bias)


def _merged(modules: list[Any], name: str) -> torch.Tensor:
    """Put one parameter of each module below the other, and point the modules at their parts."""
    if len(modules) == 1:
        return getattr(modules[0], name).data  # type: ignore[no-any-return]
    merged = torch.cat([getattr(module, name).data for module in modules])
    start = 0
    for module in modules:
        size = len(getattr(module, name))
        getattr(module, name).data = merged[start : start + size]
        start += size
    return merged


def _rotations(rotary: Any, model: PreTrainedModel, positions: int) -> tuple[Rotation, ...]:
    """Return the rotations that a layer may have: of halves, of pairs side by side, and none."""
    like = torch.empty(0, dtype=torch.float32, device=model.device)
    tables = rotary(like, torch.arange(positions, device=model.device).unsqueeze(0))
    half = tables[0].shape[-1] // 2
    cos, sin = (table[0, :, :half].float().contiguous() for table in tables)
    return (
        Rotation(cos, sin),
        Rotation(cos, sin, interleaved=True),
        Rotation(torch.ones_like(cos), torch.zeros_like(sin)),
    )


_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def _agrees(layer: Any, fused: DecoderLayer, rotary: Any, positions: torch.Tensor) -> bool:
    """Return whether a fused layer adds to random hidden states what the layer's own code adds, and caches the same.

    A window or a soft cap may change nothing of so few tokens: so what the layer asks of attention is compared too.
    """
    asked: list[tuple[object, ...]] = []

    def attend_as_asked(*arguments: Any) -> torch.Tensor:
        asked.append(arguments[5:])
        return cached_attention(*arguments)

    attention, weight = fused.attention, fused.attention.qkv.weight
    device, dtype = weight.device, weight.dtype
    generator = torch.Generator().manual_seed(fused.index)
    tokens = len(positions)
    x = torch.randn(1, tokens, weight.shape[1], generator=generator)
    head_dim = layer.self_attn.head_dim
    kv_heads = (weight.shape[0] - attention.output.weight.shape[1]) // (2 * head_dim)

    def run(forward: Any, hidden: torch.Tensor) -> list[torch.Tensor]:
        cache = LayerCache(*torch.zeros(2, 1, 16, kv_heads, head_dim, dtype=dtype, device=device))
        batch = AttentionBatch(
            slot_mapping=(torch.arange(tokens, device=device),),
            block_tables=(torch.zeros(1, 1, dtype=torch.int32, device=device),),
            cu_query_lens=torch.tensor([0, tokens], dtype=torch.int32, device=device),
            kv_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
            max_query_len=tokens,
            caches=[cache] * (fused.index + 1),
            attend=attend_as_asked,
        )
        with torch.inference_mode(), real_rows(layer, batch):
            after = forward(
                hidden.clone(),
                attention_mask=None,
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                position_embeddings=rotary(hidden, positions.unsqueeze(0)),
                attention_batch=batch,
            )
        return [after, after - hidden, cache.keys, cache.values]

    # Small, what the layer adds is not lost in the rounding of what it adds to; large, what becomes of that shows. The
    # norm evens out both.
    small, large = (x.mul(size).to(device, dtype) for size in (0.01, 100.0))
    pairs = [*zip(run(layer, small)[1:], run(fused, small)[1:], strict=True)]
    pairs.append((run(layer, large)[0], run(fused, large)[0]))
    wanted = (Scoring(attention.scale, attention.window), None)
    return asked == [wanted] * 2 and all(close(own, other) for own, other in pairs)


def _head_agrees(norm: Any, head: Any, fused: Head) -> bool:
    """Return whether a fused head gives the logits that the norm and the head give, of random hidden states."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _CHECK_TOKENS, head.in_features, generator=generator).to(head.weight.device, head.weight.dtype)
    with torch.inference_mode():
        return close(head(norm(x)), fused(x))


def close(own: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two results differ by no more than rounding in their dtype."""
    return bool((other.float() - own.float()).norm() <= _TOLERANCE[own.dtype] * own.float().norm())


def _norm(module: Any) -> Norm:
    return Norm(module.weight.data, module.variance_epsilon)
