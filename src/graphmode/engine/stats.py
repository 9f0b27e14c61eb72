"""What the engine's steps did and cost."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from typing import Any

from graphmode.graph import CaptureFailure

QUEUE_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds: the upper bounds by which waiting times are counted."""


@dataclass
class EngineStats:
    """What the engine's steps did and cost.

    Attributes:
        running: sequences that run now.
        waiting: those that wait, preempted ones included.
        blocks_used: blocks of each cache group that sequences hold now.
        blocks_total: blocks of each cache group.
        prefix_queries: tokens of the prompts that began to run, since the start.
        prefix_hits: those of them whose keys and values were cached.
        steps: steps run.
        replays: of them, replays of a graph.
        eager_steps: of them, eager ones.
        hit_rate: share of the steps that found their graph captured.
        misses: steps that did not, by reason.
        rows: true tokens of the replayed steps.
        padded_rows: padding tokens of the replayed steps.
        padding_ratio: share of the replayed rows that were padding.
        buckets: by family, how many steps replayed the graph of each number of tokens.
        replay_seconds: time that the host spent in replays: on a CPU what the steps took, on an accelerator what their
            launches did.
        graphs: graphs held.
        captures: sizes captured, each of which may have several graphs.
        capture_seconds: time spent in capture.
        graph_bytes: device memory that the graphs keep.
        capture_peak_bytes: the most device memory that one capture took at a time.
        capture_failures: the graphs that could not be captured, each with the reason; their steps run eagerly.
        decode_steps: decode steps that were timed: those after another one.
        decode_seconds: their wall time, scheduling and sampling included.
        decode_ms_per_step: mean wall time of a decode step, scheduling and sampling included; None before the first.
        queue_seconds: how many requests waited how long for their first step: for each of :data:`QUEUE_BOUNDS` those
            that waited at most as long and longer than the one before, and last those that waited longer than any.
        queue_seconds_sum: how long they waited in all.
        generated_tokens: tokens generated.
        preemptions: times that a sequence gave up its blocks for want of memory, to be computed again.
        vision_runs: images and videos that the vision tower computed.
        vision_misses: those that found no graph captured, by reason.
    """

    running: int
    waiting: int
    blocks_used: list[int]
    blocks_total: list[int]
    prefix_queries: int
    prefix_hits: int
    steps: int
    replays: int
    eager_steps: int
    hit_rate: float
    misses: dict[str, int]
    rows: int
    padded_rows: int
    padding_ratio: float
    buckets: dict[str, dict[int, int]]
    replay_seconds: float
    graphs: int
    captures: int
    capture_seconds: float
    graph_bytes: int
    capture_peak_bytes: int
    capture_failures: list[CaptureFailure]
    decode_steps: int
    decode_seconds: float
    decode_ms_per_step: float | None
    queue_seconds: list[int]
    queue_seconds_sum: float
    generated_tokens: int
    preemptions: int
    vision_runs: int
    vision_misses: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return the stats as plain values."""
        return asdict(self)


@dataclass
class _Clock:
    """Times of the decode steps and of requests that wait."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    queued: list[int] = field(default_factory=lambda: [0] * (len(QUEUE_BOUNDS) + 1))
    queued_seconds: float = 0.0

    def note_queued(self, seconds: float) -> None:
        """Count a request that waited so long."""
        self.queued[bisect_left(QUEUE_BOUNDS, seconds)] += 1
        self.queued_seconds += seconds
