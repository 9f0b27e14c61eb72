"""What a user declares about a function, and how a call's values fit it. Nothing here touches device memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from graphmode.errors import InputError
from graphmode.graph.axes import AxisSize, resolve_axes, volume
from graphmode.graph.buckets import Buckets, bucket_sizes, spread
from graphmode.graph.dispatch import GraphKey, exact
from graphmode.graph.inputs import DeclaredInputs, Input, InputTree, as_tensor, true_sizes
from graphmode.graph.outputs import OutputAxes

DEFAULT_FAMILY = "default"

Variant = tuple[tuple[str, Hashable], ...]
"""The static arguments of a call: names and values, in the order of their declaration."""


class Declaration:
    """The inputs, axes, static arguments and families of a function.

    Attributes:
        inputs: all inputs, in order.
        names: the same by name.
        axes: which axes select a graph, and how large the others are.
        output_axes: the axes of outputs, where they are declared.
        buckets: the sizes that get a graph, of each family.

    Args:
        fn: the function.
        inputs, buckets, axes, output_axes, static: as of :class:`~graphmode.graph.GraphRunner`.

    Raises:
        InputError: what is declared does not fit together.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Input] | Mapping[str, InputTree],
        buckets: Buckets | Mapping[str, Buckets],
        axes: Mapping[str, AxisSize],
        output_axes: Sequence[Sequence[str | None]] | None,
        static: Mapping[str, Sequence[Hashable]],
    ) -> None:
        self._declared = DeclaredInputs(inputs)
        self.inputs = self._declared.flat
        self.names = {spec.name: spec for spec in self.inputs}
        self._static = {name: _static_values(name, values) for name, values in static.items()}
        free = {axis for axis in self._declared.axes if axis not in axes}
        self._has_families = isinstance(buckets, Mapping) and set(buckets) != free
        families: Mapping[str, Any] = buckets if self._has_families else {DEFAULT_FAMILY: buckets}  # type: ignore
        named = [tuple(each) for each in families.values() if isinstance(each, Mapping)]
        self.axes = resolve_axes(self._declared.axes, axes, named[0] if named else (), tuple(self._static))
        self.buckets = {name: bucket_sizes(sizes, self.axes.bucketed) for name, sizes in families.items()}
        if not any(self.buckets.values()):
            raise InputError("no family has buckets; give at least one, or enabled=False to run everything eagerly")
        _check_names(fn, self._declared.arguments, self._static, tuple(families) if self._has_families else ())
        self._check_axes_are_used(output_axes or ())
        self.output_axes = None if output_axes is None else OutputAxes.declared(output_axes)
        all_sizes = [self.axes.at(key.size, key.variant) for key in self.keys()]
        self.limits = {axis: max(sizes[axis] for sizes in all_sizes) for axis in all_sizes[0]}
        self._carried_axes = {axis for spec in self.inputs if spec.carried for axis in spec.shape}

    @property
    def input_axes(self) -> tuple[str, ...]:
        """The axes that inputs have."""
        return self._declared.axes

    def keys(self, *, limited: bool = False) -> list[GraphKey]:
        """Return every key that can have a graph, the largest first, so that memory is shared.

        Args:
            limited: whether the device may run out of graphs. Then families come in the order of their declaration
                (declare full graphs first: a piecewise size takes many), each with its largest and smallest size first.
        """
        keys = [
            GraphKey(family, size, tuple(zip(self._static, values, strict=True)))
            for family, sizes in self.buckets.items()
            for values in product(*(values.values() for values in self._static.values()))
            for size in (spread(sizes) if limited else sizes)
        ]
        return keys if limited else sorted(keys, key=lambda key: -volume(key.size))

    def arguments(self, family: str, variant: Variant, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return what the function is called with: its inputs as they nest, static arguments and family."""
        arguments = {**dict(variant), **self._declared.as_arguments(tensors)}
        return {"family": family, **arguments} if self._has_families else arguments

    def flat_values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's values by the names of inputs: trees taken apart.

        Raises:
            InputError: a value is nested differently than declared.
        """
        static = {name: value for name, value in given.items() if name in self._static}
        return {**static, **self._declared.values(self.without_static(given))}

    def as_tensors(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's flat values, arrays made tensors over the same memory.

        Raises:
            InputError: no dtype of torch corresponds to that of an array.
        """
        return {name: value if name in self._static else as_tensor(name, value) for name, value in values.items()}

    def signature(self, family: str, values: Mapping[str, Any]) -> Hashable:
        """Return all that a call's plan depends on; None if values must be flattened or checked first."""
        parts: list[Hashable] = [family]
        for name, value in values.items():
            if name in self._static:
                parts.append((name, exact(self.static_value(name, value))))
            elif name not in self.names:
                return None
            elif isinstance(value, np.ndarray):
                parts.append((name, value.shape, value.dtype))
            elif isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested:
                parts.append((name, value.shape, value.dtype, value.device))
            else:
                return None
        return tuple(parts)

    def without_static(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a call's values without its static arguments."""
        return {name: value for name, value in values.items() if name not in self._static} if self._static else values

    def variant(self, family: str, values: Mapping[str, Any]) -> Variant:
        """Return the static arguments among a call's values, each as it was declared.

        Raises:
            InputError: the family is not declared, an argument is missing, or its value is not declared.
        """
        if family not in self.buckets:
            raise InputError(f"family {family!r} is not one of {sorted(self.buckets)}")
        if missing := [name for name in self._static if name not in values]:
            raise InputError(f"static arguments missing: {missing}; declared are {sorted(self._static)}")
        return tuple((name, self.static_value(name, values[name])) for name in self._static)

    def static_value(self, name: str, value: Any) -> Hashable:
        """Return the declared value of a static argument that equals ``value``, type included.

        Raises:
            InputError: there is no such argument or value.
        """
        if name not in self._static:
            raise InputError(f"static argument {name!r} is not declared; declared are {sorted(self._static)}")
        values = self._static[name]
        try:
            return values[exact(value)]
        except (KeyError, TypeError):
            raise InputError(
                f"static argument {name!r} is {value!r}, a {type(value).__name__}; declared values are "
                f"{tuple(values.values())}"
            ) from None

    def sizes(self, tensors: Mapping[str, Any], variant: Variant, device: torch.device) -> dict[str, int]:
        """Check a call's tensors and return the true size of every axis, including those that only outputs have.

        Raises:
            InputError: a tensor does not fit its declaration.
        """
        sizes = true_sizes(self.inputs, tensors, device)
        left_out = [spec for spec in self.inputs if spec.name not in tensors]
        padded = {axis for spec in left_out if not spec.carried for axis in spec.shape}
        for axis in self.axes.bucketed:
            if axis not in sizes and axis not in padded:
                raise InputError(f"no input gives axis {axis!r} a size in this call; pass one that has it")
        bucketed = {axis: sizes.get(axis, 0) for axis in self.axes.bucketed}
        for axis in self.axes.sizes:
            if axis not in sizes:
                sizes[axis] = 0 if axis in padded else self.axes.other(axis, bucketed, dict(variant))
        return sizes | bucketed

    def size_values(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Return the inputs that are sizes of axes."""
        return {spec.name: torch.tensor(sizes[spec.size_of], dtype=spec.dtype) for spec in self.inputs if spec.size_of}

    def check_state_holds(self, sizes: Mapping[str, int]) -> None:
        """Check that carried inputs have room for a step that no graph serves.

        Raises:
            InputError: an axis is larger than in the largest bucket.
        """
        for axis, size in sizes.items():
            if axis in self._carried_axes and size > self.limits[axis]:
                raise InputError(
                    f"axis {axis!r} has size {size}; carried inputs have room for {self.limits[axis]}, by the largest "
                    "bucket: make it larger"
                )

    def _check_axes_are_used(self, output_axes: Sequence[Sequence[str | None]]) -> None:
        """Check the names of axes: those of outputs, and those whose size is given or asked for."""
        known = {*self.axes.bucketed, *self.axes.sizes}
        of_outputs = {axis for output in output_axes for axis in output if axis is not None}
        sized = {spec.size_of for spec in self.inputs if spec.size_of}
        for axis in of_outputs | sized:
            if axis not in known:
                where = "output_axes" if axis in of_outputs else "the size_of of an input"
                raise InputError(
                    f"{where} names axis {axis!r}, which no input has and axes= does not give; there are "
                    f"{sorted(known)}"
                )
        for axis in self.axes.sizes:
            if axis not in {*self._declared.axes, *of_outputs, *sized}:
                raise InputError(f"axes= gives axis {axis!r} a size, but no input and no output has that axis")


def _check_names(
    fn: Callable[..., Any], inputs: Sequence[str], static: Mapping[str, object], families: Sequence[str]
) -> None:
    """Check that arguments have different names and that ``fn`` takes them, and ``family`` if there are families."""
    for name in (*inputs, *static):
        if name in ("family", "own", "repeats", "progress"):
            raise InputError(
                f"an input or static argument is called {name!r}, which is an argument of the runner; rename it"
            )
    if both := set(inputs) & static.keys():
        raise InputError(f"{sorted(both)} are declared both as inputs and as static arguments")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return  # a callable without a signature
    try:
        signature.bind(**dict.fromkeys([*inputs, *static, *(["family"] if families else [])]))
    except TypeError as error:
        taken = f", and family, as the keys of buckets={list(families)} are not the bucketed axes" if families else ""
        raise InputError(
            f"{getattr(fn, '__qualname__', fn)}{signature} cannot be called with the declared arguments "
            f"{[*inputs, *static]}{taken}: {error}"
        ) from None


def _static_values(name: str, values: Sequence[Hashable]) -> dict[Hashable, Hashable]:
    """Return the declared values of a static argument by their :func:`~graphmode.graph.dispatch.exact` keys."""
    found: dict[Hashable, Hashable] = {}
    for value in values:
        try:
            found[exact(value)] = value
        except TypeError:
            raise InputError(
                f"static argument {name!r} is declared with {value!r}, a {type(value).__name__}, which cannot be "
                "hashed and so cannot select a graph; use a tuple, or another value that can"
            ) from None
    if not found:
        raise InputError(f"static argument {name!r} is declared without values; give a list of all that it may take")
    return found
