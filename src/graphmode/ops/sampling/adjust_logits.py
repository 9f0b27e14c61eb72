"""Adjust logits before sampling: bias, penalties, and stop tokens that may not come yet.

In this order, as in vLLM: the bias is added; the repetition penalty divides positive and multiplies negative logits of
tokens that the prompt or the output had (Keskar et al., "CTRL", 2019, as Hugging Face and vLLM apply it); the frequency
penalty is subtracted for each time that the output had the token and the presence penalty once (as OpenAI's API defines
them); stop tokens that may not come yet get -inf.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphmode.ops._checks import FLOATS, require_tensor
from graphmode.ops._triton import constexpr, jit, next_power_of_2, runs_triton, tl
from graphmode.ops.sampling.token_counts import require_history

_BLOCK = 1024


class Adjustments(NamedTuple):
    """How the logits of each row of a batch are adjusted.

    Attributes:
        repetition_penalty: float32 ``[rows]``, above 0. Off at 1.
        presence_penalty: float32 ``[rows]``. Off at 0.
        frequency_penalty: float32 ``[rows]``. Off at 0.
        bias_ids: int64 ``[rows, max_bias]``: distinct tokens in the vocabulary, and -1 for unused places.
        bias: float32 ``[rows, max_bias]``: what is added to their logits; anything at unused places.
        stop_ids: int64 ``[rows, max_stop]``: tokens in the vocabulary, and -1 for unused places.
        stop_from: int64 ``[rows]``: the first position at which the row may draw its stop tokens: the prompt's length
            and the minimum of output tokens. Off at 0.
    """

    repetition_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    bias_ids: torch.Tensor
    bias: torch.Tensor
    stop_ids: torch.Tensor
    stop_from: torch.Tensor


def adjust_logits(
    logits: torch.Tensor,
    positions: torch.Tensor,
    history: torch.Tensor,
    state_indices: torch.Tensor,
    adjustments: Adjustments,
) -> torch.Tensor:
    """Return adjusted logits; a row without adjustments keeps its own.

    Args:
        logits: ``[rows, vocab]``, float32, bfloat16 or float16, with any strides.
        positions: int64 ``[rows]``: the position in its sequence of the token that is drawn. Where it is 0 or less, a
            row is padding: its logits are not read, and what is returned for it is undefined.
        history: int32 ``[states, vocab]``, contiguous: the tokens of the running sequences
            (:mod:`graphmode.ops.sampling.token_counts`).
        state_indices: int64 ``[rows]``: of each row's sequence; -1 for a row without penalties and for padding.
        adjustments: the adjustments.

    Returns:
        float32 ``[rows, vocab]``, contiguous.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor("logits", logits, shape=(None, None), dtypes=FLOATS, like=logits)
    rows = logits.shape[0]
    require_tensor("positions", positions, shape=(rows,), dtypes=(torch.int64,), like=logits)
    require_history(history, vocab=logits.shape[1], like=logits)
    require_tensor("state_indices", state_indices, shape=(rows,), dtypes=(torch.int64,), like=logits)
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        require_tensor(name, getattr(adjustments, name), shape=(rows,), dtypes=(torch.float32,), like=logits)
    require_tensor("bias_ids", adjustments.bias_ids, shape=(rows, None), dtypes=(torch.int64,), like=logits)
    require_tensor("bias", adjustments.bias, shape=adjustments.bias_ids.shape, dtypes=(torch.float32,), like=logits)
    require_tensor("stop_ids", adjustments.stop_ids, shape=(rows, None), dtypes=(torch.int64,), like=logits)
    require_tensor("stop_from", adjustments.stop_from, shape=(rows,), dtypes=(torch.int64,), like=logits)
    adjust = adjust_logits_triton if runs_triton(logits) else adjust_logits_reference
    return adjust(logits, positions, history, state_indices, adjustments)


def adjust_logits_reference(
    logits: torch.Tensor,
    positions: torch.Tensor,
    history: torch.Tensor,
    state_indices: torch.Tensor,
    adjustments: Adjustments,
) -> torch.Tensor:
    """Run :func:`adjust_logits` in PyTorch. An unused place of a list adds 0 to token 0."""
    repetition, presence, frequency = (penalty.unsqueeze(1) for penalty in adjustments[:3])
    used = adjustments.bias_ids >= 0
    barred = (adjustments.stop_ids >= 0) & (positions < adjustments.stop_from).unsqueeze(1)
    values = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    values.scatter_add_(1, adjustments.bias_ids.clamp(min=0), torch.where(used, adjustments.bias, 0.0))

    had = history.index_select(0, state_indices.clamp(min=0)).mul_((state_indices >= 0).unsqueeze(1))
    factor = torch.where(values > 0, repetition.reciprocal(), repetition)
    values.mul_(torch.where(had > 0, factor, 1.0))
    count = had >> 1
    values.sub_(frequency * count).sub_(presence * (count > 0))
    return values.scatter_add_(1, adjustments.stop_ids.clamp(min=0), torch.where(barred, -float("inf"), 0.0))


