"""Host arguments: what some devices' operators take as lists on the host instead of reading on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class HostArguments:
    """The host arguments of a function, by the keyword under which its operators take them.

    A graph keeps the host arguments of its capture. So the runner writes each step's values to ``current`` before the
    step runs, and a backend with ``Capabilities.host_arguments`` passes them to the graph at each replay. The function
    must always read them from ``current``: at capture, in an eager step and in a call outside the graph.

    Attributes:
        of: computes them, from the family, the size of every axis (the graph's; for an eager step the true ones) and
            the inputs' values. At capture there are no values: it returns what a graph must be captured with to serve
            every step. The number of integers must depend on family and sizes alone.
        current: the values of the step in flight.
    """

    of: Callable[[str, Mapping[str, int], Mapping[str, torch.Tensor]], Mapping[str, list[int]]]
    current: dict[str, list[int]] = field(default_factory=dict)

    def set(self, family: str, sizes: Mapping[str, int], values: Mapping[str, torch.Tensor]) -> None:
        """Compute the values of the next step."""
        self.current.update(self.of(family, sizes, values))
