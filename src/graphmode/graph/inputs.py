"""Declared inputs: what a function takes, and what the padding of each holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from graphmode.errors import InputError
from graphmode.graph.trees import is_dataclass_value, map_leaves, match


@dataclass(frozen=True)
class Input:
    """One input of a captured function, declared once.

    Attributes:
        name: the keyword by which the function takes it; in a tree of inputs, its name in messages.
        dtype: its dtype. Values of another dtype are refused, never cast.
        shape: one entry a dimension: an axis name (``"tokens"``) or a fixed size.
        padding: the value of every element beyond the true size. Choose one that reads and writes nothing.
        optional: whether a call may leave it out: then it is all padding, at no cost. An axis that no input gives a
            size then has size 0.
        carried: whether it is state that the function changes in place, such as a counter or the hidden state of a
            recurrent network. It keeps its value from call to call, through warm-up and capture, and beyond the true
            size. It starts as padding; a call that passes it sets it. ``GraphRunner.carried`` has the tensor.
        size_of: an axis. Then the runner itself fills this input, of shape ``()``, with the true size of that axis in
            each call, and at capture with the graph's.
        example: makes its value for warm-up and capture, if the function cannot run on padding alone: takes the sizes
            of all axes and returns a tensor of the input's full shape.

    Raises:
        InputError: the padding does not fit the dtype, or the attributes contradict each other.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[str | int, ...]
    padding: float | int | bool = 0
    optional: bool = False
    carried: bool = False
    size_of: str | None = None
    example: Callable[[Mapping[str, int]], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"an input is called {self.name!r}; give the name of the argument, a text")
        if not isinstance(self.dtype, torch.dtype):
            raise InputError(f"input {self.name!r} is declared with dtype {self.dtype!r}; give a torch.dtype")
        if not isinstance(self.shape, (tuple, list)):
            raise InputError(
                f"input {self.name!r} is declared with shape {self.shape!r}; give a tuple with an entry for each "
                "dimension, ('batch',) for one"
            )
        for axis in self.shape:
            if not isinstance(axis, (str, int)) or isinstance(axis, bool) or (isinstance(axis, int) and axis < 0):
                raise InputError(
                    f"input {self.name!r} is declared with {axis!r} in its shape; each entry is the name of an axis or "
                    "a size of at least 0"
                )
        if not _holds(self.dtype, self.padding):
            raise InputError(f"input {self.name!r} is padded with {self.padding!r}, which {self.dtype} cannot hold")
        if self.size_of is not None and (self.shape or self.carried or self.dtype.is_floating_point):
            raise InputError(
                f"input {self.name!r} is the size of axis {self.size_of!r}: its shape must be () and its dtype an "
                "integer's, and it cannot be carried"
            )

    @property
    def required(self) -> bool:
        """Whether every call must pass it."""
        return not (self.optional or self.carried or self.size_of)


def _holds(dtype: torch.dtype, value: float | int | bool) -> bool:
    """Return whether ``dtype`` can hold ``value``; fractions may be rounded."""
    if dtype.is_floating_point and isinstance(value, (int, float)):
        if math.isinf(value):
            return bool(torch.tensor(value).to(dtype).to(torch.float32).isinf())
        return math.isnan(value) or abs(value) <= torch.finfo(dtype).max
    try:
        return bool(torch.tensor(value, dtype=dtype).item() == value)
    except (RuntimeError, OverflowError, ValueError, TypeError):
        return False


InputTree = Any
"""Inputs in dicts, tuples, lists and dataclasses."""


class DeclaredInputs:
    """What a function takes: inputs by name, or trees of them.

    Attributes:
        flat: all inputs, in order.

    Args:
        inputs: a list of inputs, each an argument of its own; or a mapping from arguments to inputs or trees of them.

    Raises:
        InputError: two inputs share a name.
    """

    def __init__(self, inputs: Sequence[Input] | Mapping[str, InputTree]) -> None:
        self.flat: tuple[Input, ...]
        self._trees: dict[str, InputTree] = {}
        self._fields: dict[str, tuple[list[str], Callable[[Any], Sequence[Any]]]] = {}  # of dataclasses of inputs alone
        if isinstance(inputs, Mapping):
            found: list[Input] = []
            for argument, tree in inputs.items():
                map_leaves(tree, Input, found.append)
                if not isinstance(tree, Input) or tree.name != argument:
                    self._trees[argument] = tree
                if is_dataclass_value(tree) and all(isinstance(each, Input) for each in vars(tree).values()):
                    names = list(vars(tree))
                    if len(names) > 1:  # of one alone attrgetter returns no tuple
                        self._fields[argument] = [each.name for each in vars(tree).values()], attrgetter(*names)
            self.flat = tuple(found)
            self.arguments = tuple(inputs)
        else:
            self.flat = tuple(inputs)
            self.arguments = tuple(spec.name for spec in self.flat if isinstance(spec, Input))
        for spec in self.flat:
            if not isinstance(spec, Input):
                raise InputError(f"{spec!r} is among the inputs; declare each as an Input")
        names = [spec.name for spec in self.flat]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise InputError(f"inputs declared twice: {sorted(repeated)}; names must differ")
        self.axes = tuple(dict.fromkeys(axis for spec in self.flat for axis in spec.shape if isinstance(axis, str)))

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a call by the names of their inputs: trees taken apart.

        Raises:
            InputError: a value is nested differently than declared.
        """
        values: dict[str, Any] = {}

        def take(spec: Input, value: Any) -> None:
            if value is not None:
                values[spec.name] = value

        for argument, value in given.items():
            if argument in self._fields and type(value) is type(self._trees[argument]):
                names, read = self._fields[argument]
                values |= {name: each for name, each in zip(names, read(value), strict=True) if each is not None}
            elif argument in self._trees:
                match(self._trees[argument], Input, value, argument, take)
            elif not self._trees or argument in self.arguments:
                values[argument] = value
            else:
                raise InputError(f"argument {argument!r} is not declared; declared are {list(self.arguments)}")
        return values

    def as_arguments(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        """Return the function's arguments: ``tensors`` by input name, put into their trees."""
        if not self._trees:
            return tensors
        return {
            argument: map_leaves(self._trees[argument], Input, lambda spec: tensors[spec.name])
            if argument in self._trees
            else tensors[argument]
            for argument in self.arguments
        }


