"""The keys of a decode batch shared out among programs, on the device, by the lengths of the moment.

A part has at most ``1 / spare`` of all keys, so that long contexts beside short ones are spread over the device, and
the short ones stay whole. Of ``seqs`` sequences there are then at most ``seqs + spare`` parts, whatever the lengths:
the number of programs, which a graph fixes. Parts of one sequence (flash-decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html) are put together by the last of its programs to end,
in their order, so that it does not matter which one that is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphmode.kernels._triton import (
    constexpr,
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
_COLUMNS = 5
# Programs that the query heads of one key/value head may be for.
MAX_HEAD_BLOCKS = 8


class Parts(NamedTuple):
    """The parts of a decode batch.

    Attributes:
        programs: int32 ``[seqs + spare, 5]``: of each program the sequence, the first of its keys, where they end, how
            many parts the sequence has, 0 for a program with nothing to do, and the first program of the sequence.
        arrivals: int32 ``[seqs, kv_heads, 8]``: programs of a sequence, a key/value head and up to eight groups of its
            query heads that have come to their end; 0 between calls.
    """

    programs: torch.Tensor
    arrivals: torch.Tensor


def share_keys(
    kv_lens: torch.Tensor,
    kv_heads: int,
    *,
    window: int | None = None,
    top_k: int | None = None,
    spare: int | None = None,
) -> Parts:
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
        spare = min(max(filling - seqs, filling // 2, 1) if few else 2 * filling, _MAX_SPARE)
    programs = torch.empty((seqs + spare, _COLUMNS), dtype=torch.int32, device=kv_lens.device)
    arrivals = torch.zeros((seqs, kv_heads, MAX_HEAD_BLOCKS), dtype=torch.int32, device=kv_lens.device)
    block_seqs = next_power_of_2(seqs)
    block = max(4096 // block_seqs, 1)
    _share_kernel[(-(-(seqs + spare) // block),)](
        kv_lens,
        programs,
        seqs,
        min(limit for limit in (window, top_k, 2**31 - 1) if limit is not None),
        _TILE if few else _LEAST,
        windowed=window is not None,
        spare=spare,
        tile=_TILE,
        columns=_COLUMNS,
        block_seqs=block_seqs,
        block=block,
        **launch_options(kv_lens.device),
    )
    return Parts(programs, arrivals)


@jit()
def load_part(programs, number):  # type: ignore[no-untyped-def]
    """Return what :class:`Parts` says of program ``number``."""
    place = programs + number * 5
    return tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3), tl.load(place + 4)


@jit()
def is_last(arrivals, place, count):  # type: ignore[no-untyped-def]
    """Return whether all ``count`` programs have stored their parts, this one last."""
    tl.debug_barrier()
    last = tl.atomic_add(arrivals + place, 1) == count - 1
    if last:
        tl.store(arrivals + place, 0)
    return last


@jit()
def weigh_parts(  # type: ignore[no-untyped-def]
    tops, sums, row, stride: constexpr, count, mine, block_parts: constexpr
):
    """Return the largest score of each row of all parts, and the sum of weights relative to it.

    Args:
        tops: float32 ``[programs, stride]``: what a part's scores were taken relative to.
        sums: float32 ``[programs, stride]``: of a part's weights.
        row: of the first part in these, ``[block_m]``.
        stride: query heads.
        count: parts.
        mine: ``[block_m]``: which rows there are.
        block_parts: a power of two that is at least ``count``.
    """
    part = tl.arange(0, block_parts)
    at = row[:, None] + (part * stride)[None, :]
    inside = mine[:, None] & (part < count)[None, :]
    top = tl.load(tops + at, mask=inside, other=-1e38, cache_modifier=".cg")
    total = tl.load(sums + at, mask=inside, other=0.0, cache_modifier=".cg")
    top_of_all = tl.max(top, 1)
    return top_of_all, tl.sum(total * tl.exp2(top - top_of_all[:, None]), 1)


@jit()
def add_parts(  # type: ignore[no-untyped-def]
    parts, tops, row, stride: constexpr, count, top_of_all, mine, dim, real, width: constexpr, at_once: constexpr
):
    """Return the sums of weighted values of all parts, ``[block_m, block]``, relative to ``top_of_all``.

    Args:
        parts: float32 ``[programs, stride, width]``.
        tops: this and what follows as of :func:`weigh_parts`.
        row: as there.
        stride: as there.
        count: as there.
        top_of_all: as it returns it.
        mine: as there.
        dim: elements of a row, ``[block]``.
        real: which of them there are.
        width: of a row.
        at_once: parts that are asked for together.
    """
    acc = tl.zeros([row.shape[0], dim.shape[0]], tl.float32)
    for first in range(0, count, at_once):
        for step in tl.static_range(at_once):
            number = tl.zeros_like(row) + (first + step)
            at = row + number * stride
            here = mine & (number < count)
            top = tl.load(tops + at, mask=here, other=-1e38, cache_modifier=".cg")
            part = tl.load(
                parts + at[:, None] * width + dim[None, :],
                mask=here[:, None] & real[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            acc += part * tl.exp2(top - top_of_all)[:, None]
    return acc


@jit(do_not_specialize=["seqs", "most", "least"])
def _share_kernel(  # type: ignore[no-untyped-def]
    kv_lens,
    programs,
    seqs,
    most,
    least,
    windowed: constexpr,
    spare: constexpr,
    tile: constexpr,
    columns: constexpr,
    block_seqs: constexpr,
    block: constexpr,
    early: constexpr,
):
    """Fill ``block`` entries of ``programs``."""
    # It lets no kernel start early: those after it read what it writes before they wait.
    if early:
        gdc_wait()
    index = tl.arange(0, block_seqs)
    length = tl.load(kv_lens + index, mask=index < seqs, other=0)
    keys = tl.minimum(length, most)
    share = tl.cdiv(tl.maximum(tl.cdiv(tl.sum(keys, 0), spare), least), tile) * tile
    count = tl.where(index < seqs, tl.maximum(tl.cdiv(keys, share), 1), 0)
    end = tl.cumsum(count, 0)
    number = tl.program_id(0) * block + tl.arange(0, block)
    seq = tl.sum((end[None, :] <= number[:, None]).to(tl.int32), 1)
    mine = index[None, :] == seq[:, None]
    parts = tl.sum(tl.where(mine, count[None, :], 0), 1)
    first_program = tl.sum(tl.where(mine, (end - count)[None, :], 0), 1)
    part = number - first_program
    seq_keys = tl.sum(tl.where(mine, keys[None, :], 0), 1)
    part_keys = tl.cdiv(tl.cdiv(seq_keys, tl.maximum(parts, 1)), tile) * tile
    first = part * part_keys
    last = tl.minimum(first + part_keys, seq_keys)
    if windowed:
        skipped = tl.sum(tl.where(mine, (length - keys)[None, :], 0), 1)
        first += skipped
        last += skipped
    inside = number < seqs + spare
    place = programs + number * columns
    tl.store(place, seq, mask=inside)
    tl.store(place + 1, first, mask=inside)
    tl.store(place + 2, last, mask=inside)
    tl.store(place + 3, parts, mask=inside)
    tl.store(place + 4, first_program, mask=inside)


@jit()
def join_sink(total, top, sinks, head, inside):  # type: ignore[no-untyped-def]
    """Return the sums of weights relative to the scores ``top``, with the heads' sinks where there are any.

    A sink far above every score overflows to infinity, and the division makes zero of the row, as it should be.
    """
    if sinks is not None:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        total = total + tl.exp2(sink - top)
    return total
