"""Which line an error comes from, and what can be done there: in the user's code or in an installed package."""

from __future__ import annotations

import linecache
import os
import re
import sys
import sysconfig
import traceback
from dataclasses import dataclass
from functools import cache

import torch

REMEDY = "compute it with tensor operators, or move the code into a function marked @outside_graph"
"""What to do about the user's own code that no graph can hold."""

READS_VALUE = "it reads a tensor's value into Python, which a replay would not read again"
"""Why no graph can hold such code."""

_PASSED_OVER = (
    os.path.dirname(os.path.abspath(__file__)),
    os.path.dirname(os.path.abspath(torch.__file__)),
    "<",
)
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_INSTALLED = re.compile(r".*[/\\](?:site|dist)-packages[/\\]([^/\\.]+)")

_MASKS_OF_TRANSFORMERS = (
    "transformers chooses its way there by the values of a mask. Load the model with attn_implementation='sdpa' or "
    "'eager' and give it a mask of four dimensions as attention_mask, which it takes as it is: "
    "[batch, 1, queries, keys] in the model's dtype, 0 where a query attends to a key and torch.finfo(dtype).min where "
    "not, with causality and windows in it"
)


@dataclass(frozen=True)
class Location:
    """A line of code that an error comes from.

    Attributes:
        line: ``file:line: code`` of the innermost frame that is not Python's, torch's or the runtime's.
        package: the installed package that it belongs to, if it does.
        caller: of a line in such a package, the innermost line outside of installed packages; None where there is none.
    """

    line: str
    package: str | None = None
    caller: str | None = None

    def __str__(self) -> str:
        return self.line if self.caller is None else f"{self.line}\n  called at {self.caller}"

    @property
    def remedy(self) -> str:
        """What to do about code that no graph can hold at this line."""
        if self.package is None:
            return REMEDY
        if self.package == "transformers" and ("mask" in self.line or "flash_attention" in self.line):
            return _MASKS_OF_TRANSFORMERS
        return (
            f"the line is in the package {self.package}. Call that part of it in a function of your own marked "
            "@outside_graph, or give it arguments with which it reads no values"
        )


def location_of(error: BaseException) -> Location | None:
    """Return the line that raised an error, outside of Python, torch and the runtime; None if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_shown(frame.filename)]
    if not frames:
        return None
    lines = [f"{frame.filename}:{frame.lineno}: {frame.line}" for frame in frames]
    packages = [None if (found := _INSTALLED.match(frame.filename)) is None else found[1] for frame in frames]
    if packages[-1] is None:
        return Location(lines[-1])
    callers = [line for line, package in zip(lines, packages, strict=True) if package is None]
    return Location(lines[-1], packages[-1], callers[-1] if callers else None)


@cache
def _is_shown(file: str) -> bool:
    standard = file.startswith(_STANDARD_LIBRARY) and not _INSTALLED.match(file)
    return not standard and not file.startswith(_PASSED_OVER)


@dataclass(frozen=True)
class Line:
    """A line of code that is being run."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {linecache.getline(self.file, self.number).strip()}"


def line_being_run() -> Line | None:
    """Return the innermost line that is neither Python's, torch's nor the runtime's."""
    frame = sys._getframe(1)
    while frame is not None and not _is_shown(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else Line(frame.f_code.co_filename, frame.f_lineno)
