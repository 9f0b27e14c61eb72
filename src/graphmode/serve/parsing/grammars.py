"""Grammars of answers that call tools, in the format that the model knows.

They are in Lark, as llguidance reads it. Special tokens stand in them by their ids: their texts would match nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphmode.serve.parsing.calls import Tools
from graphmode.serve.parsing.formats import JsonCall, NamedCall, ReasoningFormat, TaggedCall, ToolFormat
from graphmode.serve.parsing.schemas import kinds

# As Python's json writes them, and so the chat templates. No other white space: a model could go on with it for ever.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, kw_only=True)
class Thoughts:
    """What may stand before the answer.

    Attributes:
        form: how thoughts are set apart; None where the model has none.
        begun: whether the prompt has begun them.
    """

    form: ReasoningFormat | None = None
    begun: bool = False


class AnswerGrammar:
    """A grammar of answers.

    Args:
        special: the ids of the special tokens, by their texts.
        thoughts: what may stand before the answer.
    """

    def __init__(self, special: Mapping[str, int], thoughts: Thoughts) -> None:
        self._special = special
        self._special_text = re.compile(f"({'|'.join(map(re.escape, special)) or '(?!)'})")
        self._thoughts = thoughts
        self._rules: list[str] = []

    def json(self, schema: Mapping[str, Any]) -> str:
        """Return the grammar of an answer that is JSON by a schema."""
        return self._grammar(_json(schema))

    def forced_calls(self, form: ToolFormat, tools: Tools, *, several: bool) -> str:
        """Return the grammar of an answer that is nothing but calls.

        Args:
            form: the format.
            tools: what can be called.
            several: whether there may be more than one.
        """
        return self._grammar(self._calls_alone(form, tools, several))

    def json_or_calls(self, schema: Mapping[str, Any], form: ToolFormat, tools: Tools, *, several: bool) -> str:
        """Return the grammar of an answer that is JSON by a schema, or nothing but calls as of :meth:`forced_calls`."""
        return self._grammar(f"{_json(schema)} | {self._calls_alone(form, tools, several)}")

    def free_calls(self, form: ToolFormat, tools: Tools, *, several: bool) -> str:
        """Return the grammar of an answer that may hold calls, which then are those of the tools.

        Args:
            form: the format.
            tools: what can be called.
            several: whether there may be more than one.
        """
        written = "".join(form.begin)
        if form.bare:
            self._rules.append("OTHER: /([^{\\n](.|\\n)*)?/")
            return self._grammar(f"({self._literal(written)})? {self._run(form, tools, '', several)} | OTHER")
        first = "" if written else form.call[0]
        after_trigger = self._literal((written or first).removeprefix(form.trigger))
        calls = f"({self._text_until(form.trigger)} {after_trigger} {self._run(form, tools, first, several)})"
        return self._grammar(f"{calls}{'*' if several else '?'} TEXT")

    def _grammar(self, answer: str) -> str:
        thoughts = ""
        form = self._thoughts.form
        if form is not None:
            end = self._text_until(form.end)
            thoughts = f"{end} SPACE" if self._thoughts.begun else f"({self._literal(form.begin)} {end} SPACE)?"
        return "\n".join(
            [
                "%llguidance {}",
                f"start: {thoughts} answer",
                f"answer: {answer}",
                *self._rules,
                "TEXT: /(.|\\n)*/",
                "SPACE: /\\n{0,2}/",
            ]
        )

    def _calls_alone(self, form: ToolFormat, tools: Tools, several: bool) -> str:
        begin = "" if form.bare else self._literal("".join(form.begin))
        return f"{begin} {self._run(form, tools, '', several)}"

    def _run(self, form: ToolFormat, tools: Tools, begun: str, several: bool) -> str:
        """Return the rule of calls; of the first, ``begun`` is written already."""
        calls = []
        for number, (name, schema) in enumerate(tools.items()):
            self._rules.append(f"call_{number}: {self._call(form.body, name, schema)} {self._literal(form.call[1])}")
            calls.append(f"call_{number}")
        one = f"({' | '.join(calls)})"
        more = f"({self._literal(form.between + form.call[0])} {one})*" if several else ""
        first = self._literal(form.call[0].removeprefix(begun))
        return f"{first} {one} {more} {self._literal(form.end)}"

    def _call(self, body: JsonCall | NamedCall | TaggedCall, name: str, schema: Mapping[str, Any] | None) -> str:
        if isinstance(body, JsonCall):
            head = f'{{"name": {json.dumps(name)}, {json.dumps(body.arguments)}: '
            return f"{self._literal(head)} {_json(_arguments(schema))} {self._literal('}')}"
        if isinstance(body, NamedCall):
            head = body.before + name + body.between
            return f"{self._literal(head)} {_json(_arguments(schema))} {self._literal(body.after)}"
        return self._tagged(body, name, _arguments(schema))

    def _tagged(self, body: TaggedCall, name: str, schema: Mapping[str, Any]) -> str:
        written = [self._literal(body.name[0] + name + body.name[1])]
        required = schema.get("required", ())
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        for key, own in schema.get("properties", {}).items():
            begin = self._literal(body.key[0] + key + body.key[1] + body.value[0])
            argument = f"{begin} {self._value(body.value[1], own, shared)}"
            written.append(argument if key in required else f"({argument})?")
        return " ".join((*written, self._literal(body.after)))

    def _value(self, end: str, schema: Any, shared: Mapping[str, Any]) -> str:
        if kinds(schema) and "string" not in kinds(schema):
            return f"{_json({**shared, **schema})} {self._literal(end)}"
        choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
        if choices:
            texts = [each if isinstance(each, str) else json.dumps(each) for each in choices]
            return f"({' | '.join(map(self._literal, texts))}) {self._literal(end)}"
        return self._text_until(end)

    def _text_until(self, end: str) -> str:
        """Return the rule of any text up to one that ends it, and that text."""
        head, special, tail = self._split(end)
        if special:
            if head:  # a text and what follows it are one terminal: the text alone would take all
                self._rules.append(f"UNTIL_{len(self._rules)}: TEXT {_quoted(head)}")
            text = f"UNTIL_{len(self._rules) - 1}" if head else "TEXT"
            return f"{text} {special} {self._literal(tail)}"
        name = f"until_{len(self._rules)}"
        self._rules.append(f"{name}[lazy]: TEXT {_quoted(end)}")
        return name

    def _split(self, text: str) -> tuple[str, str, str]:
        """Return what is before the first special token of a text, that token in the grammar, and what follows it."""
        head, *rest = self._special_text.split(text, maxsplit=1)
        return (head, f"<[{self._special[rest[0]]}]>", rest[1]) if rest else (head, "", "")

    def _literal(self, text: str) -> str:
        written = []
        while text:
            head, special, text = self._split(text)
            written += [_quoted(head)] if head else []
            written += [special] if special else []
        return " ".join(written)


def _arguments(schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments: a tool without one takes none, and names that it lacks are not made."""
    if not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {**closed, **schema}


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _SPACING})}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
