"""What was measured: figures, the rows that carry them, JSON, and tables beside peers and floors."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphmode.errors import InputError

TITLES: Mapping[str, str] = {
    "step_ms": "ms a step",
    "first_token_ms": "ms to the first token",
    "token_ms": "ms a token of an answer",
    "gap_ms": "ms between tokens",
    "after_last_first_token_ms": "ms a token, all streams decoding",
    "request_ms": "ms to the end of the answer",
    "cpu_seconds_per_token": "CPU seconds a token",
    "requests_per_s": "requests/s",
    "tokens_per_s": "tokens/s",
}
"""The figures there are, with their titles."""
_RATES = frozenset({"requests_per_s", "tokens_per_s"})


@dataclass(frozen=True)
class Figure:
    """One figure of a run.

    Attributes:
        name: one of :data:`TITLES`.
        median: of the samples.
        spread: how far samples lie apart: ``least`` and ``most`` of a few; of many ``mean``, ``p90``, ``p99`` and
            ``std``, the standard deviation.
        floor: the figure of a run that takes no more than the floor; None where it is not known.
    """

    name: str
    median: float
    spread: Mapping[str, float] = field(default_factory=dict)
    floor: float | None = None

    @property
    def of_floor(self) -> float | None:
        """The share of the floor's speed that was reached."""
        return None if self.floor is None else self.speed_against(self.floor)

    def speed_against(self, other: float) -> float:
        """Return how many times as fast it is as another value of the same figure."""
        return self.median / other if self.name in _RATES else other / self.median


def of_runs(name: str, samples: Sequence[float], floor: float | None = None) -> Figure:
    """Return the figure of a few runs: the median, the least and the most."""
    return Figure(name, statistics.median(samples), {"least": min(samples), "most": max(samples)}, floor)


