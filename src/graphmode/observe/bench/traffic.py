"""Which requests a load test sends: how long, and when."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphmode.errors import InputError

_FORMS = "128, uniform:64:256, normal:128:32 (mean, deviation) or lognormal:128:0.5 (median, deviation of its log)"


@dataclass(frozen=True)
class Lengths:
    """A distribution of numbers of tokens, all at least 1.

    Attributes:
        kind: ``fixed``, ``uniform``, ``normal`` or ``lognormal``.
        first: the number; the least; the mean; the median.
        second: unused; the most; the standard deviation; that of the logarithm.
    """

    kind: str
    first: float
    second: float = 0.0

    def __str__(self) -> str:
        return f"{self.first:g}" if self.kind == "fixed" else f"{self.kind}:{self.first:g}:{self.second:g}"

    def draw(self, rng: random.Random) -> int:
        """Return a number of tokens."""
        if self.kind == "uniform":
            return rng.randint(round(self.first), round(self.second))
        drawn = self.first
        if self.kind == "normal":
            drawn = rng.normalvariate(self.first, self.second)
        elif self.kind == "lognormal":
            drawn = self.first * math.exp(rng.normalvariate(0, self.second))
        return max(1, round(drawn))


TOKENS = Lengths("fixed", 128)
"""The default."""


def lengths(option: str, text: str) -> Lengths:
    """Return the distribution that a text means, as :class:`Lengths` writes it.

    Raises:
        InputError: it means none; the message names the option.
    """
    kind, *numbers = text.split(":") if ":" in text else ("fixed", text)
    expected = {"fixed": 1, "uniform": 2, "normal": 2, "lognormal": 2}
    try:
        values = [float(each) if kind in ("normal", "lognormal") else int(each) for each in numbers]
    except ValueError:
        values = []
    if len(values) != expected.get(kind) or not all(map(math.isfinite, values)) or values[0] < 1 or values[-1] < 0:
        raise InputError(f"{option} is {text!r}; give {_FORMS}")
    if kind == "uniform" and values[1] < values[0]:
        raise InputError(f"{option} is {text!r}, whose most is below its least; give {_FORMS}")
    return Lengths(kind, *values)


@dataclass(frozen=True)
class Planned:
    """A request to be sent.

    Attributes:
        prompt_tokens: of its prompt.
        max_tokens: of its answer.
        at: seconds after the beginning; None where it follows another.
        prompt: its text; None for one of ``prompt_tokens``.
    """

    prompt_tokens: int
    max_tokens: int
    at: float | None = None
    prompt: str | None = None


def arrival_times(count: int, rate: float, rng: random.Random, *, poisson: bool = True) -> list[float]:
    """Return when requests arrive, in seconds from the first: a Poisson process, or evenly spaced.

    Args:
        count: of requests.
        rate: requests a second.
        rng: of the random numbers.
        poisson: whether gaps are exponentially distributed.
    """
    times = [0.0]
    for _ in range(count - 1):
        times.append(times[-1] + (rng.expovariate(rate) if poisson else 1 / rate))
    return times[:count]


def read_trace(file: Path, default_max_tokens: Lengths, rng: random.Random) -> list[Planned]:
    """Read a trace, JSON lines of ``at`` (seconds), ``prompt_tokens`` or ``prompt`` (a text), and ``max_tokens``.

    ``at`` may be left out of all lines, and ``max_tokens`` of any.

    Raises:
        InputError: the file cannot be read, or a line is not that.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"trace {file} cannot be read: {error}") from error
    planned = [
        _planned(f"{file}:{number}", line, default_max_tokens, rng)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not planned:
        raise InputError(f"trace {file} holds no request; write one a line")
    if len({each.at is None for each in planned}) > 1:
        raise InputError(f"trace {file} has `at` on some lines only; write it on all or on none")
    return sorted(planned, key=lambda each: each.at or 0.0)


def _planned(where: str, line: str, default_max_tokens: Lengths, rng: random.Random) -> Planned:
    allowed = 'such as {"at": 0.5, "prompt_tokens": 128, "max_tokens": 64}, or with "prompt", a text'
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is no JSON: {error}; write an object a line, {allowed}") from error
    if not isinstance(values, dict) or values.keys() - {"at", "prompt_tokens", "prompt", "max_tokens"}:
        raise InputError(f"{where} is {line[:100]}; write {allowed}")
    at, tokens, prompt = values.get("at"), values.get("prompt_tokens"), values.get("prompt")
    max_tokens = values.get("max_tokens", default_max_tokens.draw(rng))
    good = (at is None or (isinstance(at, (int, float)) and at >= 0)) and (tokens is None) != (prompt is None)
    good &= prompt is None or (isinstance(prompt, str) and prompt != "")
    good &= all(isinstance(each, int) and each >= 1 for each in (max_tokens, 1 if tokens is None else tokens))
    if not good:
        raise InputError(f"{where} is {line[:100]}; write {allowed}")
    return Planned(tokens or 0, max_tokens, at, prompt)
