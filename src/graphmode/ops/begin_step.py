"""The beginning of a step on the device: its tokens are put together, and its block tables.

Block tables stay on the device, by the state indices of their sequences. A step brings the blocks that its sequences
got since the last one; each table is extended by them and copied to the row of its sequence, where all layers read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from graphmode.ops._checks import require, require_tensor
from graphmode.ops._cpu import cpu_operator, loops
from graphmode.ops._triton import constexpr, gdc_wait, jit, launch_options, runs_triton, tl


class TableUpdate(NamedTuple):
    """What a step changes in block tables, and where it reads them.

    Attributes:
        tables: int32 ``[groups, states, blocks]``: of each cache group the table of every running sequence, by its
            state index. Changed in place.
        step_tables: int32 ``[groups, seqs, blocks]``: written, the table of each sequence of the step. What lies beyond
            its blocks is left as it is.
        state_indices: int64 ``[seqs]``: of the sequences; 0 for padding.
        changes: int32 ``[seqs, groups, 3]``: how many entries a table has, how many it gets, and where the first of
            these is in ``new_blocks``. 0 for padding.
        new_blocks: int32 ``[new_blocks]``: block numbers.
    """

    tables: torch.Tensor
    step_tables: torch.Tensor
    state_indices: torch.Tensor
    changes: torch.Tensor
    new_blocks: torch.Tensor


def begin_step(
    token_ids: torch.Tensor, token_sources: torch.Tensor, last_tokens: torch.Tensor, update: TableUpdate
) -> torch.Tensor:
    """Return the tokens of a step, and bring its block tables up to date.

    To be called once with the same ``changes`` or several times: each call leaves the same tables.

    Args:
        token_ids: int64 ``[tokens]``: those that the host knows.
        token_sources: int64 ``[tokens]``: the state index of the sequence whose last sampled token this is; 0 for a
            token that the host knows.
        last_tokens: int64 ``[states]``: the last sampled token of each sequence, by state index.
        update: of block tables.

    Returns:
        int64 ``[tokens]``.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor("token_ids", token_ids, shape=(None,), dtypes=(torch.int64,), like=token_ids)
    require_tensor("token_sources", token_sources, shape=token_ids.shape, dtypes=(torch.int64,), like=token_ids)
    require_tensor("last_tokens", last_tokens, shape=(None,), dtypes=(torch.int64,), like=token_ids)
    tables, step_tables, state_indices, changes, new_blocks = update
    require_tensor("tables", tables, shape=(None, None, None), dtypes=(torch.int32,), like=token_ids)
    groups, _, blocks = tables.shape
    seqs = len(state_indices)
    require_tensor("step_tables", step_tables, shape=(groups, seqs, blocks), dtypes=(torch.int32,), like=token_ids)
    require_tensor("state_indices", state_indices, shape=(None,), dtypes=(torch.int64,), like=token_ids)
    require_tensor("changes", changes, shape=(seqs, groups, 3), dtypes=(torch.int32,), like=token_ids)
    require_tensor("new_blocks", new_blocks, shape=(None,), dtypes=(torch.int32,), like=token_ids)
    for name, tensor in (("tables", tables), ("changes", changes)):
        require(tensor.is_contiguous(), name, f"of strides {tensor.stride()}", "a contiguous tensor")
    require(step_tables.stride(2) == 1, "step_tables.stride(2)", step_tables.stride(2), "1")
    run = begin_step_cpu if token_ids.device.type == "cpu" else begin_step_reference
    if runs_triton(token_ids):
        run = begin_step_triton
    return run(token_ids, token_sources, last_tokens, update)


def begin_step_reference(
    token_ids: torch.Tensor, token_sources: torch.Tensor, last_tokens: torch.Tensor, update: TableUpdate
) -> torch.Tensor:
    """The same as :func:`begin_step` in PyTorch. It looks at all entries that a table can have."""
    tables, step_tables, state_indices, changes, new_blocks = update
    groups, _, blocks = tables.shape
    known, new, first = changes.permute(2, 1, 0).unsqueeze(3)  # [groups, seqs, 1] each
    entry = torch.arange(blocks, device=tables.device)
    is_new = (entry >= known) & (entry < known + new)
    old = tables[:, state_indices]
    # One entry more, so that there is one to look at where no block is new.
    at = torch.where(is_new, first + entry - known, len(new_blocks))
    current = torch.where(is_new, torch.nn.functional.pad(new_blocks, (0, 1))[at.long()], old)
    # Padding writes to the table of nobody, at index 0.
    group = torch.arange(groups, device=tables.device).unsqueeze(1)
    tables.index_put_((group, state_indices.expand(groups, -1)), current)
    step_tables.copy_(torch.where(entry < known + new, current, step_tables))
    return torch.where(token_sources > 0, last_tokens[token_sources], token_ids)


