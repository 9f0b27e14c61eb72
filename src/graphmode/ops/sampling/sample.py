"""Sample the next tokens from logits, with noise that belongs to the request and not to the batch.

A row's token is ``argmax(logits / temperature + noise)`` with Gumbel noise, which draws from the softmax of ``logits
/ temperature`` without computing it. Filters leave out the logits below a row's threshold
(:mod:`graphmode.ops.sampling.filters`), which draws from the softmax over the others with the same noise. The noise
is no random state but a hash of the request's seed, the token's position and the vocabulary index. So a seeded
request gets the same tokens alone, in any row of any batch, in any bucket, captured or not, and replay cannot repeat
it: the position moves on.

The hash: seed and position become a 64-bit key by splitmix64's finaliser. Half of the key multiplies the vocabulary
index (made odd) and half is added, modulo 2**32; a 32-bit finaliser then mixes the sum. The top 23 of its bits are a
uniform number that float32 holds exactly and that is neither 0 nor 1. Both implementations compute the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from graphmode.ops._checks import FLOATS, require, require_tensor
from graphmode.ops._cpu import cpu_operator, loops, runs_on_host
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
from graphmode.ops.sampling.filters import (
    MIN_TEMPERATURE,
    Filters,
    require_filters,
    threshold_reference,
    threshold_triton,
)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    filters: Filters | None = None,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token for each row.

    Args:
        logits: ``[seqs, vocab]``, float32, bfloat16 or float16. A token with a logit of -inf is never drawn; NaN counts
            as -inf, and a row without any other value gives token 0.
        temperature: float32 ``[states]``. Below 1e-5, 0 included, a row is greedy: the highest logit, the lowest index
            among equals.
        seeds: int64 ``[states]``: all bits count.
        positions: int64 or int32 ``[seqs]``: the position in its sequence of the token that is drawn. No text begins
            with a drawn token: 0 or less is a padding row, which gets token 0, and whose logits are not read.
        filters: the rows' top-k, top-p and min-p. A row whose filters are all off gets the token that it gets without
            them. None spares their work where no row will ever filter.
        state_indices: int64 ``[seqs]``: which entry of ``temperature`` and ``seeds`` is a row's, without
            ``filters``. None: the entry of the row's own number.

    Returns:
        int64 ``[seqs]``: always in the vocabulary, for padding rows too, whatever they hold.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor("logits", logits, shape=(None, None), dtypes=FLOATS, like=logits)
    rows = logits.shape[:1]
    given = rows if state_indices is None else (None,)
    require_tensor("temperature", temperature, shape=given, dtypes=(torch.float32,), like=logits)
    require_tensor("seeds", seeds, shape=temperature.shape, dtypes=(torch.int64,), like=logits)
    require_tensor("positions", positions, shape=rows, dtypes=(torch.int64, torch.int32), like=logits)
    if logits.shape[1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected a vocabulary of at least one token")
    if filters is not None:
        require_filters(filters, logits)
        require(state_indices is None, "state_indices", "given", "None with filters")
    if state_indices is not None:
        require_tensor("state_indices", state_indices, shape=rows, dtypes=(torch.int64,), like=logits)
    draw = sample_triton if runs_triton(logits) else sample_cpu if runs_on_host(logits) else sample_reference
    return draw(logits, temperature, seeds, positions, filters, state_indices)


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    filters: Filters | None = None,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run :func:`sample` in PyTorch."""
    if state_indices is not None:
        temperature, seeds = temperature.index_select(0, state_indices), seeds.index_select(0, state_indices)
    random = (temperature >= MIN_TEMPERATURE).unsqueeze(1)
    scores = logits.float() * torch.where(random, temperature.unsqueeze(1), 1.0).reciprocal()
    log_rate = uniform_reference(seeds, positions, logits.shape[1]).log_().neg_().log_()
    scores = torch.addcmul(scores, log_rate, random.float(), value=-1.0)
    infinity = float("inf")
    if filters is not None:
        threshold = threshold_reference(logits, temperature, filters).unsqueeze(1)
        scores = torch.where(logits >= threshold, scores, -infinity)
    tokens = scores.nan_to_num_(nan=-infinity, posinf=infinity, neginf=-infinity).argmax(dim=1)
    return torch.where(positions > 0, tokens, 0)


