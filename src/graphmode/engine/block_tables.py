"""Block tables on the device, by the state indices of running sequences: steps bring what is new, not the tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from graphmode.engine.types import Batch, Limits
from graphmode.graph.backends.base import Backend
from graphmode.graph.buffers import STAGING_BUFFERS
from graphmode.graph.staging import StagingRing


def room_for_blocks(limits: Limits, block_sizes: Sequence[int], tokens: int) -> int:
    """Return how many new blocks the inputs of a step of ``tokens`` tokens have room for.

    That is enough for the blocks that the tokens themselves need; a cached prefix may bring more.
    """
    of_a_burst = sum(-(-limits.decode_steps // size) for size in block_sizes)
    return min(tokens, limits.max_num_seqs) * of_a_burst + tokens * len(block_sizes)


def table_bytes(limits: Limits, block_sizes: Sequence[int]) -> int:
    """Return the bytes of the tables of :class:`BlockTables` on the device."""
    longest = -(-limits.max_model_len // min(block_sizes))
    return 4 * len(block_sizes) * (2 * limits.max_num_seqs + 1) * longest


class BlockTables:
    """The block tables of the running sequences, in each cache group.

    Attributes:
        block_sizes: tokens in a block of each group.
        tables: int32 ``[groups, max_num_seqs + 1, blocks]`` on the device, by state index; 0 is nobody's.
        step_tables: int32 ``[groups, max_num_seqs, blocks]`` on the device: those of a step's sequences in the order of
            the step, which :func:`~graphmode.ops.begin_step.begin_step` writes.
        room: how many new blocks the inputs of a step have room for, by its tokens.

    Args:
        backend: the device.
        limits: how many sequences there may be, and how long.
        block_sizes: tokens in a block of each group.
    """

    def __init__(self, backend: Backend, limits: Limits, block_sizes: Sequence[int]) -> None:
        self.block_sizes = tuple(block_sizes)
        self._sizes = np.array(block_sizes)
        seqs, groups = limits.max_num_seqs, len(self.block_sizes)
        blocks = -(-limits.max_model_len // min(self.block_sizes))
        self.tables = torch.zeros(groups, seqs + 1, blocks, dtype=torch.int32, device=backend.device)
        self.step_tables = torch.zeros(groups, seqs, blocks, dtype=torch.int32, device=backend.device)
        self.room = partial(room_for_blocks, limits, self.block_sizes)
        self._known = np.zeros((seqs + 1, groups), dtype=np.int64)  # entries that the device has of each table
        self._staging = StagingRing(4 * blocks, STAGING_BUFFERS, backend.host_buffer, backend.event)

    def take_new(self, batch: Batch, state_indices: np.ndarray, end_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what a batch changes in the tables of its sequences, taking it as done.

        The blocks of a table that the step's inputs have no room for are put on the device here.

        Args:
            batch: the batch.
            state_indices: int64 ``[seqs]``: of its sequences.
            end_lens: int64 ``[seqs]``: how long each is after the batch's last step.

        Returns:
            ``changes``, int32 ``[seqs, groups, 3]``, and ``new_blocks``, int32, of
            :class:`~graphmode.ops.begin_step.TableUpdate`.
        """
        self._known[[sequence.state_index for sequence in batch.admitted]] = 0
        known = self._known[state_indices]
        needed = np.maximum(-(-end_lens[:, np.newaxis] // self._sizes), known)
        self._known[state_indices] = needed
        changes = np.zeros((*known.shape, 3), dtype=np.int32)
        new_blocks: list[int] = []
        room = self.room(batch.num_tokens)
        rows, groups = (needed > known).nonzero()
        for at, group in zip(rows.tolist(), groups.tolist(), strict=True):
            sequence = batch.scheduled[at].sequence
            start, end = int(known[at, group]), int(needed[at, group])
            blocks = sequence.block_tables[group][start:end]
            if len(new_blocks) + len(blocks) <= room:
                changes[at, group, 2] = len(new_blocks)
                new_blocks += blocks
            else:
                staged = self._staging.acquire()
                values = staged.memory[: 4 * len(blocks)].view(torch.int32)
                values.copy_(torch.tensor(blocks))
                self.tables[group, sequence.state_index, start:end].copy_(values, non_blocking=True)
                self._staging.release(staged)
                known[at, group] = end
        changes[..., 0] = known
        changes[..., 1] = needed - known
        return changes, np.array(new_blocks, dtype=np.int32)
