"""What a row may sample: top-k, top-p and min-p, as one threshold for its logits.

All three keep the most likely tokens, so that together they keep the logits at or above some value: the threshold. It
is found without sorting. Top-k wants the largest value at which the number of logits that are kept is at least k, top-p
that at which their probability is at least p; both are found digit by digit, from the highest, in the order-preserving
integer form of float32 (radix select: Alabi, Blanchard, Gordon and Steinbach, "Fast k-selection algorithms for graphics
processing units", 2012).

Probabilities are summed as integers: ``exp`` of a scaled logit's distance from the largest, in units of 2**-40.
Integer sums do not depend on their order, so neither the batch nor the split of a row decides what a row keeps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphmode.ops._checks import require_tensor
from graphmode.ops._triton import constexpr, jit, tl

# Lower temperatures mean greedy: dividing by them leaves nothing to noise.
MIN_TEMPERATURE = 1e-5

_INFINITY = float("inf")
_LARGEST = torch.finfo(torch.float32).max
_UNIT = 2.0**40
# The key of -inf: smaller ones belong to NaN.
_LOWEST_KEY = 0x007FFFFF


class Filters(NamedTuple):
    """What the rows of a batch may sample, one entry a row. Filters apply in this order: min-p, top-k, top-p.

    Tokens tied with the least likely one that is kept are kept too, all of them. The most likely token always is.

    Attributes:
        top_k: int32 ``[rows]``: keep the k most likely. Off where it is 0 or less, or at least the vocabulary.
        top_p: float32 ``[rows]``: of what the others keep, keep the fewest most likely tokens whose share of the
            probability is at least this. Off at 1 and above.
        min_p: float32 ``[rows]``: keep what is at least this many times as likely as the most likely. Off at 0.
    """

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


def require_filters(filters: Filters, logits: torch.Tensor) -> None:
    """Check the shapes, dtypes and devices of ``filters`` for ``logits``, ``[rows, vocab]``."""
    rows = logits.shape[:1]
    require_tensor("top_k", filters.top_k, shape=rows, dtypes=(torch.int32,), like=logits)
    require_tensor("top_p", filters.top_p, shape=rows, dtypes=(torch.float32,), like=logits)
    require_tensor("min_p", filters.min_p, shape=rows, dtypes=(torch.float32,), like=logits)


def threshold_reference(logits: torch.Tensor, temperature: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Return what a row's logits must reach to be kept, float32 ``[rows]``: -inf where no filter is on.

    Args:
        logits: ``[rows, vocab]``, any float dtype; NaN counts as -inf.
        temperature: float32 ``[rows]``: scales the logits before top-p and min-p.
        filters: the filters.
    """
    vocab = logits.shape[1]
    top_k, top_p, min_p = (column.unsqueeze(1) for column in filters)
    warmth = torch.where(temperature >= MIN_TEMPERATURE, temperature, 1.0).unsqueeze(1)
    values = logits.float().nan_to_num(nan=-_INFINITY, posinf=_LARGEST, neginf=-_INFINITY)
    top = values.amax(dim=1, keepdim=True).clamp_(min=-_LARGEST)
    keys = _flip(values + 0.0).long() + (1 << 31)  # + 0.0 makes -0.0, an equal, the same

    at_least = (top + min_p.clamp(0, 1).log() * warmth).nan_to_num(nan=-_INFINITY, neginf=-_INFINITY)
    kth = _largest_reaching(keys, torch.ones_like(keys), top_k.long())
    at_least = torch.where((top_k > 0) & (top_k < vocab), torch.maximum(at_least, kth), at_least)

    mass = ((values - top) * warmth.reciprocal()).exp_().nan_to_num_(nan=0.0).mul_(_UNIT).long()
    mass.mul_(values >= at_least)
    target = (top_p.double() * mass.sum(dim=1, keepdim=True)).ceil_().nan_to_num_(nan=1.0).long().clamp_(min=1)
    last = _largest_reaching(keys, mass, target)
    return torch.where(top_p < 1, torch.maximum(at_least, last), at_least).squeeze(1)


