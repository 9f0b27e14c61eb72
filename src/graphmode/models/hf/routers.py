"""Routers of experts that are recognised, by what they choose, compute in two kernels."""

from __future__ import annotations

import inspect
import logging
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from graphmode.layers.linear import Linear
from graphmode.layers.moe import Router
from graphmode.ops import Routing

log = logging.getLogger(__name__)

_CHECK_TOKENS = 64
_BIAS = "e_score_correction_bias"


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


def _fused_router(module: Any, dtype: torch.dtype) -> Router | None:
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
            fused = Router(Linear(own.weight.data), getattr(own, _BIAS, None), routing, in_float32)
            if _alike(results, fused(x)):
                bias = None if bias is None else bias.data
                return Router(Linear(weight), bias, replace(routing, dtype=weights_dtype), in_float32)
    return None


def _alike(results: Any, others: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> bool:
    """Return whether routers gave the same logits and weights, in whatever order they name experts."""
    shapes = [getattr(each, "shape", None) for each in results] if isinstance(results, tuple) else []
    if shapes != [each.shape for each in others]:
        return False
    own, fused = (torch.zeros_like(logits).scatter(1, index, weights) for logits, weights, index in (results, others))
    return torch.allclose(results[0], others[0], atol=1e-5) and torch.allclose(own, fused, atol=1e-5)
