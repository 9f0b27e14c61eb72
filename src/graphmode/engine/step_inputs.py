"""The tensors of a step, declared once, and how a batch fills them on the host."""

from __future__ import annotations

import numpy as np
import torch

from graphmode.engine.types import Batch
from graphmode.graph import Input
from graphmode.layers.attention import PORTABLE_ATTENTION

# A padding token has slot -1 and a padding sequence length 0: they write no KV and read none.
INPUTS = (
    Input("token_ids", torch.int64, ("tokens",), padding=0),
    Input("token_sources", torch.int64, ("tokens",), padding=-1),
    Input("positions", torch.int64, ("tokens",), padding=0),
    Input("slot_mapping", torch.int64, ("tokens",), padding=-1),
    Input("query_lens", torch.int32, ("seqs",), padding=0),
    Input("kv_lens", torch.int32, ("seqs",), padding=0),
    Input("logits_indices", torch.int64, ("seqs",), padding=0),
    Input("slots", torch.int64, ("seqs",), padding=0),
    Input("limits", torch.int32, ("seqs",), padding=0),
    Input("step", torch.int64, (1,), padding=0, optional=True),
    Input("scored_rows", torch.int64, ("scored",), padding=0, optional=True),
    Input("scored_tokens", torch.int64, ("scored",), padding=0, optional=True),
    Input("scored_slots", torch.int64, ("scored",), padding=0, optional=True),
    Input("block_tables", torch.int32, ("seqs", "blocks"), padding=0),
)


# A model with a vision tower takes positions of three coordinates, and is told which tokens stand for images.
VISION_INPUTS = (
    *(spec for spec in INPUTS if spec.name != "positions"),
    Input("positions", torch.int64, ("tokens", 3), padding=0),
    Input("visual", torch.bool, ("tokens",), padding=False, optional=True),
)


def scored_tokens(batch: Batch) -> list[int]:
    """Return the prompt tokens that a step scores: the successors of the scored positions."""
    return [row.sequence.prompt_token_ids[at + 1] for row in batch.rows for at in row.scored]


def step_inputs(
    batch: Batch, max_blocks: int, block_size: int = PORTABLE_ATTENTION.block_size
) -> dict[str, torch.Tensor]:
    """Return the inputs of a step at their true sizes, on the host."""
    rows = batch.rows
    starts = np.array([row.start for row in rows])
    query_lens = np.array([row.num_tokens for row in rows])
    ends = np.cumsum(query_lens)
    token_ids: list[int] = []
    sources = np.full(batch.num_tokens, -1)
    tables = np.zeros((len(rows), max_blocks), dtype=np.int32)
    for index, row in enumerate(rows):
        token_ids += row.sequence.token_ids[row.start : row.start + row.num_tokens]
        if row.source >= 0:
            token_ids.append(0)
            sources[ends[index] - 1] = row.source
        [table] = row.sequence.block_tables
        tables[index, : len(table)] = table
    positions = np.arange(batch.num_tokens) + np.repeat(starts - (ends - query_lens), query_lens)
    blocks = tables[np.repeat(np.arange(len(rows)), query_lens), positions // block_size].astype(np.int64)
    arrays = {
        "token_ids": np.array(token_ids),
        "token_sources": sources,
        "positions": positions,
        "slot_mapping": blocks * block_size + positions % block_size,
        "query_lens": query_lens.astype(np.int32),
        "kv_lens": (starts + query_lens).astype(np.int32),
        "logits_indices": ends - 1,
        # A row that only computes a part of a prompt draws nothing that counts.
        "slots": np.array([row.sequence.slot if row.samples else 0 for row in rows]),
        "limits": np.array([row.start + row.steps for row in rows], dtype=np.int32),
        "block_tables": tables,
    }
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if any(row.scored for row in batch.rows):
        firsts = [int(end) - row.num_tokens - row.start for end, row in zip(ends, batch.rows, strict=True)]
        places = [first + at for first, row in zip(firsts, batch.rows, strict=True) for at in row.scored]
        inputs["scored_rows"] = torch.tensor(places)
        inputs["scored_tokens"] = torch.tensor(scored_tokens(batch))
        inputs["scored_slots"] = torch.tensor([row.sequence.slot for row in batch.rows for _ in row.scored])
    return inputs
