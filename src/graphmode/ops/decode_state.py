"""The end of a step on the device: sampled tokens are handed on, and decode rows move to their next position.

So several decode steps follow each other without the host: each leaves the inputs of the next one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphmode.ops._checks import require_tensor
from graphmode.ops._triton import (
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    runs_triton,
    tl,
)


class DecodeRows(NamedTuple):
    """The inputs of a decode step that change from one to the next; all are changed in place.

    Attributes:
        token_sources: int64 ``[rows]``: the row that sampled a row's token.
        positions: int64 ``[rows]``, or ``[rows, kinds]``: of the token, contiguous.
        slot_mapping: int64 ``[rows]``: where its key and value go.
        kv_lens: int32 ``[rows]``: length of the sequence with it; 0 for padding and for a row that has ended.
        slots: int64 ``[rows]``: of the sampling parameters; 0 likewise.
        limits: int32 ``[rows]``: the length that ends the row here.
        block_tables: int32 ``[rows, blocks]``: read only.
    """

    token_sources: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    kv_lens: torch.Tensor
    slots: torch.Tensor
    limits: torch.Tensor
    block_tables: torch.Tensor


class Handover(NamedTuple):
    """Where sampled tokens go.

    Attributes:
        last: int64 ``[max_rows]``: each row's last token, for the next step to take.
        log: int64 ``[max_steps, max_rows]``: the tokens of each step since the host wrote the inputs.
        step: int64 ``[1]``: which of these steps this is; counted up.
    """

    last: torch.Tensor
    log: torch.Tensor
    step: torch.Tensor


def take_tokens(token_ids: torch.Tensor, sources: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Return the tokens of a step: those that the host knows, and those that rows of the step before left.

    Args:
        token_ids: int64 ``[tokens]``: those that the host knows.
        sources: int64 ``[tokens]``: the row that sampled a token; -1 for one that the host knows.
        last: int64 ``[max_rows]``: of :class:`Handover`.

    Returns:
        int64 ``[tokens]``.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    require_tensor("token_ids", token_ids, shape=(None,), dtypes=(torch.int64,), like=token_ids)
    require_tensor("sources", sources, shape=token_ids.shape, dtypes=(torch.int64,), like=token_ids)
    require_tensor("last", last, shape=(None,), dtypes=(torch.int64,), like=token_ids)
    take = take_tokens_triton if runs_triton(token_ids) else take_tokens_reference
    return take(token_ids, sources, last)


def take_tokens_reference(token_ids: torch.Tensor, sources: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Do as :func:`take_tokens` in PyTorch."""
    return torch.where(sources < 0, token_ids, last[sources.clamp(min=0)])


_TAKE_BLOCK = 256


