"""A text that comes in pieces, read as if all of it were there: reading waits where it depends on what follows."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeVar

from graphmode.serve.parsing.parts import Part

Result = TypeVar("Result")

Steps = Generator[Part | None, None, Result]
"""What reads: it yields the parts that it finds, and None where it waits for more text."""

Pieces = Generator[str | None, None, Result]
"""The same, for pieces of text."""

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[\w.:/-]*")


class Source:
    """The text, and how far it is read.

    Attributes:
        text: what has come and is not forgotten.
        at: how much of ``text`` is read.
        ended: whether no more will come.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self._kept: int | None = None

    def feed(self, text: str) -> None:
        """Take in the next piece, and forget what is read and not kept."""
        forgotten = self.at if self._kept is None else self._kept
        self.text = self.text[forgotten:] + text
        self.at -= forgotten
        self._kept = None if self._kept is None else 0

    def keep(self) -> None:
        """Keep the text from here on, so that reading can return here."""
        self._kept = self.at

    def go_back(self) -> None:
        """Return to where :meth:`keep` was called."""
        assert self._kept is not None
        self.at = self._kept

    def release(self) -> None:
        """Keep no text that is read."""
        self._kept = None

    @property
    def rest(self) -> str:
        """What has come and is not read."""
        return self.text[self.at :]

    def more(self) -> Generator[None, None, bool]:
        """Wait for more text; return False where there will be none."""
        if self.ended:
            return False
        yield None
        return True

    def next_character(self) -> Generator[None, None, str]:
        """Return the next character without reading it; an empty text at the end."""
        while self.at == len(self.text) and (yield from self.more()):
            pass
        return self.text[self.at : self.at + 1]

    def space(self) -> Generator[None, None, str]:
        """Read white space, and return it."""
        return (yield from self._run(_SPACE))

    def name(self) -> Generator[None, None, str]:
        """Read what the name of a tool may be made of, and return it."""
        return (yield from self._run(_NAME))

    def _run(self, pattern: re.Pattern[str]) -> Generator[None, None, str]:
        run = ""
        while True:
            found = pattern.match(self.text, self.at)
            assert found is not None
            run += found[0]
            self.at = found.end()
            if self.at < len(self.text) or not (yield from self.more()):
                return run

    def follows(self, expected: str, *, space: bool = True) -> Generator[None, None, int | None]:
        """Return how far a text reaches that comes next, after white space if ``space``; None where another comes."""
        while True:
            found = _SPACE.match(self.text, self.at)
            begin = self.at if found is None or not space else found.end()
            ahead = self.text[begin : begin + len(expected)]
            if ahead == expected:
                return begin + len(expected) - self.at
            if not expected.startswith(ahead) or not (yield from self.more()):
                return None

    def takes(self, expected: str, *, space: bool = True) -> Generator[None, None, bool]:
        """Read a text if it comes next, with white space before it if ``space``, and return whether it does."""
        length = yield from self.follows(expected, space=space)
        self.at += length or 0
        return length is not None

    def until(self, *ends: str) -> Pieces[bool]:
        """Read up to the first of some texts, which is left unread, or to the end.

        Yields:
            What is read. A piece stops before what may be the beginning of one of the texts.

        Returns:
            Whether there is one of them.
        """
        pattern = re.compile("|".join(map(re.escape, ends)))
        while True:
            found = pattern.search(self.text, self.at)
            end = len(self.text) - unfinished(self.rest, ends) if found is None else found.start()
            if end > self.at:
                begin, self.at = self.at, end
                yield self.text[begin:end]
            if found is not None:
                return True
            if not (yield from self.more()):
                if self.rest:
                    begin, self.at = self.at, len(self.text)
                    yield self.text[begin:]
                return False

    def json_value(self) -> Pieces[bool]:
        """Read a JSON value as far as its brackets and quotes tell; whether it is valid is not looked at.

        Yields:
            Its text.

        Returns:
            Whether it is complete.
        """
        first = yield from self.next_character()
        if first not in ("{", "[", '"'):
            while True:
                begin = self.at
                while self.at < len(self.text) and not (self.text[self.at].isspace() or self.text[self.at] in ",}]<["):
                    self.at += 1
                if self.at > begin:
                    yield self.text[begin : self.at]
                if self.at < len(self.text) or not (yield from self.more()):
                    return self.at < len(self.text)
        depth, quoted, escaped = 0, False, False
        while True:
            begin = self.at
            for at in range(begin, len(self.text)):
                character = self.text[at]
                if escaped:
                    escaped = False
                elif quoted:
                    escaped, quoted = character == "\\", character != '"'
                elif character == '"':
                    quoted = True
                elif character in "{[":
                    depth += 1
                elif character in "}]":
                    depth -= 1
                if depth == 0 and not quoted and not escaped:
                    self.at = at + 1
                    yield self.text[begin : at + 1]
                    return True
            self.at = len(self.text)
            if self.at > begin:
                yield self.text[begin:]
            if not (yield from self.more()):
                return False


def collected(pieces: Pieces[Result]) -> Generator[None, None, tuple[str, Result]]:
    """Return all pieces as one text, and what their reading returns."""
    text = ""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            return text, stop.value
        if piece is None:
            yield None
        else:
            text += piece


def unfinished(text: str, ends: tuple[str, ...]) -> int:
    """Return how long the end of a text is that may be the beginning of one of ``ends``."""
    longest = max(map(len, ends)) - 1
    tail = text[-longest:] if longest else ""
    # Of the places where one begins, the first that goes on to the end of the text counts.
    places = sorted({at for end in ends for at in _places(tail, end[0])})
    return next((len(tail) - at for at in places if any(end.startswith(tail[at:]) for end in ends)), 0)


def _places(text: str, character: str) -> list[int]:
    return [at for at, each in enumerate(text) if each == character] if character in text else []
