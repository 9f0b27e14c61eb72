"""Tokens that a sequence may not draw: those of a set, and the last token of a word whose others it has just made.

What is banned lies on the device by the state index of a sequence, which rows name; index 0 is nobody's and bans
nothing. The tokens that a sequence made last lie in a ring, by position: a word is recognised also where the host does
not know them yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphmode.ops._checks import require, require_contiguous, require_tensor
from graphmode.ops._triton import constexpr, jit, runs_triton, tl

_BLOCK = 1024
_WORDS = 32  # words that a Triton program compares at a time


class Bans(NamedTuple):
    """What the sequence of each state index may not draw.

    Attributes:
        forbidden: int32 ``[states, ceil(vocab / 32)]``: bit ``token % 32`` of entry ``token // 32`` is set where a
            token may not be drawn.
        prefixes: int32 ``[states, words, window]``: the tokens of each word before its last one, the nearest first; -1
            beyond the word's first token.
        finals: int32 ``[states, words]``: the last token of each word, which may not follow the others; -1 for none.
        recent: int32 ``[states, window]``: the last tokens that each sequence made, that of position ``p`` at place
            ``p % window``; -1 where that position is of the prompt.
    """

    forbidden: torch.Tensor
    prefixes: torch.Tensor
    finals: torch.Tensor
    recent: torch.Tensor


def no_bans(states: int, vocab: int, words: int, window: int, device: torch.device | str) -> Bans:
    """Return bans for that many state indices which ban nothing."""
    return Bans(
        forbidden=torch.zeros(states, -(-vocab // 32), dtype=torch.int32, device=device),
        prefixes=torch.full((states, words, window), -1, dtype=torch.int32, device=device),
        finals=torch.full((states, words), -1, dtype=torch.int32, device=device),
        recent=torch.full((states, window), -1, dtype=torch.int32, device=device),
    )


def ban_tokens(logits: torch.Tensor, positions: torch.Tensor, state_indices: torch.Tensor, bans: Bans) -> None:
    """Give -inf to the tokens that each row may not draw, in place.

    Args:
        logits: float32 ``[rows, vocab]``, contiguous.
        positions: int64 ``[rows]``: the position in its sequence of the token that is drawn.
        state_indices: int64 ``[rows]``: of each row's sequence; 0 for a row without bans and for padding.
        bans: of all sequences; the window is a power of two.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor("logits", logits, shape=(None, None), dtypes=(torch.float32,), like=logits)
    require_contiguous(logits=logits)
    rows, vocab = logits.shape
    require_tensor("positions", positions, shape=(rows,), dtypes=(torch.int64,), like=logits)
    require_tensor("state_indices", state_indices, shape=(rows,), dtypes=(torch.int64,), like=logits)
    states, words = bans.finals.shape
    window = _require_window(bans.recent)
    require_tensor("forbidden", bans.forbidden, shape=(states, -(-vocab // 32)), dtypes=(torch.int32,), like=logits)
    require_tensor("prefixes", bans.prefixes, shape=(states, words, window), dtypes=(torch.int32,), like=logits)
    require_tensor("finals", bans.finals, shape=(states, words), dtypes=(torch.int32,), like=logits)
    require_tensor("recent", bans.recent, shape=(states, window), dtypes=(torch.int32,), like=logits)
    require_contiguous(**bans._asdict())
    ban = ban_tokens_triton if runs_triton(logits) else ban_tokens_reference
    ban(logits, positions, state_indices, bans)


def ban_tokens_reference(
    logits: torch.Tensor, positions: torch.Tensor, state_indices: torch.Tensor, bans: Bans
) -> None:
    """Run :func:`ban_tokens` in PyTorch. A word that is not there adds 0 to token 0."""
    rows, vocab = logits.shape
    window = bans.recent.shape[1]
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    banned = (bans.forbidden.index_select(0, state_indices).unsqueeze(2) >> bits).bitwise_and_(1)
    logits.masked_fill_(banned.view(rows, -1)[:, :vocab] != 0, -float("inf"))
    back = torch.arange(window, device=logits.device)
    behind = bans.recent.index_select(0, state_indices).gather(1, (positions.unsqueeze(1) - 1 - back) % window)
    prefixes = bans.prefixes.index_select(0, state_indices)
    finals = bans.finals.index_select(0, state_indices).long()
    complete = ((prefixes < 0) | (prefixes == behind.unsqueeze(1))).all(dim=2)
    logits.scatter_add_(1, finals.clamp(min=0), torch.where(complete & (finals >= 0), -float("inf"), 0.0))


def ban_tokens_triton(logits: torch.Tensor, positions: torch.Tensor, state_indices: torch.Tensor, bans: Bans) -> None:
    """Run :func:`ban_tokens` in Triton. An index or a token that does not exist, the caller's error, bans nothing."""
    rows, vocab = logits.shape
    states, words = bans.finals.shape
    if rows == 0:
        return
    _forbid_kernel[(rows, -(-vocab // _BLOCK))](
        logits, state_indices, bans.forbidden, states, bans.forbidden.shape[1], vocab, block=_BLOCK
    )
    if words:
        _ban_words_kernel[(rows,)](
            logits,
            positions,
            state_indices,
            bans.prefixes,
            bans.finals,
            bans.recent,
            states,
            words,
            vocab,
            window=bans.recent.shape[1],
            block=_WORDS,
        )


@jit(do_not_specialize=["states", "entries", "vocab"])
def _forbid_kernel(logits, state_indices, forbidden, states, entries, vocab, block: constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(state_indices + row)
    if (state <= 0) | (state >= states):
        return
    index = tl.program_id(1) * block + tl.arange(0, block)
    inside = index < vocab
    bits = tl.load(forbidden + state * entries + (index >> 5), mask=inside, other=0)
    banned = inside & (((bits >> (index & 31)) & 1) != 0)
    tl.store(logits + row * vocab + index, tl.full([block], float("-inf"), tl.float32), mask=banned)


@jit(do_not_specialize=["states", "words", "vocab"])
def _ban_words_kernel(  # type: ignore[no-untyped-def]
    logits,
    positions,
    state_indices,
    prefixes,
    finals,
    recent,
    states,
    words,
    vocab,
    window: constexpr,
    block: constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(state_indices + row)
    if (state <= 0) | (state >= states):
        return
    back = tl.arange(0, window)
    behind = tl.load(recent + state * window + ((tl.load(positions + row) - 1 - back) & (window - 1)))
    for start in range(0, words, block):
        word = start + tl.arange(0, block)
        final = tl.load(finals + state * words + word, mask=word < words, other=-1)
        prefix = tl.load(
            prefixes + (state * words + word)[:, None] * window + back[None, :], mask=(word < words)[:, None], other=-1
        )
        differs = (prefix >= 0) & (prefix != behind[None, :])
        banned = (final >= 0) & (final < vocab) & (tl.sum(differs.to(tl.int32), 1) == 0)
        place = logits + row * vocab + tl.where(banned, final, 0)
        tl.store(place, tl.full([block], float("-inf"), tl.float32), mask=banned)


def note_recent(
    recent: torch.Tensor, positions: torch.Tensor, state_indices: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Note the tokens that rows drew, in place.

    Args:
        recent: int32 ``[states, window]``, of :class:`Bans`.
        positions: int64 ``[rows]``: where the tokens stand.
        state_indices: int64 ``[rows]``: whose they are; for 0 anything may be noted.
        tokens: int64 ``[rows]``.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    _require_window(recent)
    rows = tokens.shape
    require_tensor("tokens", tokens, shape=(None,), dtypes=(torch.int64,), like=recent)
    require_tensor("positions", positions, shape=rows, dtypes=(torch.int64,), like=recent)
    require_tensor("state_indices", state_indices, shape=rows, dtypes=(torch.int64,), like=recent)
    note = note_recent_triton if runs_triton(recent) else note_recent_reference
    note(recent, positions, state_indices, tokens)


def note_recent_reference(
    recent: torch.Tensor, positions: torch.Tensor, state_indices: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Run :func:`note_recent` in PyTorch."""
    window = recent.shape[1]
    recent.view(-1).scatter_(0, state_indices * window + positions % window, tokens.int())


def note_recent_triton(
    recent: torch.Tensor, positions: torch.Tensor, state_indices: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Run :func:`note_recent` in Triton. For state index 0, and one that does not exist, nothing is noted."""
    rows = len(tokens)
    if rows:
        _note_recent_kernel[(-(-rows // _BLOCK),)](
            recent, positions, state_indices, tokens, rows, recent.shape[0], window=recent.shape[1], block=_BLOCK
        )


@jit(do_not_specialize=["rows", "states"])
def _note_recent_kernel(  # type: ignore[no-untyped-def]
    recent, positions, state_indices, tokens, rows, states, window: constexpr, block: constexpr
):
    row = tl.program_id(0) * block + tl.arange(0, block)
    state = tl.load(state_indices + row, mask=row < rows, other=0)
    noted = (state > 0) & (state < states)
    position = tl.load(positions + row, mask=noted, other=0)
    token = tl.load(tokens + row, mask=noted, other=0)
    place = tl.where(noted, state * window + (position & (window - 1)), 0)
    tl.store(recent + place, token.to(tl.int32), mask=noted)


def _require_window(recent: torch.Tensor) -> int:
    require_tensor("recent", recent, shape=(None, None), dtypes=(torch.int32,), like=recent)
    require_contiguous(recent=recent)
    window = recent.shape[1]
    require(window > 0 and window & (window - 1) == 0, "the window", window, "a power of two")
    return window
