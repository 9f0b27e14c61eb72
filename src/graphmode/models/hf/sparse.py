"""DeepSeek sparse attention: an indexer in the layer picks the keys that each token attends to.

The indexers of transformers score all keys of a sequence, which they cache themselves. Here the model's own modules
make queries, keys and weights; keys go to the paged cache, and :func:`~graphmode.ops.select_keys` chooses. Indexers
differ in how they rotate: a comparison of keys with the indexer's own finds which of the known ways it uses, and a
comparison of rankings proves the scores. Both also prove the order of the parameters, whose names differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from graphmode.errors import ModelError
from graphmode.models.hf.latent import keeps_latents

_STRUCTURE = ("wq_b", "wk", "k_norm", "weights_proj", "n_heads", "head_dim", "qk_rope_head_dim", "index_topk")


@dataclass(frozen=True)
class _Rotation:
    """How an indexer rotates: pairs side by side or a half apart, in its first or its last elements."""

    interleaved: bool
    first: bool


@dataclass(frozen=True)
class BatchAsMask:
    """Takes a step's batch to the indexer, in place of the mask that the attention module cuts for it.

    Attributes:
        batch: the step's :class:`~graphmode.models.hf.attention.AttentionBatch`.
    """

    batch: Any

    def __getitem__(self, index: object) -> Any:
        return self.batch


def use_indexers(model: torch.nn.Module) -> None:
    """Let every indexer choose among the keys of the paged cache.

    Raises:
        ModelError: an indexer of an unknown kind.
    """
    for module in model.modules():
        indexer = getattr(module, "indexer", None)
        if isinstance(indexer, torch.nn.Module):
            if not keeps_latents(module):
                raise ModelError("its attention is sparse, over keys that are no expansion of latents")
            indexer.forward = partial(_select, indexer, _rotation(indexer), inspect.signature(indexer.forward))
            module.register_forward_pre_hook(_pass_batch_as_mask, with_kwargs=True)


def _pass_batch_as_mask(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Put the batch where the attention module expects a mask. A mask that the model made stays and is refused."""
    if kwargs.get("attention_mask") is None:
        kwargs = {**kwargs, "attention_mask": BatchAsMask(kwargs["attention_batch"])}
    return args, kwargs


def _select(indexer: Any, rotation: _Rotation, signature: inspect.Signature, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Replace an indexer's forward of that signature: choose keys, int32 ``[1, tokens, top_k]``.

    It gets the step's batch in place of the mask.
    """
    hidden_states, q_resid, position_embeddings, batch = signature.bind(*args, **kwargs).args[:4]
    queries, keys, weights = _project(indexer, rotation, hidden_states, q_resid, position_embeddings)
    chosen: torch.Tensor = batch.select(indexer.layer_idx, queries, keys, weights, indexer.index_topk)
    return chosen.unsqueeze(0)


def _project(
    indexer: Any,
    rotation: _Rotation,
    hidden_states: torch.Tensor,
    q_resid: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries ``[tokens, heads, dim]``, keys ``[tokens, 1, dim]`` and float32 weights ``[tokens, heads]``."""
    queries = indexer.wq_b(q_resid).view(-1, indexer.n_heads, indexer.head_dim)
    norm = indexer.k_norm
    keys = norm(indexer.wk(hidden_states).to(norm.weight.dtype)).to(hidden_states.dtype)[0].unsqueeze(1)
    proj = indexer.weights_proj
    factor = indexer.n_heads**-0.5 * indexer.head_dim**-0.5
    weights = proj(hidden_states.to(proj.weight.dtype))[0].float() * factor
    cos, sin = (part[0].unsqueeze(1) for part in position_embeddings)
    rotate = partial(_rotate, rotation=rotation, size=indexer.qk_rope_head_dim, cos=cos, sin=sin)
    return rotate(queries), rotate(keys), weights


def _rotate(x: torch.Tensor, rotation: _Rotation, size: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``size`` elements of each head of ``[tokens, heads, dim]`` by the angles of ``cos`` and ``sin``."""
    others = x.shape[-1] - size
    parts = x.split([size, others] if rotation.first else [others, size], dim=-1)
    turned, rest = parts if rotation.first else parts[::-1]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if rotation.interleaved else turned.chunk(2, dim=-1)
    cos, sin = cos[..., : size // 2], sin[..., : size // 2]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned, rest] if rotation.first else [rest, turned], dim=-1)


class _ProbeCache:
    """A cache of one step, to see what an indexer caches."""

    keys: torch.Tensor | None = None

    def update_indexer(self, keys: torch.Tensor, layer_idx: int) -> torch.Tensor:
        self.keys = keys
        return keys


def _keys_and_ranking(indexer: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return what an indexer's own code caches, ``[1, tokens, dim]``, and chooses, ``[tokens, top_k]``.

    Returns None where its code cannot be called with these inputs and, as one further argument, a cache.
    """
    forward: Callable[..., torch.Tensor] = type(indexer).forward
    others = list(inspect.signature(forward).parameters)[1 + len(inputs) :]
    for name in others:
        probe = _ProbeCache()
        try:
            chosen = forward(indexer, *inputs, **(dict.fromkeys(others) | {name: probe}))
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            continue
        if probe.keys is not None:
            return probe.keys, chosen[0].long()
    return None


@torch.no_grad()
def _rotation(indexer: Any) -> _Rotation:
    """Return how an indexer rotates, tried on random tokens: its keys and its ranking of all tokens must be ours.

    Raises:
        ModelError: they are not, in any known way.
    """
    unknown = ModelError(f"its attention is sparse, and {type(indexer).__name__} picks keys in a way of its own")
    if not all(hasattr(indexer, name) for name in _STRUCTURE):
        raise unknown
    tokens = 32
    weight = indexer.wk.weight
    generator = torch.Generator().manual_seed(0)

    def normal(size: int) -> torch.Tensor:
        return torch.randn(1, tokens, size, generator=generator).to(weight.device, weight.dtype)

    hidden, residual = normal(indexer.wk.in_features), normal(indexer.wq_b.in_features)
    angles = torch.rand(1, tokens, indexer.qk_rope_head_dim // 2, generator=generator).repeat(1, 1, 2) * 6
    places = angles.cos().to(weight), angles.sin().to(weight)
    no_mask = torch.zeros(1, tokens, tokens, device=weight.device)
    top_k, indexer.index_topk = indexer.index_topk, tokens
    try:
        found = _keys_and_ranking(indexer, hidden, residual, places, no_mask)
    finally:
        indexer.index_topk = top_k
    if found is None:
        raise unknown
    own_keys, ranking = found
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    for interleaved in (False, True):
        for first in (False, True):
            rotation = _Rotation(interleaved, first)
            queries, keys, weights = _project(indexer, rotation, hidden, residual, places)
            apart = (keys[:, 0] - own_keys[0]).float().norm()
            if apart > tolerance * own_keys.float().norm():
                continue
            scores = torch.einsum("thd,sd->ths", queries.float(), keys[:, 0].float()).relu()
            ranked = torch.einsum("ths,th->ts", scores, weights).gather(1, ranking)
            if (ranked.diff(dim=1).amax() <= tolerance * ranked.abs().amax()).item():
                return rotation
    raise unknown