def adjust_logits_triton(
    logits: torch.Tensor,
    positions: torch.Tensor,
    history: torch.Tensor,
    state_indices: torch.Tensor,
    adjustments: Adjustments,
) -> torch.Tensor:
    """Run :func:`adjust_logits` in Triton: one kernel for all logits, then one for those that lists name.

    A state index or a token that does not exist, the caller's error, is left out.
    """
    rows, vocab = logits.shape
    adjusted = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device)
    if rows == 0:
        return adjusted
    penalties = (history, state_indices, *adjustments[:3])
    _penalise_kernel[(rows, -(-vocab // _BLOCK))](
        logits, *logits.stride(), *penalties, adjusted, history.shape[0], vocab, positions, block=_BLOCK
    )
    max_bias, max_stop = adjustments.bias_ids.shape[1], adjustments.stop_ids.shape[1]
    if max_bias or max_stop:
        _adjust_listed_kernel[(rows,)](
            logits,
            *logits.stride(),
            *penalties,
            adjusted,
            history.shape[0],
            vocab,
            positions,
            *(tensor.contiguous() for tensor in adjustments[3:]),
            max_bias,
            max_stop,
            bias_block=next_power_of_2(max(max_bias, 1)),
            stop_block=next_power_of_2(max(max_stop, 1)),
        )
    return adjusted


@jit(do_not_specialize=["states", "vocab"])
def _penalise_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride_row,
    logits_stride_vocab,
    history,
    state_indices,
    repetition,
    presence,
    frequency,
    adjusted,
    states,
    vocab,
    positions,
    block: constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * block + tl.arange(0, block)
    inside = index < tl.where(tl.load(positions + row) > 0, vocab, 0)
    value = tl.load(
        logits + row * logits_stride_row + index.to(tl.int64) * logits_stride_vocab, mask=inside, other=0.0
    ).to(tl.float32)
    value = _penalise(value, index, inside, row, history, state_indices, repetition, presence, frequency, states, vocab)
    tl.store(adjusted + row * vocab + index, value, mask=inside)


@jit(do_not_specialize=["states", "vocab", "max_bias", "max_stop"])
def _adjust_listed_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride_row,
    logits_stride_vocab,
    history,
    state_indices,
    repetition,
    presence,
    frequency,
    adjusted,
    states,
    vocab,
    positions,
    bias_ids,
    bias,
    stop_ids,
    stop_from,
    max_bias,
    max_stop,
    bias_block: constexpr,
    stop_block: constexpr,
):
    """Compute the logits of one row's biased tokens anew, then bar its stop tokens."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, bias_block)
    index = tl.load(bias_ids + row * max_bias + place, mask=place < max_bias, other=-1)
    used = (index >= 0) & (index < vocab)
    index = tl.where(used, index, 0)
    value = tl.load(logits + row * logits_stride_row + index * logits_stride_vocab, mask=used, other=0.0)
    value = value.to(tl.float32) + tl.load(bias + row * max_bias + place, mask=used, other=0.0)
    value = _penalise(value, index, used, row, history, state_indices, repetition, presence, frequency, states, vocab)
    tl.store(adjusted + row * vocab + index, value, mask=used)
    tl.debug_barrier()  # a biased token may be a stop token too
    place = tl.arange(0, stop_block)
    index = tl.load(stop_ids + row * max_stop + place, mask=place < max_stop, other=-1)
    barrable = tl.where(tl.load(positions + row) < tl.load(stop_from + row), vocab, 0)
    barred = (index >= 0) & (index < barrable)
    index = tl.where(barred, index, 0)
    tl.store(adjusted + row * vocab + index, tl.full([stop_block], float("-inf"), tl.float32), mask=barred)


@jit()
def _penalise(  # type: ignore[no-untyped-def]
    value, index, inside, row, history, state_indices, repetition, presence, frequency, states, vocab
):
    state = tl.load(state_indices + row)
    recorded = tl.where((state >= 0) & (state < states), vocab, 0)
    known = inside & (index < recorded)
    had = tl.load(history + tl.where(known, state * vocab + index, 0), mask=known, other=0)
    factor = tl.load(repetition + row)
    factor = tl.where(value > 0, 1.0 / factor, factor)
    value = value * tl.where(had > 0, factor, 1.0)
    count = had >> 1
    value = value - tl.load(frequency + row) * count.to(tl.float32)
    return value - tl.where(count > 0, tl.load(presence + row), 0.0)
