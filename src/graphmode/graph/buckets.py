"""Buckets: the sizes that get a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from numbers import Integral

from graphmode.errors import InputError
from graphmode.graph.axes import Size, volume

AxisBuckets = int | Sequence[int]
"""The buckets of an axis: a list, or the largest one, from which few are made."""

Buckets = AxisBuckets | Mapping[str, AxisBuckets]
"""The buckets of the one bucketed axis, or of each of several by its name."""


def make_buckets(maximum: int) -> tuple[int, ...]:
    """Return few, cheap buckets up to ``maximum``: 1, 2, 4, 8, then steps that grow with the size.

    Up to 64 each step is 8; after that there are four to each doubling, so that less than a fifth of a replay is
    padding, and tiles of 64 or 128 rows, in which kernels go through a step, are full at powers of two.
    ``maximum`` is always a member, so the largest step that a scheduler may make is a hit.

    Raises:
        InputError: ``maximum`` is less than 1.
    """
    if maximum < 1:
        raise InputError(f"the largest bucket is {maximum}; it must be at least 1")
    sizes = [size for size in (1, 2, 4, 8) if size < maximum]
    size = 8
    while (size := size + max(8, 1 << size.bit_length() - 3)) < maximum:
        sizes.append(size)
    return (*sizes, maximum)


def powers_of_two(maximum: int) -> tuple[int, ...]:
    """Return the powers of two below ``maximum``, and it: for a device where each graph costs two eager steps.

    They are fewer than those of :func:`make_buckets`; up to half of a replay is padding.

    Raises:
        InputError: ``maximum`` is less than 1.
    """
    if maximum < 1:
        raise InputError(f"the largest bucket is {maximum}; it must be at least 1")
    return (*(1 << power for power in range((maximum - 1).bit_length())), maximum)


def check_buckets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return ``sizes`` sorted and without repeats.

    Raises:
        InputError: there is none, or one is not a positive integer.
    """
    if not len(sizes):
        raise InputError("no buckets: give at least one size, or a maximum to make them from")
    found = set()
    for size in sizes:
        number = _integer(size)
        if number is None or number < 1:
            raise InputError(f"bucket {size!r} is not a positive integer")
        found.add(number)
    return tuple(sorted(found))


def bucket_sizes(buckets: Buckets, axes: Sequence[str]) -> tuple[Size, ...]:
    """Return the sizes that ``buckets`` mean, the smallest first.

    Args:
        buckets: as a user gives them; ``()`` for none.
        axes: the bucketed axes. With several a size is a tuple, and all combinations get a graph.

    Raises:
        InputError: a size is no positive integer.
    """
    if isinstance(buckets, Mapping):
        each = [_axis_sizes(buckets[axis]) for axis in axes]
        return each[0] if len(each) == 1 else tuple(sorted(product(*each), key=lambda size: (volume(size), size)))
    return () if isinstance(buckets, tuple) and not buckets else _axis_sizes(buckets)


def _integer(value: object) -> int | None:
    """Return an integer of Python or numpy as one of Python, and None for anything else."""
    return int(value) if type(value) is not bool and isinstance(value, Integral) else None


def _axis_sizes(buckets: object) -> tuple[int, ...]:
    largest = _integer(buckets)
    if largest is not None:
        return make_buckets(largest)
    if not isinstance(buckets, Iterable) or isinstance(buckets, str):
        raise InputError(f"buckets are {buckets!r}; give a list of sizes, or the largest one as an integer")
    return check_buckets(tuple(buckets))


def spread(sizes: Sequence[Size]) -> tuple[Size, ...]:
    """Return ``sizes`` in the order of capture on a device that may run out of graphs.

    The largest comes first, so that every step is served; then the smallest; then always the one in the middle of the
    longest run of sizes that are still missing. Wherever capture stops, the captured sizes are spread over the range.

    Args:
        sizes: in ascending order, without repeats.
    """
    if len(sizes) < 3:
        return tuple(reversed(sizes))
    order = [len(sizes) - 1, 0]
    runs = [(0, len(sizes) - 1)]  # between two sizes that are in the order
    while runs:
        low, high = max(runs, key=lambda run: (run[1] - run[0], run[1]))
        runs.remove((low, high))
        if high - low > 1:
            middle = (low + high + 1) // 2
            order.append(middle)
            runs += [(low, middle), (middle, high)]
    return tuple(sizes[index] for index in order)
