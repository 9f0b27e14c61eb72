"""The calls of tools, read from an answer by the table of formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Set
from typing import Any

from graphmode.errors import NoCallError
from graphmode.serve.parsing.formats import JsonCall, NamedCall, TaggedCall, ToolFormat
from graphmode.serve.parsing.parts import Arguments, CallEnd, CallStart
from graphmode.serve.parsing.schemas import kind_of, kinds
from graphmode.serve.parsing.source import Pieces, Source, Steps, collected

_ARGUMENTS = ("arguments", "parameters")

Tools = Mapping[str, Mapping[str, Any] | None]
"""JSON schemas of the tools' arguments, by the tools' names."""


class CallReader:
    """Reads calls in one format.

    Args:
        form: the format.
        source: what is read. What may have to be given back is kept.
        tools: what can be called.

    Attributes:
        begun: whether a call has begun to be given out, which cannot be taken back.
    """

    def __init__(self, form: ToolFormat, source: Source, tools: Tools) -> None:
        self.begun = False
        self._form = form
        self._source = source
        self._tools = tools

    def run(self, *, bare: bool = False) -> Steps[None]:
        """Read a run of calls, whose trigger is read unless it is ``bare``.

        Raises:
            NoCallError: what follows is no call, or calls a tool that there is not. The source then keeps its text; of
                a call that follows others, with what stands between.
        """
        form, source = self._form, self._source
        for text in () if bare else form.begin[1:]:
            yield from self._expect(text)
        if form.begin and form.call[0]:
            yield from self._expect(form.call[0])
        while True:
            yield from self._call()
            if form.call[1]:
                yield from source.takes(form.call[1].strip())
            yield CallEnd()
            if not form.begin or (form.end and (yield from source.takes(form.end))):
                return
            source.keep()
            separator = (form.between + form.call[0]).strip()
            if not (yield from source.takes(separator)):
                return

    def _call(self) -> Steps[None]:
        body = self._form.body
        if isinstance(body, JsonCall):
            yield from self._json()
        elif isinstance(body, NamedCall):
            yield from self._named(body)
        else:
            yield from self._tagged(body)

    def _json(self) -> Steps[None]:
        source, name, early, given = self._source, "", "{}", False
        yield from self._expect("{")
        closed = yield from source.takes("}")
        while not closed:
            key = yield from self._text()
            yield from self._expect(":")
            yield from source.space()
            if key == "name" and not given:
                name = self._known((yield from self._text()))
            elif key in _ARGUMENTS and name and not given:
                yield self._start(name)
                given = True
                yield from self._arguments()
            else:
                value, complete = yield from collected(source.json_value())
                if not complete and not given:
                    raise NoCallError
                early = value if key in _ARGUMENTS else early
            closed = yield from source.takes("}")
            if not closed and not (yield from source.takes(",")):
                if not given:
                    raise NoCallError
                return  # only the brace that closes the call is missing
        if not given:
            yield self._start(self._known(name))
            yield Arguments(_as_object(early))

    def _named(self, body: NamedCall) -> Steps[None]:
        source = self._source
        if body.before:
            yield from self._expect(body.before)
        yield from source.space()
        name = self._known((yield from source.name()))
        if body.id_begin and (yield from source.takes(body.id_begin)):
            yield from source.name()
        yield from source.takes(body.between.strip())
        if (yield from source.follows("{")) is None:
            raise NoCallError
        yield from source.space()
        yield self._start(name)
        yield from self._arguments()
        if body.after:
            yield from source.takes(body.after.strip())

    def _arguments(self) -> Steps[None]:
        if (yield from self._source.next_character()) == "{":
            yield from _as_arguments(self._source.json_value())
        else:
            value, _ = yield from collected(self._source.json_value())
            yield Arguments(_as_object(value))

    def _tagged(self, body: TaggedCall) -> Steps[None]:
        source, (key_begin, key_end) = self._source, body.key
        yield from self._expect(body.name[0])
        yield from source.space()
        name = self._known((yield from source.name()))
        yield from self._expect(body.name[1])
        if (yield from source.follows(key_begin)) is None:
            last = body.after or self._form.call[1].strip()
            if (yield from source.follows(last)) is None:
                raise NoCallError
        yield self._start(name)
        yield Arguments("{")
        properties = (self._tools[name] or {}).get("properties")
        comma = ""
        while (yield from source.takes(key_begin)):
            key, complete = yield from collected(source.until(key_end.strip()))
            if not complete:
                yield Arguments(comma + key)
                return
            yield from source.takes(key_end.strip())
            yield Arguments(f"{comma}{_written(key.strip())}: ")
            schema = properties.get(key.strip()) if isinstance(properties, Mapping) else None
            if not (yield from self._value(body, schema)):
                return
            comma = ", "
        yield Arguments("}")
        if body.after:
            yield from source.takes(body.after)

    def _value(self, body: TaggedCall, schema: object) -> Steps[bool]:
        """Read the value of an argument; return whether it is complete."""
        source, (begin, end) = self._source, body.value
        yield from source.takes(begin, space=not begin.isspace())
        # The line break before the tag may be missing.
        pieces = source.until(end.rstrip(), end.strip())
        allowed = kinds(schema)
        if allowed == {"string"}:
            yield Arguments('"')
            complete = yield from _as_arguments(pieces, lambda text: _written(text)[1:-1])
            if complete:
                yield Arguments('"')
        else:
            text, complete = yield from collected(pieces)
            yield Arguments(_as_value(text, allowed) if complete else text)
        if complete:
            yield from source.takes(end.strip())
        return complete

    def _start(self, name: str) -> CallStart:
        self.begun = True
        self._source.release()
        return CallStart(name, self._form.new_id())

    def _known(self, name: str) -> str:
        if name not in self._tools:
            raise NoCallError
        return name

    def _text(self) -> Generator[None, None, str]:
        """Return a JSON text."""
        if (yield from self._source.follows('"')) is None:
            raise NoCallError
        yield from self._source.space()
        text, _ = yield from collected(self._source.json_value())
        try:
            return str(json.loads(text))
        except ValueError:
            raise NoCallError from None

    def _expect(self, text: str) -> Generator[None, None, None]:
        if not (yield from self._source.takes(text.strip())):
            raise NoCallError


def _as_arguments(pieces: Pieces[bool], write: Callable[[str], str] = str) -> Steps[bool]:
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            return bool(stop.value)
        yield None if piece is None else Arguments(write(piece))


def _as_object(value: str) -> str:
    """Return the JSON text that a JSON text holds, an empty object for null, and all else as it is."""
    try:
        inner = json.loads(value)
    except ValueError:
        return value
    return "{}" if inner is None else inner if isinstance(inner, str) else value


def _written(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _as_value(text: str, allowed: Set[str]) -> str:
    """Return as JSON what stands without quotes if it is a text."""
    text = text.lower() if allowed == {"boolean"} else text  # some models write Python's True
    try:
        kind = kind_of(json.loads(text, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return _written(text)
    return _written(text) if "string" in allowed and kind not in allowed - {"string"} else text


def _refuse(constant: str) -> None:
    raise ValueError(constant)
