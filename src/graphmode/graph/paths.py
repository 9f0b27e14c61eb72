"""Paths: how a function reaches the tensors that it uses. They are searched once and can be followed again later.

A path starts at the function and leads through variables of its closure and module, the object that it is bound to,
attributes and items, and parameters, buffers and children of modules. It keeps nothing alive but the function.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from pathlib import PurePath
from types import BuiltinMethodType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

SEARCH_LIMIT = 100_000
"""Attributes and items that a search looks at, at most: some hundredths of a second."""
_CONTAINER_LIMIT = 4096
# The memory may be a constant that the function made, so the search for it is short.
_LEFT_FOR_STORAGES = SEARCH_LIMIT - 2000

_PLAIN = (
    *(bool, int, float, complex, str, bytes, bytearray, type(None), range, slice, CodeType, Enum, PurePath),
    *(torch.dtype, torch.device, torch.layout, torch.Generator, torch.UntypedStorage, torch.optim.Optimizer),
)
_COMMON = frozenset((bool, int, float, str, type(None)))  # recognised without issubclass
_CONTAINERS = frozenset((dict, OrderedDict, list, tuple, set))
_FUNCTIONS = (FunctionType, MethodType, BuiltinMethodType, functools.partial)


# The steps of a path. Each raises where it leads to nothing.


def _held_by(attribute: str) -> Callable[[Any, Any], Any]:
    """Return the step to what an attribute of an object, a dict or a tuple, holds by a key."""
    return lambda owner, key: getattr(owner, attribute)[key]


_parameter, _buffer, _child = map(_held_by, ("_parameters", "_buffers", "_modules"))
_attribute, _global = map(_held_by, ("__dict__", "__globals__"))
_default, _keyword_default = map(_held_by, ("__defaults__", "__kwdefaults__"))
_argument, _keyword = map(_held_by, ("args", "keywords"))  # of a functools.partial


def _slot(instance: Any, name: str) -> Any:
    return object.__getattribute__(instance, name)


def _class_attribute(instance: Any, name: str) -> Any:
    if name in getattr(instance, "__dict__", ()):
        return instance.__dict__[name]
    return next(vars(kind)[name] for kind in type(instance).__mro__ if name in vars(kind))


def _entry(mapping: Any, key: Any) -> Any:
    key = key() if isinstance(key, weakref.ref) else key
    if isinstance(mapping, dict):
        return dict.__getitem__(mapping, key)  # a subclass may create what it is asked for
    return mapping[key]


def _element(sequence: Any, index: int) -> Any:
    return sequence[index]


def _cell(function: Any, index: int) -> Any:
    return function.__closure__[index].cell_contents


def _imported(_: Any, name: str) -> Any:
    return sys.modules[name]


def _receiver(method: Any, _: None) -> Any:
    return method.__self__


def _inner(wrapper: Any, name: str) -> Any:
    return getattr(wrapper, name)


def _referent(reference: Any, _: None) -> Any:
    return reference()


def _by_name(instance: Any, get: Callable[[Any, Any], Any], name: Any) -> Any:
    """Return what ``getattr`` gives for an attribute that is no longer where it was found, or None."""
    if get not in (_parameter, _buffer, _child, _attribute, _slot, _class_attribute):
        return None
    try:
        return getattr(instance, name, None)
    except Exception:  # of a property
        return None


Step = tuple[Callable[[Any, Any], Any], Any]


def _text(parent: Any, step: Step) -> str:
    """Return a step as code writes it. One that begins with neither ``.`` nor ``[`` starts the written path."""
    get, key = step
    if get in (_global, _imported, _keyword_default, _keyword):
        return str(key)
    if get is _cell:
        return str(parent.__code__.co_freevars[key])
    if get is _default:
        code = parent.__code__
        return str(code.co_varnames[code.co_argcount - len(parent.__defaults__) + key])
    if get is _argument:
        return f"args[{key}]"
    if get is _receiver:
        return ".__self__"
    if get in (_inner, _referent):
        return ""
    return f"[{key!r}]" if get in (_entry, _element) else f".{key}"


class Place(NamedTuple):
    """An object where a search found it.

    Attributes:
        value: the object.
        parent: the place that it was reached from, and the step from there; None for the function itself.
    """

    value: Any
    parent: tuple[Place, Step] | None = None

    def steps(self) -> list[tuple[Place, Step]]:
        """Return the places before this one and the steps from them, from the function on."""
        steps, place = [], self
        while place.parent is not None:
            steps.append(place.parent)
            place = place.parent[0]
        return steps[::-1]

    @property
    def path(self) -> str:
        """The path as code would write it."""
        text = ""
        for place, step in self.steps():
            part = _text(place.value, step)
            if part == ".__self__" and not text:
                part = "self"
            text = text + part if part.startswith((".", "[")) or not part else part
        return text.removeprefix(".") or "the function itself"


@dataclass
class Found:
    """What a search found.

    Attributes:
        tensors: places of the tensors that were looked for; one tensor may have several.
        others: for memory that was looked for, by its storage's ``_cdata``: the first other tensor over it.
        modules: the first place of each module, parents first.
        again: further places of modules.
        own: the ``id`` of the function and of what belongs to it: what it is bound to and what it wraps.
    """

    tensors: list[Place] = field(default_factory=list)
    others: dict[int, Place] = field(default_factory=dict)
    modules: list[Place] = field(default_factory=list)
    again: list[Place] = field(default_factory=list)
    own: set[int] = field(default_factory=set)


def search(function: object, tensors: Mapping[int, torch.Tensor], storages: Collection[int]) -> Found:
    """Search what a function reaches, breadth first and modules first, until all is found.

    The search goes through objects of any class, but not into the code of Python's own library and of installed
    packages, except the package of the function.

    Args:
        function: where to start.
        tensors: those to find, by their ``id``.
        storages: memory to find by any tensor over it, by its ``_cdata``.
    """
    return _Search(function, tensors, storages).run()


class _Search:
    def __init__(self, function: object, tensors: Mapping[int, torch.Tensor], storages: Collection[int]) -> None:
        self._tensors = tensors
        self._missing, self._missing_storages = set(tensors), set(storages)
        self._found = Found(own={id(function)})
        self._left = SEARCH_LIMIT
        self._seen = {id(function)}
        self._first: deque[tuple[Place, frozenset[str]]] = deque([(Place(function), frozenset())])
        self._then: deque[tuple[Place, frozenset[str]]] = deque()
        start: Any = function
        while isinstance(start, functools.partial):
            start = start.func
        self._home = _package(start.__module__) if isinstance(start, _FUNCTIONS) else ""
        if isinstance(function, torch.nn.Module):
            self._found.modules.append(Place(function))

    def run(self) -> Found:
        while self._left > 0:
            if self._first:
                place, names = self._first.popleft()
            elif self._then and (self._missing or (self._missing_storages and self._left > _LEFT_FOR_STORAGES)):
                place, names = self._then.popleft()
            else:
                break
            if isinstance(place.value, FunctionType):
                names = frozenset(code_names(place.value.__code__))
            for get, key, value in self._from(place.value, names):
                self._left -= 1
                kind = type(value)
                if kind not in _COMMON and not (kind in _CONTAINERS and not value) and not issubclass(kind, _PLAIN):
                    self._visit(Place(value, (place, (get, key))), names)
        return self._found

    def _visit(self, place: Place, names: frozenset[str]) -> None:
        value, kind = place.value, type(place.value)
        if issubclass(kind, torch.Tensor):
            self._visit_tensor(place)
            if kind in (torch.Tensor, torch.nn.Parameter):
                return
        is_module = issubclass(kind, torch.nn.Module)
        mark = hash((id(value), names)) if issubclass(kind, ModuleType) else id(value)
        if mark in self._seen:
            if is_module:
                self._found.again.append(place)
            return
        self._seen.add(mark)
        if is_module:
            self._found.modules.append(place)
        assert place.parent is not None
        before, (get, _) = place.parent
        if get in (_receiver, _inner) and id(before.value) in self._found.own:
            self._found.own.add(id(value))
        (self._first if is_module or id(value) in self._found.own else self._then).append((place, names))

    def _visit_tensor(self, place: Place) -> None:
        tensor = place.value
        if id(tensor) in self._tensors:
            self._found.tensors.append(place)
            self._missing.discard(id(tensor))
        elif self._missing_storages:
            with suppress(RuntimeError, NotImplementedError):  # a tensor without memory of its own
                storage = tensor.untyped_storage()._cdata
                if storage in self._missing_storages:
                    self._found.others[storage] = place
                    self._missing_storages.discard(storage)

    def _from(self, value: Any, names: frozenset[str]) -> Iterator[tuple[Any, Any, Any]]:
        """Yield each step from an object: how, by which key, and to what."""
        kind = type(value)
        if issubclass(kind, FunctionType):
            yield from self._from_function(value, names)
        elif issubclass(kind, (MethodType, BuiltinMethodType)):
            yield _receiver, None, value.__self__
            if kind is MethodType:
                yield _inner, "__func__", value.__func__
        elif issubclass(kind, functools.partial):
            yield _inner, "func", value.func
            yield from ((_argument, index, argument) for index, argument in enumerate(value.args))
            yield from ((_keyword, name, argument) for name, argument in value.keywords.items())
        elif issubclass(kind, ModuleType):
            if self._is_own(value.__name__):
                yield from ((_attribute, name, vars(value)[name]) for name in names if name in vars(value))
        elif issubclass(kind, weakref.ref):
            yield _referent, None, value()
        elif issubclass(kind, (property, classmethod, staticmethod, functools.cached_property)):
            for name in ("fget", "__func__", "func"):
                if (function := getattr(value, name, None)) is not None:
                    yield _inner, name, function
        elif issubclass(kind, type):
            for owner in value.__mro__:
                if self._is_own(owner.__module__):
                    yield from ((_attribute, name, each) for name, each in tuple(vars(owner).items()))
        else:
            yield from self._from_instance(value, kind)

    def _from_function(self, function: FunctionType, names: frozenset[str]) -> Iterator[tuple[Any, Any, Any]]:
        for index, cell in enumerate(function.__closure__ or ()):
            with suppress(ValueError):  # a variable that has no value yet
                yield _cell, index, cell.cell_contents
        yield from ((_default, index, value) for index, value in enumerate(function.__defaults__ or ()))
        yield from ((_keyword_default, name, value) for name, value in (function.__kwdefaults__ or {}).items())
        for name, value in tuple(vars(function).items()):
            yield (_inner if name == "__wrapped__" else _attribute), name, value
        if self._is_own(function.__globals__.get("__name__", "")):
            for name in names:
                if name in function.__globals__:
                    yield _global, name, function.__globals__[name]
                elif name in sys.modules:
                    yield _imported, name, sys.modules[name]

    def _from_instance(self, value: Any, kind: type) -> Iterator[tuple[Any, Any, Any]]:
        attributes: dict[str, Any] = {}
        with suppress(AttributeError):
            attributes = object.__getattribute__(value, "__dict__")
        if issubclass(kind, torch.nn.Module):
            for get, name in ((_parameter, "_parameters"), (_buffer, "_buffers"), (_child, "_modules")):
                yield from ((get, key, each) for key, each in tuple(attributes.get(name, {}).items()))
        elif issubclass(kind, (dict, MappingProxyType)):
            items = dict.items(value) if issubclass(kind, dict) else value.items()
            for key, each in list(islice(items, _CONTAINER_LIMIT)):
                yield _entry, key if issubclass(type(key), (*_PLAIN, tuple)) else _weak(key), each
        elif issubclass(kind, (list, tuple, deque)):
            yield from ((_element, index, each) for index, each in enumerate(list(islice(value, _CONTAINER_LIMIT))))
        if not self._is_followed(kind):
            return
        skipped = ("_parameters", "_buffers", "_modules") if issubclass(kind, torch.nn.Module) else ()
        yield from ((_attribute, name, each) for name, each in tuple(attributes.items()) if name not in skipped)
        for owner in kind.__mro__:
            for name in _slots(owner):
                with suppress(AttributeError):
                    yield _slot, name, object.__getattribute__(value, name)
            if id(owner) not in self._seen and self._is_own(owner.__module__):
                self._seen.add(id(owner))
                yield from ((_class_attribute, name, each) for name, each in tuple(vars(owner).items()))

    def _is_followed(self, kind: type) -> bool:
        """Return whether to look at an object's attributes: not those of Python's own library and this runtime."""
        if kind.__module__.startswith(f"{__package__}."):
            return False
        return _package(kind.__module__) not in _PYTHON or kind in (UserDict, UserList, SimpleNamespace)

    def _is_own(self, module: str) -> bool:
        """Return whether a module's code is looked at: the user's, and that of the package of the function."""
        package = _package(module)
        return not _is_installed(package) or (package == self._home and package != "torch")


_PYTHON = frozenset(sys.stdlib_module_names) - {"__main__"}


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


@functools.cache
def _is_installed(package: str) -> bool:
    """Return whether a package is of Python's own library or installed, and not the user's own code."""
    if package in _PYTHON:
        return True
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any({"site-packages", "dist-packages"} & set(PurePath(place).parts) for place in places if place)


def code_names(code: CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes that code uses, and functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_names(constant)


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    private = f"_{kind.__name__.lstrip('_')}"
    return [private + name if name.startswith("__") and not name.endswith("__") else name for name in names]


def _weak(key: Any) -> Any:
    try:
        return weakref.ref(key)
    except TypeError:
        return key


class Node:
    """A place in the tree of watched paths.

    Attributes:
        path: as code would write it, if the object here is watched; else None.
        address: where the watched object lay, if it is a tensor with memory of its own; else None.
        layout: its size, stride and dtype.
        children: where the steps from here lead.
    """

    def __init__(self, value: object) -> None:
        self.path: str | None = None
        self.address: int | None = None
        self.layout: tuple[Any, ...] = ()
        self.children: dict[Step, Node] = {}
        self._id = id(value)
        self._reference: weakref.ref[Any] | None = None
        with suppress(TypeError):
            self._reference = weakref.ref(value)

    def held(self, value: object) -> bool:
        """Return whether ``value`` is the object that was found here."""
        return self._id == id(value) if self._reference is None else value is not None and self._reference() is value

    @property
    def found(self) -> Any:
        """The object that was found here, or None where it is gone."""
        return None if self._reference is None else self._reference()

    def add(self, place: Place) -> Node:
        """Add the path to a place below this node, the function's, and watch it. Return its node."""
        node, steps = self, place.steps()
        values = [before.value for before, _ in steps[1:]] + [place.value]
        for (_, step), value in zip(steps, values, strict=True):
            node = node.children.setdefault(step, Node(value))
        if node.path is None:
            node.path = place.path
            if isinstance(place.value, torch.Tensor):
                node.address, node.layout = address_of(place.value), layout_of(place.value)
        return node

    def watched(self) -> Iterator[Node]:
        """Yield this node and those below it that are watched."""
        if self.path is not None:
            yield self
        for child in self.children.values():
            yield from child.watched()

    def follow(self, value: Any, changes: list[Change]) -> None:
        """Follow all paths from ``value``, which is here now, and append what is not as it was found."""
        for (get, key), child in self.children.items():
            try:
                now = get(value, key)
            except Exception:  # the object that is here now may raise anything
                now = _by_name(value, get, key)
                if now is None:
                    replaced = not self.held(value)
                    changes.extend(Change(node, None, replaced) for node in child.watched())
                    continue
            if child.path is not None and not (
                child.held(now) and (child.address is None or now.data_ptr() == child.address)
            ):
                changes.append(Change(child, now, True))
            if child.children:
                child.follow(now, changes)


class Change(NamedTuple):
    """A path that no longer leads to the object that was found by it.

    Attributes:
        node: where it led.
        now: what it leads to now; None where it leads to nothing.
        replaced: whether another object is there or on the way; False if it is just gone.
    """

    node: Node
    now: Any
    replaced: bool


def address_of(tensor: torch.Tensor) -> int | None:
    """Return where a tensor's first element lies, or None where it has no memory of its own."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return None


def layout_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return the shape, strides and dtype of a tensor."""
    return tensor.shape, tensor.stride() if tensor.layout is torch.strided else None, tensor.dtype
