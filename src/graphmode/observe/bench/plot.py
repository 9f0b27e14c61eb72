"""A plot of step time against batch, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import cycle

from graphmode.observe.bench.results import Row

_WIDTH, _HEIGHT = 780, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 230, 40, 50
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#44aa99")


def step_plot(rows: Sequence[Row]) -> str:
    """Return a plot of ``step_ms`` against batch on logarithmic axes: a line a mode, and the floor dashed.

    Args:
        rows: of one device and model, at least one of them with ``step_ms``.
    """
    lines: dict[str, dict[int, float]] = {}
    floor: dict[int, float] = {}
    for row in rows:
        for figure in row.figures:
            if figure.name == "step_ms" and figure.median > 0:  # noise may make a difference of two times negative
                lines.setdefault(row.mode, {})[row.batch] = figure.median
                if figure.floor is not None:
                    floor.setdefault(row.batch, figure.floor)
    batches = sorted({batch for line in lines.values() for batch in line})
    values = [value for line in (*lines.values(), floor) for value in line.values()]
    ticks = _ticks(min(values), max(values))
    x = _axis(batches[0], batches[-1], _LEFT, _WIDTH - _RIGHT)
    y = _axis(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP)

    title = escape(f"{rows[0].model}: ms a decode step, {rows[0].device}")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{title}</text>',
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">batch</text>',
    ]
    parts += [
        f'<path d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    ]
    parts += [
        f'<text x="{x(batch):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{batch}</text>'
        for batch in batches
    ]
    drawn = [(mode, line, colour, "") for (mode, line), colour in zip(lines.items(), cycle(_COLOURS), strict=False)]
    if floor:
        drawn.append(("floor", floor, "#555", ' stroke-dasharray="5 4"'))
    for index, (mode, line, colour, dashes) in enumerate(drawn):
        points = [(x(batch), y(value)) for batch, value in sorted(line.items())]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        at = _TOP + 8 + 20 * index
        left = _WIDTH - _RIGHT + 16
        parts.append(f'<path d="M{left} {at}h20" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts.append(f'<text x="{left + 26}" y="{at + 4}">{escape(mode)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the map from values to places on a logarithmic axis."""
    span = math.log(high / low) if high > low else 1.0
    return lambda value: start + (end - start) * math.log(value / low) / span


def _ticks(low: float, high: float) -> list[float]:
    """Return round values, three a decade, the first not above ``low`` and the last not below ``high``."""
    first = math.floor(math.log10(low))
    every = [step * 10.0**power for power in range(first, math.ceil(math.log10(high)) + 1) for step in (1, 2, 5)]
    start = max(index for index, tick in enumerate(every) if tick <= low)
    end = min(index for index, tick in enumerate(every) if tick >= high)
    return every[start : end + 1]