def take_tokens_triton(token_ids: torch.Tensor, sources: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Do as :func:`take_tokens` in Triton."""
    taken = torch.empty_like(token_ids)
    count = len(token_ids)
    if count:
        _take_tokens_kernel[(-(-count // _TAKE_BLOCK),)](
            token_ids, sources, last, taken, count, block=_TAKE_BLOCK, **launch_options(token_ids.device)
        )
    return taken


@jit(do_not_specialize=["count"])
def _take_tokens_kernel(  # type: ignore[no-untyped-def]
    token_ids, sources, last, taken, count, block: constexpr, early: constexpr
):
    if early:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < count
    source = tl.load(sources + at, mask=inside, other=-1)
    known = tl.load(token_ids + at, mask=inside, other=0)
    made = tl.load(last + source, mask=inside & (source >= 0), other=0)
    tl.store(taken + at, tl.where(source < 0, known, made), mask=inside)


def advance_decode(
    sampled: torch.Tensor, kv_lens: torch.Tensor, handover: Handover, decode: DecodeRows | None, block_size: int
) -> None:
    """Hand sampled tokens on, and move decode rows to their next position, in place.

    A row of length 0 hands nothing on. A decode row whose length has come to its limit becomes padding.

    Args:
        sampled: int64 ``[rows]``.
        kv_lens: int32 ``[rows]``: lengths of the sequences.
        handover: where the tokens go; a step beyond its log is not logged.
        decode: the rows' inputs; None where rows are no decode rows.
        block_size: tokens in a cache block.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    rows = sampled.shape
    require_tensor("sampled", sampled, shape=(None,), dtypes=(torch.int64,), like=sampled)
    require_tensor("kv_lens", kv_lens, shape=rows, dtypes=(torch.int32,), like=sampled)
    require_tensor("last", handover.last, shape=(None,), dtypes=(torch.int64,), like=sampled)
    require_tensor("log", handover.log, shape=(None, len(handover.last)), dtypes=(torch.int64,), like=sampled)
    require_tensor("step", handover.step, shape=(1,), dtypes=(torch.int64,), like=sampled)
    if decode is not None:
        for name in ("token_sources", "slot_mapping", "slots"):
            require_tensor(name, getattr(decode, name), shape=rows, dtypes=(torch.int64,), like=sampled)
        for name in ("kv_lens", "limits"):
            require_tensor(name, getattr(decode, name), shape=rows, dtypes=(torch.int32,), like=sampled)
        require_tensor("block_tables", decode.block_tables, shape=(*rows, None), dtypes=(torch.int32,), like=sampled)
    run = advance_decode_triton if runs_triton(sampled) else advance_decode_reference
    run(sampled, kv_lens, handover, decode, block_size)


def advance_decode_reference(
    sampled: torch.Tensor, kv_lens: torch.Tensor, handover: Handover, decode: DecodeRows | None, block_size: int
) -> None:
    """Do as :func:`advance_decode` in PyTorch."""
    last, log, step = handover
    running = kv_lens > 0
    kept = last[: len(sampled)]
    kept.copy_(torch.where(running, sampled, kept))
    logged = torch.arange(len(log), device=sampled.device).unsqueeze(1) == step
    part = log[:, : len(sampled)]
    part.copy_(torch.where(logged, sampled, part))
    step.add_(1)
    if decode is None:
        return
    goes_on = running & (decode.kv_lens < decode.limits)
    position = decode.kv_lens.long().clamp(max=decode.block_tables.shape[1] * block_size - 1)
    block = decode.block_tables.gather(1, (position // block_size).unsqueeze(1)).squeeze(1)
    decode.token_sources.copy_(torch.arange(len(sampled), device=sampled.device))
    decode.positions.view(len(sampled), -1).add_(goes_on.unsqueeze(1))
    decode.slot_mapping.copy_(torch.where(goes_on, block * block_size + position % block_size, -1))
    decode.slots.mul_(goes_on)
    decode.kv_lens.copy_(torch.where(goes_on, decode.kv_lens + 1, 0))


def advance_decode_triton(
    sampled: torch.Tensor, kv_lens: torch.Tensor, handover: Handover, decode: DecodeRows | None, block_size: int
) -> None:
    """Do as :func:`advance_decode` in Triton: one program, so that no other reads the step while it counts up."""
    rows = len(sampled)
    if rows == 0:
        return
    _advance_decode_kernel[(1,)](
        sampled,
        kv_lens,
        *handover,
        *(decode or [None] * 7),
        rows,
        len(handover.log),
        len(handover.last),
        0 if decode is None else decode.block_tables.stride(0),
        kinds=0 if decode is None else decode.positions.numel() // rows,
        block_size=block_size,
        block=max(next_power_of_2(rows), 16),
        **launch_options(sampled.device),
    )


@jit(do_not_specialize=["rows", "max_steps", "max_rows"])
def _advance_decode_kernel(  # type: ignore[no-untyped-def]
    sampled,
    all_kv_lens,
    last,
    log,
    step,
    token_sources,
    positions,
    slot_mapping,
    kv_lens,
    slots,
    limits,
    block_tables,
    rows,
    max_steps,
    max_rows,
    table_stride,
    kinds: constexpr,
    block_size: constexpr,
    block: constexpr,
    early: constexpr,
):
    row = tl.arange(0, block)
    real = row < rows
    # It lets no kernel start early: those after it read lengths and tables before they wait.
    if early:
        gdc_wait()
    token = tl.load(sampled + row, mask=real, other=0)
    length = tl.load(all_kv_lens + row, mask=real, other=0)
    at = tl.load(step + row * 0)
    tl.store(last + row, token, mask=real & (length > 0))
    tl.store(log + at * max_rows + row, token, mask=real & (at < max_steps))
    tl.debug_barrier()
    tl.store(step + row, at + 1, mask=row == 0)
    if kinds > 0:
        goes_on = real & (length > 0) & (length < tl.load(limits + row, mask=real, other=0))
        page = tl.load(block_tables + row.to(tl.int64) * table_stride + length // block_size, mask=goes_on, other=0)
        slot = page.to(tl.int64) * block_size + length % block_size
        tl.store(token_sources + row, row.to(tl.int64), mask=real)
        tl.store(slot_mapping + row, tl.where(goes_on, slot, -1), mask=real)
        tl.store(slots + row, 0, mask=real & (goes_on == 0))
        tl.store(kv_lens + row, tl.where(goes_on, length + 1, 0), mask=real)
        for kind in tl.static_range(kinds):
            position = tl.load(positions + row * kinds + kind, mask=goes_on, other=0)
            tl.store(positions + row * kinds + kind, position + 1, mask=goes_on)
