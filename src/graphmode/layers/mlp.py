"""The gated feed-forward network of a decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

from graphmode.layers.linear import Linear
from graphmode.layers.residual import Norm, Residual


@dataclass(frozen=True)
class MLP:
    """``down(silu(gate(norm(x))) * up(norm(x)))``, added to the residual stream ``x``.

    Attributes:
        norm: of what it reads.
        gate_up: both projections in one, gate before up.
        down: the projection back.
        output_norm: of what it adds; None for none.
    """

    norm: Norm
    gate_up: Linear
    down: Linear
    output_norm: Norm | None = None

    def __call__(self, x: Residual) -> None:
        """Add what the network makes of the stream to it."""
        self.down.add_to(x, self.gate_up.swiglu_of_norm(x, self.norm), self.output_norm)
