"""Answers taken apart as their text comes."""

from __future__ import annotations

from collections.abc import Sequence

from graphmode.errors import NoCallError
from graphmode.serve.parsing.calls import CallReader, Tools
from graphmode.serve.parsing.formats import ReasoningFormat, ToolFormat
from graphmode.serve.parsing.parts import Content, Part, Reasoning, merged
from graphmode.serve.parsing.source import Source, Steps


class AnswerParser:
    """Takes one answer apart.

    In whatever pieces the text comes, the parts joined are the same. What looks like a call and is none, or calls a
    tool that there is not, is content, as it was written. A call is given out from where its tool is known and its
    arguments begin; these are the model's own text, so that they may be broken JSON or end early, as the model wrote
    them. White space around thoughts and calls is no part of the content.

    Args:
        formats: in which calls may be written, all with one trigger; none where tools cannot be called.
        tools: what can be called.
        reasoning: how thoughts are set apart; None where they are content.
        thinking: whether the prompt has begun the thoughts already.
    """

    def __init__(
        self,
        formats: Sequence[ToolFormat] = (),
        tools: Tools | None = None,
        reasoning: ReasoningFormat | None = None,
        *,
        thinking: bool = False,
    ) -> None:
        self._source = Source()
        self._formats = formats
        self._tools = tools or {}
        self._plain = False
        self._steps = self._answer(reasoning, thinking)

    def feed(self, text: str) -> list[Part]:
        """Take in the next piece of the text, and return the parts that it gives."""
        if self._plain:  # most of most answers, token by token
            return [Content(text)] if text else []
        self._source.feed(text)
        return self._run()

    def end(self) -> list[Part]:
        """Return the parts that are left when no more text comes."""
        self._source.ended = True
        return self._run()

    def _run(self) -> list[Part]:
        parts: list[Part] = []
        for part in self._steps:
            if part is None:
                break
            parts.append(part)
        return merged(parts)

    def _answer(self, reasoning: ReasoningFormat | None, thinking: bool) -> Steps[None]:
        if reasoning is not None:
            yield from self._thoughts(reasoning, thinking)
        if self._formats and self._tools:
            yield from self._content(self._formats[0].trigger)
        self._plain = True
        if self._source.rest:
            yield Content(self._source.rest)

    def _thoughts(self, form: ReasoningFormat, thinking: bool) -> Steps[None]:
        source, held = self._source, ""
        if not (yield from source.takes(form.begin)) and not thinking:
            return
        yield from source.space()
        for piece in source.until(form.end):
            if piece is None:
                yield None
                continue
            text = held + piece
            if shown := text.rstrip():
                yield Reasoning(shown)
            held = text[len(shown) :]
        if (yield from source.takes(form.end)):
            yield from source.space()

    def _content(self, trigger: str) -> Steps[None]:
        source, held, said, called = self._source, "", False, False
        if any(form.bare for form in self._formats) and (yield from source.follows("{")):
            called = yield from self._calls(bare=True)
        while True:
            for piece in source.until(trigger):
                if piece is None:
                    yield None
                    continue
                text = held + piece if said or not called else (held + piece).lstrip()
                if shown := text.rstrip():
                    said = True
                    yield Content(shown)
                held = text[len(shown) :]
            if not source.rest:
                break
            if (yield from self._calls(bare=False)):
                called, held = True, ""
            else:
                yield from source.takes(trigger)
                said = True
                yield Content(held + trigger)
                held = ""
        if held and not called:
            yield Content(held)

    def _calls(self, *, bare: bool) -> Steps[bool]:
        """Read calls where they seem to begin; return whether there are any. If not, nothing is read."""
        source = self._source
        for form in self._formats:
            source.keep()
            if not bare:
                yield from source.takes(form.trigger)
            reader = CallReader(form, source, self._tools)
            try:
                yield from reader.run(bare=bare)
            except NoCallError:
                source.go_back()
            source.release()
            if reader.begun:
                return True
        return False
