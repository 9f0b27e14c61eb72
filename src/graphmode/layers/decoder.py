"""A decoder layer, as of Llama, Qwen3, Mistral, GLM-4 and their like, and the head that makes logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from graphmode.layers.attention import Attention, AttentionBatch
from graphmode.layers.linear import Linear
from graphmode.layers.mlp import MLP
from graphmode.layers.moe import MoE
from graphmode.layers.residual import Norm, Residual


@dataclass(frozen=True)
class DecoderLayer:
    """Attention, then a feed-forward network: each reads a norm of the residual stream and adds to the stream.

    Attributes:
        index: its number among the layers.
        attention: over the KV cache.
        mlp: a gated network, or a mixture of experts.
    """

    index: int
    attention: Attention
    mlp: MLP | MoE

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *args: object,
        position_ids: torch.Tensor,
        attention_batch: AttentionBatch,
        **kwargs: object,
    ) -> torch.Tensor:
        """Compute the layer, in place: ``hidden_states`` is ``[1, tokens, hidden]``, and is returned.

        The last layer returns only the tokens that the batch has ``kept``, where it says so: ``[1, kept, hidden]``.
        """
        batch = attention_batch
        x = Residual(hidden_states[0], batch.row_lens)
        heads = self.attention.heads(x, batch.caches[self.index], position_ids[0], batch)
        if batch.kept is not None and self.index == len(batch.caches) - 1:
            x = Residual(x.rows.index_select(0, batch.kept), batch.row_lens)
            heads = heads.index_select(0, batch.kept)
        self.attention.output.add_to(x, heads, self.attention.output_norm)
        self.mlp(x)
        return x.finish().unsqueeze(0)


def decoder_layer(index: int, attention: Attention, mlp: MLP | MoE) -> DecoderLayer:
    """Return a layer whose linear layers know each other, as some kernels are taken for all of them or for none."""
    linears = (attention.qkv, attention.output, *((mlp.gate_up, mlp.down) if isinstance(mlp, MLP) else ()))
    layer = tuple(each.weight.shape for each in linears)
    residual: tuple[torch.Tensor, ...] = ()
    # A norm of what is added needs the whole sum first, and experts have no such projection.
    if isinstance(mlp, MLP) and attention.output_norm is None and mlp.output_norm is None:
        residual = attention.output.weight, mlp.down.weight
    qkv, output = replace(attention.qkv, layer=layer), replace(attention.output, layer=layer, residual=residual)
    if isinstance(mlp, MLP):
        gate_up, down = replace(mlp.gate_up, layer=layer), replace(mlp.down, layer=layer, residual=residual)
        mlp = replace(mlp, gate_up=gate_up, down=down)
    return DecoderLayer(index, replace(attention, qkv=qkv, output=output), mlp)


@dataclass(frozen=True)
class Head:
    """The final norm and the projection to logits."""

    norm: Norm
    linear: Linear

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[1, rows, vocab]`` of hidden states ``[1, rows, hidden]`` before the final norm."""
        x = Residual(hidden_states[0].contiguous(), None)
        return self.linear.of_norm(x, self.norm, "logits").unsqueeze(0)