def _largest_reaching(keys: torch.Tensor, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the largest value at which the keys that are at least as large weigh at least ``target``.

    Args:
        keys: int64 ``[rows, vocab]``: 32 bits in the order of the values.
        weights: int64 ``[rows, vocab]``, none negative; overwritten.
        target: int64 ``[rows, 1]``.

    Returns:
        float32 ``[rows, 1]``: -inf where all of them do not weigh so much.
    """
    found = torch.zeros_like(target)
    above = torch.zeros_like(target)  # the weight of the keys that are larger than any with the digits found
    for shift, bits in ((21, 11), (10, 11), (0, 10)):
        digits = (keys >> shift).bitwise_and_((1 << bits) - 1)
        by_digit = torch.zeros((keys.shape[0], 1 << bits), dtype=torch.int64, device=keys.device)
        by_digit.scatter_add_(1, digits, weights)
        reaching = by_digit.flip(1).cumsum(1).flip(1).add_(above)
        digit = (reaching >= target).sum(dim=1, keepdim=True).sub_(1).clamp_(min=0)
        above = (reaching - by_digit).gather(1, digit)
        found = found | (digit << shift)
        weights.mul_(digits == digit)
    return _flip_back((found.clamp_(min=_LOWEST_KEY) - (1 << 31)).int())


def _flip(values: torch.Tensor) -> torch.Tensor:
    """Return int32 in the order of float32 values."""
    bits = values.view(torch.int32)
    return bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)


def _flip_back(keys: torch.Tensor) -> torch.Tensor:
    return (keys ^ (keys >> 31).bitwise_and_(0x7FFFFFFF)).view(torch.float32)


# Vocabulary entries that a Triton program takes at a time.
_BLOCK = 4096


def threshold_triton(logits: torch.Tensor, temperature: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Run :func:`threshold_reference` in Triton: what is returned may lie between two logits, but keeps the same.

    One program a row passes over it for each two bits of the threshold, and stops when one logit is left to find. It
    gives a row without a filter, and a greedy one, whose token every filter keeps, -inf at once.
    """
    rows, vocab = logits.shape
    threshold = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _threshold_kernel[(rows,)](
            logits,
            *logits.stride(),
            temperature,
            *filters,
            threshold,
            vocab,
            min_temperature=MIN_TEMPERATURE,
            block=_BLOCK,
            num_warps=16,
        )
    return threshold


@jit(do_not_specialize=["vocab"])
def _threshold_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride_row,
    logits_stride_vocab,
    temperature,
    top_k,
    top_p,
    min_p,
    threshold,
    vocab,
    min_temperature: constexpr,
    block: constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    warmth = tl.load(temperature + row)
    count = tl.load(top_k + row)
    share = tl.load(top_p + row)
    ratio = tl.load(min_p + row)
    by_count = (count > 0) & (count < vocab)
    by_mass = share < 1
    at_least = float("-inf")
    if (warmth >= min_temperature) & (by_count | by_mass | (ratio > 0)):
        values = logits + row * logits_stride_row
        lane = tl.arange(0, block)
        best = tl.full([block], float("-inf"), tl.float32)
        for start in range(0, vocab, block):
            best = tl.maximum(best, load_values(values, start + lane, logits_stride_vocab, vocab))
        top = tl.maximum(tl.max(best, 0), -3.4028234663852886e38)
        if ratio > 0:
            ratio_at = top + tl.log(tl.minimum(ratio, 1.0)) * warmth
            at_least = tl.where(ratio_at == ratio_at, ratio_at, at_least)
        if by_count:
            kth = largest_reaching_triton(
                values, logits_stride_vocab, vocab, top, 0.0, at_least, count.to(tl.int64), False, block
            )
            at_least = tl.maximum(at_least, kth)
        if by_mass:
            factor = 1.0 / warmth
            total = tl.zeros([block], tl.int64)
            for start in range(0, vocab, block):
                value = load_values(values, start + lane, logits_stride_vocab, vocab)
                total += _mass(value, top, factor, at_least)
            target = tl.ceil(tl.maximum(share, 0.0).to(tl.float64) * tl.sum(total, 0).to(tl.float64))
            target = tl.maximum(target.to(tl.int64), 1)
            last = largest_reaching_triton(
                values, logits_stride_vocab, vocab, top, factor, at_least, target, True, block
            )
            at_least = tl.maximum(at_least, last)
    tl.store(threshold + row, at_least)


@jit()
def largest_reaching_triton(  # type: ignore[no-untyped-def]
    values, stride, vocab, top, factor, at_least, target, by_mass: constexpr, block: constexpr
):
    """Run `_largest_reaching` for one row, whose logits weigh 1 each or their mass."""
    lane = tl.arange(0, block)
    found = tl.zeros([1], tl.uint32)
    shift = 30
    reaching = vocab  # logits at or above the digits found
    above = 0  # logits larger than any with the digits found
    while (shift >= 0) & (reaching - above > 1):
        first = tl.zeros([block], tl.int32)
        second = tl.zeros([block], tl.int32)
        third = tl.zeros([block], tl.int32)
        first_mass = tl.zeros([block], tl.int64)
        second_mass = tl.zeros([block], tl.int64)
        third_mass = tl.zeros([block], tl.int64)
        step = tl.full([1], 1, tl.uint32) << shift
        for start in range(0, vocab, block):
            index = start + lane
            value = load_values(values, index, stride, vocab)
            bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
            key = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)
            key = tl.where(index < vocab, key, 0)
            in_first = key >= found + step
            in_second = key >= found + 2 * step
            in_third = key >= found + 3 * step
            first += in_first.to(tl.int32)
            second += in_second.to(tl.int32)
            third += in_third.to(tl.int32)
            if by_mass:
                mass = _mass(value, top, factor, at_least)
                first_mass += tl.where(in_first, mass, 0)
                second_mass += tl.where(in_second, mass, 0)
                third_mass += tl.where(in_third, mass, 0)
        one = tl.sum(first, 0)
        two = tl.sum(second, 0)
        three = tl.sum(third, 0)
        if by_mass:
            reach_one = tl.sum(first_mass, 0) >= target
            reach_two = tl.sum(second_mass, 0) >= target
            reach_three = tl.sum(third_mass, 0) >= target
        else:
            reach_one = one >= target
            reach_two = two >= target
            reach_three = three >= target
        digit = reach_one.to(tl.uint32) + reach_two.to(tl.uint32) + reach_three.to(tl.uint32)
        above = tl.where(reach_three, above, tl.where(reach_two, three, tl.where(reach_one, two, one)))
        reaching = tl.where(reach_three, three, tl.where(reach_two, two, tl.where(reach_one, one, reaching)))
        found += digit * step
        shift -= 2
    key = tl.max(tl.maximum(found, 0x007FFFFF), 0).to(tl.int32, bitcast=True)
    return (key ^ ((~key >> 31) | -0x80000000)).to(tl.float32, bitcast=True)


@jit()
def load_values(values, index, stride, vocab):  # type: ignore[no-untyped-def]
    """Load logits as float32: NaN as -inf, and +inf as the largest finite number."""
    value = tl.load(values + index.to(tl.int64) * stride, mask=index < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(value == value, tl.minimum(value, 3.4028234663852886e38), float("-inf"))


@jit()
def _mass(value, top, factor, at_least):  # type: ignore[no-untyped-def]
    mass = tl.exp((value - top) * factor)
    return tl.where((value >= at_least) & (mass == mass), mass * 1099511627776.0, 0.0).to(tl.int64)
