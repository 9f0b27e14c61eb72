"""Host arguments: what some devices' operators take as lists on the host instead of reading on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class HostArguments:
    """The host arguments of a function, by the keyword under which its operators take them.

    A graph holds a host argument as it was captured: the hazard of a Python scalar, made a rule. So the runner writes
    the values of each step to ``current`` before it runs, and a backend with ``Capabilities.host_arguments`` hands them
    to the graph at each replay. The function must read them from ``current``, whatever runs it: capture, eager step or
    call outside the graph.

    Attributes:
        of: computes them, from the family, the size of every axis (the graph's; for an eager step the true ones) and
            the inputs' values. At capture there are no values: it returns what a graph must be captured with to serve
            every step. The number of integers must depend on family and sizes alone.
        current: those of the step under way.
    """

    of: Callable[[str, Mapping[str, int], Mapping[str, torch.Tensor]], Mapping[str, list[int]]]
    current: dict[str, list[int]] = field(default_factory=dict)

    def set(self, family: str, sizes: Mapping[str, int], values: Mapping[str, torch.Tensor]) -> None:
        """Compute the values of the step that comes."""
        self.current.update(self.of(family, sizes, values))
