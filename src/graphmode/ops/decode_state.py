"""The end of a step on the device: sampled tokens are kept, and decode inputs move on to the next position.

So several decode steps follow each other without the host: each leaves the inputs of the next one.
"""

# ruff: noqa: D102  (the docstring of DecodeInputs says what its properties are)
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from graphmode.ops._checks import require, require_tensor
from graphmode.ops._triton import constexpr, gdc_wait, jit, launch_options, next_power_of_2, runs_triton, tl


class DecodeInputs(Protocol):
    """The inputs of a decode step with one token a sequence; those that change from step to step change in place.

    Attributes:
        token_sources: int64 ``[seqs]``: changed to the state index of the sequence.
        positions: int64 ``[seqs]``, or ``[seqs, kinds]``: of the token, contiguous; changed.
        slot_mapping: int64 ``[groups, seqs]``: where its key and value go; changed.
        kv_lens: int32 ``[seqs]``: length of the sequence with it; 0 for padding and for one that has ended; changed.
        logits_positions: int32 ``[seqs]``: of the token to draw; changed.
        logits_state_indices: int64 ``[seqs]``: state index of the sequence; 0 for padding, and for one that has ended
            or draws nothing; changed.
        end_lens: int32 ``[seqs]``: the length with which the sequence ends here.
    """

    @property
    def token_sources(self) -> torch.Tensor: ...
    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def slot_mapping(self) -> torch.Tensor: ...
    @property
    def kv_lens(self) -> torch.Tensor: ...
    @property
    def logits_positions(self) -> torch.Tensor: ...
    @property
    def logits_state_indices(self) -> torch.Tensor: ...
    @property
    def end_lens(self) -> torch.Tensor: ...


class SampledTokens(NamedTuple):
    """Where sampled tokens are kept.

    Attributes:
        last: int64 ``[states]``: the last token of each sequence, by state index, for the next step to take.
        log: int64 ``[max_steps, max_logits]``: the tokens of each step since the host wrote the inputs.
        step: int64 ``[1]``: which of these steps this is; counted up.
    """

    last: torch.Tensor
    log: torch.Tensor
    step: torch.Tensor