@cpu_operator(
    "sample_on_cpu(Tensor logits, Tensor temperature, Tensor seeds, Tensor positions, Tensor state_indices, "
    "Tensor(a!) out)"
)
def _sample_on_cpu(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    state_indices: torch.Tensor,
    out: torch.Tensor,
) -> Callable[[], object]:
    parameters = (temperature.numpy(), seeds.numpy(), positions.numpy(), state_indices.numpy())
    return partial(loops().sample, logits.numpy(), *parameters, MIN_TEMPERATURE, out.numpy())


def sample_cpu(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    filters: Filters | None = None,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run :func:`sample` by a loop on the CPU, in float32."""
    if filters is not None:
        threshold = threshold_reference(logits, temperature, filters).unsqueeze(1)
        logits = torch.where(logits >= threshold, logits, float("-inf"))
    if state_indices is None:
        state_indices = torch.arange(len(logits))
    out = torch.empty(len(logits), dtype=torch.int64)
    _sample_on_cpu(logits.contiguous(), temperature, seeds, positions.long(), state_indices, out)
    return out


def uniform_reference(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Return the uniform numbers in (0, 1) behind the noise of each row, float32 ``[seqs, vocab]``."""
    key = _mix64(_mix64(seeds) + positions.long())
    factor = (key >> 32).to(torch.int32).bitwise_or_(1).unsqueeze(1)
    offset = key.to(torch.int32).unsqueeze(1)
    bits = torch.arange(vocab, dtype=torch.int32, device=seeds.device) * factor
    bits += offset
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= 0x7FEB352D
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= 0x846CA68B - (1 << 32)
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return ((bits >> 9).bitwise_and_(0x7FFFFF)).float().mul_(2.0**-23).add_(2.0**-24)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """Mix the bits of int64 values: splitmix64. Arithmetic wraps; shifts are made logical by the masks."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return x ^ ((x >> 31) & ((1 << 33) - 1))


# Vocabulary entries that a Triton program takes at a time, how many times that is in flight at once (one of them being
# computed with), and programs that fill a large GPU.
_BLOCK = 256
_STAGES = 4
_FULL_GRID = 2048


def sample_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    filters: Filters | None = None,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run :func:`sample` in Triton: one pass over the logits, in parts, then a small kernel picks the best part.

    With filters, another kernel finds the rows' thresholds first.
    """
    seqs, vocab = logits.shape
    tokens = torch.empty(seqs, dtype=torch.int64, device=logits.device)
    if seqs == 0:
        return tokens
    blocks = -(-vocab // _BLOCK)
    part = -(-blocks // max(_FULL_GRID // seqs, 1)) * _BLOCK
    parts = -(-vocab // part)
    best_score = torch.empty((seqs, parts), dtype=torch.float32, device=logits.device)
    best_index = torch.empty((seqs, parts), dtype=torch.int32, device=logits.device)
    _sample_part_kernel[(seqs, parts)](
        logits,
        *logits.stride(),
        temperature,
        seeds,
        state_indices,
        positions,
        None if filters is None else threshold_triton(logits, temperature, filters),
        best_score,
        best_index,
        vocab,
        part,
        min_temperature=MIN_TEMPERATURE,
        block=_BLOCK,
        stages=_STAGES,
        num_warps=1,
        **launch_options(logits.device),
    )
    _pick_part_kernel[(seqs,)](
        best_score, best_index, tokens, parts, block=next_power_of_2(parts), **launch_options(logits.device)
    )
    return tokens


def uniform_triton(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Run :func:`uniform_reference` in Triton. Sampling computes these numbers in place; this is for tests."""
    out = torch.empty((seeds.shape[0], vocab), dtype=torch.float32, device=seeds.device)
    _uniform_kernel[(seeds.shape[0], -(-vocab // _BLOCK))](seeds, positions, out, vocab, block=_BLOCK)
    return out


@jit()
def _sample_part_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride_row,
    logits_stride_vocab,
    temperature,
    seeds,
    state_indices,
    positions,
    threshold,
    best_score,
    best_index,
    vocab,
    part,
    min_temperature: constexpr,
    block: constexpr,
    stages: constexpr,
    early: constexpr,
):
    """Find the highest score, and its lowest index, in one part of one row."""
    if early:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * part
    position = tl.load(positions + row)
    end = tl.where(position > 0, tl.minimum(start + part, vocab), 0)
    state = row
    if state_indices is not None:
        state = tl.load(state_indices + row)
    warmth = tl.load(temperature + state)
    random = warmth >= min_temperature
    factor = 1.0 / tl.where(random, warmth, 1.0)
    key = _key(tl.load(seeds + state), position)
    lane = tl.arange(0, block)
    best = tl.full([block], float("-inf"), tl.float32)
    best_at = start + lane
    bound = float("-inf")
    for tile in tl.range(start, end, block, num_stages=stages):
        index = tile + lane
        value = tl.load(
            logits + row * logits_stride_row + index.to(tl.int64) * logits_stride_vocab,
            mask=index < end,
            other=float("-inf"),
        )
        score = value.to(tl.float32) * factor
        may_win = True
        if random:
            # -log(uniform) is at least 1 - uniform: where that is too much, the logarithms can be spared.
            uniform = _uniform(key, index)
            too_low = 1.0 - uniform > tl.exp(score - bound)
            may_win = tl.min(too_low.to(tl.int32), 0) == 0
        if may_win:
            if random:
                score -= tl.log(-tl.log(_uniform(key, index)))
            if threshold is not None:
                score = tl.where(value.to(tl.float32) >= tl.load(threshold + row), score, float("-inf"))
            better = score > best  # False for NaN
            best = tl.where(better, score, best)
            best_at = tl.where(better, index, best_at)
            if random:
                top = tl.max(best, 0)
                bound = top - (1e-3 + 1e-6 * tl.abs(top))  # lower, for scores are rounded
    top = tl.max(best, 0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_score + place, top)
    tl.store(best_index + place, tl.min(tl.where(best == top, best_at, 0x7FFFFFFF), 0))


@jit(do_not_specialize=["parts"])
def _pick_part_kernel(  # type: ignore[no-untyped-def]
    best_score, best_index, tokens, parts, block: constexpr, early: constexpr
):
    if early:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, block)
    score = tl.load(best_score + row * parts + part, mask=part < parts, other=float("-inf"))
    index = tl.load(best_index + row * parts + part, mask=part < parts, other=0x7FFFFFFF)
    top = tl.max(score, 0)
    tl.store(tokens + row, tl.min(tl.where(score == top, index, 0x7FFFFFFF), 0).to(tl.int64))


@jit()
def _uniform_kernel(seeds, positions, out, vocab, block: constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * block + tl.arange(0, block)
    key = _key(tl.load(seeds + row), tl.load(positions + row))
    tl.store(out + row * vocab + index, _uniform(key, index), mask=index < vocab)


@jit()
def _key(seed, position):  # type: ignore[no-untyped-def]
    return _mix64_triton(_mix64_triton(seed.to(tl.uint64)) + position.to(tl.uint64))


@jit()
def _mix64_triton(x):  # type: ignore[no-untyped-def]
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit()
def _uniform(key, index):  # type: ignore[no-untyped-def]
    bits = index.to(tl.uint32) * ((key >> 32).to(tl.uint32) | 1) + key.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    return (bits >> 9).to(tl.float32) * 1.1920928955078125e-07 + 5.9604644775390625e-08
