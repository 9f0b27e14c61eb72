"""The text of an answer, made as its tokens come.

Only the last few tokens are decoded again, so the time is linear in the tokens, and how they are grouped when they come
changes nothing. The text is that of prompt and answer together less that of the prompt.
"""

from __future__ import annotations

import codecs
import copy
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from graphmode.errors import ModelError
from graphmode.models.hf.tokenizer import decodes_as_its_backend

CONTEXT = 4
"""Tokens that are decoded again before new ones: a character has at most four bytes, a token at least one."""

_REPLACEMENT = "\ufffd"
_SAMPLE = ("A sample: it's", " two lines,\n  with naïve 漢字 and 😀.")


class Decoded(NamedTuple):
    """A text so far, and what it takes to go on.

    Attributes:
        text: what no later token changes.
        held: what follows it if no token comes: a character that is not complete is a replacement character there.
        window: the last tokens.
        length: how much of the window's own text is in ``text``.
        pending: where bytes come one a token, those of a character that is not complete; None after other tokens.
        before: what the prompt's text holds back. It is no part of the answer's, should it become text.
    """

    text: str = ""
    held: str = ""
    window: Sequence[int] = ()
    length: int = 0
    pending: bytes | None = None
    before: str = ""

    @property
    def whole(self) -> str:
        """The text if no token comes."""
        return self.text + self.held.removeprefix(self.before)


