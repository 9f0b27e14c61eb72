"""An engine process that only says what it is told to say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graphmode.serve.metrics import STEP_BOUNDS


@dataclass
class FakeState:
    phase: str = "ready"
    cause: str | None = None
    captured: int = 3
    to_capture: int = 3
    restarts: int = 0


@dataclass
class FakeEngine:
    state: FakeState = field(default_factory=FakeState)


@dataclass
class FakeSnapshot:
    stats: dict[str, Any]
    steps: int = 0
    running: int = 2
    waiting: int = 1
    kv_blocks_used: list[int] = field(default_factory=lambda: [3, 1])
    kv_blocks_total: list[int] = field(default_factory=lambda: [12, 12])
    prefix_queries: int = 0
    prefix_hits: int = 0
    failed_steps: int = 0
    replays: dict[str, int] = field(default_factory=dict)
    step_seconds: list[int] = field(default_factory=list)
    step_seconds_sum: float = 0.0

    def __post_init__(self) -> None:
        self.replays = {"decode:8": self.steps}
        self.step_seconds = [self.steps, *[0] * len(STEP_BOUNDS)]
        self.step_seconds_sum = 0.5 * self.steps


def snapshot(number: int, **more: Any) -> FakeSnapshot:
    """What an engine process says after ``number`` steps."""
    stats = {
        "steps": number,
        "replays": number,
        "eager_steps": 0,
        "misses": {"disabled": number // 2},
        "rows": 3 * number,
        "padded_rows": number,
        "graphs": 3,
        "captures": 3,
        "capture_failures": [],
        "capture_seconds": 1.5,
        "graph_bytes": 4096,
        "preemptions": number,
        **more,
    }
    return FakeSnapshot(stats, number)
