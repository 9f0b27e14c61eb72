"""Prompts of a wanted number of tokens, for an endpoint whose tokenizer is not known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from graphmode.errors import EndpointError, InputError

# Words that most vocabularies have as one token.
_WORDS = """
the of and to in that is was for on with his he as you at this but by not are from have they or which one her all
had be we were their when who will more no if out so said what up its about into than them can only other new
some could time these two may then do first any my now such like our over man me even most made after also did
many before must through years where much your way well down should because each just those people how too
little good world make very year still see own work men day get here old life both between being under three
never know same last another while us off might great go come since against right came take used himself few
house use place during high without again home around small however found part once
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class TokenPrompts:
    """Prompts that are token ids: exact."""

    ids: Sequence[int]
    kind: str
    least: int = 1

    def draw(self, tokens: int, rng: random.Random) -> list[int]:
        """Return token ids."""
        return rng.choices(self.ids, k=tokens)


@dataclass(frozen=True)
class WordPrompts:
    """Prompts that are words, of which the server has told how many tokens they are."""

    words: Sequence[str]
    per_word: float
    beside: float
    kind: str

    @property
    def least(self) -> int:
        """The tokens of one word and what the server adds."""
        return round(self.per_word + self.beside)

    def draw(self, tokens: int, rng: random.Random) -> str:
        """Return words."""
        count = round((tokens - self.beside) / self.per_word)
        if count < 1:
            raise InputError(
                f"a prompt of {tokens} tokens is too short: the server adds about {self.beside:.0f} of its own; "
                f"ask for at least {self.least}"
            )
        # A word may be one token after a space and several where a text begins, so all begin alike.
        return " ".join([_WORDS[0], *rng.choices(self.words, k=count - 1)])


_REFUSED = (EndpointError, httpx.HTTPError, ValueError, LookupError, TypeError)  # also answers of another shape


def find_prompts(
    http: httpx.Client, url: str, headers: dict[str, str], model: str, api: str, vocab_size: int | None
) -> TokenPrompts | WordPrompts:
    """Find out how to make prompts of a number of tokens for an endpoint.

    By ``completions`` they are token ids: of the words that ``/tokenize`` knows, or of ids that every vocabulary has.
    Otherwise they are words: by ``/tokenize`` such that each is one token, so that the number is exact, or any, whose
    number of tokens is about right.

    Args:
        http: the client.
        url: of the endpoint, without ``/v1``.
        headers: of requests.
        model: its name.
        api: ``completions`` or ``chat``.
        vocab_size: if given, token ids are drawn from all below it.

    Raises:
        EndpointError: the endpoint answers to no prompt.
    """

    def tokenize(text: str) -> list[int]:
        response = http.post(f"{url}/tokenize", json={"model": model, "prompt": text}, headers=headers)
        if response.status_code != 200:
            raise EndpointError(f"POST {url}/tokenize: {response.status_code}")
        return list(response.json()["tokens"])

    def prompt_tokens(prompt: Any) -> int:
        asked = {"messages": [{"role": "user", "content": prompt}]} if api == "chat" else {"prompt": prompt}
        path = "chat/completions" if api == "chat" else "completions"
        body = {"model": model, "max_tokens": 1, **asked}
        response = http.post(f"{url}/v1/{path}", json=body, headers=headers)
        if response.status_code != 200:
            raise EndpointError(f"POST {url}/v1/{path}: {response.status_code} {response.text[:500]}")
        return int(response.json()["usage"]["prompt_tokens"])

    if api == "completions":
        kinds: list[tuple[str, Callable[[], Sequence[int]]]] = [
            ("token ids of words (/tokenize)", lambda: sorted(set(tokenize(" ".join(_WORDS))[1:]))),
            ("token ids from 1000 to 1999", lambda: range(1000, 2000)),
        ]
        if vocab_size is not None:
            kinds = [(f"token ids below {vocab_size}", lambda: range(vocab_size))]
        for kind, ids in kinds:
            with suppress(*_REFUSED):
                prompts = TokenPrompts(ids(), kind)
                if prompt_tokens(prompts.draw(16, random.Random(0))) == 16:
                    return prompts
    kind = "words of one token each (/tokenize)"
    try:
        base = len(tokenize(_WORDS[0]))
        words = [word for word in _WORDS if len(tokenize(f"{_WORDS[0]} {word}")) == base + 1]
    except _REFUSED:
        words = []
    if len(words) < 20:
        words, kind = _WORDS, "words, of about so many tokens"
    try:
        few, many = (prompt_tokens(" ".join([_WORDS[0], *words[: count - 1]])) for count in (16, len(words)))
    except _REFUSED as error:
        raise EndpointError(f"the endpoint does not answer to a prompt of words: {error}") from error
    per_word = (many - few) / (len(words) - 16)
    return WordPrompts(words, per_word, few - 16 * per_word, kind)