@cpu_operator(
    "begin_step_on_cpu(Tensor token_ids, Tensor token_sources, Tensor last_tokens, Tensor(a!) tables, "
    "Tensor(b!) step_tables, Tensor state_indices, Tensor changes, Tensor new_blocks, Tensor(c!) out)"
)
def _begin_step_on_cpu(*tensors: torch.Tensor) -> Callable[[], None]:
    arrays = [tensor.numpy() for tensor in tensors]
    return lambda: loops().begin_step(*arrays)


def begin_step_cpu(
    token_ids: torch.Tensor, token_sources: torch.Tensor, last_tokens: torch.Tensor, update: TableUpdate
) -> torch.Tensor:
    """The same as :func:`begin_step` as loops over the tokens and blocks that are there."""
    taken = torch.empty_like(token_ids)
    _begin_step_on_cpu(token_ids, token_sources, last_tokens, *update, taken)
    return taken


_BLOCK = 256


def begin_step_triton(
    token_ids: torch.Tensor, token_sources: torch.Tensor, last_tokens: torch.Tensor, update: TableUpdate
) -> torch.Tensor:
    """The same as :func:`begin_step` in one Triton kernel: programs of some tokens, and one for each table."""
    taken = torch.empty_like(token_ids)
    groups, states, blocks = update.tables.shape
    tokens, seqs = len(token_ids), len(update.state_indices)
    token_programs = -(-tokens // _BLOCK)
    if token_programs + groups * seqs:
        _begin_step_kernel[(token_programs + groups * seqs,)](
            token_ids,
            token_sources,
            last_tokens,
            taken,
            *update,
            tokens,
            token_programs,
            states,
            blocks,
            *update.step_tables.stride()[:2],
            groups=groups,
            block=_BLOCK,
            **launch_options(token_ids.device),
        )
    return taken


@jit(do_not_specialize=["tokens", "token_programs", "states", "blocks", "group_stride", "seq_stride"])
def _begin_step_kernel(  # type: ignore[no-untyped-def]
    token_ids,
    token_sources,
    last_tokens,
    taken,
    tables,
    step_tables,
    state_indices,
    changes,
    new_blocks,
    tokens,
    token_programs,
    states,
    blocks,
    group_stride,
    seq_stride,
    groups: constexpr,
    block: constexpr,
    early: constexpr,
):
    # It lets no kernel start early: those after it read tables before they wait.
    if early:
        gdc_wait()
    program = tl.program_id(0)
    if program < token_programs:
        at = program * block + tl.arange(0, block)
        inside = at < tokens
        source = tl.load(token_sources + at, mask=inside, other=0)
        known = tl.load(token_ids + at, mask=inside, other=0)
        sampled = tl.load(last_tokens + source, mask=inside & (source > 0), other=0)
        tl.store(taken + at, tl.where(source > 0, sampled, known), mask=inside)
    else:
        row = program - token_programs
        seq = (row // groups).to(tl.int64)
        group = (row % groups).to(tl.int64)
        count = tl.load(changes + row * 3)
        end = count + tl.load(changes + row * 3 + 1)
        first = tl.load(changes + row * 3 + 2)
        table = tables + (group * states + tl.load(state_indices + seq)) * blocks
        step_table = step_tables + group * group_stride + seq * seq_stride
        for start in range(0, end, block):
            entry = start + tl.arange(0, block)
            is_new = (entry >= count) & (entry < end)
            old = tl.load(table + entry, mask=entry < count, other=0)
            new = tl.load(new_blocks + first + entry - count, mask=is_new, other=0)
            tl.store(step_table + entry, tl.where(is_new, new, old), mask=entry < end)
            tl.store(table + entry, new, mask=is_new)
