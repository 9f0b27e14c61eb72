"""Which tokens a sequence has had: what penalties are computed from, kept on the device.

The history is one int32 tensor ``[slots, vocab]``. A running sequence owns a slot; an entry is twice the number of
times that its output had the token, plus 1 if the prompt had it. So one tensor, and one load, answers both questions.
Slot -1 stands for no history: padding, rows that sample nothing in this step, sequences without penalties.
"""

from __future__ import annotations

import torch

from graphmode.ops._checks import require, require_tensor
from graphmode.ops._triton import constexpr, jit, runs_triton, tl

_BLOCK = 1024


def require_history(history: torch.Tensor, *, vocab: int | None, like: torch.Tensor) -> None:
    """Check a history: int32 ``[slots, vocab]``, contiguous, with at least one slot, on ``like``'s device."""
    require_tensor("history", history, shape=(None, vocab), dtypes=(torch.int32,), like=like)
    require(history.numel() > 0, "history", f"of shape {list(history.shape)}", "at least one slot and one token")
    require(history.is_contiguous(), "history", f"of strides {history.stride()}", "a contiguous tensor")


def start_history(history: torch.Tensor, slots: torch.Tensor, prompt: torch.Tensor, prompt_slots: torch.Tensor) -> None:
    """Clear slots for new sequences and note the tokens of their prompts, in place.

    Later parts of a prompt are noted by calls that clear nothing: chunked prefill.

    Args:
        history: int32 ``[slots, vocab]``, contiguous.
        slots: int64 ``[n]``: the slots to clear; -1 clears none.
        prompt: int64 ``[tokens]``: prompt tokens of any number of sequences, in the vocabulary.
        prompt_slots: int64 ``[tokens]``: whose they are; -1 notes nothing, and that token may be anything.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_history(history, vocab=None, like=history)
    require_tensor("slots", slots, shape=(None,), dtypes=(torch.int64,), like=history)
    require_tensor("prompt", prompt, shape=(None,), dtypes=(torch.int64,), like=history)
    require_tensor("prompt_slots", prompt_slots, shape=prompt.shape, dtypes=(torch.int64,), like=history)
    start = start_history_triton if runs_triton(history) else start_history_reference
    start(history, slots, prompt, prompt_slots)


def start_history_reference(
    history: torch.Tensor, slots: torch.Tensor, prompt: torch.Tensor, prompt_slots: torch.Tensor
) -> None:
    """Do as :func:`start_history` in PyTorch. A -1 clears what is cleared anyway, or rewrites slot 0 as it is."""
    if slots.shape[0]:
        some = slots.max()
        filler = torch.where(some >= 0, 0, history[:1])
        chosen = torch.where(slots >= 0, slots, some.clamp(min=0))
        history.index_copy_(0, chosen, filler.expand(slots.shape[0], -1))
    noted = (prompt_slots >= 0).int()
    history.view(-1).scatter_reduce_(0, _entries(history, prompt_slots, prompt), noted, "amax")


def count_tokens(history: torch.Tensor, row_slot: torch.Tensor, tokens: torch.Tensor) -> None:
    """Count new output tokens, in place.

    Args:
        history: int32 ``[slots, vocab]``, contiguous.
        row_slot: int64 ``[rows]``: the slot of each row's sequence; -1 counts nothing. A slot may come more than once.
        tokens: int64 ``[rows]``: the tokens, in the vocabulary; anything where the slot is -1.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_history(history, vocab=None, like=history)
    require_tensor("row_slot", row_slot, shape=(None,), dtypes=(torch.int64,), like=history)
    require_tensor("tokens", tokens, shape=row_slot.shape, dtypes=(torch.int64,), like=history)
    count = count_tokens_triton if runs_triton(history) else count_tokens_reference
    count(history, row_slot, tokens)


def count_tokens_reference(history: torch.Tensor, row_slot: torch.Tensor, tokens: torch.Tensor) -> None:
    """Do as :func:`count_tokens` in PyTorch: -1 adds nothing to the first entry."""
    counted = (row_slot >= 0).int().mul_(2)
    history.view(-1).scatter_add_(0, _entries(history, row_slot, tokens), counted)


def _entries(history: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return where tokens' entries lie in the flat history; the first entry for slot -1."""
    return torch.where(slots >= 0, slots * history.shape[1] + tokens, 0)


def start_history_triton(
    history: torch.Tensor, slots: torch.Tensor, prompt: torch.Tensor, prompt_slots: torch.Tensor
) -> None:
    """Do as :func:`start_history` in Triton. Slots and tokens that do not exist, the caller's error, write nothing."""
    num_slots, vocab = history.shape
    if slots.shape[0]:
        _clear_kernel[(slots.shape[0], -(-vocab // _BLOCK))](history, slots, num_slots, vocab, block=_BLOCK)
    _note(history, prompt_slots, prompt, in_prompt=True)


def count_tokens_triton(history: torch.Tensor, row_slot: torch.Tensor, tokens: torch.Tensor) -> None:
    """Do as :func:`count_tokens` in Triton. Slots and tokens that do not exist, the caller's error, write nothing."""
    _note(history, row_slot, tokens, in_prompt=False)


def _note(history: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor, *, in_prompt: bool) -> None:
    count = slots.shape[0]
    if count:
        grid = (-(-count // _BLOCK),)
        _note_kernel[grid](history, slots, tokens, count, *history.shape, in_prompt=in_prompt, block=_BLOCK)


@jit(do_not_specialize=["num_slots", "vocab"])
def _clear_kernel(history, slots, num_slots, vocab, block: constexpr):  # type: ignore[no-untyped-def]
    slot = tl.load(slots + tl.program_id(0))
    if (slot < 0) | (slot >= num_slots):
        return
    index = tl.program_id(1) * block + tl.arange(0, block)
    tl.store(history + slot * vocab + index, tl.zeros([block], tl.int32), mask=index < vocab)


@jit(do_not_specialize=["count", "num_slots", "vocab"])
def _note_kernel(  # type: ignore[no-untyped-def]
    history, slots, tokens, count, num_slots, vocab, in_prompt: constexpr, block: constexpr
):
    index = tl.program_id(0) * block + tl.arange(0, block)
    slot = tl.load(slots + index, mask=index < count, other=-1)
    token = tl.load(tokens + index, mask=index < count, other=-1)
    real = (slot >= 0) & (slot < num_slots) & (token >= 0) & (token < vocab)
    entry = history + tl.where(real, slot * vocab + token, 0)
    if in_prompt:
        tl.atomic_max(entry, tl.full([block], 1, tl.int32), mask=real, sem="relaxed")
    else:
        tl.atomic_add(entry, tl.full([block], 2, tl.int32), mask=real, sem="relaxed")
