"""What the engine's steps did and cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from graphmode.graph import CaptureFailure


@dataclass
class EngineStats:
    """What the engine's steps did and cost.

    Attributes:
        steps: steps run.
        replays: of them, replays of a graph.
        eager_steps: of them, eager ones.
        hit_rate: share of the steps that found their graph captured.
        misses: steps that did not, by reason.
        padding_ratio: share of the replayed rows that were padding.
        graphs: graphs held.
        capture_seconds: time spent in capture.
        graph_bytes: device memory that the graphs keep.
        capture_peak_bytes: the most device memory that one capture took at a time.
        capture_failures: the graphs that could not be captured, each with the reason; their steps run eagerly.
        decode_ms_per_step: mean wall time of a decode step, scheduling and sampling included; None before the first.
        generated_tokens: tokens generated.
        preemptions: times that a sequence gave up its blocks for want of memory, to be computed again.
        vision_runs: images and videos that the vision tower computed.
        vision_misses: those that found no graph captured, by reason.
    """

    steps: int
    replays: int
    eager_steps: int
    hit_rate: float
    misses: dict[str, int]
    padding_ratio: float
    graphs: int
    capture_seconds: float
    graph_bytes: int
    capture_peak_bytes: int
    capture_failures: list[CaptureFailure]
    decode_ms_per_step: float | None
    generated_tokens: int
    preemptions: int
    vision_runs: int
    vision_misses: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return the stats as plain values."""
        return asdict(self)


@dataclass
class _Clock:
    """Times of the decode steps."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
