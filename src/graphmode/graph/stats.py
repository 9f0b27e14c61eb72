"""What a runner counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from graphmode.graph.axes import Size
from graphmode.graph.dispatch import GraphKey, Reason


@dataclass(frozen=True)
class CaptureFailure:
    """A graph that could not be captured.

    Attributes:
        key: what would have selected it.
        reason: what steps of that key count as misses by.
        message: what went wrong, where, and what to do.
    """

    key: GraphKey
    reason: Reason
    message: str


@dataclass
class RunnerStats:
    """Counters of one runner, from its creation or the last :meth:`reset_steps`.

    Attributes:
        steps: calls of the runner, each as often as it was repeated.
        replays: steps that replayed a graph.
        eager_steps: steps that ran eagerly.
        misses: steps that were no hit, by reason. A first use that captured and then replayed counts here too.
        buckets: replays by family and bucket.
        rows: true rows of the replayed steps.
        padded_rows: padding rows of the replayed steps.
        replay_seconds: time that the host spent in replays: on a CPU what the steps took, on an accelerator what their
            launches did.
        graphs: graphs held; a piecewise capture has several.
        breaks: where graphs break by themselves, by the operator that they break around; the marked calls of
            ``@outside_graph`` are not in it.
        captures: keys captured.
        out_of_graphs: keys left without a graph because the device had no room for more.
        capture_failures: the graphs that could not be captured, those out of room among them.
        capture_seconds: time spent in capture, warm-up included.
        graph_bytes: device memory that the graphs keep, measured; their inputs' buffers are not in it.
        capture_peak_bytes: the most device memory that one capture took at a time, what it kept included, measured.
    """

    steps: int = 0
    replays: int = 0
    eager_steps: int = 0
    misses: Counter[Reason] = field(default_factory=Counter)
    buckets: Counter[tuple[str, Size]] = field(default_factory=Counter)
    rows: int = 0
    padded_rows: int = 0
    replay_seconds: float = 0.0
    graphs: int = 0
    breaks: Counter[str] = field(default_factory=Counter)
    captures: int = 0
    out_of_graphs: int = 0
    capture_failures: list[CaptureFailure] = field(default_factory=list)
    capture_seconds: float = 0.0
    graph_bytes: int = 0
    capture_peak_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of steps that were hits: replayed a graph that was there. 0 before the first step."""
        return (self.steps - self.misses.total()) / self.steps if self.steps else 0.0

    @property
    def padding_ratio(self) -> float:
        """Share of the replayed rows that were padding."""
        total = self.rows + self.padded_rows
        return self.padded_rows / total if total else 0.0

    def reset_steps(self) -> None:
        """Forget the steps; keep what is known of the graphs."""
        self.steps = self.replays = self.eager_steps = self.rows = self.padded_rows = 0
        self.replay_seconds = 0.0
        self.misses.clear()
        self.buckets.clear()
