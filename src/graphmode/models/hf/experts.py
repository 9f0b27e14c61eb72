"""The experts hook: transformers' mixture-of-experts layers call it, and padding tokens cost them nothing.

Experts that are SwiGLU networks go through four kernels where Triton runs (:mod:`graphmode.ops.moe.experts`). Others,
or elsewhere: pairs of a token and an expert are sorted by expert on the device and go through grouped matrix products,
whose group boundaries the kernels read at run time: every shape depends on the number of rows alone. The pairs of
padding tokens sort behind all others and belong to no group, so that where real pairs lie, and what is computed of
them, does not depend on padding.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import grouped_mm
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from graphmode.errors import ModelError
from graphmode.models.hf.versions import post_expert_norm
from graphmode.ops import Routing, choose_experts, gated_experts, skinny_linear
from graphmode.ops._triton import runs_triton
from graphmode.ops.dispatch import choose

EXPERTS_NAME = "graphmode"
_CHECK_TOKENS = 64
_BIAS = "e_score_correction_bias"

log = logging.getLogger(__name__)


# An operator, so that layers can be traced and compiled around it.
torch.library.define(
    "graphmode::gated_experts",
    "(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor real, Tensor gate_up, Tensor down) -> Tensor",
)
torch.library.impl("graphmode::gated_experts", "default", gated_experts)
torch.library.register_fake("graphmode::gated_experts", lambda x, *others: torch.empty_like(x))


class RealRows:
    """Which rows of the step that is running are tokens: one object for a model, that its expert modules share.

    Attributes:
        mask: bool ``[tokens]``, False for padding; None between steps.
    """

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None

    def enter(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the mask of a step from the slots of its batch; a hook before the model's forward."""
        self.mask = kwargs["attention_batch"].slot_mapping[0] >= 0

    def leave(self, model: torch.nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Forget the mask; a hook after the model's forward."""
        self.mask = None


def share_real_rows(model: PreTrainedModel) -> None:
    """Let the expert modules of a model know which rows are tokens, by the ``attention_batch`` it is called with."""
    # What use_experts_implementation leaves on a module, in every version of transformers that has it.
    experts = [m for m in model.modules() if hasattr(m, "is_concatenated") and hasattr(m, "_apply_gate")]
    if not experts:
        return
    rows = RealRows()
    for module in experts:
        module.real_rows = rows  # type: ignore[assignment]
        module.is_swiglu = _is_swiglu(module)  # type: ignore[assignment]
    model.register_forward_pre_hook(rows.enter, with_kwargs=True)
    model.register_forward_hook(rows.leave, always_call=True)


def _is_swiglu(module: Any) -> bool:
    """Return whether each of a module's experts is ``(silu(gate) * up) @ down.T``, of merged weights without biases."""
    if not module.has_gate or module.has_bias or module.is_transposed or post_expert_norm(module) is not None:
        return False
    if not (module.gate_up_proj.is_contiguous() and module.down_proj.is_contiguous()):
        return False
    # From near zero to past what some models clamp to, of both signs together.
    gate = torch.linspace(-10, 10, module.down_proj.shape[2]).sinh().expand(2, -1)
    up = torch.stack([gate[0], -gate[0]])
    with torch.inference_mode():
        own = module._apply_gate(torch.cat([gate, up], dim=1))
    return torch.equal(own, torch.nn.functional.silu(gate) * up)


@dataclass(frozen=True)
class FusedRouter:
    """A router in two kernels; called as the one of transformers is.

    Attributes:
        weight: ``[experts, hidden]``.
        bias: float32 ``[experts]``, or None.
        routing: how it chooses.
        in_float32: whether logits are float32, whatever the dtype of hidden states.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    routing: Routing
    in_float32: bool

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits ``[tokens, experts]``, the weights of those chosen ``[tokens, k]`` and which they are."""
        x = hidden_states.reshape(-1, self.weight.shape[1])
        if self.in_float32:
            logits = _float_product(x, self.weight)
        else:
            product = skinny_linear if choose("linear", len(x), self.weight) == "skinny" else torch.nn.functional.linear
            logits = product(x, self.weight)
        return logits, *choose_experts(logits, self.bias, self.routing)


def _float_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``x @ weight.T`` in float32."""
    if x.device.type == "cuda" and x.dtype == weight.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return torch.nn.functional.linear(x.float(), weight.float())


def fuse_routers(block: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let the routers of a block of experts that are recognised compute in fewer kernels; log those that are not.

    Args:
        block: the block.
        dtype: of the hidden states that it is given, which may not be that of a router's weight.
    """
    for module in block.modules():
        if isinstance(getattr(module, "top_k", None), int) and hasattr(module, "weight"):
            fused = _fused_router(module, dtype)
            if fused is None:
                log.info("%s is not fused: it chooses experts in another way", type(module).__name__)
            else:
                module.forward = fused


def _fused_router(module: Any, dtype: torch.dtype) -> FusedRouter | None:
    """Return a router as a fused one, if in float32, with a random bias, it gives the same of random tokens."""
    tensors = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    bias = getattr(module, _BIAS, None)
    if tensors - {_BIAS} != {"weight"} or len(inspect.signature(module.forward).parameters) != 1:
        return None
    if bias is not None and bias.dtype != torch.float32:
        return None
    weight = module.weight.data
    own = deepcopy(module).float()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_CHECK_TOKENS, weight.shape[1], generator=generator).to(weight.device)
    with torch.inference_mode():
        if bias is not None:
            getattr(own, _BIAS).copy_(torch.rand(bias.shape, generator=generator))
        try:
            results = own(x)
            logits_dtype, weights_dtype = (each.dtype for each in module(x.to(dtype))[:2])
        except Exception as error:  # it takes something else than tokens, or returns something else than tensors
            log.info("%s cannot be tried: %s: %s", type(module).__name__, type(error).__name__, error)
            return None
        in_float32 = logits_dtype != dtype
        if logits_dtype not in (dtype, torch.float32) or (weight.dtype != dtype and not in_float32):
            return None
        for sigmoid, normalise in ((False, True), (False, False), (True, True), (True, False)):
            routing = Routing(
                module.top_k,
                sigmoid=sigmoid,
                groups=getattr(module, "num_group", 1),
                top_groups=getattr(module, "topk_group", 1),
                normalise=normalise,
                scale=getattr(module, "routed_scaling_factor", 1.0),
            )
            fused = FusedRouter(own.weight.data, getattr(own, _BIAS, None), routing, in_float32)
            if _alike(results, fused(x)):
                bias = None if bias is None else bias.data
                return FusedRouter(weight, bias, replace(routing, dtype=weights_dtype), in_float32)
    return None


