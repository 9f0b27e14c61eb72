"""Layers are fused only where that changes nothing: what they have, give, and ask of attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from graphmode.models.attention import ATTENTION_NAME
from graphmode.models.fused import fuse

CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    options = {"dtype": torch.float32, "attn_implementation": ATTENTION_NAME}
    return AutoModelForCausalLM.from_config(Qwen3Config(**CONFIG), **options).eval().requires_grad_(False)


def test_recognised_layers_are_fused_over_views_of_merged_weights(model: Any) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert fuse(model, 64) == 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    attention = model.model.layers[1].self_attn
    storages = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(storages) == 1


def add_one_to_the_weight(model: Any) -> None:
    norm = model.model.norm
    norm.forward = lambda x: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon) * (1 + norm.weight)
    )


def cap_scores(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, softcap=1e4, **kwargs)


def narrow_the_window(model: Any) -> None:
    """A window that five tokens do not feel, passed to attention and not said by the module."""
    attention = model.model.layers[0].self_attn
    own = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        said, attention.sliding_window = attention.sliding_window, 40
        try:
            return own(*args, **kwargs)
        finally:
            attention.sliding_window = said

    attention.forward = forward


def scale_the_residual(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) * 0.5


@pytest.mark.parametrize("change", [add_one_to_the_weight, cap_scores, narrow_the_window, scale_the_residual])
def test_what_gives_or_asks_something_else_is_left_as_it_is(model: Any, change: Any, tmp_path: Path) -> None:
    change(model)
    assert fuse(model, 64) == 0
    assert "forward" not in vars(model.model.layers[0])
    assert "forward" not in vars(model.lm_head)
