"""What positions a model was made for, and rotary embeddings that follow the length, fixed for an engine."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from graphmode.errors import ModelError


def context_length(config: PretrainedConfig) -> tuple[int, int]:
    """Return how many tokens a sequence may have: as a rule, and at most where the user asks for more.

    Frequencies that are stretched by a factor (linear, YaRN, proportional) serve the original length times the factor.
    LongRoPE and Llama 3 name the stretched length as ``max_position_embeddings``. Dynamic NTK stretches them only
    beyond that length, so that up to there all tokens are what they are without it; further on, an engine has to choose
    frequencies once and for all its sequences, which is left to the user. Where the layers differ, the least counts.

    Raises:
        ModelError: the configuration names no length.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        raise ModelError(
            f"the configuration of this {config.model_type} model has no max_position_embeddings, so the length of a "
            "sequence is not known; add it to config.json if it is a language model"
        )
    ropes = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in ropes:
        ropes = {None: ropes}
    rule, most = [], []
    for rope in (each for each in ropes.values() if isinstance(each, dict)):
        kind = rope.get("rope_type")
        stretched = positions
        if kind in ("linear", "yarn", "proportional", "dynamic") and rope.get("factor"):
            stretched = int((rope.get("original_max_position_embeddings") or positions) * rope["factor"])
        rule.append(positions if kind == "dynamic" else stretched)
        most.append(max(positions, stretched) if kind == "dynamic" else stretched)
    lengths = min(rule, default=positions), min(most, default=positions)
    if min(lengths) < 1:
        raise ModelError(
            f"config.json: max_position_embeddings={positions} with rope_parameters={ropes} makes a length of "
            f"{min(lengths)} tokens; the first must be positive and a factor at least 1"
        )
    return lengths


def fix_rotary_embeddings(model: PreTrainedModel, max_model_len: int) -> None:
    """Let every rotary embedding choose its frequencies once, for sequences of ``max_model_len`` tokens.

    LongRoPE and dynamic NTK choose them by the longest position of the call. In a step of many sequences one's result
    would then depend on another's length, and keys in the cache would have other frequencies than new queries.
    So LongRoPE takes its long factors if ``max_model_len`` is beyond the length before extension, else its short ones;
    dynamic NTK takes those of ``max_model_len`` if that is beyond the length that the model was made for.

    Raises:
        ModelError: an embedding still depends on the other tokens of the call.
    """
    hidden = torch.empty(0, dtype=model.dtype, device=model.device)  # the embeddings take only dtype and device of it
    positions = torch.tensor([[1, max_model_len - 1]], device=model.device)
    module: Any
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        by_layer_type = rope_type if isinstance(rope_type, dict) else {None: rope_type}
        for layer_type, kind in by_layer_type.items():
            if not isinstance(kind, str) or not (kind == "longrope" or "dynamic" in kind):
                continue
            options = {} if layer_type is None else {"layer_type": layer_type}
            chosen = module(hidden, positions, **options)
            if isinstance(rope_type, dict):
                rope_type[layer_type] = "default"
            else:
                module.rope_type = "default"
            alone = module(hidden, positions[:, :1], **options)
            if not all(torch.allclose(a[:, :1], b, rtol=1e-2, atol=1e-3) for a, b in zip(chosen, alone, strict=True)):
                raise ModelError(
                    f"{type(module).__name__} rotates a token by the length of other sequences; lower max_model_len, "
                    f"which is {max_model_len}, to the length before its extension (original_max_position_embeddings)"
                )
