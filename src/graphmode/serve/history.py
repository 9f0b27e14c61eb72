"""The last minutes, second by second: what the dashboard draws."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from graphmode.serve.histograms import Buckets

SECONDS = 300
"""How far back the history goes."""
WINDOW = 60
"""Seconds that :meth:`History.window` looks back."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What was counted by a time since the server started; running, waiting and cache are those of the time itself.

    Names are those of :mod:`graphmode.serve.metrics`.
    """

    time: float
    prompt_tokens: int
    generation_tokens: int
    first_token: Buckets
    inter_token: Buckets
    running: int
    waiting: int
    kv_cache_usage: float
    steps: int
    misses: Mapping[str, int]
    rows: int
    padded_rows: int
    bucket_replays: Mapping[str, int]
    step_seconds: Buckets


class History:
    """What was counted, about once a second, for the last :data:`SECONDS`.

    Attributes:
        started: when it began, in seconds since 1970: which tells a server from the one before it.
        number: of the newest entry; the first is 1.
    """

    def __init__(self) -> None:
        self.started = time.time()
        self.number = 0
        self._start = time.monotonic()
        self._entries: deque[Totals] = deque(maxlen=SECONDS + 1)

    def now(self) -> float:
        """Return the time in seconds since 1970, by a clock that nobody sets meanwhile."""
        return self.started + time.monotonic() - self._start

    def wants(self) -> bool:
        """Return whether it is time for another entry."""
        # What comes four times a second fits.
        return not self._entries or self.now() - self._entries[-1].time >= 0.95

    def add(self, totals: Totals) -> None:
        """Keep what was counted until now."""
        self._entries.append(totals)
        self.number += 1

    def points(self, after: int) -> list[dict[str, float | None]]:
        """Return what happened between the entries since the one of that number, as rates and shares.

        Each has the ``time`` of its end, tokens a second (``input``, ``output``), ``running``, ``waiting``,
        ``kv`` (share), and the median and 99th percentile of the time of a step in ms; None where no step ended.
        """
        new = min(self.number - max(after, 0), len(self._entries) - 1)
        if new < 1:
            return []
        entries = list(self._entries)[-new - 1 :]
        return [_point(before, now) for before, now in pairwise(entries)]

    def window(self) -> dict[str, Any]:
        """Return what the last :data:`WINDOW` seconds were like; None where nothing happened that would tell."""
        if not self._entries:
            return {}
        now = self._entries[-1]
        before = next(each for each in self._entries if each.time >= now.time - WINDOW)
        steps, rows, padded = now.steps - before.steps, now.rows - before.rows, now.padded_rows - before.padded_rows
        misses = _less(now.misses, before.misses)
        return {
            "seconds": now.time - before.time,
            "steps": steps,
            "hit_rate": (steps - sum(misses.values())) / steps if steps else None,
            "padding": padded / (rows + padded) if rows + padded else None,
            "misses": misses,
            "replays": _less(now.bucket_replays, before.bucket_replays),
            "first_token_ms": _percentiles(now.first_token, before.first_token),
            "inter_token_ms": _percentiles(now.inter_token, before.inter_token),
            "step_ms": _percentiles(now.step_seconds, before.step_seconds),
        }


def _point(before: Totals, now: Totals) -> dict[str, float | None]:
    seconds = now.time - before.time
    median, tail = _quantiles(now.step_seconds, before.step_seconds, (0.5, 0.99))
    return {
        "time": now.time,
        "input": (now.prompt_tokens - before.prompt_tokens) / seconds,
        "output": (now.generation_tokens - before.generation_tokens) / seconds,
        "running": now.running,
        "waiting": now.waiting,
        "kv": now.kv_cache_usage,
        "step_p50": median,
        "step_p99": tail,
    }


def _less(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {key: count - before.get(key, 0) for key, count in now.items()}


def _percentiles(now: Buckets, before: Buckets) -> dict[str, float | None]:
    return dict(zip(("p50", "p95", "p99"), _quantiles(now, before, (0.5, 0.95, 0.99)), strict=True))


def _quantiles(now: Buckets, before: Buckets, shares: Sequence[float]) -> list[float | None]:
    """Return quantiles of what was observed in between, in ms."""
    between = now.since(before.counts)
    found = (between.quantile(share) for share in shares)
    return [None if each is None else 1e3 * each for each in found]
