"""Rotary embeddings that follow the length: fixed for an engine, so that no sequence hangs on another's length."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graphmode import LLM, SamplingParams
from graphmode.models.errors import ModelError

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


def save(folder: Path, model_type: str, rope: dict[str, Any], **options: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=200,
        max_position_embeddings=64,
        original_max_position_embeddings=BEFORE,
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


def test_an_embedding_that_cannot_be_fixed_is_refused(tmp_path: Path) -> None:
    rope = {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.3}
    folder = save(tmp_path, "phimoe", rope, num_local_experts=2)
    with pytest.raises(ModelError, match="PhimoeRotaryEmbedding rotates a token by the length of other sequences"):
        LLM(folder, device="cpu")
