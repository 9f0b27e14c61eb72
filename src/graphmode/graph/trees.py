"""Trees of values: inputs and outputs nested in dicts, tuples, lists and dataclasses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from graphmode.errors import InputError


def is_dataclass_value(value: object) -> bool:
    """Return whether a value is an instance of a dataclass, and not the class itself."""
    return is_dataclass(value) and not isinstance(value, type)


@dataclass(frozen=True)
class Structure:
    """How flat outputs nest: what torch's pytree knows, None, and dataclasses, which pytree takes for leaves.

    Attributes:
        spec: the structure down to dataclasses.
        parts: what is at each leaf of ``spec``: True for a leaf, False for None, or a dataclass.
    """

    spec: TreeSpec
    parts: tuple[bool | _DataclassPart, ...]

    def build(self, leaves: Sequence[Any]) -> Any:
        """Return ``leaves`` nested as the outputs were."""
        if len(leaves) == len(self.parts) == 1 and self.spec.is_leaf() and self.parts[0] is True:
            return leaves[0]
        return self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Any:
        nested: list[Any] = []
        for part in self.parts:
            if isinstance(part, bool):
                nested.append(next(leaves) if part else None)
            else:
                fields_now = zip(part.names, part.structure._build(leaves), strict=True)
                nested.append(_with_fields(part.value, dict(fields_now)))
        return tree_unflatten(nested, self.spec)


@dataclass(frozen=True)
class _DataclassPart:
    """A dataclass among outputs: one without its fields, the fields' names, and how what they hold nests."""

    value: Any
    names: tuple[str, ...]
    structure: Structure


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """Return the leaves of ``tree`` in order, without None, and its structure."""
    leaves, spec = tree_flatten(tree)
    flat: list[Any] = []
    parts: list[bool | _DataclassPart] = []
    for leaf in leaves:
        if is_dataclass_value(leaf):
            names = tuple(field.name for field in fields(leaf))
            inner, structure = flatten(tuple(getattr(leaf, name) for name in names))
            flat += inner
            parts.append(_DataclassPart(_with_fields(leaf, dict.fromkeys(names)), names, structure))
        else:
            parts.append(leaf is not None)
            flat += [] if leaf is None else [leaf]
    return flat, Structure(spec, tuple(parts))


def map_leaves(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return a declared tree with each leaf, which is of ``kind``, replaced by ``function(leaf)``, in order."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_leaves(value, kind, function) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(value, kind, function) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_leaves(value, kind, function) for value in tree)
    if is_dataclass_value(tree):
        names = [each.name for each in fields(tree)]
        return _with_fields(tree, {name: map_leaves(getattr(tree, name), kind, function) for name in names})
    raise InputError(
        f"{tree!r} stands in a tree of inputs; it takes dicts, tuples, lists, dataclasses and {kind.__name__}s"
    )


def _with_fields(value: Any, changed: Mapping[str, Any]) -> Any:
    """Return a copy of a dataclass, frozen or not, with other fields. Its ``__post_init__`` does not run again."""
    new = copy.copy(value)
    for name, field in changed.items():
        object.__setattr__(new, name, field)
    return new


def match(declared: Any, kind: type, value: Any, path: str, take: Callable[[Any, Any], None]) -> None:
    """Go through ``value`` along a declared tree and call ``take(leaf, value)`` for each leaf, which is of ``kind``.

    A dict may lack keys: then what is declared there gets None.

    Raises:
        InputError: the value is nested differently; the message names the path and what is declared there.
    """
    if isinstance(declared, kind):
        take(declared, value)
        return
    if value is None:
        map_leaves(declared, kind, lambda leaf: take(leaf, None))
        return
    if isinstance(declared, Mapping):
        _expect(isinstance(value, Mapping), path, value, f"a dict with the keys {sorted(map(str, declared))}")
        if unknown := [key for key in value if key not in declared]:
            raise InputError(f"input {path} has the keys {unknown}; declared are {list(declared)}")
        pairs = [(f"{path}[{key!r}]", leaf, value.get(key)) for key, leaf in declared.items()]
    elif isinstance(declared, (list, tuple)):
        fits = isinstance(value, (list, tuple)) and len(value) == len(declared)
        _expect(fits, path, value, f"a {type(declared).__name__} of {len(declared)} values")
        pairs = [(f"{path}[{at}]", leaf, value[at]) for at, leaf in enumerate(declared)]
    else:
        _expect(isinstance(value, type(declared)), path, value, f"a {type(declared).__name__}")
        pairs = [(f"{path}.{name}", leaf, getattr(value, name)) for name, leaf in vars(declared).items()]
    for where, leaf, each in pairs:
        if isinstance(leaf, kind):  # most are: a call fewer for each
            take(leaf, each)
        else:
            match(leaf, kind, each, where, take)


def _expect(fits: bool, path: str, value: object, wanted: str) -> None:
    if not fits:
        raise InputError(f"input {path} is {_in_words(value)}; it is declared as {wanted}")


def _in_words(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)} values"
    return f"a {type(value).__name__}"
