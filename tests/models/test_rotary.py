"""Rotary embeddings that follow the length are fixed for an engine: no sequence depends on another's length."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graphmode import LLM, SamplingParams
from graphmode.errors import InputError, ModelError
from graphmode.models.hf.rotary import context_length

pytestmark = pytest.mark.versions

BEFORE = 16  # tokens that the models were made for before their extension to 64
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [1.0, 3.0, 7.0, 20.0]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": SHORT,
    "long_factor": LONG,
}
PROMPTS = [[(7 * at + 3 * length) % 199 + 1 for at in range(length)] for length in (2, 3, 40)]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def save(folder: Path, model_type: str, rope: dict[str, Any], *, original: int | None = BEFORE, **options: Any) -> Path:
    torch.manual_seed(0)
    if original is not None:
        options["original_max_position_embeddings"] = original
    config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=200,
        max_position_embeddings=64,
        initializer_range=0.3,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **options,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def theirs(folder: Path, prompts: list[list[int]], **rope: Any) -> list[list[int]]:
    """transformers' own tokens, each prompt alone, with other rotary parameters if given."""
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {**config.rope_parameters, **rope}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    results = []
    for prompt in prompts:
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(GREEDY.max_tokens):
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        results.append(tokens[len(prompt) :])
    return results


def ours(folder: Path, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    llm = LLM(folder, device="cpu", dtype="float32", max_num_seqs=4, max_num_batched_tokens=64, strict=True, **options)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY)
    assert llm.stats.hit_rate == 1.0
    return [output.outputs[0].token_ids for output in outputs]


def test_longrope_takes_the_long_factors_for_all_where_sequences_may_be_long(tmp_path: Path) -> None:
    folder = save(tmp_path, "phi3", LONGROPE)
    together = ours(folder, PROMPTS)
    assert together == [ours(folder, [prompt])[0] for prompt in PROMPTS]
    assert together == theirs(folder, PROMPTS, short_factor=LONG)
    assert together != theirs(folder, PROMPTS, long_factor=SHORT)


def test_longrope_takes_the_short_factors_for_all_where_no_sequence_is_long(tmp_path: Path) -> None:
    folder = save(tmp_path, "phi3", LONGROPE)
    assert ours(folder, PROMPTS[:2], max_model_len=BEFORE) == theirs(folder, PROMPTS[:2])


def test_dynamic_ntk_is_captured(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    assert ours(folder, PROMPTS) == theirs(folder, PROMPTS)


THETA = {"rope_theta": 1e4}
YARN, LINEAR, DYNAMIC = ({"rope_type": kind, "factor": 4.0} for kind in ("yarn", "linear", "dynamic"))
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "positions", "length"),
    [
        ({"rope_type": "default"}, 32, (32, 32)),
        (YARN, 32, (128, 128)),
        ({**YARN, "original_max_position_embeddings": 32}, 32, (128, 128)),
        ({**YARN, "original_max_position_embeddings": 32}, 128, (128, 128)),  # DeepSeek, gpt-oss
        ({**YARN, "original_max_position_embeddings": 32}, 40, (128, 128)),  # Qwen3
        ({**YARN, "factor": 2.5}, 32, (80, 80)),
        (LINEAR, 32, (128, 128)),
        ({**LINEAR, "original_max_position_embeddings": 8}, 32, (32, 32)),
        (DYNAMIC, 32, (32, 128)),
        ({**DYNAMIC, "original_max_position_embeddings": 8}, 32, (32, 32)),
        ({**LLAMA3, "original_max_position_embeddings": 32}, 128, (128, 128)),
        ({**LLAMA3, "original_max_position_embeddings": 32}, 32, (32, 32)),
        ({**LONGROPE, "original_max_position_embeddings": 32}, 128, (128, 128)),
    ],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_the_length_of_a_model_is_its_original_one_times_the_factor(
    tmp_path: Path, rope: dict[str, Any], positions: int, length: tuple[int, int], key: str
) -> None:
    settings = {"model_type": "llama", "max_position_embeddings": positions, key: {**rope, **THETA}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert context_length(AutoConfig.from_pretrained(tmp_path)) == length


@pytest.mark.parametrize(("rope", "positions"), [(THETA, -5), (THETA, 0), ({**LINEAR, "factor": -4.0, **THETA}, 32)])
def test_a_length_that_is_none_is_refused(rope: dict[str, Any], positions: int) -> None:
    config = AutoConfig.for_model("llama", max_position_embeddings=positions, rope_parameters=dict(rope))
    with pytest.raises(ModelError, match=f"max_position_embeddings={positions} .* must be positive"):
        context_length(config)


def test_where_layers_differ_the_shortest_counts() -> None:
    ropes = {"sliding_attention": {"rope_type": "default"}, "full_attention": LINEAR}
    rope = {name: {**each, **THETA} for name, each in ropes.items()}
    config = AutoConfig.for_model("gemma3_text", max_position_embeddings=64, rope_parameters=rope)
    assert context_length(config) == (64, 64)


@pytest.mark.parametrize("rope", [YARN, LINEAR, {**LLAMA3, "original_max_position_embeddings": 16}])
def test_sequences_longer_than_the_original_length_get_the_tokens_of_transformers(
    tmp_path: Path, rope: dict[str, Any]
) -> None:
    folder = save(tmp_path, "llama", {**rope, **THETA}, original=None)
    prompts = [*PROMPTS, [(5 * at) % 199 + 1 for at in range(54 if rope["rope_type"] == "llama3" else 100)]]
    assert ours(folder, prompts) == theirs(folder, prompts)


def test_dynamic_ntk_beyond_its_length_takes_the_frequencies_of_the_longest_sequence(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama", {**DYNAMIC, **THETA})
    prompts = [*PROMPTS, [(5 * at) % 199 + 1 for at in range(100)]]
    theta = 1e4 * (4 * 128 / 64 - 3) ** (8 / (8 - 2))
    assert ours(folder, prompts, max_model_len=128) == theirs(folder, prompts, rope_type="default", rope_theta=theta)
    with pytest.raises(InputError, match="max_model_len is 257; the model was made for 256 tokens"):
        LLM(folder, device="cpu", max_model_len=257)


def test_an_embedding_that_cannot_be_fixed_is_refused(tmp_path: Path) -> None:
    rope = {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.3, "original_max_position_embeddings": BEFORE}
    folder = save(tmp_path, "phimoe", rope, num_local_experts=2)
    with pytest.raises(ModelError, match="PhimoeRotaryEmbedding rotates a token by the length of other sequences"):
        LLM(folder, device="cpu")


def test_a_configuration_without_a_length_is_refused() -> None:
    with pytest.raises(ModelError, match="vit model has no max_position_embeddings"):
        context_length(AutoConfig.for_model("vit"))
