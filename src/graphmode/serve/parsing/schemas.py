"""What is asked of JSON schemas: of what kinds a value may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value, as schemas name it."""
    return _KINDS.get(type(value), "null")


def kinds(schema: Any) -> frozenset[str]:
    """Return the kinds that a schema names; none where it leaves them open."""
    if not isinstance(schema, Mapping):
        return frozenset()
    named = schema.get("type", ())
    found = {named} if isinstance(named, str) else {each for each in named if isinstance(each, str)}
    if not found:
        found |= {
            kind_of(each) for each in (*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ()))
        }
        for branches in (schema.get("anyOf", ()), schema.get("oneOf", ())):
            found = found.union(*map(kinds, branches))
    return frozenset(found | ({"integer"} if "number" in found else set()))
