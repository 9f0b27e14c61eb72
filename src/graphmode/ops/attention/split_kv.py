"""The keys of a decode batch shared out among programs, on the device, by the lengths of the moment.

A part has at most ``1 / spare`` of all keys, so that long contexts beside short ones are spread over the device, and
the short ones stay whole. Of ``seqs`` sequences there are then at most ``seqs + spare`` parts, whatever the lengths:
the number of programs, which a graph fixes. Parts of one sequence are put together by a second kernel (flash-decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html), or by the last of its programs to finish.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphmode.ops._triton import (
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    tl,
)

# Programs that have a multiprocessor each on a large GPU (H100 and H200 have 132), or nearly.
_PROGRAMS = 128
_MAX_SPARE = 32
# Keys are shared out in tiles. Where the sequences fill the device, a part of fewer keys costs more than it gains.
_TILE = 64
_LEAST = 256


class SplitKVPlan(NamedTuple):
    """The parts of a decode batch.

    Attributes:
        programs: int32 ``[seqs + spare, 6]``: of each program the sequence, the first of its keys, where they end, how
            many parts the sequence has, 0 for a program with nothing to do, 1 where its newest key is among them, and
            which part it is.
        several: int32 ``[min(seqs, spare), 3]``: the sequences of several parts: which one, its first program, how many
            parts; 0 where there is none.
        arrived: int32 ``[seqs, kv_heads]``: zeros, for a sequence's programs to count in who has finished.
    """

    programs: torch.Tensor
    several: torch.Tensor
    arrived: torch.Tensor


def plan_split_kv(
    kv_lens: torch.Tensor,
    kv_heads: int,
    *,
    window: int | None = None,
    top_k: int | None = None,
    spare: int | None = None,
) -> SplitKVPlan:
    """Share out the keys of a decode batch, in Triton.

    Args:
        kv_lens: int32 ``[seqs]``: each sequence's length with its new token; 0 for padding, which is one part.
        kv_heads: each takes a program of each part.
        window: the last keys of a sequence that count.
        top_k: the first keys of a sequence that count: of a selection.
        spare: parts more than sequences that there may be, 1 or more; default by shapes.
    """
    seqs = len(kv_lens)
    filling = max(_PROGRAMS // kv_heads, 1)
    few = seqs <= filling
    if spare is None:
        spare = min(filling if few else 2 * filling, _MAX_SPARE)
    programs = torch.empty((seqs + spare, 6), dtype=torch.int32, device=kv_lens.device)
    several = torch.empty((min(seqs, spare), 3), dtype=torch.int32, device=kv_lens.device)
    arrived = torch.empty((seqs, kv_heads), dtype=torch.int32, device=kv_lens.device)
    block_seqs = next_power_of_2(seqs)
    block = min(max(4096 // block_seqs, 1), next_power_of_2(seqs + spare))
    _share_kernel[(-(-(seqs + spare) // block),)](
        kv_lens,
        programs,
        several,
        arrived,
        seqs,
        min(limit for limit in (window, top_k, 2**31 - 1) if limit is not None),
        _TILE if few else _LEAST,
        kv_heads=kv_heads,
        windowed=window is not None,
        longest_first=not few,
        spare=spare,
        tile=_TILE,
        block_seqs=block_seqs,
        block_spare=next_power_of_2(len(several)),
        block=block,
        **launch_options(kv_lens.device),
    )
    return SplitKVPlan(programs, several, arrived)


def room_for_parts(parts: SplitKVPlan, q_heads: int, value_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return room for what programs make of their parts: the first arguments of :func:`combine_parts`."""
    programs, device = len(parts.programs), parts.programs.device
    acc = torch.empty((programs, q_heads, value_dim), dtype=torch.float32, device=device)
    return acc, *torch.empty((2, programs, q_heads), dtype=torch.float32, device=device)


def combine_parts(
    acc: torch.Tensor,
    tops: torch.Tensor,
    sums: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    parts: SplitKVPlan,
) -> None:
    """Put together in ``out`` what several programs made of the keys of one sequence; the others' rows are there.

    Args:
        acc: float32 ``[programs, q_heads, value_dim]``: sums of weighted values.
        tops: float32 ``[programs, q_heads]``: what scores were taken relative to.
        sums: float32 ``[programs, q_heads]``: of weights; 0 for a part without keys.
        sinks: as of :func:`~graphmode.ops.paged_attention`.
        out: ``[seqs, q_heads, value_dim]``.
        parts: of the batch.
    """
    q_heads, value_dim = out.shape[1:]
    block_parts = next_power_of_2(len(parts.programs) - len(out))
    _combine_kernel[(len(parts.several), q_heads)](
        acc,
        tops,
        sums,
        sinks,
        out,
        parts.several,
        q_heads=q_heads,
        value_dim=value_dim,
        block_v=max(16, next_power_of_2(value_dim)),
        block_parts=block_parts,
        num_warps=4 if value_dim * block_parts > 2048 else 1,
        **launch_options(out.device),
    )


@jit()
def load_part(programs, number):  # type: ignore[no-untyped-def]
    """Return what the plan says of program ``number``; from L2, where the kernel ahead may just have put it."""
    place = programs + number * 6
    seq = tl.load(place, cache_modifier=".cg")
    first = tl.load(place + 1, cache_modifier=".cg")
    end = tl.load(place + 2, cache_modifier=".cg")
    return seq, first, end, tl.load(place + 3, cache_modifier=".cg"), tl.load(place + 4, cache_modifier=".cg")


