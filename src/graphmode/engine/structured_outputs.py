"""What an answer is held to: a JSON schema, a regular expression, one of several texts, or a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from graphmode.engine import aliases, checks
from graphmode.errors import InputError

MAX_SCHEMA_BYTES = 2**17
MAX_NESTING = 64  # objects and arrays of a schema inside each other
MAX_REGEX_BYTES = 2**14
MAX_CHOICES = 2**13
MAX_CHOICES_BYTES = 2**17
MAX_GRAMMAR_BYTES = 2**16

_ANY_OBJECT = {"type": "object"}


@aliases.by_name(aliases.STRUCTURED)
@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What an answer is held to, token by token. Exactly one is given.

    Attributes:
        json: a JSON schema, as a dict or as JSON text of up to 131072 bytes, or True for any JSON object. The answer is
            JSON that it allows, with nothing but a space, or a line break and up to 20 spaces, between its parts. What
            of JSON Schema the compiler (llguidance) does not know, such as ``uniqueItems``, is refused. It is kept as
            JSON text.
        regex: a regular expression that the whole answer matches, in the syntax of Rust's regex, up to 16384 bytes.
        choice: texts of which the answer is one, at most 8192.
        grammar: a context-free grammar, in llguidance's dialect of Lark (with a rule ``start``) or in GBNF (with a rule
            ``root``), up to 65536 bytes.

    Raises:
        InputError: none or several are given, or a value is of another type, malformed or too large.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [each.name for each in fields(self) if getattr(self, each.name) is not None]
        if len(given) != 1:
            raise InputError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}; give exactly one of json, regex, choice "
                "and grammar"
            )
        read = {"json": _schema, "regex": _regex, "choice": _choice, "grammar": _grammar}[given[0]]
        object.__setattr__(self, given[0], read(getattr(self, given[0])))

    @property
    def kind(self) -> str:
        """Which one is given."""
        return next(each.name for each in fields(self) if getattr(self, each.name) is not None)


def structured_outputs(name: str, value: object) -> StructuredOutputs:
    """Return what a request's answers are held to: as it is, or made from a dict; anything else is an InputError."""
    if isinstance(value, StructuredOutputs):
        return value
    if not isinstance(value, Mapping):
        raise checks.unfit(name, value, "StructuredOutputs, a dict such as {'regex': '[0-9]+'}, or None")
    return StructuredOutputs(**{str(key): each for key, each in value.items()})


def _schema(value: object) -> str:
    """Return a schema as JSON text."""
    name = "structured_outputs.json"
    if value is True:
        value = _ANY_OBJECT
    if isinstance(value, str):
        _check_size(name, checks.text(name, value), MAX_SCHEMA_BYTES)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} is no JSON: {error}; give a JSON schema, or True for any object") from None
    if not isinstance(value, Mapping):
        raise checks.unfit(name, value, "a JSON schema, which is an object, as a dict or as JSON text, or True")
    _check_nesting(name, value)
    if "x-guidance" in value:
        raise InputError(f"{name} holds x-guidance, options of its compiler that requests cannot set; leave it out")
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be written as JSON: {error}; use dicts, lists, texts and numbers") from None
    return _check_size(name, text, MAX_SCHEMA_BYTES)


def _check_nesting(name: str, schema: Mapping[str, Any]) -> None:
    """Refuse what is nested too deep or has too many parts, whatever else it is: it may hold itself."""
    level: list[Any] = [schema]
    parts = depth = 0
    while level:
        depth += 1
        if depth > MAX_NESTING:
            raise InputError(
                f"{name} is nested more than {MAX_NESTING} levels deep; name inner schemas in $defs and refer to them"
            )
        inner = []
        for each in level:
            within = list(each.values()) if isinstance(each, Mapping) else list(each)
            inner += [part for part in within if isinstance(part, (Mapping, list, tuple))]
            parts += len(within)
            if parts > MAX_SCHEMA_BYTES:
                raise InputError(f"{name} has more than {MAX_SCHEMA_BYTES} parts; give a smaller schema")
        level = inner


def _regex(value: object) -> str:
    return _check_size(name := "structured_outputs.regex", checks.text(name, value), MAX_REGEX_BYTES)


def _choice(value: object) -> tuple[str, ...]:
    name = "structured_outputs.choice"
    if isinstance(value, str):
        raise checks.unfit(name, value, "a list of texts")
    choices = checks.texts(name, value)
    if not choices:
        raise InputError(f"{name} is empty, which allows no answer; give a text at least")
    if len(choices) > MAX_CHOICES:
        raise InputError(f"{name} has {len(choices)} texts; it may have {MAX_CHOICES}. Give fewer")
    _check_size(name, "".join(choices), MAX_CHOICES_BYTES)
    return choices


def _grammar(value: object) -> str:
    return _check_size(name := "structured_outputs.grammar", checks.text(name, value), MAX_GRAMMAR_BYTES)


def _check_size(name: str, text: str, most: int) -> str:
    if (size := len(text.encode())) > most:
        raise InputError(f"{name} has {size} bytes; it may have {most}. Give a smaller one")
    return text
