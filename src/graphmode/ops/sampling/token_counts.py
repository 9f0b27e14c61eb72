"""Which tokens a sequence has had: what penalties are computed from, kept on the device.

The history is one int32 tensor ``[states, vocab]``, a row for the state index of each running sequence. An entry is
twice the number of times that its output had the token, plus 1 if the prompt had it. So one tensor, and one load,
answers both questions.
Index -1 stands for no history: padding, rows that sample nothing in this step, sequences without penalties.
"""

from __future__ import annotations

import torch

from graphmode.ops._checks import require, require_contiguous, require_tensor
from graphmode.ops._triton import constexpr, jit, runs_triton, tl

_BLOCK = 1024


def require_history(history: torch.Tensor, *, vocab: int | None, like: torch.Tensor) -> None:
    """Check a history: int32 ``[states, vocab]``, contiguous, with at least one row, on ``like``'s device."""
    require_tensor("history", history, shape=(None, vocab), dtypes=(torch.int32,), like=like)
    require(history.numel() > 0, "history", f"of shape {list(history.shape)}", "at least one state and one token")
    require_contiguous(history=history)


def start_history(
    history: torch.Tensor, state_indices: torch.Tensor, prompt: torch.Tensor, prompt_state_indices: torch.Tensor
) -> None:
    """Clear the histories of new sequences and note the tokens of their prompts, in place.

    Later parts of a prompt are noted by calls that clear nothing: chunked prefill.

    Args:
        history: int32 ``[states, vocab]``, contiguous.
        state_indices: int64 ``[n]``: whose histories to clear; -1 clears none.
        prompt: int64 ``[tokens]``: prompt tokens of any number of sequences, in the vocabulary.
        prompt_state_indices: int64 ``[tokens]``: whose they are; -1 notes nothing, and that token may be anything.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_history(history, vocab=None, like=history)
    require_tensor("state_indices", state_indices, shape=(None,), dtypes=(torch.int64,), like=history)
    require_tensor("prompt", prompt, shape=(None,), dtypes=(torch.int64,), like=history)
    require_tensor(
        "prompt_state_indices", prompt_state_indices, shape=prompt.shape, dtypes=(torch.int64,), like=history
    )
    start = start_history_triton if runs_triton(history) else start_history_reference
    start(history, state_indices, prompt, prompt_state_indices)


def start_history_reference(
    history: torch.Tensor, state_indices: torch.Tensor, prompt: torch.Tensor, prompt_state_indices: torch.Tensor
) -> None:
    """Run :func:`start_history` in PyTorch. A -1 clears what is cleared anyway, or rewrites history 0 as it is."""
    if state_indices.shape[0]:
        some = state_indices.max()
        filler = torch.where(some >= 0, 0, history[:1])
        chosen = torch.where(state_indices >= 0, state_indices, some.clamp(min=0))
        history.index_copy_(0, chosen, filler.expand(state_indices.shape[0], -1))
    noted = (prompt_state_indices >= 0).int()
    history.view(-1).scatter_reduce_(0, _entries(history, prompt_state_indices, prompt), noted, "amax")


def count_tokens(history: torch.Tensor, state_indices: torch.Tensor, tokens: torch.Tensor) -> None:
    """Count new output tokens, in place.

    Args:
        history: int32 ``[states, vocab]``, contiguous.
        state_indices: int64 ``[rows]``: of each row's sequence; -1 counts nothing. One may come more than once.
        tokens: int64 ``[rows]``: the tokens, in the vocabulary; anything where that is -1.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_history(history, vocab=None, like=history)
    require_tensor("state_indices", state_indices, shape=(None,), dtypes=(torch.int64,), like=history)
    require_tensor("tokens", tokens, shape=state_indices.shape, dtypes=(torch.int64,), like=history)
    count = count_tokens_triton if runs_triton(history) else count_tokens_reference
    count(history, state_indices, tokens)


def count_tokens_reference(history: torch.Tensor, state_indices: torch.Tensor, tokens: torch.Tensor) -> None:
    """Run :func:`count_tokens` in PyTorch: -1 adds nothing to the first entry."""
    counted = (state_indices >= 0).int().mul_(2)
    history.view(-1).scatter_add_(0, _entries(history, state_indices, tokens), counted)


def _entries(history: torch.Tensor, state_indices: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return where tokens' entries lie in the flat history; the first entry for index -1."""
    return torch.where(state_indices >= 0, state_indices * history.shape[1] + tokens, 0)


def start_history_triton(
    history: torch.Tensor, state_indices: torch.Tensor, prompt: torch.Tensor, prompt_state_indices: torch.Tensor
) -> None:
    """Run :func:`start_history` in Triton. What does not exist, the caller's error, writes nothing."""
    states, vocab = history.shape
    if state_indices.shape[0]:
        _clear_kernel[(state_indices.shape[0], -(-vocab // _BLOCK))](
            history, state_indices, states, vocab, block=_BLOCK
        )
    _note(history, prompt_state_indices, prompt, in_prompt=True)


def count_tokens_triton(history: torch.Tensor, state_indices: torch.Tensor, tokens: torch.Tensor) -> None:
    """Run :func:`count_tokens` in Triton. What does not exist, the caller's error, writes nothing."""
    _note(history, state_indices, tokens, in_prompt=False)


def _note(history: torch.Tensor, state_indices: torch.Tensor, tokens: torch.Tensor, *, in_prompt: bool) -> None:
    count = state_indices.shape[0]
    if count:
        grid = (-(-count // _BLOCK),)
        _note_kernel[grid](history, state_indices, tokens, count, *history.shape, in_prompt=in_prompt, block=_BLOCK)


@jit(do_not_specialize=["states", "vocab"])
def _clear_kernel(history, state_indices, states, vocab, block: constexpr):  # type: ignore[no-untyped-def]
    state = tl.load(state_indices + tl.program_id(0))
    if (state < 0) | (state >= states):
        return
    index = tl.program_id(1) * block + tl.arange(0, block)
    tl.store(history + state * vocab + index, tl.zeros([block], tl.int32), mask=index < vocab)


@jit(do_not_specialize=["count", "states", "vocab"])
def _note_kernel(  # type: ignore[no-untyped-def]
    history, state_indices, tokens, count, states, vocab, in_prompt: constexpr, block: constexpr
):
    index = tl.program_id(0) * block + tl.arange(0, block)
    state = tl.load(state_indices + index, mask=index < count, other=-1)
    token = tl.load(tokens + index, mask=index < count, other=-1)
    real = (state >= 0) & (state < states) & (token >= 0) & (token < vocab)
    entry = history + tl.where(real, state * vocab + token, 0)
    if in_prompt:
        tl.atomic_max(entry, tl.full([block], 1, tl.int32), mask=real, sem="relaxed")
    else:
        tl.atomic_add(entry, tl.full([block], 2, tl.int32), mask=real, sem="relaxed")
