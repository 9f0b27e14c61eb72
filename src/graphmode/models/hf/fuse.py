"""Fused layers: recognised decoder layers compute with a few kernels over the weights that they have.

A layer is recognised by its parts, and replaced only if it gives what its own code gives: both run on a few random
tokens at load. Its modules stay, with their weights as views of merged ones; only what their ``forward`` does changes.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from graphmode.cache.specs import LayerCache
from graphmode.layers.attention import AttentionBatch, attend, attend_outside_graph, cached_attention
from graphmode.models.hf.attention import sliding_window
from graphmode.models.hf.experts import fuse_routers, real_rows
from graphmode.ops import (
    Rotation,
    add_rms_norm,
    add_split_k,
    add_split_k_and_norm,
    embed,
    prefill_heads,
    prefill_swiglu,
    rms_norm,
    rotate_and_attend,
    rotate_and_cache,
    silu_mul,
    skinny_linear,
    skinny_linear_add,
    skinny_norm_linear,
    small_batch_linear,
    split_k_linear,
)
from graphmode.ops.dispatch import choose
from graphmode.ops.rope import heads_of

log = logging.getLogger(__name__)

_CHECK_TOKENS = 5


@dataclass(frozen=True)
class Norm:
    """An RMS norm: its weight ``[size]`` and what is added to the mean of squares."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class FusedLayer:
    """A decoder layer: attention and a gated feed-forward network, each after a norm and added to the residual.

    Attributes:
        index: its number among the layers.
        input_norm: before attention.
        qkv: merged weight of the projections, ``[(q_heads + 2 * kv_heads) * head_dim, hidden]``.
        qkv_bias: of them, ``[out]``; None for none.
        head_norms: of query and key heads; None where there are none.
        head_dim: elements of a head.
        scale: of the scores.
        window: of sliding-window attention.
        output: weight of the output projection, ``[hidden, q_heads * head_dim]``.
        output_norm: of what attention adds; None for none.
        mlp_norm: before the feed-forward network.
        gate_up: merged weight of its gate and up projections, ``[2 * size, hidden]``; None where ``experts`` is in its
            place.
        down: weight of its down projection, ``[hidden, size]``; None likewise.
        down_norm: of what the network adds; None for none.
        experts: a module for another kind of network; None for this kind.
        rotation: of queries and keys.
    """

    index: int
    input_norm: Norm
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    head_norms: tuple[Norm, Norm] | None
    head_dim: int
    scale: float
    window: int | None
    output: torch.Tensor
    output_norm: Norm | None
    mlp_norm: Norm
    gate_up: torch.Tensor | None
    down: torch.Tensor | None
    down_norm: Norm | None
    experts: nn.Module | None
    rotation: Rotation

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *args: object,
        position_ids: torch.Tensor,
        attention_batch: AttentionBatch,
        **kwargs: object,
    ) -> torch.Tensor:
        """Compute the layer, in place: ``hidden_states`` is ``[1, tokens, hidden]``, and is returned.

        Of the last layer only the tokens that the batch has ``kept``, if it says so: ``[1, kept, hidden]``.
        """
        x = hidden_states[0]
        few, lens = self._few(x), attention_batch.row_lens
        heads = self._attention(x, position_ids[0], attention_batch, few)
        if attention_batch.kept is not None and self.index == len(attention_batch.caches) - 1:
            x, heads = (each.index_select(0, attention_batch.kept) for each in (x, heads))
            hidden_states, few = x.unsqueeze(0), self._few(x)
        norm = self.mlp_norm
        if self.experts is not None:
            _project(x, heads, self.output, self.output_norm, lens, few)
            h = self.experts(rms_norm(x, norm.weight, norm.eps).unsqueeze(0))[0]
            _add(x, h, self.down_norm)
            return hidden_states
        assert self.gate_up is not None
        assert self.down is not None
        plain = self.output_norm is None and self.down_norm is None
        if not few and plain and choose("residual", len(x), self.output, self.down) == "split_k":
            h = add_split_k_and_norm(x, split_k_linear(heads, self.output), norm.weight, norm.eps)
            add_split_k(x, split_k_linear(_gated(h, self.gate_up), self.down))
            return hidden_states
        _project(x, heads, self.output, self.output_norm, lens, few)
        if few:
            h = skinny_norm_linear(x, norm.weight, self.gate_up, None, norm.eps, gated=True, lens=lens)
        else:
            h = _gated(rms_norm(x, norm.weight, norm.eps), self.gate_up)
        _project(x, h, self.down, self.down_norm, lens, few)
        return hidden_states

    def _few(self, x: torch.Tensor) -> bool:
        weights = (self.qkv, self.output, self.gate_up, self.down)
        layer = tuple(weight.shape for weight in weights if weight is not None)
        return choose("linear", len(x), self.qkv, layer=layer) == "skinny"

    def _attention(self, x: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, few: bool) -> torch.Tensor:
        norm, cache = self.input_norm, batch.caches[self.index]
        cache.check_window(self.window)
        q_norm, k_norm = (None, None) if self.head_norms is None else (norm.weight for norm in self.head_norms)
        eps = 0.0 if self.head_norms is None else self.head_norms[0].eps
        rotated = (
            q_norm,
            k_norm,
            eps,
            self.rotation,
            positions,
            cache.keys,
            cache.values,
            batch.slot_mapping[cache.group],
        )
        decode = batch.max_query_len == 1 and not batch.piecewise
        if few:
            qkv = skinny_norm_linear(x, norm.weight, self.qkv, self.qkv_bias, norm.eps, lens=batch.row_lens)
        else:
            h = rms_norm(x, norm.weight, norm.eps)
            kind = heads_of(len(self.qkv), self.rotation, cache.keys, cache.values)
            if not decode and choose("norm_heads", len(h), self.qkv, heads=kind) == "prefill":
                return self._attend(prefill_heads(h, self.qkv, self.qkv_bias, *rotated), batch)
            small = choose("norm_linear", len(x), self.qkv) == "small_batch"
            product = small_batch_linear if small else nn.functional.linear
            qkv = product(h, self.qkv, self.qkv_bias)
        if not decode:
            return self._attend(rotate_and_cache(qkv, *rotated), batch)
        lengths = (batch.block_tables[cache.group], batch.cu_query_lens, batch.kv_lens)
        parts = batch.parts(cache.keys.shape[2], self.window)
        heads = rotate_and_attend(qkv, *rotated, *lengths, scale=self.scale, window=self.window, parts=parts)
        return heads.flatten(1)

    def _attend(self, queries: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        run = attend_outside_graph if batch.piecewise else attend
        return run(queries, batch.caches[self.index], batch, self.scale, self.window, None, None).flatten(1)


def _gated(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` of ``h @ weight.T``."""
    kernel = choose("norm_swiglu", len(h), weight)
    if kernel == "small_batch":
        return small_batch_linear(h, weight, gated=True)
    if kernel == "prefill":
        return prefill_swiglu(h, weight)
    return silu_mul(nn.functional.linear(h, weight))


def _project(
    x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, norm: Norm | None, lens: torch.Tensor | None, few: bool
) -> None:
    """Add ``h @ weight.T``, or its norm, to ``x``, in place."""
    if norm is not None:
        _add(x, skinny_linear(h, weight, None, lens) if few else nn.functional.linear(h, weight), norm)
    elif few:
        skinny_linear_add(x, h, weight, lens)
    else:
        x.addmm_(h, weight.T)


def _add(x: torch.Tensor, h: torch.Tensor, norm: Norm | None) -> None:
    """Add ``h``, or its norm, to ``x``, in place."""
    if norm is None:
        x += h
    else:
        add_rms_norm(x, h, norm.weight, norm.eps)


@dataclass(frozen=True)
class FusedHead:
    """The final norm and the projection to logits."""

    norm: Norm
    weight: torch.Tensor

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[1, rows, vocab]`` of hidden states ``[1, rows, hidden]`` before the final norm."""
        x = hidden_states[0].contiguous()
        if choose("logits", len(x), self.weight) == "skinny":
            return skinny_norm_linear(x, self.norm.weight, self.weight, None, self.norm.eps).unsqueeze(0)
        return nn.functional.linear(rms_norm(x, self.norm.weight, self.norm.eps), self.weight).unsqueeze(0)


def fuse(model: PreTrainedModel, max_model_len: int) -> int:
    """Fuse the layers of a model that are recognised and give what they gave; log what is not and why.

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
    fused_head = FusedHead(_norm(text.norm), head.weight.data)
    if not _head_agrees(text.norm, head, fused_head):
        log.info("layers are not fused: the head gives other results when it is")
        return 0
    rotations = _rotations(text.rotary_emb, model, max_model_len)
    fused: list[FusedLayer] = []
    for index, layer in enumerate(text.layers):
        parts = _merge(layer, index, rotations[0])
        positions = torch.arange(max_model_len - _CHECK_TOKENS, max_model_len, device=model.device).clamp(min=0)
        rotated = (replace(parts, rotation=rotation) for rotation in rotations)
        alike = next((each for each in rotated if _agrees(layer, each, text.rotary_emb, positions)), None)
        if alike is None:
            log.info("layers are not fused: layer %d gives other results when it is", index)
            return 0
        fused.append(alike)
    for layer, parts in zip(text.layers, fused, strict=True):
        layer.forward = parts
        if parts.experts is not None:
            fuse_routers(parts.experts, parts.qkv.dtype)
    rotation = fused[0].rotation
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
    return isinstance(last, FusedLayer) and last.experts is None


def _unchanged(hidden_states: torch.Tensor) -> torch.Tensor:
    """Stand for the final norm, which the head does."""
    return hidden_states


def _why_not(model: Any, text: Any) -> str:
    """Return why a model cannot be fused as far as its outermost parts say; empty if it can."""
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
    """Return why a layer's parts are not those of a fused one; empty if they are."""
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


def _merge(layer: Any, index: int, rotation: Rotation) -> FusedLayer:
    """Return the fused layer of a recognised one, whose own weights become views of the merged ones."""
    attention, mlp = layer.self_attn, layer.mlp
    merged = hasattr(attention, "qkv_proj")
    projections = [attention.qkv_proj] if merged else [attention.q_proj, attention.k_proj, attention.v_proj]
    passed = {"sliding_window": attention.sliding_window} if hasattr(attention, "sliding_window") else {}
    gate_and_up = _gate_and_up(mlp)
    output_norm, down_norm = (getattr(layer, name, None) for name in ("post_self_attn_layernorm", "post_mlp_layernorm"))
    return FusedLayer(
        index=index,
        input_norm=_norm(layer.input_layernorm),
        qkv=_merged(projections, "weight"),
        qkv_bias=None if projections[0].bias is None else _merged(projections, "bias"),
        head_norms=(_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        window=sliding_window(attention, passed),
        output=attention.o_proj.weight.data,
        output_norm=None if output_norm is None else _norm(output_norm),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=None if gate_and_up is None else _merged(gate_and_up, "weight"),
        down=None if gate_and_up is None else mlp.down_proj.weight.data,
        down_norm=None if down_norm is None else _norm(down_norm),
        experts=mlp if gate_and_up is None else None,
        rotation=rotation,
    )


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


def _agrees(layer: Any, parts: FusedLayer, rotary: Any, positions: torch.Tensor) -> bool:
    """Return whether a fused layer adds to random hidden states what the layer's own code adds, and caches the same.

    A window or a soft cap may change nothing of so few tokens: so what the layer asks of attention is compared too.
    """
    asked: list[tuple[object, ...]] = []

    def attend_as_asked(*arguments: Any) -> torch.Tensor:
        asked.append(arguments[5:])
        return cached_attention(*arguments)

    device, dtype = parts.qkv.device, parts.qkv.dtype
    generator = torch.Generator().manual_seed(parts.index)
    tokens = len(positions)
    x = torch.randn(1, tokens, parts.qkv.shape[1], generator=generator)
    kv_heads = (parts.qkv.shape[0] - parts.output.shape[1]) // (2 * parts.head_dim)

    def run(forward: Any, hidden: torch.Tensor) -> list[torch.Tensor]:
        cache = LayerCache(*torch.zeros(2, 1, 16, kv_heads, parts.head_dim, dtype=dtype, device=device))
        batch = AttentionBatch(
            slot_mapping=(torch.arange(tokens, device=device),),
            block_tables=(torch.zeros(1, 1, dtype=torch.int32, device=device),),
            cu_query_lens=torch.tensor([0, tokens], dtype=torch.int32, device=device),
            kv_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
            max_query_len=tokens,
            caches=[cache] * (parts.index + 1),
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
    # norm makes up for both.
    small, large = (x.mul(size).to(device, dtype) for size in (0.01, 100.0))
    pairs = [*zip(run(layer, small)[1:], run(parts, small)[1:], strict=True)]
    pairs.append((run(layer, large)[0], run(parts, large)[0]))
    for scale, window, *rest in asked:
        if (scale, window) != (parts.scale, parts.window) or any(option is not None for option in rest):
            return False
    return len(asked) == 2 and all(close(own, other) for own, other in pairs)


def _head_agrees(norm: Any, head: Any, fused: FusedHead) -> bool:
    """Return whether a fused head gives the logits that the norm and the head give, of random hidden states."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _CHECK_TOKENS, head.in_features, generator=generator).to(head.weight.device, head.weight.dtype)
    with torch.inference_mode():
        return close(head(norm(x)), fused(x))


def close(own: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether results of the same computation differ by rounding alone, as far as their dtype can tell."""
    return bool((other.float() - own.float()).norm() <= _TOLERANCE[own.dtype] * own.float().norm())


def _norm(module: Any) -> Norm:
    return Norm(module.weight.data, module.variance_epsilon)