def advance_decode(
    sampled: torch.Tensor,
    state_indices: torch.Tensor,
    kept: SampledTokens,
    decode: DecodeInputs | None,
    block_tables: torch.Tensor,
    block_sizes: Sequence[int],
) -> None:
    """Keep sampled tokens, and move the inputs of a decode step to the next position, in place.

    Where several rows are of one sequence, which then lie next to each other, its last token is that of the last row. A
    sequence whose length has come to its end becomes padding.

    Args:
        sampled: int64 ``[logits]``.
        state_indices: int64 ``[logits]``: of the sequence that a token is for; 0 for a token that counts for nothing.
        kept: where the tokens go; a step beyond its log is not logged.
        decode: the inputs, of one token a sequence; None where they are not to move on.
        block_tables: int32 ``[groups, seqs, blocks]``: of the step. Only read to move inputs on.
        block_sizes: tokens in a block of each group.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    rows, groups = sampled.shape, len(block_sizes)
    require_tensor("sampled", sampled, shape=(None,), dtypes=(torch.int64,), like=sampled)
    require_tensor("state_indices", state_indices, shape=rows, dtypes=(torch.int64,), like=sampled)
    require_tensor("last", kept.last, shape=(None,), dtypes=(torch.int64,), like=sampled)
    require_tensor("log", kept.log, shape=(None, None), dtypes=(torch.int64,), like=sampled)
    require_tensor("step", kept.step, shape=(1,), dtypes=(torch.int64,), like=sampled)
    if decode is not None:
        for name in ("token_sources", "logits_state_indices"):
            require_tensor(name, getattr(decode, name), shape=rows, dtypes=(torch.int64,), like=sampled)
        for name in ("kv_lens", "end_lens", "logits_positions"):
            require_tensor(name, getattr(decode, name), shape=rows, dtypes=(torch.int32,), like=sampled)
        require_tensor("slot_mapping", decode.slot_mapping, shape=(groups, *rows), dtypes=(torch.int64,), like=sampled)
        require_tensor("block_tables", block_tables, shape=(groups, *rows, None), dtypes=(torch.int32,), like=sampled)
        for name, tensor in (("slot_mapping", decode.slot_mapping), ("block_tables", block_tables)):
            require(tensor.stride(-1) == 1, f"{name}.stride(-1)", tensor.stride(-1), "1")
    run = advance_decode_triton if runs_triton(sampled) else advance_decode_reference
    run(sampled, state_indices, kept, decode, block_tables, block_sizes)


def advance_decode_reference(
    sampled: torch.Tensor,
    state_indices: torch.Tensor,
    kept: SampledTokens,
    decode: DecodeInputs | None,
    block_tables: torch.Tensor,
    block_sizes: Sequence[int],
) -> None:
    """The same as :func:`advance_decode` in PyTorch."""
    last, log, step = kept
    following = torch.nn.functional.pad(state_indices[1:], (0, 1))
    # What is no sequence's last token goes to nobody, at index 0, which keeps what it has.
    to = torch.where(state_indices == following, 0, state_indices)
    last.index_put_((to,), torch.where(to > 0, sampled, last[0]))
    logged = torch.arange(len(log), device=sampled.device).unsqueeze(1) == step
    part = log[:, : len(sampled)]
    part.copy_(torch.where(logged, sampled, part))
    step.add_(1)
    if decode is None:
        return
    goes_on = (decode.kv_lens > 0) & (decode.kv_lens < decode.end_lens)
    decode.token_sources.copy_(state_indices)
    decode.positions.view(len(sampled), -1).add_(goes_on.unsqueeze(1))
    for slots, table, block_size in zip(decode.slot_mapping, block_tables, block_sizes, strict=True):
        position = decode.kv_lens.long().clamp(max=table.shape[1] * block_size - 1)
        block = table.gather(1, (position // block_size).unsqueeze(1)).squeeze(1).long()
        slots.copy_(torch.where(goes_on, block * block_size + position % block_size, -1))
    decode.logits_state_indices.mul_(goes_on)
    decode.logits_positions.copy_(torch.where(goes_on, decode.logits_positions + 1, 0))
    decode.kv_lens.copy_(torch.where(goes_on, decode.kv_lens + 1, 0))


def advance_decode_triton(
    sampled: torch.Tensor,
    state_indices: torch.Tensor,
    kept: SampledTokens,
    decode: DecodeInputs | None,
    block_tables: torch.Tensor,
    block_sizes: Sequence[int],
) -> None:
    """The same as :func:`advance_decode` in Triton: one program, so that no other reads the step while it counts up."""
    rows = len(sampled)
    if rows == 0:
        return
    moved: tuple[torch.Tensor | None, ...] = (None,) * 8
    if decode is not None:
        moved = (
            decode.token_sources,
            decode.positions,
            decode.slot_mapping,
            decode.kv_lens,
            decode.logits_positions,
            decode.logits_state_indices,
            decode.end_lens,
            block_tables,
        )
    _advance_decode_kernel[(1,)](
        sampled,
        state_indices,
        *kept,
        *moved,
        rows,
        *kept.log.shape,
        0 if decode is None else decode.slot_mapping.stride(0),
        *block_tables.stride()[:2],
        kinds=0 if decode is None else decode.positions.numel() // rows,
        block_sizes=tuple(block_sizes),
        block=max(next_power_of_2(rows), 16),
        **launch_options(sampled.device),
    )


@jit(do_not_specialize=["rows", "max_steps", "max_logits"])
def _advance_decode_kernel(  # type: ignore[no-untyped-def]
    sampled,
    state_indices,
    last,
    log,
    step,
    token_sources,
    positions,
    slot_mapping,
    kv_lens,
    logits_positions,
    logits_state_indices,
    end_lens,
    block_tables,
    rows,
    max_steps,
    max_logits,
    slots_stride,
    group_stride,
    table_stride,
    kinds: constexpr,
    block_sizes: constexpr,
    block: constexpr,
    early: constexpr,
):
    row = tl.arange(0, block)
    real = row < rows
    # It lets no kernel start early: those after it read lengths and tables before they wait.
    if early:
        gdc_wait()
    token = tl.load(sampled + row, mask=real, other=0)
    index = tl.load(state_indices + row, mask=real, other=0)
    following = tl.load(state_indices + row + 1, mask=row + 1 < rows, other=0)
    at = tl.load(step + row * 0)
    tl.store(last + index, token, mask=real & (index > 0) & (index != following))
    tl.store(log + at * max_logits + row, token, mask=real & (at < max_steps))
    if kinds > 0:
        length = tl.load(kv_lens + row, mask=real, other=0)
        goes_on = real & (length > 0) & (length < tl.load(end_lens + row, mask=real, other=0))
    tl.debug_barrier()
    tl.store(step + row, at + 1, mask=row == 0)
    if kinds > 0:
        for group in tl.static_range(len(block_sizes)):
            table = block_tables + group * group_stride + row.to(tl.int64) * table_stride
            page = tl.load(table + length // block_sizes[group], mask=goes_on, other=0)
            slot = page.to(tl.int64) * block_sizes[group] + length % block_sizes[group]
            tl.store(slot_mapping + group * slots_stride + row, tl.where(goes_on, slot, -1), mask=real)
        tl.store(token_sources + row, index, mask=real)
        tl.store(logits_state_indices + row, 0, mask=real & (goes_on == 0))
        tl.store(kv_lens + row, tl.where(goes_on, length + 1, 0), mask=real)
        drawn = tl.load(logits_positions + row, mask=goes_on, other=0)
        tl.store(logits_positions + row, tl.where(goes_on, drawn + 1, 0), mask=real)
        for kind in tl.static_range(kinds):
            position = tl.load(positions + row * kinds + kind, mask=goes_on, other=0)
            tl.store(positions + row * kinds + kind, position + 1, mask=goes_on)
