"""Multi-head latent attention: what is cached of a token is the latent that its keys and values are expanded from.

DeepSeek-V2 (https://arxiv.org/abs/2405.04434, section 2.1) expands the keys and values of all heads from one small
latent by the matrix ``kv_b_proj``; beside what is expanded, a key has a rotated part that all heads share. A score is
then ``q . (W_key c) + q_rotated . k_rotated``, which is ``(W_key^T q) . c + ...``: with the matrix absorbed into the
queries, attention runs over the latents themselves, as one key/value head whose keys are latent and rotated part and
whose values are the latent, and its results are expanded once.

The projections, norms and rotary embeddings before that are the model's own. Where the latent is, transformers'
``expand_kv`` of the module shows: if it is proven to compute the above, a function that expands nothing replaces it.
"""

from __future__ import annotations

from typing import Any

import torch

_STRUCTURE = ("expand_kv", "kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def keep_latents(model: torch.nn.Module) -> None:
    """Let every module of latent attention hand its latents to the attention hook, instead of keys and values.

    A module with another expansion stays as it is: its keys and values are cached as they come.
    """
    for module in model.modules():
        if all(hasattr(module, name) for name in _STRUCTURE) and _expands_by_kv_b_proj(module):
            module.expand_kv = _keep  # type: ignore[assignment]


def keeps_latents(module: Any) -> bool:
    """Return whether the module's keys are rotated parts and its values latents: ``[1, 1, tokens, dim]`` each."""
    return vars(module).get("expand_kv") is _keep


def absorb_keys(module: Any, query: torch.Tensor) -> torch.Tensor:
    """Return queries of latents.

    Args:
        module: one that keeps latents.
        query: ``[heads, tokens, nope_dim + rope_dim]``.

    Returns:
        ``[heads, tokens, rank + rope_dim]``.
    """
    plain, rotated = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    by_key, _ = _halves(module)
    return torch.cat([torch.bmm(plain, by_key), rotated], dim=-1)


def expand_values(module: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return sums of latents, ``[tokens, heads, rank]``, as sums of values, ``[tokens, heads, value_dim]``."""
    _, by_value = _halves(module)
    return torch.bmm(latents.transpose(0, 1), by_value.transpose(1, 2)).transpose(0, 1)


def expand(module: Any, rotated: torch.Tensor, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values that the model itself makes of these, ``[1, heads, tokens, dim]`` each."""
    expanded: tuple[torch.Tensor, torch.Tensor] = type(module).expand_kv(module, latent, rotated)
    return expanded


def _keep(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace ``expand_kv``: what follows gets these as keys and values."""
    return rotated, latent


def _halves(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrices of keys and of values, ``[heads, nope_dim, rank]`` and ``[heads, value_dim, rank]``.

    They are views of the one weight, made at each call, so that the weight may be moved.
    """
    sizes = [module.qk_nope_head_dim, module.v_head_dim]
    weight: torch.Tensor = module.kv_b_proj.weight
    by_key, by_value = weight.view(-1, sum(sizes), weight.shape[1]).split(sizes, dim=1)
    return by_key, by_value


@torch.no_grad()
def _expands_by_kv_b_proj(module: Any) -> bool:
    """Return whether the module's own expansion is that by ``kv_b_proj``, tried on a few random latents."""
    if not isinstance(module.kv_b_proj, torch.nn.Linear):
        return False
    linear: Any = module.kv_b_proj
    rank, rope = module.kv_lora_rank, module.qk_rope_head_dim
    if linear.bias is not None or linear.in_features != rank or not rope:
        return False
    if linear.out_features % (module.qk_nope_head_dim + module.v_head_dim):
        return False
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(1, 1, 5, rank + rope, generator=generator).to(linear.weight.device, linear.weight.dtype)
    latent, rotated = both.split([rank, rope], dim=-1)
    key, value = expand(module, rotated, latent)
    by_key, by_value = _halves(module)
    plain = latent[0] @ by_key.transpose(1, 2)
    expected = (torch.cat([plain, rotated[0].expand(len(plain), -1, -1)], dim=-1), latent[0] @ by_value.transpose(1, 2))
    tolerance = 1e-4 if linear.weight.dtype == torch.float32 else 2e-2
    return all(
        mine.shape == theirs[0].shape and bool((mine - theirs[0]).float().norm() <= tolerance * mine.float().norm())
        for mine, theirs in zip(expected, (key, value), strict=True)
    )
