"""Log-probabilities of the chosen tokens and of the most likely ones."""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphmode.ops._checks import FLOATS, require, require_tensor
from graphmode.ops._triton import constexpr, jit, runs_triton, tl


class LogProbabilities(NamedTuple):
    """What :func:`log_probabilities` returns. Rows come in order, tokens from the most likely on.

    Attributes:
        chosen: float32 ``[rows]``: of the chosen tokens; -inf where nothing is wanted.
        rank: int64 ``[rows]``: the chosen tokens' places among all, from 1; 0 where nothing is wanted.
        top_ids: int64 ``[rows, top_n]``: the most likely tokens; -1 beyond as many as the row wants.
        top: float32 ``[rows, top_n]``: theirs; -inf beyond.
    """

    chosen: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor, wanted: torch.Tensor, top_n: int) -> LogProbabilities:
    """Return the log-probabilities in the softmax of ``logits``: the chosen tokens' and the highest.

    Given the model's logits, before temperature and adjustments, they are those of OpenAI's API and vLLM's default.

    Args:
        logits: ``[rows, vocab]``, float32, bfloat16 or float16, with any strides. NaN counts as -inf. Among equals,
            lower indexes come first.
        tokens: int64 ``[rows]``: the chosen tokens, in the vocabulary.
        wanted: int32 ``[rows]``: how many of the most likely tokens each row wants; more than ``top_n`` is ``top_n``.
            Less than 0 wants nothing, not even the chosen token's: the row is not read.
        top_n: the most that a row may want: a graph holds it.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``top_n`` is not from 0 to the vocabulary's size.
    """
    require_tensor("logits", logits, shape=(None, None), dtypes=FLOATS, like=logits)
    require_tensor("tokens", tokens, shape=logits.shape[:1], dtypes=(torch.int64,), like=logits)
    require_tensor("wanted", wanted, shape=logits.shape[:1], dtypes=(torch.int32,), like=logits)
    require(0 <= top_n <= logits.shape[1], "top_n", top_n, f"0 to {logits.shape[1]}, the vocabulary")
    compute = log_probabilities_triton if runs_triton(logits) else log_probabilities_reference
    return compute(logits, tokens, wanted, top_n)


def log_probabilities_reference(
    logits: torch.Tensor, tokens: torch.Tensor, wanted: torch.Tensor, top_n: int
) -> LogProbabilities:
    """Run :func:`log_probabilities` in PyTorch: an integer key that holds the index too leaves no equals."""
    infinity = float("inf")
    values = logits.float().nan_to_num(nan=-infinity, posinf=infinity, neginf=-infinity).add_(0.0)
    bits = values.view(torch.int32)
    keys = (bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)).long().bitwise_left_shift_(32)
    keys -= torch.arange(values.shape[1], device=values.device)
    chosen = tokens.unsqueeze(1)
    rank = (keys > keys.gather(1, chosen)).sum(dim=1).add_(1)
    top_ids = keys.topk(top_n, dim=1).indices
    logs = values.log_softmax(1)
    read = wanted >= 0
    kept = torch.arange(top_n, device=values.device) < wanted.unsqueeze(1)
    return LogProbabilities(
        chosen=torch.where(read, logs.gather(1, chosen).squeeze(1), -infinity),
        rank=torch.where(read, rank, 0),
        top_ids=torch.where(kept, top_ids, -1),
        top=torch.where(kept, logs.gather(1, top_ids), -infinity),
    )


_BLOCK = 4096


def log_probabilities_triton(
    logits: torch.Tensor, tokens: torch.Tensor, wanted: torch.Tensor, top_n: int
) -> LogProbabilities:
    """Run :func:`log_probabilities` in Triton: a program a row passes over it once, and once for each of the wanted.

    A chosen token beyond the vocabulary, the caller's error, counts as one with a logit of -inf.
    """
    rows, vocab = logits.shape
    device = logits.device
    result = LogProbabilities(
        chosen=torch.full((rows,), -float("inf"), dtype=torch.float32, device=device),
        rank=torch.zeros(rows, dtype=torch.int64, device=device),
        top_ids=torch.full((rows, top_n), -1, dtype=torch.int64, device=device),
        top=torch.full((rows, top_n), -float("inf"), dtype=torch.float32, device=device),
    )
    if rows:
        _log_probabilities_kernel[(rows,)](
            logits, *logits.stride(), tokens, wanted, *result, vocab, top_n, block=_BLOCK, num_warps=16
        )
    return result


@jit(do_not_specialize=["vocab", "top_n"])
def _log_probabilities_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride_row,
    logits_stride_vocab,
    tokens,
    wanted,
    chosen,
    rank,
    top_ids,
    top,
    vocab,
    top_n,
    block: constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(wanted + row)
    if count < 0:
        return
    values = logits + row * logits_stride_row
    token = tl.load(tokens + row)
    real = (token >= 0) & (token < vocab)
    token_value = tl.load(values + token * logits_stride_vocab, mask=real, other=float("-inf")).to(tl.float32)
    token_value = tl.where(token_value == token_value, token_value, float("-inf"))
    lane = tl.arange(0, block)
    highest = tl.full([block], float("-inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    before = tl.zeros([block], tl.int32)
    for start in range(0, vocab, block):
        index = start + lane
        value = _load(values, index, logits_stride_vocab, vocab)
        higher = tl.maximum(highest, value)
        # Where nothing was finite yet, there is nothing to scale: exp(-inf - -inf) would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.exp(value - base)
        highest = higher
        first = (value > token_value) | ((value == token_value) & (index < token))
        before += (first & (index < vocab)).to(tl.int32)
    peak = tl.max(highest, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    log_total = tl.log(tl.sum(total * tl.exp(highest - base), 0)) + base
    tl.store(chosen + row, token_value - log_total)
    tl.store(rank + row, tl.sum(before, 0).to(tl.int64) + 1)

    last_value = float("inf")
    last_index = -1
    for place in range(tl.minimum(count, top_n)):
        best = tl.full([block], float("-inf"), tl.float32)
        best_at = tl.full([block], 0x7FFFFFFF, tl.int32)
        for start in range(0, vocab, block):
            index = start + lane
            value = _load(values, index, logits_stride_vocab, vocab)
            after = (value < last_value) | ((value == last_value) & (index > last_index))
            # The first of a lane's equals has the lowest index; -inf is better than nothing.
            better = after & (index < vocab) & ((value > best) | (best_at == 0x7FFFFFFF))
            best = tl.where(better, value, best)
            best_at = tl.where(better, index, best_at)
        last_value = tl.max(best, 0)
        last_index = tl.min(tl.where(best == last_value, best_at, 0x7FFFFFFF), 0)
        tl.store(top_ids + row * top_n + place, last_index.to(tl.int64))
        tl.store(top + row * top_n + place, last_value - log_total)


@jit()
def _load(values, index, stride, vocab):  # type: ignore[no-untyped-def]
    value = tl.load(values + index.to(tl.int64) * stride, mask=index < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(value == value, value, float("-inf"))
