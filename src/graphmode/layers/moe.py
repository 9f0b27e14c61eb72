"""Mixtures of experts: the layer, its router, and experts computed by grouped products.

Experts that are SwiGLU networks take four kernels where Triton runs (:mod:`graphmode.ops.moe.experts`). Elsewhere, and
for others, pairs of a token and an expert are sorted by expert on the device and go through grouped matrix products,
whose group boundaries the kernels read at run time: every shape depends on the number of rows alone. The pairs of
padding tokens are sorted behind all others and belong to no group, so where real pairs lie, and what is computed of
them, does not depend on padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import grouped_mm

from graphmode.layers.linear import Linear
from graphmode.layers.residual import Norm, Residual
from graphmode.ops import Routing, choose_experts, gated_experts

# An operator, so that layers can be traced and compiled around it.
torch.library.define(
    "graphmode::gated_experts",
    "(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor real, Tensor gate_up, Tensor down) -> Tensor",
)
torch.library.impl("graphmode::gated_experts", "default", gated_experts)
torch.library.register_fake("graphmode::gated_experts", lambda x, *others: torch.empty_like(x))


@dataclass(frozen=True)
class MoE:
    """A mixture of experts, whose result is added to the residual stream.

    Attributes:
        norm: of what it reads.
        block: router and experts: takes and returns ``[1, tokens, hidden]``.
        output_norm: of what it adds; None for none.
    """

    norm: Norm
    block: Callable[[torch.Tensor], torch.Tensor]
    output_norm: Norm | None = None

    def __call__(self, x: Residual) -> None:
        """Add what the experts make of the stream to it."""
        x.add(self.block(x.normed(self.norm).unsqueeze(0))[0], self.output_norm)


@dataclass(frozen=True)
class Router:
    """A router in two kernels.

    Attributes:
        linear: makes logits: its weight is ``[experts, hidden]``.
        bias: float32 ``[experts]``, added where scores are compared; or None.
        routing: how it chooses.
        in_float32: whether logits are float32, whatever the dtype of hidden states.
    """

    linear: Linear
    bias: torch.Tensor | None
    routing: Routing
    in_float32: bool

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits ``[tokens, experts]``, the weights of those chosen ``[tokens, k]`` and which they are."""
        weight = self.linear.weight
        x = hidden_states.reshape(-1, weight.shape[1])
        logits = _float_product(x, weight) if self.in_float32 else self.linear(x)
        return logits, *choose_experts(logits, self.bias, self.routing)


def _float_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``x @ weight.T`` in float32."""
    if x.device.type == "cuda" and x.dtype == weight.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return torch.nn.functional.linear(x.float(), weight.float())


def routed_experts(
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    count: int,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    real: torch.Tensor,
) -> torch.Tensor:
    """Return the weighted sum of what its experts make of each token, ``[tokens, hidden]``; 0 for padding.

    Args:
        compute: from rows ``[pairs, hidden]`` grouped by expert, the row after each expert's last (int32 ``[count]``)
            and each row's expert, ``count`` for none, makes what the experts make of their rows, ``[pairs, hidden]``.
        count: how many experts there are.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: the experts of each token, integers ``[tokens, k]``; one outside ``[0, count)`` is no expert.
        top_k_weights: of them, ``[tokens, k]``.
        real: bool ``[tokens]``, False for padding.
    """
    tokens, k = top_k_index.shape
    routed = real.unsqueeze(1) & (top_k_index >= 0) & (top_k_index < count)
    experts = torch.where(routed, top_k_index, count).flatten()
    experts, order = torch.sort(experts, stable=True)
    ends = torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True, out_int32=True)
    rows = compute(hidden_states[order // k], ends, experts)
    pairs = torch.empty_like(rows).index_copy_(0, order, rows).view(tokens, k, -1)
    # Rows of no group hold whatever was in memory. They are left out, not multiplied by 0, which NaN would survive.
    weighted = torch.where(routed.unsqueeze(-1), pairs * top_k_weights.unsqueeze(-1), 0)
    return weighted.sum(1).to(hidden_states.dtype)


def grouped_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows by a matrix of its own.

    Args:
        rows: ``[rows, in]``; those from ``ends[-1]`` on are in no group.
        weights: ``[groups, in, out]``.
        ends: int32 ``[groups]``: the row after each group's last, ascending.

    Returns:
        ``[rows, out]``; what rows of no group hold is undefined.
    """
    rows = rows.to(weights.dtype)
    if _has_grouped_kernel(rows, weights):
        return grouped_mm(rows, weights, offs=ends)
    # All rows times every matrix, of which one result is wanted for each row.
    place = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
    result = rows.new_zeros(rows.shape[0], weights.shape[2])
    for group in reversed(range(weights.shape[0])):
        result = torch.where(place < ends[group], rows @ weights[group], result)
    return result


def _has_grouped_kernel(rows: torch.Tensor, weights: torch.Tensor) -> bool:
    """Return whether ``grouped_mm`` takes these, and reads the groups' ends on the device."""
    strides = [stride for tensor in (rows, weights) for stride in tensor.stride() if stride != 1]
    if any(stride * rows.element_size() % 16 for stride in strides):
        return False
    if rows.device.type != "cuda":
        return rows.device.type == "cpu"
    # Elsewhere torch copies the ends to the host and loops.
    return rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device)[0] in (9, 10)
