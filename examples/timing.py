"""Timing for the examples."""

import statistics
import time
from collections.abc import Callable

import torch


def milliseconds(call: Callable[[], object], repeats: int = 200) -> float:
    """Return the median wall time of ``call``, the device's work included."""
    times = []
    for _ in range(20 + repeats):
        start = time.perf_counter()
        call()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[20:])
