"""A model that would give wrong tokens is refused for what it does."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DiffLlamaConfig,
    DogeConfig,
    GemmaConfig,
    GPT2Config,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MoshiConfig,
    NemotronConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from graphmode.cache.specs import CacheShape
from graphmode.errors import ModelError
from graphmode.models.hf.attention import ATTENTION_NAME
from graphmode.models.hf.dry_run import cache_shapes, check_class
from graphmode.models.hf.experts import EXPERTS_NAME, share_real_rows

pytestmark = pytest.mark.versions

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def make(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=ATTENTION_NAME, experts_implementation=EXPERTS_NAME
    )
    share_real_rows(model)
    return model.eval()


def check(config: PretrainedConfig) -> tuple[CacheShape, ...]:
    check_class(AutoModelForCausalLM._model_mapping[type(config)], config)
    return cache_shapes(make(config))


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (Qwen3Config(**SMALL), (CacheShape(2, 8, 8),) * 2),
        (GemmaConfig(**{**SMALL, "head_dim": 24}), (CacheShape(2, 24, 24),) * 2),
        (GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=64), (CacheShape(4, 8, 8),) * 3),
        (MistralConfig(**SMALL, sliding_window=8), (CacheShape(2, 8, 8, window=8),) * 2),
        (PhimoeConfig(**SMALL, num_local_experts=2, sliding_window=8), (CacheShape(2, 8, 8, window=8),) * 2),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_shapes_are_what_attention_gets(config: PretrainedConfig, shapes: tuple[CacheShape, ...]) -> None:
    model = make(config)
    assert cache_shapes(model) == shapes
    assert model.config._attn_implementation == ATTENTION_NAME


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50), "keeps a state beside keys and values"),
        (Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), "1 of its 2 layers keep a state"),
        (BertConfig(**{**SMALL, "head_dim": None}), "not causal"),
        (DiffLlamaConfig(**SMALL), "not once each"),
        (DogeConfig(**SMALL), "a mask of its own"),
        # Its model hands keyword arguments on in newer versions of transformers only.
        (
            MoshiConfig(**{**SMALL, "num_codebooks": 2}, sliding_window=8),
            "do not agree on how far a token sees|keyword arguments",
        ),
        (Llama4TextConfig(**SMALL, attention_chunk_size=8, num_local_experts=2), "chunked_attention"),
        (NemotronConfig(**SMALL), "keyword arguments"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_would_be_wrong_is_refused(config: PretrainedConfig, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        check(config)


def mix_tokens(model: PreTrainedModel) -> None:
    """A short convolution over tokens, as hybrid models have."""
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + output.roll(1, dims=1))


def look_ahead(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + output.roll(-1, dims=1))


def number_tokens(model: PreTrainedModel) -> None:
    """Rotary positions of the model's own."""

    def positions(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> object:
        return args, {**kwargs, "position_ids": torch.arange(3).unsqueeze(0)}

    model.model.rotary_emb.register_forward_pre_hook(positions, with_kwargs=True)


def limit_by_mask(model: PreTrainedModel) -> None:
    """A window that only the mask has, and the configuration of the attention does not."""
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": torch.full((1, 1, 3, 3), 8)}), with_kwargs=True
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (mix_tokens, "mixes tokens outside of attention"),
        (look_ahead, "mixes tokens outside of attention"),
        (number_tokens, "numbers positions by itself"),
        (limit_by_mask, "a mask of its own"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_changed_to_be_wrong_is_refused(
    change: Callable[[PreTrainedModel], None], words: str, dtype: torch.dtype
) -> None:
    model = make(LlamaConfig(**SMALL))
    change(model)
    with pytest.raises(ModelError, match=words):
        cache_shapes(model.to(dtype))  # type: ignore[arg-type]