class Detokenizer:
    """What turns tokens into text, in steps.

    Tokenizers of the tokenizers library decode left to right: a later token changes at most a character that is not
    complete. Others may change more (CTRL joins words where another token follows), so of their text only that counts
    as settled which stays when one more token follows. Byte tokens (``<0xE2>``) are put together here: the tokenizers
    library gives up a whole run of them for one byte that is wrong.

    Args:
        tokenizer: the model's.
        name: the model's, for messages.

    Attributes:
        special: the texts of the special tokens, by their ids.
        decode: returns the text of tokens on their own, special ones included. It never raises: a token without a text
            gives none.

    Raises:
        ModelError: its texts cannot be made in steps.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: object = "the tokenizer") -> None:
        self._tokenizer = tokenizer
        self._has_text: dict[int, bool] = {}
        self._size = sys.maxsize
        self._follower: list[int] = []
        self._decode: Callable[[Sequence[int]], Any] = partial(
            tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        self.decode: Callable[[Sequence[int]], str] = self._decode_what_has_text
        try:
            if decodes_as_its_backend(tokenizer):
                # The same, without looking at each token in Python; there ids that are not known give nothing.
                self.decode = self._decode = partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
                self._size = 1 + max(tokenizer.get_vocab().values(), default=-1)
            else:
                self._follower = self._encode("a")[-1:]
            self.special = self._find_special()
            self._special_text = re.compile("|".join(map(re.escape, self.special.values())) or "(?!)")
            self._bytes = self._find_bytes()
            self._drops_first_space = bool(self._bytes) and not self.decode(
                [token for token, byte in self._bytes.items() if byte == ord(" ")]
            )
            self._check()
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from error
        except Exception as error:  # whatever a tokenizer's own code raises
            raise ModelError(
                f"{name}: its tokenizer ({type(tokenizer).__name__}) does not work: {type(error).__name__}: {error}"
            ) from error

    def keeping(self, texts: Collection[str]) -> Detokenizer:
        """Return one that never leaves out the special tokens with these texts."""
        other = copy.copy(self)
        other.special = {token: text for token, text in self.special.items() if text not in texts}
        return other

    def names_special(self, text: str) -> bool:
        """Return whether a text holds that of a special token."""
        return self._special_text.search(text) is not None

    def visible(self, token_ids: Sequence[int], skip_special_tokens: bool) -> Sequence[int]:
        """Return the tokens that have a text, with or without special ones."""
        hidden: Mapping[int, str] = self.special if skip_special_tokens else {}
        if token_ids and max(token_ids) < self._size and hidden.keys().isdisjoint(token_ids):
            return token_ids
        return [token for token in token_ids if token < self._size and token not in hidden]

    def begin(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> Decoded:
        """Return the empty text of an answer to a prompt."""
        size, context = CONTEXT, self.visible(prompt_token_ids[-CONTEXT:], skip_special_tokens)
        while size < len(prompt_token_ids) and not (len(context) >= CONTEXT and self._is_enough(context)):
            size *= 2
            context = self.visible(prompt_token_ids[-size:], skip_special_tokens)
        prompt = self.extend(Decoded(), self._recent(context))
        return prompt._replace(text="", before=prompt.held)

    def extend(self, decoded: Decoded, token_ids: Sequence[int]) -> Decoded:
        """Return the text with further tokens, all visible."""
        if decoded.pending is None and self._bytes.keys().isdisjoint(token_ids):
            return self._with_words(decoded, token_ids) if token_ids else decoded
        for are_bytes, run in groupby(token_ids, self._bytes.__contains__):
            decoded = (self._with_bytes if are_bytes else self._with_words)(decoded, list(run))
        return decoded

    def _with_words(self, decoded: Decoded, token_ids: Sequence[int]) -> Decoded:
        text, held, window, length, pending, before = decoded
        new = ""
        if pending is not None:  # the run of bytes is over
            new, length = held, len(self.decode(window))
        elif len(window) > 2 * CONTEXT:
            window = self._recent(window)
            length = self._settled(window, self.decode(window))
        window = [*window, *token_ids]
        whole = self.decode(window)
        settled = max(length, self._settled(window, whole))
        new += whole[length:settled]
        if new and before:
            new, before = new.removeprefix(before), ""
        return Decoded(text + new, whole[settled:], window, settled, None, before)

    def _with_bytes(self, decoded: Decoded, token_ids: Sequence[int]) -> Decoded:
        text, held, window, _, pending, before = decoded
        data = (pending or b"") + bytes(map(self._bytes.__getitem__, token_ids))
        new, used = codecs.utf_8_decode(data, "replace")
        if self._drops_first_space and not window:
            new = new.removeprefix(" ")
        if pending is None:
            new = held + new
        if new and before:
            new, before = new.removeprefix(before), ""
        held = _REPLACEMENT if used < len(data) else ""
        return Decoded(text + new, held, [*window, *token_ids][-CONTEXT:], 0, data[used:], before)

    def _settled(self, window: Sequence[int], text: str) -> int:
        """Return how much of a window's text no later token changes."""
        settled = len(text)
        if self._follower:
            followed = self.decode([*window, *self._follower])
            pairs = enumerate(zip(text, followed, strict=False))
            settled = next((at for at, (one, other) in pairs if one != other), min(settled, len(followed)))
        return settled - text.endswith(_REPLACEMENT, 0, settled)

    def _recent(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Return the last tokens, as many as must be decoded before those that follow."""
        size = CONTEXT
        while size < len(token_ids) and not self._is_enough(token_ids[-size:]):
            size *= 2
        return token_ids[-size:]

    def _is_enough(self, context: Sequence[int]) -> bool:
        # Tokenizers in Python may strip a text: spaces at its beginning would be lost.
        return not self._follower or bool(self.decode(context).strip())

    def _decode_what_has_text(self, token_ids: Sequence[int]) -> str:
        try:
            return str(self._decode(token_ids))
        except Exception:  # whatever a tokenizer's own code raises
            known = [token for token in token_ids if self._knows(token)]
            return self.decode(known) if len(known) < len(token_ids) else _REPLACEMENT * len(known)

    def _knows(self, token: int) -> bool:
        if token not in self._has_text:
            try:
                self._decode([token])
                self._has_text[token] = True
            except Exception:
                self._has_text[token] = False
        return self._has_text[token]

    def _encode(self, text: str) -> list[int]:
        """Return the tokens of a text, as far as the tokenizer has them."""
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [token for token in tokens if token is not None]

    def _find_special(self) -> dict[int, str]:
        """Return the tokens that the tokenizer skips where special ones are skipped, with their texts."""
        candidates = {*self._tokenizer.all_special_ids, *getattr(self._tokenizer, "added_tokens_decoder", ())}
        texts = {token: self.decode([token]) for token in sorted(candidates)}
        return {
            token: text
            for token, text in texts.items()
            if text and self._tokenizer.decode([token], skip_special_tokens=True) != text
        }

    def _find_bytes(self) -> dict[int, int]:
        """Return the byte of each token that stands for one, where the tokenizer decodes them so."""
        found = {}
        for byte in range(256):
            token = self._tokenizer.convert_tokens_to_ids(name := f"<0x{byte:02X}>")
            if isinstance(token, int) and self._tokenizer.convert_ids_to_tokens(token) == name:
                found[token] = byte
        letters = [token for token, byte in found.items() if byte == ord("A")]
        return found if letters and self.decode(letters) == "A" else {}

    def _check(self) -> None:
        """Check with a sample that texts made in steps are those made at once.

        Raises:
            ModelError: they are not.
        """
        prompt, answer = map(self._encode, _SAMPLE)
        expected = str(self._decode([*prompt, *answer])).removeprefix(self._decode(prompt))
        made = self.begin(prompt, skip_special_tokens=False)
        for token in answer:
            made = self.extend(made, [token])
        if made.whole != expected:
            raise ModelError(
                f"its tokenizer ({type(self._tokenizer).__name__}) gives {made.whole!r} token by token and "
                f"{expected!r} at once, so texts cannot be made as tokens come; remove the tokenizer's files from the "
                "model's folder and use token ids"
            )


class _Texts(NamedTuple):
    """An answer's text, and where stop texts need it, the same with special tokens.

    Attributes:
        shown: the text, with special tokens or without, as asked for.
        full: with special tokens; the same where it need not be another.
        specials: of the last special tokens that are not shown: their begin and end in ``full``, and where they are in
            ``shown``.
    """

    shown: Decoded
    full: Decoded
    specials: tuple[tuple[int, int, int], ...] = ()

    def to_shown(self, at: int) -> int:
        """Return the place in ``shown`` of a place in ``full`` that is not far from its end."""
        place, shown = len(self.full.whole), len(self.shown.whole)
        for begin, end, hidden in reversed(self.specials):
            if at >= end:
                break
            place, shown = begin, hidden
        return max(0, shown - max(0, place - at))


class AnswerText:
    """The text of one answer.

    Tokens may come in any bursts: text, stop text and number of tokens are the same. Of the stop texts that a token
    completes, the one that begins first ends the answer, with that token.

    Args:
        detokenizer: the model's.
        prompt_token_ids: what is answered.
        stop: the texts that end the answer. One that holds a special token's text is found where that token is.
        min_tokens: what these first tokens complete does not end it.
        skip_special_tokens: whether special tokens are left out of the text.
        include_stop: whether the text ends with the stop text instead of before it.

    Attributes:
        num_tokens: the tokens that are taken in; where a stop text was found, up to the one that completes it.
        stop: the stop text that ended it; None where none did.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        prompt_token_ids: Sequence[int],
        *,
        stop: Collection[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self.num_tokens = 0
        self.stop: str | None = None
        self._detokenizer = detokenizer
        self._prompt = prompt_token_ids
        self._min_tokens = min_tokens
        self._skip = skip_special_tokens
        self._include_stop = include_stop
        self._stops = [(each, skip_special_tokens and detokenizer.names_special(each)) for each in stop]
        self._longest = max(map(len, stop), default=0)
        self._apart = any(special for _, special in self._stops)
        self._texts: _Texts | None = None
        self._unread: list[int] = []
        self._least = (0, 0)  # how much text the first tokens made, which need not be searched
        self._final: str | None = None
        self._ended = False

    @property
    def text(self) -> str:
        """The text if no token comes."""
        return self._read().shown.whole if self._final is None else self._final

    @property
    def shown(self) -> str:
        """What no later token changes or takes back: without an end that may become a stop text."""
        if self._ended:
            return self.text
        texts = self._read()
        end = len(texts.shown.text)
        for stop, special in () if self._include_stop else self._stops:
            text = (texts.full if special else texts.shown).text
            for size in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:size]):
                    at = len(text) - size
                    end = min(end, texts.to_shown(at) if special else at)
                    break
        return texts.shown.text[:end]

    def feed(self, token_ids: Sequence[int], *, last: bool = False) -> str | None:
        """Take in the next tokens.

        Args:
            token_ids: the tokens.
            last: whether no more will come.

        Returns:
            The stop text that the text has come to, so that it ends; None where it has not.
        """
        if not self._stops:
            # Decoding costs the host time: it is done where somebody looks.
            self._unread += token_ids
            self.num_tokens += len(token_ids)
            self._ended = last
            return None
        before = self._read()
        if (early := self._min_tokens - self.num_tokens) > 0:
            before = self._texts = self._extend(before, token_ids[:early])
            self.num_tokens += len(token_ids[:early])
            token_ids = token_ids[early:]
            self._least = len(before.shown.text), len(before.full.text)
        if len(token_ids) > 1 and not self._find(before, after := self._extend(before, token_ids), last):
            self._texts = after
            self.num_tokens += len(token_ids)
        elif token_ids:
            # The token that completes the stop text is the last one: which it is, a second look tells.
            for index, token in enumerate(token_ids, start=1):
                self._texts = after = self._extend(before, [token])
                self.num_tokens += 1
                if found := self._find(before, after, last and index == len(token_ids)):
                    return self._stop(after, *found)
                before = after
        elif last and self.num_tokens > self._min_tokens and (found := self._find(before, before, last)):
            return self._stop(before, *found)
        self._ended = last
        return None

    def _stop(self, texts: _Texts, at: int, stop: str) -> str:
        self.stop = stop
        self._final = texts.shown.whole[:at] + (stop if self._include_stop else "")
        self._ended = True
        return stop

    def _read(self) -> _Texts:
        """Return the texts with all tokens that are taken in."""
        if self._texts is None:
            shown = self._detokenizer.begin(self._prompt, self._skip)
            self._texts = _Texts(shown, self._detokenizer.begin(self._prompt, False) if self._apart else shown)
        if self._unread:
            self._texts = self._extend(self._texts, self._unread)
            self._unread = []
        return self._texts

    def _extend(self, texts: _Texts, token_ids: Sequence[int]) -> _Texts:
        detokenizer = self._detokenizer
        if not self._apart:
            decoded = detokenizer.extend(texts.shown, detokenizer.visible(token_ids, self._skip))
            return _Texts(decoded, decoded)
        shown, full, specials = texts
        for special, run in groupby(detokenizer.visible(token_ids, False), detokenizer.special.__contains__):
            tokens = list(run)
            begin, full = len(full.whole), detokenizer.extend(full, tokens)
            if special:
                specials = (*specials[-self._longest :], (begin, len(full.text), len(shown.whole)))
            else:
                shown = detokenizer.extend(shown, tokens)
        return _Texts(shown, full, specials)

    def _find(self, before: _Texts, after: _Texts, last: bool) -> tuple[int, str] | None:
        """Return where in the text the first stop text begins that new tokens complete, and itself."""
        found = []
        for stop, special in self._stops:
            old, new = (before.full, after.full) if special else (before.shown, after.shown)
            searched = max(len(old.text), self._least[special])
            at = (new.whole if last else new.text).find(stop, max(0, searched - len(stop) + 1))
            if at >= 0:
                found.append((after.to_shown(at) if special else at, len(stop), stop))
        if not found:
            return None
        at, _, stop = min(found)  # of those that begin together, the shortest
        return at, stop
