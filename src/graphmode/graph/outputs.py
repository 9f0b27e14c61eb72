"""Outputs: which of their dimensions follow the axes, found from shapes at several sizes, and how they are cut."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from graphmode.graph.axes import Axes, Size

Sizes = Mapping[str, int]
Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Length:
    """The length of a dimension.

    Attributes:
        constant: what is added to the size of the axis, such as -2 of a convolution over 3 rows.
        axis: the axis that it follows; None where its length is the constant.
    """

    constant: int
    axis: str | None = None

    def at(self, sizes: Sizes) -> int:
        """Return the length at the axis ``sizes``, at least 0."""
        return max(0, self.constant + (0 if self.axis is None else sizes[self.axis]))


@dataclass(frozen=True)
class OutputAxes:
    """The lengths of the leading dimensions of every output; dimensions beyond them are never cut."""

    lengths: tuple[tuple[Length | None, ...], ...]

    @classmethod
    def declared(cls, names: Sequence[Sequence[str | None]]) -> OutputAxes:
        """Return what a user declares: an axis, or None, for each dimension."""
        return cls(tuple(tuple(None if axis is None else Length(0, axis) for axis in output) for output in names))

    def problem(self, shapes: Shapes, sizes: Sizes) -> str | None:
        """Return why outputs of ``shapes`` cannot be those of the axis ``sizes``, or None where they fit."""
        if len(shapes) != len(self.lengths):
            return f"the function returned {len(shapes)} tensors; output_axes declares {len(self.lengths)}"
        for index, (shape, lengths) in enumerate(zip(shapes, self.lengths, strict=True)):
            expected = [length.at(sizes) if length else size for length, size in zip(lengths, shape, strict=False)]
            if len(shape) < len(lengths) or list(shape[: len(lengths)]) != expected:
                return (
                    f"output {index} has shape {tuple(shape)}, but its dimensions are taken to be {tuple(expected)} at "
                    f"the axes {dict(sizes)}; declare them with output_axes"
                )
        return None

    def cuts(self, shapes: Shapes, sizes: Sizes) -> list[tuple[slice, ...] | None]:
        """Return for each output of ``shapes`` the slices to the true ``sizes``; None where it stays whole."""
        cuts: list[tuple[slice, ...] | None] = []
        for shape, lengths in zip(shapes, self.lengths, strict=True):
            ends = [length.at(sizes) if length else size for length, size in zip(lengths, shape, strict=False)]
            whole = ends == list(shape[: len(ends)])
            cuts.append(None if whole else tuple(map(slice, ends)))
        return cuts


@dataclass(frozen=True)
class Sample:
    """The shapes of all outputs at certain sizes of the axes."""

    sizes: Sizes
    shapes: tuple[tuple[int, ...], ...]


def find_output_axes(
    samples: Sequence[Sample],
    axes: Axes,
    used: Sequence[str],
    limits: Mapping[str, int],
    variant: Sequence[tuple[str, Hashable]],
    run: Callable[[dict[str, int]], tuple[tuple[int, ...], ...]],
) -> OutputAxes | str:
    """Find which dimensions of outputs follow which axes, or say why that is not known.

    Shapes are compared between sizes that differ in one axis alone, and at one more size. If ``samples`` lacks such
    sizes, the function runs at smaller ones.

    Args:
        samples: what is known, at least one.
        axes: gives the sizes of a bucket.
        used: the axes of inputs.
        limits: the largest size of each.
        variant: the static arguments.
        run: runs the function at the sizes of all axes and returns the shapes of its outputs.
    """
    samples, full = list(samples), dict(samples[0].sizes)
    free = list(used)
    problem: Exception | None = None

    def tried(sizes: dict[str, int]) -> bool:
        nonlocal problem
        try:
            samples.append(Sample(sizes, run(sizes)))
        except Exception as error:  # the function may refuse this size
            problem = error
            return False
        return True

    for axis in used:
        others = [size for size in (1, 2, 3) if size <= limits[axis] and size != full[axis]]
        if axis not in free or not others or _pair_apart_in(axis, [sample.sizes for sample in samples], free):
            continue
        if any(tried({**full, axis: other}) for other in others):
            continue
        raised = f"at size {others[-1]} of axis {axis!r} the function raises {type(problem).__name__}: {problem}"
        if axis in axes.bucketed:
            # Sizes that are computed from this one may have to agree with it: then they follow it too.
            bucketed = ([other if each == axis else full[each] for each in axes.bucketed] for other in others)
            if not any(tried(axes.at(_as_size(sizes), variant)) for sizes in bucketed):
                return _undeclared(raised)
            free = [each for each in free if each in axes.bucketed or isinstance(axes.sizes[each], int)]
        elif isinstance(axes.sizes[axis], int):
            return _undeclared(raised)
        else:
            free.remove(axis)
    bases = [full[axis] if full[axis] > 2 else min(limits[axis], 4) for axis in axes.bucketed]
    between = axes.at(_as_size([max(1, 2 * base // 3) for base in bases]), variant)
    if len(samples) < 3 and all(any(sample.sizes[axis] != between[axis] for axis in used) for sample in samples):
        tried(between)  # shows a length that fits two sizes by chance
    found = infer_output_axes(samples, free)
    return _undeclared(found) if isinstance(found, str) else found


def _as_size(sizes: Sequence[int]) -> Size:
    return sizes[0] if len(sizes) == 1 else tuple(sizes)


def _undeclared(problem: str) -> str:
    return f"which dimensions of the outputs follow the axes cannot be found: {problem}. Declare them with output_axes"


def infer_output_axes(samples: Sequence[Sample], axes: Sequence[str]) -> OutputAxes | str:
    """Return which dimensions follow which of ``axes``, by the shapes of ``samples``, or why that is not known.

    A dimension follows an axis if in every sample it is as long, or shorter by a constant. If it is longer, such as
    after a concatenation, shapes do not show whether true rows come before all padding.
    """
    ranks = [len(shape) for shape in samples[0].shapes]
    for sample in samples:
        if [len(shape) for shape in sample.shapes] != ranks:
            return f"there are other outputs, or other numbers of dimensions, at the sizes {dict(sample.sizes)}"
    outputs = []
    for index, rank in enumerate(ranks):
        lengths = []
        for dim in range(rank):
            length = _find_length([(sample.sizes, sample.shapes[index][dim]) for sample in samples], axes)
            if isinstance(length, str):
                return f"dimension {dim} of output {index} {length}"
            lengths.append(length)
        outputs.append(tuple(lengths))
    return OutputAxes(tuple(outputs))


def _find_length(seen: Sequence[tuple[Sizes, int]], axes: Sequence[str]) -> Length | str:
    """Return the length of one dimension, seen at several sizes, or what is wrong with it."""
    follows: list[str] = []
    for axis in axes:
        pair = _pair_apart_in(axis, [sizes for sizes, _ in seen], axes)
        if pair is None:
            continue
        (sizes, length), (other, other_length) = seen[pair[0]], seen[pair[1]]
        if length - other_length == sizes[axis] - other[axis]:
            follows.append(axis)
        elif length != other_length:
            return _told(seen)
    sizes, length = seen[0]
    found = Length(length - sizes[follows[0]], follows[0]) if follows else Length(length)
    if len(follows) > 1 or (follows and found.constant > 0) or any(found.at(at) != length for at, length in seen):
        return _told(seen)
    return found


def _pair_apart_in(axis: str, sizes: Sequence[Sizes], axes: Sequence[str]) -> tuple[int, int] | None:
    """Return two samples that differ in ``axis`` and in no other of ``axes``."""
    for index, one in enumerate(sizes):
        for at, other in enumerate(sizes[:index]):
            if one[axis] != other[axis] and all(one[each] == other[each] for each in axes if each != axis):
                return at, index
    return None


def _told(seen: Sequence[tuple[Sizes, int]]) -> str:
    pairs = ", ".join(f"{length} at {dict(sizes)}" for sizes, length in seen)
    return f"has the length {pairs}, which neither is constant nor follows one axis"
