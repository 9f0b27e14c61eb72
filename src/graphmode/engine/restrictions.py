"""Which tokens an answer may hold: allowed token ids, and bad words as the tokens that make them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from graphmode.engine.checks import shown
from graphmode.errors import InputError

MAX_WORDS = 256  # sequences of more than one token that one request may ban
WINDOW = 16  # tokens before the last one that such a sequence may have


@dataclass(frozen=True)
class Restrictions:
    """What one request may not draw.

    Attributes:
        forbidden: bool ``[vocab]``: the tokens that it never draws.
        words: sequences of two tokens and more, of which the last may not follow the others.
    """

    forbidden: npt.NDArray[np.bool_]
    words: tuple[tuple[int, ...], ...]

    @property
    def bits(self) -> npt.NDArray[np.int32]:
        """``forbidden``, packed."""
        return packed(self.forbidden)


def packed(tokens: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Return bool ``[vocab]`` as ``graphmode.ops.sampling.bans`` has it: a bit each, int32 ``[ceil(vocab / 32)]``."""
    padded = np.zeros(-(-len(tokens) // 32) * 32, dtype=np.bool_)
    padded[: len(tokens)] = tokens
    return np.packbits(padded, bitorder="little").view("<i4")


def restrictions(
    allowed_token_ids: Sequence[int] | None,
    bad_words: Sequence[str],
    barred: Collection[int],
    *,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Restrictions:
    """Return what a request may not draw.

    Args:
        allowed_token_ids: its parameter.
        bad_words: its parameter.
        barred: tokens that it may not draw for another reason, at least at first.
        vocab_size: tokens that the model has.
        tokenizer: makes tokens of bad words; None where the model comes without one.

    Raises:
        InputError: a token that the model does not have, a bad word that no tokens make or too many do, or nothing is
            left to draw.
    """
    forbidden = np.zeros(vocab_size, dtype=np.bool_)
    if allowed_token_ids is not None:
        if (most := max(allowed_token_ids)) >= vocab_size:
            raise InputError(f"allowed_token_ids names token {most}; the model's ids are 0 to {vocab_size - 1}")
        forbidden[:] = True
        forbidden[list(allowed_token_ids)] = False
    sequences = {tokens for word in bad_words for tokens in _tokenized(word, vocab_size, tokenizer)}
    forbidden[[tokens[0] for tokens in sequences if len(tokens) == 1]] = True
    words = tuple(sorted(tokens for tokens in sequences if len(tokens) > 1))
    if len(words) > MAX_WORDS:
        raise InputError(
            f"bad_words are {len(words)} sequences of more than one token, each word with and without a space before "
            f"it; there is room for {MAX_WORDS}. Give fewer words"
        )
    left = ~forbidden
    left[[tokens[-1] for tokens in words]] = False
    left[list(barred)] = False
    if not left.any():
        raise InputError(
            "allowed_token_ids, bad_words and min_tokens together may leave no token to draw; allow a token that none "
            "of the others forbids"
        )
    return Restrictions(forbidden, words)


def _tokenized(word: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None) -> set[tuple[int, ...]]:
    """Return the tokens of a word at the beginning of a text and after a space."""
    if tokenizer is None:
        raise InputError(
            "the model comes without a tokenizer, so bad_words cannot be told; use logit_bias or allowed_token_ids"
        )
    plain, spaced = (
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (word.lstrip(), f" {word.lstrip()}")
    )
    # Where the space is a token of its own, what follows it is banned anyway.
    found = {plain or spaced, plain if spaced[-len(plain) :] == plain else spaced} - {()}
    if not found:
        raise InputError(f"bad_words holds {shown(word)}, which the tokenizer makes no token of; leave it out")
    for tokens in found:
        if len(tokens) > WINDOW + 1:
            raise InputError(
                f"bad_words holds {shown(word)}, which is {len(tokens)} tokens; a word may have {WINDOW + 1}. Give a "
                "shorter part of it"
            )
        if max(tokens) >= vocab_size:
            raise InputError(
                f"bad_words holds {shown(word)}, whose token {max(tokens)} the model cannot make; its ids are 0 to "
                f"{vocab_size - 1}. Leave it out"
            )
    return found
