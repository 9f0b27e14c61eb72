"""The keys of a decode batch shared out among programs, on the device, by the lengths of the moment.

A part has at most ``1 / spare`` of all keys, so that long contexts beside short ones are spread over the device, and
the short ones stay whole. Of ``seqs`` sequences there are then at most ``seqs + spare`` parts, whatever the lengths:
the number of programs, which a graph fixes. Parts of one sequence are put together by a second kernel (flash-decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from __future__ import annotations

import torch

from graphmode.kernels._triton import (
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    tl,
)

# Programs that fill a large GPU: H100 and H200 have 132 multiprocessors, and two of these fit on each.
_PROGRAMS = 256
_MAX_SPARE = 32


def spare_parts(heads: int) -> int:
    """Return how many parts more than sequences there may be, for so many key/value heads, each a program."""
    return max(min(_PROGRAMS // heads, _MAX_SPARE), 1)


def combine_parts(
    parts: torch.Tensor,
    tops: torch.Tensor,
    sums: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    kv_lens: torch.Tensor,
    most: int,
    spare: int,
    block_n: int,
) -> None:
    """Put together in ``out`` what several programs made of the keys of one sequence; the others' rows are there.

    Args:
        parts: float32 ``[seqs + spare, q_heads, value_dim]``: sums of weighted values.
        tops: float32 ``[seqs + spare, q_heads]``: what scores were taken relative to.
        sums: float32 ``[seqs + spare, q_heads]``: of weights; 0 for a part without keys.
        sinks: as of :func:`~graphmode.kernels.paged_attention`.
        out: ``[seqs, q_heads, value_dim]``.
        kv_lens: int32 ``[seqs]``, as the programs took it; ``most``, ``spare`` and ``block_n`` likewise.
        most: keys of a sequence that count.
        spare: parts more than sequences.
        block_n: keys of a tile.
    """
    seqs, q_heads, value_dim = out.shape
    _combine_kernel[(min(seqs, spare), q_heads)](
        parts,
        tops,
        sums,
        sinks,
        out,
        kv_lens,
        seqs,
        most,
        q_heads=q_heads,
        value_dim=value_dim,
        block_v=max(16, next_power_of_2(value_dim)),
        spare=spare,
        block_n=block_n,
        block_seqs=next_power_of_2(seqs),
        block_parts=next_power_of_2(spare),
        num_warps=4 if value_dim * spare > 2048 else 1,
        **launch_options(out.device),
    )


@jit()
def count_parts(  # type: ignore[no-untyped-def]
    kv_lens, seqs, most, spare: constexpr, block_n: constexpr, block_seqs: constexpr
):
    """Return the numbers of sequences, of each one's parts, and where they end in the row of all parts."""
    index = tl.arange(0, block_seqs)
    keys = tl.minimum(tl.load(kv_lens + index, mask=index < seqs, other=0), most)
    share = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(keys, 0), spare), block_n), 1) * block_n
    count = tl.where(index < seqs, tl.maximum(tl.cdiv(keys, share), 1), 0)
    return index, count, tl.cumsum(count, 0)


@jit()
def find_part(  # type: ignore[no-untyped-def]
    number, kv_lens, seqs, most, spare: constexpr, block_n: constexpr, block_seqs: constexpr
):
    """Return of a part its sequence, how many parts that has, 0 if there is none, and which one of them it is."""
    index, count, end = count_parts(kv_lens, seqs, most, spare, block_n, block_seqs)
    seq = tl.sum((end <= number).to(tl.int32), 0)
    parts = tl.sum(tl.where(index == seq, count, 0), 0)
    return seq, parts, number - tl.sum(tl.where(index == seq, end - count, 0), 0)


@jit()
def join_sink(total, top, sinks, head, inside):  # type: ignore[no-untyped-def]
    """Return the sums of weights relative to the scores ``top``, with the heads' sinks where there are any.

    A sink far above every score overflows to infinity, and the division makes zero of the row, as it should be.
    """
    if sinks is not None:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        total = total + tl.exp2(sink - top)
    return total


@jit(do_not_specialize=["seqs", "most"])
def _combine_kernel(  # type: ignore[no-untyped-def]
    parts,
    tops,
    sums,
    sinks,
    out,
    kv_lens,
    seqs,
    most,
    q_heads: constexpr,
    value_dim: constexpr,
    block_v: constexpr,
    spare: constexpr,
    block_n: constexpr,
    block_seqs: constexpr,
    block_parts: constexpr,
    early: constexpr,
):
    """Combine the parts of one query head of the sequence that is the ``program_id(0)``-th of several parts."""
    if early:
        gdc_launch_dependents()
    index, count, end = count_parts(kv_lens, seqs, most, spare, block_n, block_seqs)
    several = count > 1
    mine = several & (tl.cumsum(several.to(tl.int32), 0) == tl.program_id(0) + 1)
    seq = tl.sum(tl.where(mine, index, 0), 0)
    number = tl.sum(tl.where(mine, count, 0), 0)
    first = tl.sum(tl.where(mine, end - count, 0), 0)
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
