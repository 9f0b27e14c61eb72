"""Timing for the examples."""

import statistics
import time
from collections.abc import Callable, Iterable

import torch

from graphmode.graph import GraphRunner

Call = Callable[[], object]


def milliseconds(call: Call, repeats: int = 200) -> float:
    """Return the median wall time of ``call``, the device's work included."""
    times = []
    for _ in range(1 + repeats // 10 + repeats):
        start = time.perf_counter()
        call()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[-repeats:])


def print_table(runner: GraphRunner, calls: Iterable[tuple[str, Call, Call]], repeats: int = 200) -> None:
    """Print how long each call takes without a graph and with one, and what ``runner`` counted.

    Args:
        runner: whose graphs the second call of each entry uses.
        calls: for each line of the table its name, the call without a graph and the one with it.
        repeats: how often each is timed.
    """
    print(f"{'':24}{'eager':>10}{'graph':>10}{'speed-up':>10}")
    for name, eager_call, graph_call in calls:
        eager, graph = milliseconds(eager_call, repeats), milliseconds(graph_call, repeats)
        print(f"{name:24}{eager:7.3f} ms{graph:7.3f} ms{eager / graph:8.1f} x")
    stats = runner.stats
    print(
        f"{stats.graphs} graphs, {stats.graph_bytes / 2**20:.2f} MiB, hit rate {stats.hit_rate:.3f}, on "
        f"{runner.backend.device}"
    )
