"""Which graph serves a step, and where none does, why. A pure decision: no tensor, no device, no state of its own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    """What a step does."""

    REPLAY = "replay"
    CAPTURE = "capture"
    """Capture the graph of the key now (its first use), then replay it."""
    EAGER = "eager"


class Reason(StrEnum):
    """Why a step runs eagerly, or pays for a capture: why it was not a hit."""

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


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What selects a graph.

    Attributes:
        family: name of the family, a set of graphs with buckets of its own.
        size: the bucket: the size of the bucketed axis that the graph was captured at.
        variant: the static arguments, ``(name, value)`` pairs in the order of their declaration.
    """

    family: str
    size: int
    variant: tuple[tuple[str, Hashable], ...] = ()


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
        buckets: sorted sizes of each family. The last one is the family's threshold; one with none runs eagerly.
        enabled: False runs every step eagerly.
        max_padding_ratio: a step whose padding is more than this share of its bucket runs eagerly; None allows any.
        capture_on_first_use: whether a key without a graph is captured when a step first needs it.
    """

    buckets: Mapping[str, tuple[int, ...]]
    enabled: bool = True
    max_padding_ratio: float | None = None
    capture_on_first_use: bool = True


def dispatch(
    size: int,
    policy: DispatchPolicy,
    captured: Mapping[GraphKey, object],
    failed: Mapping[GraphKey, Reason],
    family: str,
    variant: tuple[tuple[str, Hashable], ...] = (),
) -> Decision:
    """Decide how a step of ``size`` runs: by the smallest bucket of its family that holds it.

    Buckets that there was no room for are passed over, for the next larger one.

    Args:
        size: the true size of the bucketed axis, at least 1.
        policy: the user's choices.
        captured: the keys that have a graph.
        failed: the keys whose capture failed, and why; they are never tried again.
        family: one of ``policy.buckets``.
        variant: the step's static arguments.
    """
    buckets = policy.buckets[family]
    if not policy.enabled or not buckets:
        return Decision(Mode.EAGER, None, 0, Reason.DISABLED)
    index = bisect_left(buckets, size)
    if index == len(buckets):
        return Decision(Mode.EAGER, None, 0, Reason.ABOVE_THRESHOLD)
    key = GraphKey(family, buckets[index], variant)
    if failed and failed.get(key) in _NO_ROOM:
        larger = (GraphKey(family, bucket, variant) for bucket in buckets[index + 1 :])
        key = next((other for other in larger if failed.get(other) not in _NO_ROOM), key)
    padding = key.size - size
    if policy.max_padding_ratio is not None and padding > policy.max_padding_ratio * key.size:
        return Decision(Mode.EAGER, key, 0, Reason.PADDING_RATIO)
    if key in captured:
        return Decision(Mode.REPLAY, key, padding, None)
    if key in failed:
        return Decision(Mode.EAGER, key, 0, failed[key])
    if policy.capture_on_first_use:
        return Decision(Mode.CAPTURE, key, padding, Reason.NOT_CAPTURED_YET)
    return Decision(Mode.EAGER, key, 0, Reason.NOT_CAPTURED_YET)
