"""Tiny models with random weights, one of every type of language model that transformers has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

from graphmode.models.hf.auto import auto_class

CAUSAL_TYPES: Mapping[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_TYPES: Mapping[str, str] = {
    model_type: architecture
    for model_type, architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    if model_type not in CAUSAL_TYPES
}
MODEL_TYPES: Mapping[str, str] = {**CAUSAL_TYPES, **IMAGE_TYPES}
# Sizes that every configuration gets for those of its fields that have these names.
SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "index_topk": 8,
    "vocab_size_per_layer_input": 131,
    "hidden_size_per_layer_input": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Of models of images and text.
    "image_token_id": 3,
    "video_token_id": 4,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
    "depth": 2,
    "embed_dim": 64,
    "num_heads": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 36,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
}
FIRST_TEXT_TOKEN = 8  # those before are special
# Shorter than the prompts, where a type has a window at all.
_WINDOW = 8
# What a type, or a part of it, needs beyond that, or instead; None leaves a field as it is by default.
_OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
    },
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "falcon": {"head_dim": None},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gpt_neo": {"attention_types": [[["global"], 4]]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}

_MAX_PARAMETERS = 100_000_000


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return a configuration of a model small enough to try."""
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    parts = {name: getattr(default, name, None) for name in default.sub_configs}
    sizes: dict[str, Any] = {
        name: _sizes(part, part.model_type) for name, part in parts.items() if isinstance(part, PretrainedConfig)
    }
    sizes |= _sizes(default, model_type)
    if hasattr(AutoModel._model_mapping.get(cls, None), "get_rope_index"):
        sizes["text_config"] |= _grid_rope(default.get_text_config())
    return cls(**sizes)


def _grid_rope(text: PretrainedConfig) -> dict[str, Any]:
    """Return how many pairs of a tiny head's elements turn by each coordinate of a position."""
    rope = text.rope_parameters
    pairs = int(SIZES["head_dim"] * rope.get("partial_rotary_factor", 1)) // 2
    first = 3 * pairs // 8  # and the second, which for Ernie 4.5 are height and width and must be alike
    return {"rope_parameters": {**rope, "mrope_section": [first, first, pairs - 2 * first]}} if rope else {}


def _sizes(default: PretrainedConfig, model_type: str) -> dict[str, Any]:
    sizes = {name: value for name, value in SIZES.items() if _has(default, name)}
    if hasattr(default, "qk_rope_head_dim"):  # latent attention: other names for a head's size, and no shared heads
        sizes |= {"head_dim": None, "num_key_value_heads": sizes.get("num_attention_heads")}
    if getattr(default, "sliding_window", None):
        sizes["sliding_window"] = _WINDOW
    sizes |= _OVERRIDES.get(model_type, {})
    return {name: value for name, value in sizes.items() if value is not None}


def _has(config: PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except AmbiguousGlobalPerLayerAttributeError:
        return False


def save_tiny_model(model_type: str, folder: Path) -> None:
    """Save a tiny model with random weights, large enough that every part of it moves the tokens.

    Raises:
        ModelError: graphmode cannot run its class.
        ValueError: it would not be tiny, or could not be loaded again.
    """
    auto_class(CONFIG_MAPPING[model_type]())
    config = tiny_config(model_type)
    auto = auto_class(config)
    parts: list[Any] = [AutoModel._model_mapping.get(part, None) for part in config.sub_configs.values()]
    if TimmWrapperModel in parts:
        raise ValueError("a part of it is one of the timm library's models, of which none is tiny")
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"its smallest configuration known has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.mul_(0.1)  # else what a layer adds drowns in it, and a model just repeats its last token
    if type(model.config) not in auto._model_mapping:
        raise ValueError("its text part cannot be loaded by itself")
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