def of_many(name: str, samples: Sequence[float], floor: float | None = None) -> Figure:
    """Return the figure of many samples: median, mean, percentiles 90 and 99 (nearest rank), standard deviation."""
    ordered = sorted(samples)
    percentiles = {f"p{percent}": ordered[-(-percent * len(ordered) // 100) - 1] for percent in (90, 99)}
    spread = {"mean": statistics.fmean(ordered), **percentiles, "std": statistics.pstdev(ordered)}
    return Figure(name, statistics.median(ordered), spread, floor)


@dataclass(frozen=True)
class Row:
    """What one mode gave at one batch.

    Attributes:
        workload: the workload's name.
        model: the model's name.
        mode: ``graph``, ``eager``, ``transformers``, or a peer's name.
        batch: requests submitted together.
        figures: what was measured.
        device: the device's name.
        versions: of the packages.
        date: of the run, as YYYY-MM-DD.
        details: what else describes the run, as plain values.
    """

    workload: str
    model: str
    mode: str
    batch: int
    figures: tuple[Figure, ...]
    device: str
    versions: Mapping[str, str]
    date: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return one flat object: each figure's median by its name, and its spread, its floor and its share of that."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("workload", "model", "mode", "batch")}
        for figure in self.figures:
            values[figure.name] = figure.median
            if figure.spread:
                values[f"{figure.name}_spread"] = dict(figure.spread)
            if figure.floor is not None:
                values |= {f"{figure.name}_floor": figure.floor, f"{figure.name}_of_floor": figure.of_floor}
        return values | {
            **self.details,
            "device": self.device,
            "versions": dict(self.versions),
            "date": self.date,
        }


def as_json(rows: Iterable[Row]) -> str:
    """Return rows as one JSON object, ``{"rows": [...]}``, a row a line."""
    lines = ",\n".join(json.dumps(row.as_dict()) for row in rows)
    return f'{{"rows": [\n{lines}\n]}}\n'


def read_rows(path: Path) -> list[Row]:
    """Read what :func:`as_json` wrote.

    Raises:
        InputError: the file is not that.
    """
    try:
        return [_row(values) for values in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not hold results ({type(error).__name__}: {error}); give a file that bench --json wrote"
        ) from error


def _row(values: Mapping[str, Any]) -> Row:
    figures = tuple(
        Figure(name, values[name], values.get(f"{name}_spread", {}), values.get(f"{name}_floor"))
        for name in TITLES
        if name in values
    )
    own = ("workload", "model", "mode", "batch", "device", "versions", "date")
    read = {f"{name}{end}" for name in TITLES for end in ("", "_spread", "_floor", "_of_floor")}
    details = {name: value for name, value in values.items() if name not in own and name not in read}
    return Row(**{name: values[name] for name in own}, figures=figures, details=details)


def comparable(peers: Iterable[Row], rows: Sequence[Row]) -> list[Row]:
    """Return the peers that were measured on the same device, workload, model and batch as one of the rows."""
    keys = {_key(row) for row in rows}
    return [peer for peer in peers if _key(peer) in keys]


def _key(row: Row) -> tuple[str, str, str, int]:
    return row.device, row.workload, row.model, row.batch


def tables(rows: Sequence[Row], peers: Sequence[Row] = ()) -> str:
    """Return Markdown: for each device, model and workload a table with a line a batch and a column a mode.

    A cell holds the median with its spread, the share of the floor's speed, and for other modes than ``graph`` how many
    times as fast ``graph`` is.
    """
    blocks = []
    for device, model, workload in dict.fromkeys((row.device, row.model, row.workload) for row in rows):
        here = [row for row in rows if (row.device, row.model, row.workload) == (device, model, workload)]
        beside = comparable(peers, here)
        blocks.append(f"**{model}, {workload}** on {device}\n\n{_table(here, beside)}\n\n{_runs([*here, *beside])}\n")
    return "\n".join(blocks)


def _table(rows: Sequence[Row], peers: Sequence[Row]) -> str:
    modes = list(dict.fromkeys(row.mode for row in [*rows, *peers]))
    lines = [["", "floor", *modes]]
    for batch in sorted({row.batch for row in rows}):
        figures = {(row.mode, each.name): each for row in [*rows, *peers] if row.batch == batch for each in row.figures}
        for name in [name for name in TITLES if any(found == name for _, found in figures)]:
            floors = [each.floor for (_, found), each in figures.items() if found == name and each.floor is not None]
            graph = figures.get(("graph", name))
            cells = [_cell(figures.get((mode, name)), floors[:1], None if mode == "graph" else graph) for mode in modes]
            lines.append([f"{TITLES[name]}, batch {batch}", _number(floors[0]) if floors else "", *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    padded.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in padded)


def _cell(figure: Figure | None, floors: Sequence[float], graph: Figure | None) -> str:
    if figure is None:
        return ""
    cell = _number(figure.median)
    if figure.spread:
        cell += f" ({', '.join(f'{name} {_number(value)}' for name, value in figure.spread.items())})"
    # A run of fewer tokens has a lower floor of its own.
    floor = figure.floor if figure.floor is not None else floors[0] if floors else None
    if floor is not None:
        cell += f", {figure.speed_against(floor):.0%}"
    if graph is not None:
        cell += f", graph {graph.speed_against(figure.median):.2f} x"
    return cell


def _number(value: float) -> str:
    digits = ",.0f" if value >= 1000 else ".1f" if value >= 100 else ".3f" if value >= 0.1 else ".3g"
    return f"{value:{digits}}"


def _runs(rows: Sequence[Row]) -> str:
    """Return a line that says when and with which versions the rows were measured."""
    of: dict[str, list[str]] = {}
    for row in rows:
        versions = ", ".join(f"{package} {version}" for package, version in row.versions.items())
        of.setdefault(f"{row.date}, {versions}", []).append(row.mode)
    return "; ".join(f"{', '.join(dict.fromkeys(modes))}: {run}" for run, modes in of.items())
