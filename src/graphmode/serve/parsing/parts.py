"""What an answer is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of what the answer says."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool is called.

    Attributes:
        name: the tool's.
        id: of the call.
    """

    name: str
    id: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON text with the arguments of the call that began last."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call that began last is complete."""


Part = Content | Reasoning | CallStart | Arguments | CallEnd
_TEXTS = (Content, Reasoning, Arguments)


def merged(parts: Sequence[Part]) -> list[Part]:
    """Return parts with the texts of neighbours of one kind joined."""
    if len(parts) < 2:
        return list(parts)
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, _TEXTS) and isinstance(last, _TEXTS) and type(part) is type(last):
            joined[-1] = replace(part, text=last.text + part.text)
        else:
            joined.append(part)
    return joined
