"""Attention over the paged KV cache, as a layer calls it: inside the graph, or between two of its pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from graphmode.cache.specs import LayerCache
from graphmode.graph import outside_graph
from graphmode.layers.linear import Linear
from graphmode.layers.residual import Norm, Residual
from graphmode.ops import (
    HeadInputs,
    PagedBatch,
    Rotation,
    Scoring,
    paged_attention,
    rotate_and_attend,
    select_keys,
    write_kv,
)
from graphmode.ops._triton import runs_triton
from graphmode.ops.attention.split_kv import SplitKVPlan, plan_split_kv


@dataclass(frozen=True)
class AttentionBatch:
    """What the attention of one step reads, beside queries, keys and values.

    Attributes:
        slot_mapping: of each cache group int64 ``[tokens]``: where tokens' keys and values go; -1 for padding.
        block_tables: of each cache group int32 ``[seqs, blocks]``: the blocks of each sequence, in order.
        cu_query_lens: int32 ``[seqs + 1]``: cumulative numbers of new tokens.
        kv_lens: int32 ``[seqs]``: length of each sequence with its new tokens; 0 for padding.
        max_query_len: new tokens of each sequence in a decode step; else the number of tokens of the step.
        caches: one for each layer.
        piecewise: whether attention runs outside the graph.
        attend: the device's attention; None for :func:`cached_attention`.
        host_arguments: lengths on the host, for a device whose attention takes them there.
        kept: int64 ``[kept]``: the tokens whose hidden states are wanted in the end, for a last layer that leaves out
            the others (:func:`~graphmode.models.hf.fuse.keeps_rows`). None for all.
    """

    slot_mapping: tuple[torch.Tensor, ...]
    block_tables: tuple[torch.Tensor, ...]
    cu_query_lens: torch.Tensor
    kv_lens: torch.Tensor
    max_query_len: int
    caches: Sequence[LayerCache]
    piecewise: bool = False
    attend: Callable[..., torch.Tensor] | None = None
    host_arguments: Mapping[str, list[int]] = field(default_factory=dict)
    kept: torch.Tensor | None = None
    _plans: dict[tuple[int, int | None, int | None], SplitKVPlan] = field(default_factory=dict, init=False)

    @property
    def row_lens(self) -> torch.Tensor | None:
        """``kv_lens`` where each row of the step is a sequence of its own, to tell padding; None elsewhere."""
        return self.kv_lens if self.max_query_len == 1 and self.kept is None else None

    def paged(self, group: int) -> PagedBatch:
        """Return the sequences, as operations take them, with a cache group's block tables."""
        return PagedBatch(self.block_tables[group], self.cu_query_lens, self.kv_lens, self.max_query_len)

    def split_kv_plan(self, kv_heads: int, window: int | None, top_k: int | None = None) -> SplitKVPlan | None:
        """Return how decode is split among programs, computed once a step; None where each call computes it.

        Outside the graph a call is all that runs again, and what another one computed would be of an earlier step.
        """
        if self.max_query_len > 1 or self.piecewise or not runs_triton(self.kv_lens):
            return None
        key = kv_heads, window, top_k
        if key not in self._plans:
            self._plans[key] = plan_split_kv(self.kv_lens, kv_heads, window=window, top_k=top_k)
        return self._plans[key]

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
            As of :func:`~graphmode.ops.select_keys`.
        """
        select = _selection_outside_graph if self.piecewise else cached_selection
        return select(query, key, weights, self.caches[layer], self, top_k)


def attend(
    query: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    scoring: Scoring,
    selection: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the cache, which holds the new keys and values. Arguments and result as of :func:`cached_attention`."""
    plan = batch.split_kv_plan(cache.keys.shape[2], scoring.window, None if selection is None else selection.shape[1])
    return paged_attention(query, cache.keys, cache.values, batch.paged(cache.group), scoring, selection, plan)


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    scoring: Scoring,
    selection: torch.Tensor | None,
) -> torch.Tensor:
    """Write new keys and values to the cache, then attend to it.

    Args:
        query: ``[tokens, q_heads, key_dim]``, as the cache's.
        key: what goes to the cache's ``new_keys``, ``[tokens, kv_heads, dim]``.
        value: ``[tokens, kv_heads, value_dim]``.
        cache: the layer's.
        batch: the step's.
        scoring: how scores become weights.
        selection: of keys, for sparse attention.

    Returns:
        ``[tokens, q_heads, value_dim]``.
    """
    write_kv(key, value, cache.new_keys, cache.values, batch.slot_mapping[cache.group])
    return attend(query, cache, batch, scoring, selection)


def cached_selection(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    top_k: int,
) -> torch.Tensor:
    """Write new index keys to the cache, then choose among its keys; arguments as of :meth:`AttentionBatch.select`."""
    index_keys = cache.index_keys
    assert index_keys is not None
    write_kv(key, None, index_keys, None, batch.slot_mapping[cache.group])
    return select_keys(query, weights, index_keys, batch.paged(cache.group), top_k=top_k)


attend_outside_graph = outside_graph(attend)


_selection_outside_graph = outside_graph(cached_selection)


@dataclass(frozen=True)
class DeviceAttention:
    """How a device attends.

    Attributes:
        attend: takes and gives what :func:`cached_attention` does.
        block_size: tokens in a block of the cache.
        host_lengths: where it takes lengths on the host: computes them, from the longest sequence there can be, the
            queries of each sequence in a decode step, and what :class:`~graphmode.graph.HostArguments` gives. None
            where it reads them on the device.
    """

    attend: Callable[..., torch.Tensor]
    block_size: int
    host_lengths: Callable[[int, int, str, Mapping[str, int], Mapping[str, torch.Tensor]], dict[str, list[int]]] | None


PORTABLE_ATTENTION = DeviceAttention(cached_attention, 16, None)


@dataclass(frozen=True)
class Attention:
    """Attention of a decoder layer, from the norm before it to the projection after it.

    Attributes:
        norm: of what it reads.
        qkv: the projections to queries, keys and values in one.
        head_norms: of query and of key heads; None where there are none.
        rotation: of queries and keys.
        scale: of the scores.
        window: of sliding-window attention.
        output: the projection back.
        output_norm: of what it adds; None for none.
    """

    norm: Norm
    qkv: Linear
    head_norms: tuple[Norm, Norm] | None
    rotation: Rotation
    scale: float
    window: int | None
    output: Linear
    output_norm: Norm | None = None

    def heads(self, x: Residual, cache: LayerCache, positions: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Cache the keys and values of the residual stream, and return what its queries find: ``[tokens, size]``."""
        cache.check_window(self.window)
        q_norm, k_norm = (None, None) if self.head_norms is None else (norm.weight for norm in self.head_norms)
        eps = 0.0 if self.head_norms is None else self.head_norms[0].eps
        slots = batch.slot_mapping[cache.group]
        inputs = HeadInputs(q_norm, k_norm, eps, self.rotation, positions, cache.keys, cache.values, slots)
        scoring = Scoring(self.scale, self.window)
        if batch.max_query_len == 1 and not batch.piecewise:
            plan = batch.split_kv_plan(cache.keys.shape[2], self.window)
            new = self.qkv.of_norm(x, self.norm)
            heads = rotate_and_attend(new, inputs, batch.paged(cache.group), scoring, plan)
        else:
            queries = self.qkv.heads_of_norm(x, self.norm, inputs)
            run = attend_outside_graph if batch.piecewise else attend
            heads = run(queries, cache, batch, scoring)
        return heads.flatten(1)
