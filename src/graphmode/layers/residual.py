"""The residual stream of a layer: where the results of its linear layers are added up, and norms read them.

Under tensor parallelism the sums over ranks belong here, and nowhere else: over parts that are to be added
(``normed``, ``finish``), in the kernel that adds up split-K parts, and over whole results (``add``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graphmode.ops import add_rms_norm, add_split_k, add_split_k_and_norm, rms_norm


@dataclass(frozen=True)
class Norm:
    """An RMS norm: its weight ``[size]`` and what is added to the mean of squares."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of rows ``[rows, size]``."""
        return rms_norm(x, self.weight, self.eps)


@dataclass
class Residual:
    """The residual stream, which a layer changes in place.

    Attributes:
        rows: ``[rows, hidden]``.
        lens: int32 ``[rows]``: the length of each row's sequence, 0 for padding; None where rows are not sequences.
    """

    rows: torch.Tensor
    lens: torch.Tensor | None
    _parts: torch.Tensor | None = field(default=None, init=False)

    def add(self, h: torch.Tensor, norm: Norm | None) -> None:
        """Add ``h``, or its norm."""
        if norm is None:
            self.rows += h
        else:
            add_rms_norm(self.rows, h, norm.weight, norm.eps)

    def add_later(self, parts: torch.Tensor) -> None:
        """Add the sum of split-K parts, float32 ``[splits, rows, hidden]``, with the next norm or at the end."""
        self._parts = parts

    def normed(self, norm: Norm) -> torch.Tensor:
        """Return the norm of the stream, with all that was added."""
        if self._parts is None:
            return norm(self.rows)
        parts, self._parts = self._parts, None
        return add_split_k_and_norm(self.rows, parts, norm.weight, norm.eps)

    def finish(self) -> torch.Tensor:
        """Return the stream with all that was added."""
        if self._parts is not None:
            add_split_k(self.rows, self._parts)
        return self.rows
