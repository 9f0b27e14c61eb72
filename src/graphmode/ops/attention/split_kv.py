"""Split-KV: the keys of a decode batch are split among programs, on the device, by the lengths of the step.

A split has at most ``1 / spare`` of all keys, so that long contexts beside short ones are spread over the device, and
the short ones stay whole. Of ``seqs`` sequences there are then at most ``seqs + spare`` splits, whatever the lengths:
the number of programs, which a graph fixes. The partial results of one sequence are merged by a second kernel
(flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html), or by the last of its programs to finish.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphmode.ops._device import add_sink, softmax_average
from graphmode.ops._triton import constexpr, gdc_launch_dependents, gdc_wait, jit, launch_options, next_power_of_2, tl

# Programs that have a multiprocessor each on a large GPU (H100 and H200 have 132), or nearly.
_PROGRAMS = 128
_MAX_SPARE = 32
# Keys are split in whole tiles. Where the sequences fill the device, a split of fewer keys costs more than it gains.
_TILE = 64
_LEAST = 256


class SplitKVPlan(NamedTuple):
    """How the keys of a decode batch are split among programs.

    Attributes:
        splits: int32 ``[seqs + spare, 6]``: for each program the sequence, its first key, where its keys end, how many
            splits the sequence has (0: nothing to do), whether the sequence's newest key is among its keys, and which
            split of the sequence it is.
        split_seqs: int32 ``[min(seqs, spare), 3]``: the sequences of several splits: which one, its first program, how
            many splits; 0 where there is none.
        finished: int32 ``[seqs, kv_heads]``: zeros, for a sequence's programs to count those that have finished.
    """

    splits: torch.Tensor
    split_seqs: torch.Tensor
    finished: torch.Tensor


def plan_split_kv(
    kv_lens: torch.Tensor,
    kv_heads: int,
    *,
    window: int | None = None,
    top_k: int | None = None,
    spare: int | None = None,
) -> SplitKVPlan:
    """Split the keys of a decode batch, in Triton.

    Args:
        kv_lens: int32 ``[seqs]``: each sequence's length with its new token; 0 for padding, which is one split.
        kv_heads: each takes a program of each split.
        window: the last keys of a sequence that count.
        top_k: the first keys of a sequence that count: of a selection.
        spare: how many more splits than sequences there may be, 1 or more; default by shapes.
    """
    seqs = len(kv_lens)
    filling = max(_PROGRAMS // kv_heads, 1)
    few = seqs <= filling
    if spare is None:
        spare = min(filling if few else 2 * filling, _MAX_SPARE)
    shapes = (seqs + spare, 6), (min(seqs, spare), 3), (seqs, kv_heads)
    plan = SplitKVPlan(*(torch.empty(shape, dtype=torch.int32, device=kv_lens.device) for shape in shapes))
    block_seqs = next_power_of_2(seqs)
    block = min(max(4096 // block_seqs, 1), next_power_of_2(seqs + spare))
    _plan_kernel[(-(-(seqs + spare) // block),)](
        kv_lens,
        *plan,
        seqs,
        min(limit for limit in (window, top_k, 2**31 - 1) if limit is not None),
        _TILE if few else _LEAST,
        kv_heads=kv_heads,
        windowed=window is not None,
        longest_first=not few,
        spare=spare,
        tile=_TILE,
        block_seqs=block_seqs,
        block_spare=next_power_of_2(len(plan.split_seqs)),
        block=block,
        **launch_options(kv_lens.device),
    )
    return plan


def new_partials(plan: SplitKVPlan, q_heads: int, value_dim: int) -> tuple[torch.Tensor, ...]:
    """Return memory for the partial results of splits.

    Returns:
        float32: ``[programs, q_heads, value_dim]``, sums of weighted values; ``[programs, q_heads]``, the largest
        scores, which weights are relative to; and ``[programs, q_heads]``, sums of weights, 0 for a split without keys.
    """
    programs, device = len(plan.splits), plan.splits.device
    accs = torch.empty((programs, q_heads, value_dim), dtype=torch.float32, device=device)
    return accs, *torch.empty((2, programs, q_heads), dtype=torch.float32, device=device)


def merge_splits(
    partials: tuple[torch.Tensor, ...], sinks: torch.Tensor | None, out: torch.Tensor, plan: SplitKVPlan
) -> None:
    """Merge the partial results of the sequences of several splits, in Triton; the others' rows are in ``out`` already.

    Args:
        partials: as :func:`new_partials` has them.
        sinks: as of :class:`~graphmode.ops.Scoring`.
        out: ``[seqs, q_heads, value_dim]``.
        plan: of the batch.
    """
    q_heads, value_dim = out.shape[1:]
    block_splits = next_power_of_2(len(plan.splits) - len(out))
    _merge_kernel[(len(plan.split_seqs), q_heads)](
        *partials,
        sinks,
        out,
        plan.split_seqs,
        q_heads=q_heads,
        value_dim=value_dim,
        block_v=max(16, next_power_of_2(value_dim)),
        block_splits=block_splits,
        num_warps=4 if value_dim * block_splits > 2048 else 1,
        **launch_options(out.device),
    )


@jit(do_not_specialize=["seqs", "most", "least"])
def _plan_kernel(  # type: ignore[no-untyped-def]
    kv_lens,
    splits,
    split_seqs,
    finished,
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
    """Fill ``block`` entries of ``splits`` and ``finished``, and the first program those of ``split_seqs``."""
    if early:
        gdc_wait()
    index = tl.arange(0, block_seqs)
    length = tl.load(kv_lens + index, mask=index < seqs, other=0)
    keys = tl.minimum(length, most)
    share = tl.cdiv(tl.maximum(tl.cdiv(tl.sum(keys, 0), spare), least), tile) * tile
    if longest_first:
        split_keys = tl.cdiv(keys, tl.maximum(tl.cdiv(keys, share), 1))
        ranked = tl.where(index < seqs, split_keys.to(tl.int64) * block_seqs + block_seqs - 1 - index, -1)
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
    in_all = tl.sum(tl.where(mine, count[None, :], 0), 1)
    which_split = number - tl.sum(tl.where(mine, (end - count)[None, :], 0), 1)
    seq_keys = tl.sum(tl.where(mine, keys[None, :], 0), 1)
    split_keys = tl.cdiv(tl.cdiv(seq_keys, tl.maximum(in_all, 1)), tile) * tile
    first = which_split * split_keys
    last = tl.minimum(first + split_keys, seq_keys)
    if windowed:
        skipped = tl.sum(tl.where(mine, (length - keys)[None, :], 0), 1)
        first += skipped
        last += skipped
    inside = number < seqs + spare
    place = splits + number * 6
    tl.store(place, seq, mask=inside)
    tl.store(place + 1, first, mask=inside)
    tl.store(place + 2, last, mask=inside)
    tl.store(place + 3, in_all, mask=inside)
    tl.store(place + 4, ((which_split == in_all - 1) & (seq_keys > 0)).to(tl.int32), mask=inside)
    tl.store(place + 5, which_split, mask=inside)
    for kv_head in tl.static_range(kv_heads):
        tl.store(finished + number * kv_heads + kv_head, 0, mask=number < seqs)
    if tl.program_id(0) == 0:
        nth = tl.arange(0, block_spare)
        chosen = (count > 1)[None, :] & (tl.cumsum((count > 1).to(tl.int32), 0)[None, :] == nth[:, None] + 1)
        room = nth < tl.minimum(seqs, spare)
        tl.store(split_seqs + nth * 3, tl.sum(tl.where(chosen, which[None, :], 0), 1), mask=room)
        tl.store(split_seqs + nth * 3 + 1, tl.sum(tl.where(chosen, (end - count)[None, :], 0), 1), mask=room)
        tl.store(split_seqs + nth * 3 + 2, tl.sum(tl.where(chosen, count[None, :], 0), 1), mask=room)
    # The next kernel reads this before it waits. So it may not start early, and all must be in L2 when it does.
    if early:
        tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@jit()
def _merge_kernel(  # type: ignore[no-untyped-def]
    accs,
    tops,
    sums,
    sinks,
    out,
    split_seqs,
    q_heads: constexpr,
    value_dim: constexpr,
    block_v: constexpr,
    block_splits: constexpr,
    early: constexpr,
):
    """Merge the partial results of one query head of one sequence."""
    if early:
        gdc_launch_dependents()
    place = split_seqs + tl.program_id(0) * 3
    seq = tl.load(place)
    first = tl.load(place + 1)
    number = tl.load(place + 2)
    if early:
        gdc_wait()
    if number == 0:
        return
    head = tl.program_id(1)
    split = tl.arange(0, block_splits)
    row = (first + split).to(tl.int64) * q_heads + head
    total = tl.load(sums + row, mask=split < number, other=0.0)
    used = total > 0.0
    top = tl.load(tops + row, mask=used, other=-1e38)
    top_of_all = tl.max(top, 0)
    weight = tl.where(used, tl.exp2(top - top_of_all), 0.0)
    dim = tl.arange(0, block_v)
    inside = dim < value_dim
    acc = tl.load(accs + row[:, None] * value_dim + dim[None, :], mask=used[:, None] & inside[None, :], other=0.0)
    total_of_all = add_sink(tl.sum(total * weight, 0), top_of_all, sinks, head, True)
    acc = softmax_average(tl.sum(acc * weight[:, None], 0), total_of_all)
    target = out + (seq.to(tl.int64) * q_heads + head) * value_dim + dim
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)