def _alike(results: Any, others: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> bool:
    """Return whether routers gave the same logits and weights, in whatever order they name experts."""
    shapes = [getattr(each, "shape", None) for each in results] if isinstance(results, tuple) else []
    if shapes != [each.shape for each in others]:
        return False
    own, fused = (torch.zeros_like(logits).scatter(1, index, weights) for logits, weights, index in (results, others))
    return torch.allclose(results[0], others[0], atol=1e-5) and torch.allclose(own, fused, atol=1e-5)


@contextmanager
def real_rows(module: torch.nn.Module, batch: Any) -> Iterator[None]:
    """Let the experts inside ``module`` know the rows of a batch, where it is called without its model."""
    known: list[Any] = [each.real_rows for each in module.modules() if hasattr(each, "real_rows")]
    for rows in known:
        rows.mask = batch.slot_mapping[0] >= 0
    try:
        yield
    finally:
        for rows in known:
            rows.mask = None


def experts_hook(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts as transformers' models call them.

    Args:
        module: the experts, made by ``use_experts_implementation`` and known to :func:`share_real_rows`.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: the experts of each token, integers ``[tokens, k]``; one outside ``[0, num_experts)`` is no expert.
        top_k_weights: of them, ``[tokens, k]``.

    Returns:
        The weighted sum of the experts' results, ``[tokens, hidden]`` in the dtype of ``hidden_states``; 0 for padding.

    Raises:
        ModelError: the module gets other rows than the step's tokens.
    """
    real = module.real_rows.mask
    if not isinstance(real, torch.Tensor) or real.shape != hidden_states.shape[:1]:
        raise ModelError(
            f"{type(module).__name__} gets hidden states of shape {tuple(hidden_states.shape)}, which are not the "
            "tokens of a step; graphmode cannot tell padding from tokens there"
        )
    if module.is_swiglu and runs_triton(hidden_states):
        rows = hidden_states.to(module.down_proj.dtype)
        weights = module.gate_up_proj, module.down_proj
        result: torch.Tensor = torch.ops.graphmode.gated_experts(rows, top_k_index, top_k_weights, real, *weights)
        return result.to(hidden_states.dtype)
    return routed_experts(module, hidden_states, top_k_index, top_k_weights, real)


def routed_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    real: torch.Tensor,
) -> torch.Tensor:
    """Compute a layer of experts. Arguments and result as of :func:`experts_hook`; ``real`` is bool ``[tokens]``."""
    tokens, k = top_k_index.shape
    count: int = module.num_experts
    routed = real.unsqueeze(1) & (top_k_index >= 0) & (top_k_index < count)
    experts = torch.where(routed, top_k_index, count).flatten()
    experts, order = torch.sort(experts, stable=True)
    ends = torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True, out_int32=True)
    own = experts.clamp(max=count - 1) if module.has_bias else None

    def project(rows: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(module, name)
        result = grouped_product(rows, weight if module.is_transposed else weight.transpose(1, 2), ends)
        return result if own is None else result + getattr(module, f"{name}_bias")[own]

    rows = hidden_states[order // k]
    rows = (
        module._apply_gate(project(rows, "gate_up_proj"))
        if module.has_gate
        else module.act_fn(project(rows, "up_proj"))
    )
    rows = project(rows, "down_proj")
    if (norm := post_expert_norm(module)) is not None:
        rows = norm(rows)
    pairs = torch.empty_like(rows).index_copy_(0, order, rows).view(tokens, k, -1)
    # Rows of no group hold whatever was in memory: chosen away, not multiplied by 0, which NaN would survive.
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
    # All rows times every matrix: each product that is needed among many that are not.
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


ExpertsInterface.register(EXPERTS_NAME, experts_hook)
