"""The tensors of a step: declared once, filled on the host by a batch, read by the kernels."""

# ruff: noqa: RUF009  (what _tensor returns is a field)
from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch

from graphmode.engine.block_tables import BlockTables
from graphmode.engine.types import Batch
from graphmode.graph import Input


def _tensor(dtype: torch.dtype, *shape: str | int, padding: int | bool = 0, optional: bool = False) -> Any:
    """Declare a tensor of a step. An optional one may be None on the host; then all of it is padding."""
    declared = {"dtype": dtype, "shape": shape, "padding": padding, "optional": optional}
    return field(metadata=declared, default=None) if optional else field(metadata=declared)


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """The tensors of a step, as a graph reads them. Padding writes no key or value and reads none.

    The host fills one with arrays, which cost it less.

    Axes: ``tokens``; ``seqs``; ``logits``, the rows of logits that tokens are sampled from; ``scored``, the
    tokens whose next one in the prompt is scored; ``groups`` of the KV cache; ``new_blocks``.

    Attributes:
        token_ids: that the host knows.
        token_sources: the state index of the sequence whose last sampled token this is; 0 where the host knows it.
        positions: in the sequence.
        slot_mapping: where in the cache of each group a token's key and value go; -1 for padding.
        query_lens: tokens that a sequence computes.
        kv_lens: how long it is with them; 0 for padding.
        end_lens: how long it is after the last step of the batch.
        state_indices: where the device keeps what it knows of a sequence; 0 for padding.
        table_changes: what its block tables get: :class:`~graphmode.ops.begin_step.TableUpdate`.
        new_blocks: the blocks that they get.
        logits_indices: the token of the step that a row of logits belongs to.
        logits_positions: of the token that is sampled from it.
        logits_state_indices: of the sequence that samples; 0 where what is sampled counts for nothing.
        scored_indices: the token of the step whose successor is scored.
        scored_tokens: the successor.
        scored_state_indices: of the sequence; 0 for padding.
        burst_step: which of the batch's steps this is.
    """

    token_ids: torch.Tensor = _tensor(torch.int64, "tokens")
    token_sources: torch.Tensor = _tensor(torch.int64, "tokens")
    positions: torch.Tensor = _tensor(torch.int64, "tokens")
    slot_mapping: torch.Tensor = _tensor(torch.int64, "groups", "tokens", padding=-1)
    query_lens: torch.Tensor = _tensor(torch.int32, "seqs")
    kv_lens: torch.Tensor = _tensor(torch.int32, "seqs")
    end_lens: torch.Tensor = _tensor(torch.int32, "seqs")
    state_indices: torch.Tensor = _tensor(torch.int64, "seqs")
    table_changes: torch.Tensor = _tensor(torch.int32, "seqs", "groups", 3)
    new_blocks: torch.Tensor = _tensor(torch.int32, "new_blocks")
    logits_indices: torch.Tensor = _tensor(torch.int64, "logits")
    logits_positions: torch.Tensor = _tensor(torch.int32, "logits")
    logits_state_indices: torch.Tensor = _tensor(torch.int64, "logits")
    scored_indices: torch.Tensor = _tensor(torch.int64, "scored", optional=True)
    scored_tokens: torch.Tensor = _tensor(torch.int64, "scored", optional=True)
    scored_state_indices: torch.Tensor = _tensor(torch.int64, "scored", optional=True)
    burst_step: torch.Tensor = _tensor(torch.int64, 1, optional=True)

    @classmethod
    def declared(cls, groups: int = 1) -> Self:
        """Return the declaration of each tensor in its place, for a cache of so many groups."""
        specs: dict[str, Any] = {}
        for each in fields(cls):
            shape = tuple(groups if axis == "groups" else axis for axis in each.metadata["shape"])
            specs[each.name] = Input(each.name, **{**each.metadata, "shape": shape})
        return cls(**specs)

    def first_seqs(self, count: int) -> Self:
        """Return the step with the first ``count`` of its sequences."""
        of_seqs = [each.name for each in fields(self) if each.metadata["shape"][0] == "seqs"]
        return replace(self, **{name: getattr(self, name)[:count] for name in of_seqs})