def as_tensor(name: str, value: Any) -> Any:
    """Return a numpy array or scalar as a tensor over the same memory, and anything else as it is.

    Raises:
        InputError: no dtype of torch corresponds to that of the array.
    """
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    array = np.asarray(value)
    try:
        return torch.from_numpy(array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy())
    except (TypeError, ValueError) as error:
        raise InputError(f"input {name!r} is an array of {array.dtype!r}, which no tensor can hold: {error}") from None


def true_sizes(inputs: Sequence[Input], values: Mapping[str, Any], device: torch.device) -> dict[str, int]:
    """Check ``values`` against their declarations and return the size of every axis that they give.

    Values lie on ``device`` or on the host.

    Raises:
        InputError: naming the input: missing, unknown, wrong dtype, rank, device or size, or axes that disagree.
    """
    known = {spec.name: spec for spec in inputs}
    missing = [spec.name for spec in inputs if spec.required and spec.name not in values]
    unknown = [name for name in values if name not in known or known[name].size_of is not None]
    if missing or unknown:
        raise InputError(f"inputs missing: {missing}, unknown: {unknown}; declared are {sorted(known)}")
    sizes: dict[str, int] = {}
    for spec in inputs:
        if spec.name not in values:
            continue
        value = values[spec.name]
        if not isinstance(value, torch.Tensor):
            raise InputError(f"input {spec.name!r} is {type(value).__name__}; pass a tensor of {spec.dtype}")
        if value.layout != torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise InputError(f"input {spec.name!r} is a {kind} tensor; graphs read dense memory: pass a dense tensor")
        if value.dtype != spec.dtype:
            raise InputError(f"input {spec.name!r} has dtype {value.dtype}; it is declared {spec.dtype}")
        if value.device.type != "cpu" and value.device != device:
            raise InputError(f"input {spec.name!r} is on {value.device}; pass it on the host or on {device}")
        if value.dim() != len(spec.shape):
            raise InputError(
                f"input {spec.name!r} has {value.dim()} dimensions, shape {tuple(value.shape)}; declared {spec.shape}"
            )
        for size, axis in zip(value.shape, spec.shape, strict=True):
            expected = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            if size != expected:
                raise InputError(
                    f"input {spec.name!r} has shape {tuple(value.shape)}; declared {spec.shape}, and axis {axis!r} "
                    f"is {expected} here"
                )
    return sizes


def check_fit(sizes: Mapping[str, int], limits: Mapping[str, int]) -> None:
    """Check that every axis fits the graph.

    Raises:
        InputError: an axis is larger than its limit.
    """
    for axis, size in sizes.items():
        if size > limits[axis]:
            raise InputError(f"axis {axis!r} has size {size}; its limit at this bucket is {limits[axis]}")


def all_padding(spec: Input, sizes: Mapping[str, int], device: torch.device) -> torch.Tensor:
    """Return an input that holds nothing but padding, at the axis ``sizes``."""
    return torch.full(shape_at(spec, sizes), spec.padding, dtype=spec.dtype, device=device)


def examples(inputs: Sequence[Input], sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return the values for warm-up and capture at the axis ``sizes``, where padding alone is not enough.

    Raises:
        InputError: an example has another shape or dtype than its input.
    """
    values = {spec.name: torch.tensor(sizes[spec.size_of], dtype=spec.dtype) for spec in inputs if spec.size_of}
    for spec in inputs:
        if spec.example is not None:
            value = as_tensor(spec.name, spec.example(sizes))
            if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (shape_at(spec, sizes), spec.dtype):
                found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                raise InputError(
                    f"the example of input {spec.name!r} is {found}; at the axes {dict(sizes)} it must be "
                    f"{spec.dtype} {shape_at(spec, sizes)}"
                )
            values[spec.name] = value
    return values


def shape_at(spec: Input, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of an input at the axis ``sizes``."""
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
