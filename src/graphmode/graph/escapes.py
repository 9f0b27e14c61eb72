"""Results that outlive the call that made them: a replay would not make them again, or would overwrite them.

While a function is warmed up and captured, the memory that its operators make is noted, and whether it was computed
from the inputs. Memory that is still in use after the call was stored somewhere: in an attribute, a list, a global
variable. A constant that is made at the first run and kept is fine; a result is refused, and the error names its place.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from graphmode.errors import CaptureError
from graphmode.graph.paths import code_names
from graphmode.graph.storages import key_of, users, weakly

# At most this many objects are searched for state that a function could change.
_MOST_OBJECTS = 2_000
_OWN_PACKAGE = __name__.rpartition(".")[0]
# Objects of these packages hold nothing that a captured function stored, except modules and containers.
_LIBRARIES = frozenset({"torch", "numpy", *sys.stdlib_module_names} - {"__main__", "types"})


@dataclass(frozen=True)
class Made:
    """Memory that an operator, or a call outside the graph, made.

    Attributes:
        operator: which.
        line: the user's code that called it, where that is known.
        computed: whether it was computed from the inputs.
        storage: a weak reference, so that no other memory gets the same key.
    """

    operator: str
    line: object
    computed: bool
    storage: StorageWeakRef | None

    @property
    def is_there(self) -> bool:
        """Whether a tensor still uses it."""
        return self.storage is not None and users(self.storage.cdata) > 0

    def __str__(self) -> str:
        return f"{self.operator} made it" + (f" at {self.line}" if self.line else "")


class MemoryNotes:
    """The memory that operators made and wrote in one or more runs of a function.

    Args:
        inputs: the function's; what is computed from them differs from call to call.

    Attributes:
        made: the memory that operators made, by the key of its storage.
        written: keys of all memory that operators wrote to in place.
    """

    def __init__(self, inputs: Iterable[torch.Tensor]) -> None:
        self.made: dict[int, Made] = {}
        self.written: set[int] = set()
        self._from_inputs = {key_of(tensor) for tensor in inputs}
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}
        self._dying: list[int] = []

    def note(
        self,
        operator: str,
        line: object,
        arguments: Iterable[torch.Tensor],
        written: Iterable[torch.Tensor],
        results: Iterable[torch.Tensor],
    ) -> None:
        """Note a call of an operator: what it took, which of that it wrote to, and what it returned."""
        taken = {key_of(tensor) for tensor in arguments}
        from_inputs = not taken.isdisjoint(self._from_inputs) and not _takes_shapes_alone(operator)
        keys = {key_of(tensor) for tensor in written}
        self.written |= keys
        for tensor in results:
            key = key_of(tensor)
            if key not in taken and key not in self.made:
                self.made[key] = Made(operator, line, from_inputs, weakly(tensor))
            if key in self.made:
                self._seen[id(tensor)] = weakref.ref(tensor, partial(self._note_end, id(tensor), key))
            keys.add(key)
        if from_inputs:
            self._from_inputs |= keys

    def _note_end(self, name: int, key: int, _: object) -> None:
        """Note that a tensor was freed: the memory at ``key`` may have been freed with it."""
        self._seen.pop(name, None)
        self._dying.append(key)

    def forget_freed(self) -> None:
        """Forget memory that was freed, so that its storage object is released and its key may name another."""
        while self._dying:
            key = self._dying.pop()
            if key in self.made and not self.made[key].is_there:
                del self.made[key]
                self._from_inputs.discard(key)
                self.written.discard(key)

    def computed_and_kept(self) -> list[int]:
        """Return the keys of memory that was computed from the inputs and is still there."""
        return [key for key, made in self.made.items() if made.computed and made.is_there]

    def filled_and_kept(self) -> list[int]:
        """Return the keys of memory that was made as a constant, then written from the inputs, and is still there."""
        return [
            key for key, made in self.made.items() if not made.computed and key in self._from_inputs and made.is_there
        ]


@cache
def _takes_shapes_alone(operator: str) -> bool:
    """Return whether an operator reads shape, dtype and device of its arguments, and no values."""
    name = operator.partition("::")[2].partition(".")[0]
    return name.endswith("_like") or name.startswith("new_") or name == "empty_permuted"


def tensors_over(keys: Container[int]) -> list[torch.Tensor]:
    """Return the tensors, of all that Python knows, that lie in a storage of ``keys``."""
    return [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and holds(each, keys, 0)]


def held_by_call_alone(tensors: list[torch.Tensor], may_hold: Iterable[object]) -> bool:
    """Return whether only ``may_hold``, by way of other objects of the call, holds ``tensors``.

    Objects from before the call are frozen (``gc.freeze``), so the garbage collector does not show them. That they hold
    something shows in a reference count higher than the number of references that are seen.

    Args:
        tensors: nothing else of the runtime may hold them.
        may_hold: objects that may hold them.
    """
    allowed, seen = {id(each) for each in may_hold}, {id(tensor) for tensor in tensors}
    held: list[Any] = tensors
    while held:
        holders = [each for each in gc.get_referrers(*held) if each is not tensors and each is not held]
        holders = [each for each in holders if not isinstance(each, types.FrameType)]
        references = Counter(id(each) for holder in holders for each in gc.get_referents(holder))
        for index in range(len(held)):
            # Two of the references are those of the list and of getrefcount's argument.
            if sys.getrefcount(held[index]) - 2 > references[id(held[index])]:
                return False
        new = [each for each in holders if id(each) not in allowed and id(each) not in seen]
        del holders
        seen.update(id(each) for each in new)
        held = new
        del new
    return True


# What a function can change, and how that is written in its code.


@dataclass(frozen=True)
class Snapshot:
    """What a container held that a function can change: attributes, elements, variables.

    Attributes:
        container: a dictionary (of attributes or globals, too), list, deque, cell or class.
        path: how the code names the container; for a cell, its variable.
        names: which of its keys count; None for all.
        before: what it held, by key.
    """

    container: Any
    path: str
    names: tuple[str, ...] | None
    before: dict[Any, Any]

    @staticmethod
    def of(container: Any, path: str, names: tuple[str, ...] | None = None) -> Snapshot:
        """Return a snapshot of what ``container`` holds now."""
        return Snapshot(container, path, names, _contents(container, names))

    def changed(self) -> dict[Any, Any]:
        """Return what has changed since, or is new, by key."""
        now = _contents(self.container, self.names)
        return {key: value for key, value in now.items() if self.before.get(key, now) is not value}

    def put_back(self) -> None:
        """Restore what the container held."""
        container = self.container
        if isinstance(container, types.CellType):
            container.cell_contents = self.before[0]
        elif isinstance(container, list):
            container[:] = self.before.values()
        elif isinstance(container, deque):
            container.clear()
            container.extend(self.before.values())
        else:
            put, drop = (container.__setitem__, container.__delitem__) if isinstance(container, dict) else (None, None)
            for key in self.changed():
                if key in self.before:
                    put(key, self.before[key]) if put else setattr(container, key, self.before[key])
                else:
                    drop(key) if drop else delattr(container, key)

    def name(self, key: Any) -> str:
        """Return how the code names what a key holds: paths end with ``.`` for attributes, with ``[`` for elements."""
        if self.path.endswith("["):
            return f"{self.path}{key!r}]"
        return self.path if isinstance(self.container, types.CellType) else f"{self.path}{key}"


def _contents(container: Any, names: tuple[str, ...] | None) -> dict[Any, Any]:
    if isinstance(container, types.CellType):
        try:
            return {0: container.cell_contents}
        except ValueError:  # nothing yet
            return {}
    if isinstance(container, (list, deque)):
        return dict(enumerate(container))
    if isinstance(container, dict):
        held = dict(dict.items(container))  # a subclass may create what it is asked for
        return held if names is None else {name: held[name] for name in names if name in held}
    if names is None:
        return dict(vars(container))
    return {name: getattr(container, name) for name in names if hasattr(container, name)}


def snapshots_of(fn: Callable[..., Any]) -> list[Snapshot]:
    """Return snapshots of what ``fn`` can change: its closure, globals and object, and all that these lead to."""
    found: list[Snapshot] = []
    seen: set[int] = set()
    ahead: deque[tuple[Any, str]] = deque([(fn, "")])
    while ahead and len(seen) < _MOST_OBJECTS:
        each, path = ahead.popleft()
        if id(each) in seen or isinstance(each, (torch.Tensor, types.ModuleType)):
            continue
        if not gc.is_tracked(each) and not (isinstance(each, dict) and len(each) < 100):  # it leads to nothing
            continue
        seen.add(id(each))
        for snapshot in _snapshots_in(each, path):
            found.append(snapshot)
            ahead.extend((value, snapshot.name(key)) for key, value in snapshot.before.items())
        ahead.extend(_led_to(each, path))
    return found


def _snapshots_in(each: Any, path: str) -> Iterator[Snapshot]:
    """Yield snapshots of the containers of one object."""
    if isinstance(each, types.FunctionType):
        if _is_library(each):
            return
        for name, cell in zip(each.__code__.co_freevars, each.__closure__ or (), strict=True):
            yield Snapshot.of(cell, name)
        names = tuple(dict.fromkeys(code_names(each.__code__)))
        yield Snapshot.of(each.__globals__, "", tuple(name for name in names if name in each.__globals__))
        for name in names:
            module = each.__globals__.get(name)
            if isinstance(module, types.ModuleType) and not _is_library(module):
                yield Snapshot.of(vars(module), f"{name}.", tuple(name for name in names if name in vars(module)))
    elif isinstance(each, (dict, list, deque)):
        yield Snapshot.of(each, f"{path}[")
    elif isinstance(each, type):
        if not _is_library(each):
            yield Snapshot.of(each, f"{each.__qualname__}.")
    elif isinstance(each, torch.nn.Module) or not _is_library(type(each)):
        path = path or type(each).__qualname__
        if type(each).__module__.startswith(_OWN_PACKAGE):  # of a runner, only the function
            return
        if isinstance(getattr(each, "__dict__", None), dict):
            yield Snapshot.of(vars(each), f"{path}.")
        if isinstance(each, torch.nn.Module):
            yield Snapshot.of(each._buffers, f"{path}.")
            yield Snapshot.of(each._modules, f"{path}.")
        slots = [getattr(kind, "__slots__", ()) for kind in type(each).__mro__]
        if names := tuple(name for slot in slots for name in ((slot,) if isinstance(slot, str) else slot)):
            yield Snapshot.of(each, f"{path}.", names)


def _led_to(each: Any, path: str) -> Iterable[tuple[Any, str]]:
    """Return what an object refers to by references that the function cannot change."""
    if isinstance(each, (types.MethodType, staticmethod, classmethod)):
        return ((getattr(each, "__self__", None), path), (each.__func__, path))
    if isinstance(each, partial):
        return ((each.func, path), (each.args, path), (each.keywords, path))
    if isinstance(each, types.FunctionType):
        return ((each.__defaults__, path), (each.__kwdefaults__, path), (getattr(each, "__wrapped__", None), path))
    if isinstance(each, (tuple, set, frozenset)):
        return [(element, f"{path}[{index}]") for index, element in enumerate(each)]
    if type(each).__module__.startswith(_OWN_PACKAGE):
        return [(value, "") for value in getattr(each, "__dict__", {}).values() if callable(value)]
    if isinstance(each, type):
        return [(base, base.__qualname__) for base in each.__bases__]
    return () if isinstance(each, (dict, list, deque)) else ((type(each), path),)


def _is_library(each: Any) -> bool:
    module = each.__name__ if isinstance(each, types.ModuleType) else getattr(each, "__module__", None)
    return not isinstance(module, str) or module.partition(".")[0] in _LIBRARIES


def holds(value: Any, keys: Container[int], depth: int = 3) -> bool:
    """Return whether ``value`` is a tensor over memory of one of ``keys``, or leads to one."""
    if isinstance(value, torch.Tensor):
        return value.layout is torch.strided and key_of(value) in keys
    if not depth or not gc.is_tracked(value) or isinstance(value, (type, types.ModuleType, types.FunctionType)):
        return False
    return any(holds(each, keys, depth - 1) for each in gc.get_referents(value))


def put_back(state: Iterable[Snapshot], results: Container[int]) -> list[str]:
    """Restore containers that now hold results of a call.

    Args:
        state: snapshots of what the function can change, from before the call.
        results: the keys of the memory of these results. Constants that the call made may stay.

    Returns:
        How the code names what held such results.
    """
    names = []
    for snapshot in state:
        changed = snapshot.changed()
        if found := [snapshot.name(key) for key, value in changed.items() if holds(value, results)]:
            snapshot.put_back()
            names += found
    return names


def escaped(
    keys: Sequence[int], made: Mapping[int, Made], fn: Callable[..., Any], state: Sequence[Snapshot]
) -> CaptureError:
    """Return the error for results that outlive the call, and restore what they replaced if that is known."""
    now = {
        key: name
        for snapshot in reversed(snapshots_of(fn))
        for name, value in ((snapshot.name(name), value) for name, value in snapshot.before.items())
        for key in keys
        if holds(value, {key}, 2 if isinstance(value, tuple) else 0)
    }
    replaced = put_back(state, set(keys))
    lines = []
    for key in keys:
        name = now.get(key) or _seen_from(key)
        note = "" if replaced else ". What was there before is not known, and is changed"
        lines.append(f"{name} is a result that outlives the call: {made[key]}{note}")
    return CaptureError(
        "\n".join(list(dict.fromkeys(lines))[:3])
        + "\nA replay would not make it again, and its memory is used for other results. If it is state, declare it as "
        "an input with carried=True and write to that (copy_); else return it, or keep it in a function marked "
        "@outside_graph"
    )


def _seen_from(key: int) -> str:
    """Describe a tensor that is in no known place, and what holds it."""
    gc.unfreeze()
    for tensor in tensors_over({key}):
        kind = f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
        for holder in gc.get_referrers(tensor):
            owners = gc.get_referrers(holder) if isinstance(holder, dict) else [holder]
            for owner in owners:
                for name in getattr(owner, "__dict__", ()):
                    if vars(owner)[name] is tensor:
                        return f"{getattr(owner, '__name__', type(owner).__qualname__)}.{name}, {kind},"
        return kind
    return "a tensor"
