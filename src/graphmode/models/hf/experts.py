"""The experts hook: transformers' mixture-of-experts layers call it, and padding tokens cost them nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from graphmode.errors import ModelError
from graphmode.layers.moe import grouped_product, routed_experts
from graphmode.models.hf.versions import post_expert_norm
from graphmode.ops._triton import runs_triton

EXPERTS_NAME = "graphmode"


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
    compute = partial(compute_experts, module)
    return routed_experts(compute, module.num_experts, hidden_states, top_k_index, top_k_weights, real)


def compute_experts(module: Any, rows: torch.Tensor, ends: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Compute the experts of any module of transformers; arguments and result as of :func:`routed_experts`."""
    own = experts.clamp(max=module.num_experts - 1) if module.has_bias else None

    def project(rows: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(module, name)
        result = grouped_product(rows, weight if module.is_transposed else weight.transpose(1, 2), ends)
        return result if own is None else result + getattr(module, f"{name}_bias")[own]

    if module.has_gate:
        rows = module._apply_gate(project(rows, "gate_up_proj"))
    else:
        rows = module.act_fn(project(rows, "up_proj"))
    rows = project(rows, "down_proj")
    norm = post_expert_norm(module)
    return rows if norm is None else norm(rows)


ExpertsInterface.register(EXPERTS_NAME, experts_hook)
