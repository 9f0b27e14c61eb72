"""The ``out=`` forms of operators, which write results into given memory: found by schema, taken after a trial.

An ``out=`` form is code of its own. Some give other results than the operator, read what they are to overwrite, write
beyond it or exchange it. So each is tried on memory as graphs plan it before it is taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from graphmode.graph.guard import tensors_in

_FACTORY_OPTIONS = frozenset({"dtype", "layout", "device", "pin_memory"})
# It changes running statistics that its schema does not mark, and a trial would change them too.
_CHANGES_UNMARKED = torch.ops.aten.native_batch_norm
# Bytes before and after the memory of a trial; all of it is garbage that makes floats NaN and integers -1.
_ZONE, _GARBAGE = 256, 0xFF
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
    """Return the overload of ``func`` that writes into given tensors, their names, and arguments that it does without.

    Only a factory, which reads no tensor, does without its options: the given tensor has them.
    """
    schema = func._schema
    wanted = [(argument.name, str(argument.type)) for argument in schema.arguments]
    factory = not any("Tensor" in kind for _, kind in wanted)
    if any(str(returned.type) != "Tensor" for returned in schema.returns):
        return None
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
    """Return what of an operator's arguments or results may choose its code, in place of them."""
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
    """Try a form: whether it fills memory as a graph plans it with the results of the operator, and changes no other.

    Arguments that tell nothing, such as padding, are replaced for the trial. The state of random generators is put
    back.
    """
    out, names, dropped = overload
    replaced: dict[int, torch.Tensor] = {}
    args, kwargs = _telling(args, replaced), _telling(kwargs, replaced)
    kept = {name: value for name, value in kwargs.items() if name not in dropped}
    generator = kwargs.get("generator") or torch.default_generator
    state = generator.get_state()
    try:
        with warnings.catch_warnings(action="ignore"):
            if replaced or torch.Tag.nondeterministic_seeded in func.tags:
                results = tensors_in(func._op(*args, **kwargs))
            drawn = generator.get_state()
            generator.set_state(state)
            buffers = [_Buffer(result) for result in results]
            out._op(*args, **kept, **dict(zip(names, (buffer.target for buffer in buffers), strict=True)))
            return torch.equal(drawn, generator.get_state()) and all(buffer.holds_the_same() for buffer in buffers)
    except Exception:
        return False  # what a form cannot do it is not asked to; the operator itself has run
    finally:
        generator.set_state(state)


def _telling(tree: Any, replaced: dict[int, torch.Tensor]) -> Any:
    """Return arguments with random numbers from 0 to 1 for tensors of floats that are all the same, or NaN."""
    if isinstance(tree, torch.Tensor):
        if id(tree) in replaced:
            return replaced[id(tree)]
        if not tree.numel() or not (tree.is_floating_point() or tree.is_complex()):
            return tree
        low, high = (torch.view_as_real(tree.resolve_conj()) if tree.is_complex() else tree).aminmax()
        if low < high:
            return tree
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tree.shape, tree.stride(), strict=True))
        offset = tree.storage_offset() % 64
        numbers = torch.rand(offset + extent, dtype=torch.complex64 if tree.is_complex() else torch.float32)
        replaced[id(tree)] = numbers.to(tree.dtype).as_strided(tree.shape, tree.stride(), offset)
        return replaced[id(tree)]
    if isinstance(tree, (list, tuple)):
        return type(tree)(_telling(leaf, replaced) for leaf in tree)
    if isinstance(tree, dict):
        return {name: _telling(leaf, replaced) for name, leaf in tree.items()}
    return tree


class _Buffer:
    """Memory as that of a result in a graph's pool: a part of a storage, with garbage in and around it."""

    def __init__(self, result: torch.Tensor) -> None:
        nbytes = result.untyped_storage().nbytes()
        self._expected = result
        self._bytes = torch.full((_ZONE + -(-nbytes // _ZONE) * _ZONE + _ZONE,), _GARBAGE, dtype=torch.uint8)
        self._storage = self._bytes.untyped_storage()
        self._planned = self._storage.data_ptr(), self._storage.nbytes(), result.shape, result.stride()
        offset = _ZONE // result.dtype.itemsize + result.storage_offset()
        self.target = torch.empty(0, dtype=result.dtype).set_(self._storage, offset, result.shape, result.stride())
        self._end = _ZONE + nbytes

    def holds_the_same(self) -> bool:
        """Return whether the result was written here, and nothing else."""
        target, expected = self.target, self._expected
        storage = target.untyped_storage()
        return (
            (storage.data_ptr(), storage.nbytes(), target.shape, target.stride()) == self._planned
            and (expected.shape, expected.stride()) == self._planned[2:]
            and bool((self._bytes[:_ZONE] == _GARBAGE).all())
            and bool((self._bytes[self._end :] == _GARBAGE).all())
            and _same_bits(target, expected)
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
