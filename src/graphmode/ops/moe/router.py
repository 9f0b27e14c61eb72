"""Routers: which experts a token goes to, and how much each counts."""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphmode.ops._checks import FLOATS, require, require_contiguous, require_tensor
from graphmode.ops._device import overlap
from graphmode.ops._triton import constexpr, jit, launch_options, next_power_of_2, runs_triton, tl


@dataclass(frozen=True)
class Routing:
    """How a router chooses experts.

    Attributes:
        k: how many.
        sigmoid: whether scores are sigmoids of the logits, not their softmax.
        groups: that experts are in, equally many in each.
        top_groups: the groups that experts are chosen from: of the largest sums of their two best.
        normalise: whether the weights of those chosen add up to 1, before they are scaled.
        scale: of the weights.
        dtype: of the weights, which are computed in float32.
    """

    k: int
    sigmoid: bool = False
    groups: int = 1
    top_groups: int = 1
    normalise: bool = False
    scale: float = 1.0
    dtype: torch.dtype = torch.float32


def choose_experts(
    logits: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights of the experts with the largest scores, the largest first, and which these are.

    Args:
        logits: ``[rows, experts]``, float32, bfloat16 or float16, contiguous.
        bias: float32 ``[experts]``, added to scores where they are compared; None for none (DeepSeek-V3,
            https://arxiv.org/abs/2412.19437).
        routing: how they are chosen.

    Returns:
        Scores ``[rows, k]``, without bias; int64 ``[rows, k]``.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor("logits", logits, shape=(None, None), dtypes=FLOATS, like=logits)
    require_contiguous(logits=logits)
    experts = logits.shape[1]
    if bias is not None:
        require_tensor("bias", bias, shape=(experts,), dtypes=(torch.float32,), like=logits)
    require(1 <= routing.k <= experts, "k", routing.k, f"1 to {experts}, the number of experts")
    groups = routing.groups
    require(experts % groups == 0, "groups", groups, f"a divisor of {experts}, the number of experts")
    run = choose_experts_triton if runs_triton(logits) else choose_experts_reference
    return run(logits, bias, routing)


def choose_experts_reference(
    logits: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`choose_experts` in PyTorch."""
    scores = logits.float().sigmoid() if routing.sigmoid else logits.softmax(-1, dtype=torch.float32)
    compared = scores if bias is None else scores + bias
    if routing.groups > 1:
        grouped = compared.view(len(logits), routing.groups, -1)
        best = grouped.topk(2, -1).values.sum(-1).topk(routing.top_groups, -1).indices
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, True)
        compared = torch.where(kept.unsqueeze(2), grouped, float("-inf")).flatten(1)
    index = compared.topk(routing.k, -1).indices
    weights = scores.gather(1, index)
    if routing.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return (weights * routing.scale).to(routing.dtype), index


def choose_experts_triton(
    logits: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`choose_experts` in Triton, a program a row."""
    (rows, experts), k = logits.shape, routing.k
    weights = torch.empty((rows, k), dtype=routing.dtype, device=logits.device)
    index = torch.empty((rows, k), dtype=torch.int64, device=logits.device)
    if rows:
        size = experts // routing.groups
        block_g, block_s = next_power_of_2(routing.groups), next_power_of_2(size)
        _choose_kernel[(rows,)](
            logits,
            bias,
            weights,
            index,
            routing.scale,
            groups=routing.groups,
            size=size,
            k=k,
            sigmoid=routing.sigmoid,
            top_groups=routing.top_groups,
            normalise=routing.normalise,
            block_g=block_g,
            block_s=block_s,
            block_k=next_power_of_2(k),
            num_warps=min(max(block_g * block_s // 128, 1), 4),
            **launch_options(logits.device),
        )
    return weights, index


@jit(do_not_specialize=["scale"])
def _choose_kernel(  # type: ignore[no-untyped-def]
    logits,
    bias,
    weights,
    index,
    scale,
    groups: constexpr,
    size: constexpr,
    k: constexpr,
    sigmoid: constexpr,
    top_groups: constexpr,
    normalise: constexpr,
    block_g: constexpr,
    block_s: constexpr,
    block_k: constexpr,
    early: constexpr,
):
    """Choose for one row, of scores ``[groups, size]``."""
    overlap(early)
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, block_g)
    member = tl.arange(0, block_s)
    expert = group[:, None] * size + member[None, :]
    inside = (group < groups)[:, None] & (member < size)[None, :]
    values = tl.load(logits + row * (groups * size) + expert, mask=inside, other=float("-inf")).to(tl.float32)
    if sigmoid:
        scores = 1.0 / (1.0 + tl.exp(-values))
    else:
        scores = tl.exp(values - tl.max(tl.max(values, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    compared = scores
    if bias is not None:
        compared += tl.load(bias + expert, mask=inside, other=0.0)
    compared = tl.where(inside, compared, float("-inf"))
    if groups > 1:
        best = tl.argmax(compared, 1)
        others = tl.where(member[None, :] == best[:, None], float("-inf"), compared)
        sums = tl.max(compared, 1) + tl.max(others, 1)
        kept = tl.zeros([block_g], tl.int32)
        for _ in tl.static_range(top_groups):
            top = group == tl.argmax(sums, 0)
            kept = tl.where(top, 1, kept)
            sums = tl.where(top, float("-inf"), sums)
        compared = tl.where((kept != 0)[:, None], compared, float("-inf"))
    place = tl.arange(0, block_k)
    chosen = tl.zeros([block_k], tl.float32)
    experts = tl.zeros([block_k], tl.int32)
    for turn in tl.static_range(k):
        of_group = tl.max(compared, 1)
        number = tl.sum(tl.where(group == tl.argmax(of_group, 0), group * size + tl.argmax(compared, 1), 0), 0)
        here = expert == number
        chosen = tl.where(place == turn, tl.sum(tl.sum(tl.where(here, scores, 0.0), 1), 0), chosen)
        experts = tl.where(place == turn, number, experts)
        compared = tl.where(here, float("-inf"), compared)
    if normalise:
        chosen = chosen / tl.sum(chosen, 0)
    tl.store(weights + row * k + place, (chosen * scale).to(weights.dtype.element_ty), mask=place < k)
    tl.store(index + row * k + place, experts.to(tl.int64), mask=place < k)