@dataclass(frozen=True, kw_only=True)
class VisionStepInputs(StepInputs):
    """The tensors of a step of a model with a vision tower.

    Attributes:
        positions: of three coordinates.
        visual: whether a token stands for a part of an image.
    """

    positions: torch.Tensor = _tensor(torch.int64, "tokens", 3)
    visual: torch.Tensor = _tensor(torch.bool, "tokens", padding=False, optional=True)


def step_inputs(batch: Batch, tables: BlockTables) -> StepInputs:
    """Return a batch at its true sizes, as arrays. ``tables`` takes its changes as done."""
    scheduled = batch.scheduled
    numbers = [(e.start, e.num_tokens, e.sequence.state_index, e.steps, e.samples) for e in scheduled]
    starts, query_lens, states, steps, sampled = np.array(numbers).T.copy()
    kv_lens, ends = starts + query_lens, query_lens.cumsum()
    end_lens = kv_lens + (steps - 1)
    token_ids: list[int] = []
    sources = np.zeros(batch.num_tokens, dtype=np.int64)
    end = 0
    for each in scheduled:
        token_ids += each.sequence.token_ids[each.start : each.start + each.num_tokens]
        end += each.num_tokens
        if len(token_ids) < end:  # the last one is still in flight
            token_ids.append(0)
            sources[end - 1] = each.sequence.state_index
    positions = np.arange(batch.num_tokens) + (kv_lens - ends).repeat(query_lens)
    changes, new_blocks = tables.take_new(batch, states, end_lens)
    # Each row of logits, by how many tokens it lies before the end of its sequence's.
    logits = query_lens if batch.family == "decode" else np.maximum(sampled, 1)
    before_end = logits.cumsum().repeat(logits) - np.arange(logits.sum())
    arrays: dict[str, Any] = {
        "token_ids": np.array(token_ids),
        "token_sources": sources,
        "positions": positions,
        "slot_mapping": _slot_mapping(batch, tables.block_sizes, starts, query_lens, positions),
        "query_lens": query_lens.astype(np.int32),
        "kv_lens": kv_lens.astype(np.int32),
        "end_lens": end_lens.astype(np.int32),
        "state_indices": states,
        "table_changes": changes,
        "new_blocks": new_blocks,
        "logits_indices": ends.repeat(logits) - before_end,
        "logits_positions": (kv_lens.repeat(logits) + 1 - before_end).astype(np.int32),
        "logits_state_indices": states.repeat(logits) * (before_end <= sampled.repeat(logits)),
    }
    if scored := batch.scored_tokens:
        firsts = (ends - kv_lens).tolist()
        arrays["scored_indices"] = np.array(
            [first + at for first, each in zip(firsts, scheduled, strict=True) for at in each.scored]
        )
        arrays["scored_tokens"] = np.array(scored)
        arrays["scored_state_indices"] = np.repeat(states, [len(each.scored) for each in scheduled])
    return StepInputs(**arrays)


def _slot_mapping(
    batch: Batch, block_sizes: tuple[int, ...], starts: np.ndarray, query_lens: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Return the slot of each token in each cache group, int64 ``[groups, tokens]``."""
    slots = np.empty((len(block_sizes), len(positions)), dtype=np.int64)
    for group, block_size in enumerate(block_sizes):
        firsts, ends = starts // block_size, (starts + (query_lens - 1)) // block_size + 1
        blocks: list[int] = []
        for each, first, end in zip(batch.scheduled, firsts.tolist(), ends.tolist(), strict=True):
            blocks += each.sequence.block_tables[group][first:end]
        numbers, offsets = np.divmod(positions, block_size)
        places = numbers + ((ends - firsts).cumsum() - ends).repeat(query_lens)
        slots[group] = np.array(blocks)[places] * block_size + offsets
    return slots
