"""Options as texts: how a dataclass of options is written on a command line, from its fields, types and docstring."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from graphmode.engine.aliases import Alias, Names
from graphmode.errors import InputError


class Kind(StrEnum):
    """How a value is written."""

    FLAG = "true|false"
    INTEGER = "INTEGER"
    NUMBER = "NUMBER"
    INTEGERS = "1,2,4"
    TEXT = "TEXT"
    TEXTS = "TEXTS"
    """Texts, for each of which the option is given again."""
    VALUE = "JSON"
    """JSON, or any other text."""


@dataclass(frozen=True)
class TextOption:
    """An option as a command line takes it.

    Attributes:
        name: of the field, or another name of it.
        kind: how its value is written.
        help: what it does; empty for another name.
        default: the value when it is not given; None also where the engine chooses.
    """

    name: str
    kind: Kind
    help: str = ""
    default: Any = None

    def read(self, text: str) -> Any:
        """Return the value that a text means.

        A text that is not of the option's kind is returned as it is: the check of the option refuses it and names what
        is allowed.
        """
        written = text.strip().lower()
        if self.kind is Kind.FLAG:
            return {"true": True, "1": True, "yes": True, "on": True}.get(
                written, False if written in ("false", "0", "no", "off") else text
            )
        if self.kind in (Kind.TEXT, Kind.TEXTS):
            return text
        if written in ("none", "null"):
            return None
        try:
            if self.kind is Kind.INTEGERS:
                return [int(number) for number in text.strip().removeprefix("[").removesuffix("]").split(",")]
            return {Kind.INTEGER: int, Kind.NUMBER: float}.get(self.kind, json.loads)(text)
        except ValueError:
            return text


def text_options(options: type, names: Names) -> dict[str, TextOption]:
    """Return the options of a dataclass by name, without those that only Python can give, and then their other names.

    Args:
        options: a dataclass whose docstring has a section ``Attributes`` with all fields.
        names: other names, and names that are refused.
    """
    hints, described = get_type_hints(options), descriptions(options)
    found = {}
    for each in fields(options):
        if kind := _kind(hints[each.name]):
            default = None if each.default is MISSING else each.default
            found[each.name] = TextOption(each.name, kind, described[each.name], default)
    others = {}
    for name, other in names.items():
        if isinstance(other, Alias):
            kind = found[other.name].kind if other.name else Kind.VALUE
        else:
            kind = Kind.FLAG if any(isinstance(value, bool) for value in other.harmless) else Kind.VALUE
        others[name] = TextOption(name, kind)
    return others | found


def named_value(text: str, options: Mapping[str, TextOption]) -> tuple[str, Any]:
    """Return name and value of an option that is written ``name=value``; hyphens in the name count as underscores.

    Raises:
        InputError: it has no value.
    """
    name, equals, written = text.partition("=")
    if not equals:
        raise InputError(f"option {text!r} has no value; write NAME=VALUE, such as max_num_seqs=64")
    name = name.strip().replace("-", "_")
    return name, options.get(name, TextOption(name, Kind.VALUE)).read(written)


def descriptions(documented: type) -> dict[str, str]:
    """Return what the section ``Attributes`` of a class's docstring says of each, in plain words."""
    section = re.search(r"^Attributes:\n((?: +.*\n|\n)+)", inspect.getdoc(documented) or "", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: _plain(text) for name, text in entries}


def _plain(text: str) -> str:
    without_roles = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    return re.sub(r"\s+", " ", without_roles.replace("``", "")).strip()


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the one type that it is."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _kind(hint: Any) -> Kind | None:
    """Return how values of a type are written; None where they cannot be."""
    parts = _parts(hint)
    for part in parts:
        if is_dataclass(part):
            return Kind.VALUE
        origin = get_origin(part)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return Kind.VALUE
        if isinstance(origin, type) and issubclass(origin, Collection):
            return Kind.INTEGERS if get_args(part) == (int,) else Kind.TEXTS
    if str in parts or any(get_origin(part) is Literal for part in parts):
        return Kind.TEXT
    plain = {bool: Kind.FLAG, int: Kind.INTEGER, float: Kind.NUMBER}
    return next((kind for of, kind in plain.items() if of in parts), None)
