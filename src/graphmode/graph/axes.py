"""Axes: which of them select a graph, how large the others are, and the true sizes of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from graphmode.errors import InputError

Size = int | tuple[int, ...]
"""The size of the bucketed axis, or of each of them where there are several, in the order of their declaration."""

AxisSize = int | Callable[..., int]
"""The size of another axis: fixed, or computed from bucketed axes and static arguments."""


def volume(size: Size) -> int:
    """Return the number of rows of a size: the product over its axes."""
    return size if isinstance(size, int) else prod(size)


@dataclass(frozen=True)
class Axes:
    """The sizes of all axes as a function of the bucket and the static arguments.

    Attributes:
        bucketed: the axes whose sizes select the graph.
        sizes: the size of every other axis: fixed, or a function and the names of the axes and static arguments that it
            takes, in order.
    """

    bucketed: tuple[str, ...]
    sizes: Mapping[str, int | tuple[Callable[..., int], tuple[str, ...]]]

    def at(self, size: Size, variant: Iterable[tuple[str, Hashable]] = ()) -> dict[str, int]:
        """Return the size of every axis in the graph of ``size`` with the static arguments of ``variant``."""
        bucketed = dict(zip(self.bucketed, (size,) if isinstance(size, int) else size, strict=True))
        return {**bucketed, **{name: self.other(name, bucketed, dict(variant)) for name in self.sizes}}

    def other(self, name: str, bucketed: Mapping[str, int], static: Mapping[str, Hashable]) -> int:
        """Return the size of an axis that is not bucketed."""
        size = self.sizes[name]
        if isinstance(size, int):
            return size
        function, arguments = size
        return int(function(*(bucketed[each] if each in bucketed else static[each] for each in arguments)))

    def check(self, size: Size) -> None:
        """Check that ``size`` is one that a call may have on the bucketed axes.

        Raises:
            InputError: it is not a number of at least 0, or, with several axes, not a tuple of such numbers.
        """
        many = len(self.bucketed)
        each = (size,) if many == 1 else size
        if isinstance(each, tuple) and len(each) == many and all(isinstance(one, int) and one >= 0 for one in each):
            return
        wanted = "a number" if many == 1 else f"a tuple of {many} numbers"
        raise InputError(f"the size is {size!r}; give {wanted} of at least 0, for the bucketed {list(self.bucketed)}")

    def size_of(self, sizes: Mapping[str, int]) -> Size:
        """Return what selects the graph of a call with these sizes."""
        return sizes[self.bucketed[0]] if len(self.bucketed) == 1 else tuple(sizes[axis] for axis in self.bucketed)


def resolve_axes(
    used: Sequence[str], sizes: Mapping[str, AxisSize], bucketed: Sequence[str] = (), static: Sequence[str] = ()
) -> Axes:
    """Find the bucketed axes: those that ``sizes`` does not give.

    Args:
        used: the axes of all inputs.
        sizes: the sizes of the others.
        bucketed: the names of the bucketed axes, if several are declared; else exactly one axis must have no size.
        static: the names of the static arguments.

    Raises:
        InputError: the axes without a size are not those, or a function takes what is neither an axis nor a static
            argument.
    """
    free = [axis for axis in dict.fromkeys(used) if axis not in sizes]
    if bucketed and sorted(bucketed) != sorted(free):
        raise InputError(f"buckets are given for the axes {list(bucketed)}; the axes without a size in axes are {free}")
    if not bucketed and not free:
        raise InputError(
            "no input has an axis that is bucketed. Leave the axis that varies out of axes=; where none varies, name "
            "one nevertheless, and give its size as the only bucket: shape ('width',) and buckets=[3]"
        )
    if not bucketed and len(free) != 1:
        raise InputError(
            f"the axes {free} have no size in axes={dict(sizes)}. One axis is bucketed: leave exactly one out, or give "
            "each of several its buckets by name: buckets={'batch': 8, 'length': [16, 64]}"
        )
    names = tuple(bucketed or free)
    return Axes(
        names,
        {
            name: (size, _arguments(name, size, names, static)) if callable(size) else size
            for name, size in sizes.items()
        },
    )


def _arguments(
    axis: str, function: Callable[..., int], bucketed: Sequence[str], static: Sequence[str]
) -> tuple[str, ...]:
    """Return what a function of sizes takes, by the names of its parameters."""
    names = tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    )
    known = {*bucketed, *static}
    if len(names) == len(bucketed) == 1 and names[0] not in known:
        return tuple(bucketed)  # the one bucketed axis, by whatever name
    if unknown := [name for name in names if name not in known]:
        raise InputError(
            f"the function for the size of axis {axis!r} takes {unknown}; its parameters must be named after bucketed "
            f"axes or static arguments: {sorted(known)}"
        )
    return names
