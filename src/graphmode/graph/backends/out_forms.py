"""The ``out=`` forms of operators, which write results into given memory: found by schema, taken after a trial.

An ``out=`` form is code of its own. Some give other results than the operator, read the memory that they overwrite,
write beyond it or replace it. So each is tried on memory as graphs plan it before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from graphmode.graph.guard import tensors_in
from graphmode.graph.outside import extent

_FACTORY_OPTIONS = frozenset({"dtype", "layout", "device", "pin_memory"})
# It changes running statistics that its schema does not mark, and a trial would change them too.
_CHANGES_UNMARKED = torch.ops.aten.native_batch_norm
# Bytes before and after the memory of a trial; all of it is garbage that makes floats NaN and integers -1.
_ZONE, _GARBAGE = 256, 0xFF
_SMALL = 1 << 16  # bytes of arguments that lie beside results in a trial
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Whether the form was right, by operator and signature: few, since layers and captures are alike.
_tried: dict[object, bool] = {}


def out_form(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], results: Sequence[torch.Tensor]
) -> Callable[[], object] | None:
    """Return a call that writes what ``func(*args, **kwargs)`` gives into ``results``; None where no form does.

    Args:
        results: what the call returned. Each has memory of its own.
    """
    overload = None if func.overloadpacket is _CHANGES_UNMARKED or func._schema.is_mutable else _overload(func)
    if overload is None or len({result.untyped_storage()._cdata for result in results}) < len(results):
        return None
    out, names, dropped = overload
    signature = func, _signature(args), _signature(kwargs), _signature(results)
    if signature not in _tried:
        _tried[signature] = _gives_the_same(func, overload, args, kwargs, results)
    if not _tried[signature]:
        return None
    kept = {name: value for name, value in kwargs.items() if name not in dropped}
    return partial(out._op, *args, **kept, **dict(zip(names, results, strict=True)))


@cache
def _overload(func: Any) -> tuple[Any, tuple[str, ...], frozenset[str]] | None:
    """Return the overload of ``func`` that writes into given tensors, their names, and the arguments that it lacks.

    Only a factory, which reads no tensor, may lack options: the given tensor has them.
    """
    schema = func._schema
    wanted = [(argument.name, str(argument.type)) for argument in schema.arguments]
    factory = not any("Tensor" in kind for _, kind in wanted)
    if any(str(returned.type) != "Tensor" for returned in schema.returns):
        return None
    if any(name == "reduction" for name, _ in wanted):
        return None  # losses compute in the result's memory before they reduce: it is resized, with a warning
    for name in func.overloadpacket.overloads():
        candidate = getattr(func.overloadpacket, name)
        outs = tuple(argument.name for argument in candidate._schema.arguments if argument.is_out)
        rest = [(argument.name, str(argument.type)) for argument in candidate._schema.arguments if not argument.is_out]
        if not outs or len(outs) != len(schema.returns):
            continue
        dropped = frozenset(name for name, _ in wanted) - {name for name, _ in rest}
        if rest == wanted:
            return candidate, outs, frozenset()
        if factory and dropped <= _FACTORY_OPTIONS and rest == [pair for pair in wanted if pair[0] not in dropped]:
            return candidate, outs, dropped
    return None


def _signature(tree: Any) -> object:
    """Return a key made of everything in arguments or results by which an operator may choose its code."""
    if isinstance(tree, torch.Tensor):
        aligned = tree.data_ptr() % 64
        return tree.dtype, tree.shape, tree.stride(), aligned, tree.is_conj(), tree.is_neg()
    if isinstance(tree, (list, tuple)):
        return tuple(map(_signature, tree))
    if isinstance(tree, dict):
        return tuple((name, _signature(leaf)) for name, leaf in tree.items())
    if isinstance(tree, torch.Generator):
        return torch.Generator
    return type(tree), repr(tree)  # NaN and -0.0 as they are


def _gives_the_same(
    func: Any,
    overload: tuple[Any, tuple[str, ...], frozenset[str]],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    results: Sequence[torch.Tensor],
) -> bool:
    """Try a form with the arguments of the call, and again with random numbers where those are all alike."""
    generator = kwargs.get("generator") or torch.default_generator
    state = generator.get_state()
    random = torch.Tag.nondeterministic_seeded in func.tags
    replaced: dict[int, torch.Tensor] = {}
    try:
        others = _telling(args, replaced), _telling(kwargs, replaced)
        return _trial(func, overload, args, kwargs, None if random else results, generator) and (
            not replaced or _trial(func, overload, *others, None, generator)
        )
    except Exception:
        return False  # the form cannot do this; the operator itself has run
    finally:
        generator.set_state(state)


def _trial(
    func: Any,
    overload: tuple[Any, tuple[str, ...], frozenset[str]],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    results: Sequence[torch.Tensor] | None,
    generator: torch.Generator,
) -> bool:
    """Return whether a form fills memory as a graph plans it with the results of the operator, and changes no other.

    Args:
        results: of these arguments; None where they are yet to be computed.
    """
    out, names, dropped = overload
    state = generator.get_state()
    if results is None:
        results = tensors_in(func._op(*args, **kwargs))
    drawn = generator.get_state()
    generator.set_state(state)
    memory = _Memory(results)
    kept = {name: memory.with_arguments(value) for name, value in kwargs.items() if name not in dropped}
    out._op(*memory.with_arguments(args), **kept, **dict(zip(names, memory.targets, strict=True)))
    return torch.equal(drawn, generator.get_state()) and memory.holds(results)


def _telling(tree: Any, replaced: dict[int, torch.Tensor]) -> Any:
    """Return arguments with random numbers from 0 to 1 for tensors of floats that are all the same, or NaN."""
    if isinstance(tree, torch.Tensor):
        if id(tree) in replaced:
            return replaced[id(tree)]
        if not tree.numel() or not (tree.is_floating_point() or tree.is_complex()):
            return tree
        numbers = torch.view_as_real(tree.resolve_conj()) if tree.is_complex() else tree
        if numbers.amin() < numbers.amax():  # aminmax() would copy a weight that is transposed
            return tree
        offset = tree.storage_offset() % 64
        dtype = torch.complex64 if tree.is_complex() else torch.float32
        size = offset + extent(tree) // tree.itemsize
        random = torch.rand(size, dtype=dtype, generator=torch.Generator().manual_seed(len(replaced)))
        replaced[id(tree)] = random.to(tree.dtype).as_strided(tree.shape, tree.stride(), offset)
        return replaced[id(tree)]
    if isinstance(tree, (list, tuple)):
        return type(tree)(_telling(leaf, replaced) for leaf in tree)
    if isinstance(tree, dict):
        return {name: _telling(leaf, replaced) for name, leaf in tree.items()}
    return tree


class _Memory:
    """One storage for results and small arguments, as a graph's pool has them, with garbage in and around results.

    Attributes:
        targets: tensors as the results are, over garbage.
    """

    def __init__(self, results: Sequence[torch.Tensor]) -> None:
        self._spans: list[tuple[int, int]] = []
        end = _ZONE
        for result in results:
            nbytes = result.untyped_storage().nbytes()
            self._spans.append((end, end + nbytes))
            end += -(-nbytes // _ZONE) * _ZONE + _ZONE
        self._arguments, self._room = end, end + _SMALL
        self._bytes = torch.full((self._room,), _GARBAGE, dtype=torch.uint8)
        self._bytes[end:] = 0
        self._storage = self._bytes.untyped_storage()
        self._address = self._storage.data_ptr(), self._storage.nbytes()
        self.targets = [self._over(start, result) for (start, _), result in zip(self._spans, results, strict=True)]

    def _over(self, start: int, like: torch.Tensor) -> torch.Tensor:
        offset = start // like.dtype.itemsize + like.storage_offset()
        return torch.empty(0, dtype=like.dtype).set_(self._storage, offset, like.shape, like.stride())

    def with_arguments(self, tree: Any) -> Any:
        """Return arguments with those tensors moved into this memory that there is room for."""
        if isinstance(tree, torch.Tensor):
            nbytes = tree.untyped_storage().nbytes()
            if self._arguments + nbytes > self._room or tree.is_conj() or tree.is_neg():
                return tree
            start, self._arguments = self._arguments, self._arguments + -(-nbytes // _ZONE) * _ZONE
            moved = self._over(start, tree)
            self._bytes[start : start + nbytes] = torch.empty(0, dtype=torch.uint8).set_(tree.untyped_storage())
            return moved
        if isinstance(tree, (list, tuple)):
            return type(tree)(map(self.with_arguments, tree))
        if isinstance(tree, dict):
            return {name: self.with_arguments(leaf) for name, leaf in tree.items()}
        return tree

    def holds(self, results: Sequence[torch.Tensor]) -> bool:
        """Return whether the results were written here, and nothing else."""
        where = [
            (target.untyped_storage().data_ptr(), target.untyped_storage().nbytes(), target.storage_offset())
            for target in self.targets
        ]
        planned = [
            (*self._address, start // result.dtype.itemsize + result.storage_offset())
            for (start, _), result in zip(self._spans, results, strict=True)
        ]
        ends = [0, *(end for _, end in self._spans)]
        begins = [*(start for start, _ in self._spans), ends[-1] + _ZONE]
        return (
            where == planned
            and all(bool((self._bytes[end:start] == _GARBAGE).all()) for end, start in zip(ends, begins, strict=True))
            and all(
                (target.shape, target.stride()) == (result.shape, result.stride()) and _same_bits(target, result)
                for target, result in zip(self.targets, results, strict=True)
            )
        )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bits, where not both hold NaN."""
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    bits = _SAME_SIZE[one.dtype.itemsize]
    if torch.equal(one.view(bits), other.view(bits)):
        return True
    if not one.is_floating_point():
        return False
    both_nan = one.isnan() & other.isnan()
    return bool((both_nan | (one.view(bits) == other.view(bits))).all())