@jit(do_not_specialize=["seqs", "most", "least"])
def _share_kernel(  # type: ignore[no-untyped-def]
    kv_lens,
    programs,
    several,
    arrived,
    seqs,
    most,
    least,
    kv_heads: constexpr,
    windowed: constexpr,
    longest_first: constexpr,
    spare: constexpr,
    tile: constexpr,
    block_seqs: constexpr,
    block_spare: constexpr,
    block: constexpr,
    early: constexpr,
):
    """Fill ``block`` entries of ``programs`` and ``arrived``, and the first program those of ``several``."""
    if early:
        gdc_wait()
    index = tl.arange(0, block_seqs)
    length = tl.load(kv_lens + index, mask=index < seqs, other=0)
    keys = tl.minimum(length, most)
    share = tl.cdiv(tl.maximum(tl.cdiv(tl.sum(keys, 0), spare), least), tile) * tile
    if longest_first:
        part_keys = tl.cdiv(keys, tl.maximum(tl.cdiv(keys, share), 1))
        ranked = tl.where(index < seqs, part_keys.to(tl.int64) * block_seqs + block_seqs - 1 - index, -1)
        ranked = tl.sort(ranked, descending=True)
        which = tl.where(index < seqs, block_seqs - 1 - (ranked % block_seqs), index).to(tl.int32)
        length = tl.load(kv_lens + which, mask=index < seqs, other=0)
        keys = tl.minimum(length, most)
    else:
        which = index
    count = tl.where(index < seqs, tl.maximum(tl.cdiv(keys, share), 1), 0)
    end = tl.cumsum(count, 0)
    number = tl.program_id(0) * block + tl.arange(0, block)
    at = tl.sum((end[None, :] <= number[:, None]).to(tl.int32), 1)
    mine = index[None, :] == at[:, None]
    seq = tl.sum(tl.where(mine, which[None, :], 0), 1)
    parts = tl.sum(tl.where(mine, count[None, :], 0), 1)
    part = number - tl.sum(tl.where(mine, (end - count)[None, :], 0), 1)
    seq_keys = tl.sum(tl.where(mine, keys[None, :], 0), 1)
    part_keys = tl.cdiv(tl.cdiv(seq_keys, tl.maximum(parts, 1)), tile) * tile
    first = part * part_keys
    last = tl.minimum(first + part_keys, seq_keys)
    if windowed:
        skipped = tl.sum(tl.where(mine, (length - keys)[None, :], 0), 1)
        first += skipped
        last += skipped
    inside = number < seqs + spare
    place = programs + number * 6
    tl.store(place, seq, mask=inside)
    tl.store(place + 1, first, mask=inside)
    tl.store(place + 2, last, mask=inside)
    tl.store(place + 3, parts, mask=inside)
    tl.store(place + 4, ((part == parts - 1) & (seq_keys > 0)).to(tl.int32), mask=inside)
    tl.store(place + 5, part, mask=inside)
    for kv_head in tl.static_range(kv_heads):
        tl.store(arrived + number * kv_heads + kv_head, 0, mask=number < seqs)
    if tl.program_id(0) == 0:
        nth = tl.arange(0, block_spare)
        chosen = (count > 1)[None, :] & (tl.cumsum((count > 1).to(tl.int32), 0)[None, :] == nth[:, None] + 1)
        room = nth < tl.minimum(seqs, spare)
        tl.store(several + nth * 3, tl.sum(tl.where(chosen, which[None, :], 0), 1), mask=room)
        tl.store(several + nth * 3 + 1, tl.sum(tl.where(chosen, (end - count)[None, :], 0), 1), mask=room)
        tl.store(several + nth * 3 + 2, tl.sum(tl.where(chosen, count[None, :], 0), 1), mask=room)
    # The next kernel reads this before it waits. So it may not start early, and all must be in L2 when it does.
    if early:
        tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@jit()
def join_sink(total, top, sinks, head, inside):  # type: ignore[no-untyped-def]
    """Return the sums of weights relative to the scores ``top``, with the heads' sinks where there are any.

    A sink far above every score overflows to infinity, and the division makes zero of the row, as it should be.
    """
    if sinks is not None:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        total = total + tl.exp2(sink - top)
    return total


@jit()
def _combine_kernel(  # type: ignore[no-untyped-def]
    parts,
    tops,
    sums,
    sinks,
    out,
    several,
    q_heads: constexpr,
    value_dim: constexpr,
    block_v: constexpr,
    block_parts: constexpr,
    early: constexpr,
):
    """Combine the parts of one query head of one sequence of several parts."""
    if early:
        gdc_launch_dependents()
    place = several + tl.program_id(0) * 3
    seq = tl.load(place)
    first = tl.load(place + 1)
    number = tl.load(place + 2)
    if early:
        gdc_wait()
    if number == 0:
        return
    head = tl.program_id(1)
    part = tl.arange(0, block_parts)
    row = (first + part).to(tl.int64) * q_heads + head
    total = tl.load(sums + row, mask=part < number, other=0.0)
    used = total > 0.0
    top = tl.load(tops + row, mask=used, other=-1e38)
    top_of_all = tl.max(top, 0)
    weight = tl.where(used, tl.exp2(top - top_of_all), 0.0)
    dim = tl.arange(0, block_v)
    inside = dim < value_dim
    acc = tl.load(parts + row[:, None] * value_dim + dim[None, :], mask=used[:, None] & inside[None, :], other=0.0)
    total_of_all = join_sink(tl.sum(total * weight, 0), top_of_all, sinks, head, True)
    acc = tl.sum(acc * weight[:, None], 0) / tl.where(total_of_all == 0.0, 1.0, total_of_all)
    target = out + (seq.to(tl.int64) * q_heads + head) * value_dim + dim
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)
