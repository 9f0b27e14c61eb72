"""Which graph serves a step, or why none does. A pure decision: no tensor, no device, no state of its own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from graphmode.graph.axes import Size, volume


class Mode(StrEnum):
    """What a step does."""

    REPLAY = "replay"
    CAPTURE = "capture"
    """Capture the graph of the key now (its first use), then replay it."""
    EAGER = "eager"


class Reason(StrEnum):
    """Why a step was no hit: it ran eagerly, or it had to capture first."""

    DISABLED = "disabled"
    ABOVE_THRESHOLD = "above_threshold"
    PADDING_RATIO = "padding_ratio"
    NOT_CAPTURED_YET = "not_captured_yet"
    CAPTURE_FAILED = "capture_failed"
    UNSUPPORTED_OP = "unsupported_op"
    OUT_OF_GRAPHS = "out_of_graphs"
    """The device had no room for the graph, nor for any of a larger bucket."""
    OUT_OF_MEMORY = "out_of_memory"
    """Memory ran out while the graph was captured, and no larger bucket has one."""


_NO_ROOM = (Reason.OUT_OF_GRAPHS, Reason.OUT_OF_MEMORY)


@dataclass(frozen=True, slots=True, eq=False)
class GraphKey:
    """What selects a graph.

    Attributes:
        family: name of the family, a set of graphs with buckets of its own.
        size: the bucket: the size of the bucketed axis that the graph was captured at, or of each of several.
        variant: the static arguments, ``(name, value)`` pairs in the order of their declaration. Types count: 1, 1.0
            and True have different graphs.
    """

    family: str
    size: Size
    variant: tuple[tuple[str, Hashable], ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GraphKey) and self._exact() == other._exact()

    def __hash__(self) -> int:
        return hash(self._exact())

    def _exact(self) -> Hashable:
        return self.family, self.size, tuple((name, exact(value)) for name, value in self.variant)


def exact(value: Hashable) -> Hashable:
    """Return a key of a static argument's type and exact value: 1 and True differ, and so do 0.0 and -0.0."""
    if isinstance(value, float):
        return type(value), value.hex()
    if isinstance(value, complex):
        return type(value), value.real.hex(), value.imag.hex()
    if isinstance(value, tuple):
        return type(value), tuple(map(exact, value))
    if isinstance(value, frozenset):
        return type(value), frozenset(map(exact, value))
    return type(value), value


@dataclass(frozen=True, slots=True)
class Decision:
    """What a step does and why.

    Attributes:
        mode: replay, capture first, or run eagerly.
        key: the graph that serves the step, or that would have; None above the threshold and where graphs are disabled.
        padding: rows that the graph computes beyond the true size; 0 where the step runs eagerly.
        reason: None for a hit.
    """

    mode: Mode
    key: GraphKey | None
    padding: int
    reason: Reason | None


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    """What the user chose.

    Attributes:
        buckets: sizes of each family, the smallest first. The last one is the family's threshold; a family without any
            runs eagerly.
        enabled: False runs every step eagerly.
        max_padding_ratio: a step whose padding is more than this share of its bucket runs eagerly; None allows any.
        capture_on_first_use: whether a key without a graph is captured when a step first needs it.
    """

    buckets: Mapping[str, tuple[Size, ...]]
    enabled: bool = True
    max_padding_ratio: float | None = None
    capture_on_first_use: bool = True


def dispatch(
    size: Size,
    policy: DispatchPolicy,
    captured: Mapping[GraphKey, object],
    failed: Mapping[GraphKey, Reason],
    family: str,
    variant: tuple[tuple[str, Hashable], ...] = (),
) -> Decision:
    """Decide how a step of ``size`` runs: by the smallest bucket of its family that holds it.

    A bucket that the device had no room for is skipped; the next larger one serves.

    Args:
        size: the true size of the bucketed axis, or of each of several.
        policy: the user's choices.
        captured: the keys that have a graph.
        failed: the keys whose capture failed, and why; they are never tried again.
        family: one of ``policy.buckets``.
        variant: the step's static arguments.
    """
    buckets = policy.buckets[family]
    if not policy.enabled or not buckets:
        return Decision(Mode.EAGER, None, 0, Reason.DISABLED)
    fitting = _fitting(size, buckets)
    if not fitting:
        return Decision(Mode.EAGER, None, 0, Reason.ABOVE_THRESHOLD)
    key = GraphKey(family, fitting[0], variant)
    if failed and failed.get(key) in _NO_ROOM:
        larger = (GraphKey(family, bucket, variant) for bucket in fitting[1:])
        key = next((other for other in larger if failed.get(other) not in _NO_ROOM), key)
    rows = volume(key.size)
    padding = rows - volume(size)
    if policy.max_padding_ratio is not None and padding > policy.max_padding_ratio * rows:
        return Decision(Mode.EAGER, key, 0, Reason.PADDING_RATIO)
    if key in captured:
        return Decision(Mode.REPLAY, key, padding, None)
    if key in failed:
        return Decision(Mode.EAGER, key, 0, failed[key])
    if policy.capture_on_first_use:
        return Decision(Mode.CAPTURE, key, padding, Reason.NOT_CAPTURED_YET)
    return Decision(Mode.EAGER, key, 0, Reason.NOT_CAPTURED_YET)


def _fitting(size: Size, buckets: Sequence[Size]) -> Sequence[Size]:
    """Return the buckets that hold ``size``, the smallest first."""
    if isinstance(size, int):
        return buckets[bisect_left(buckets, size) :]
    return [bucket for bucket in buckets if all(map(int.__ge__, bucket, size))]  # type: ignore[arg-type]
