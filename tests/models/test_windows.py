"""Sliding windows end to end: blocks behind them are given back, and tokens stay those that transformers generates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graphmode import LLM, SamplingParams
from graphmode.cache.allocate import needed_bytes
from graphmode.engine.core import EngineCore
from graphmode.engine.memory import buffers_needed
from tests.models.test_families import ALL_EXPERTS, SMALL, assert_greedy, logits_behind

pytestmark = pytest.mark.versions

WINDOW = 24  # no multiple of a block
LAYERS = {"num_hidden_layers": 4, "max_position_embeddings": 256}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "like Gemma 3": (
        "gemma3_text",
        {"head_dim": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "query_pre_attn_scalar": 8},
    ),
    "like gpt-oss": (
        "gpt_oss",
        {
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **ALL_EXPERTS,
            "num_local_experts": 4,
        },
    ),
    "like Mistral": ("mistral", {}),
}
NEW_TOKENS = 40
SHARED = [(11 * at) % 199 + 1 for at in range(130)]
PROMPTS = [[*SHARED, 7, 9], [*SHARED, 8], SHARED[:100], [(5 * at) % 197 + 1 for at in range(150)], [3], SHARED[:17]]


@pytest.mark.parametrize("model", MODELS)
def test_tokens_beyond_several_windows_are_those_of_transformers(tmp_path: Path, model: str) -> None:
    """With and without shared prefixes, in chunks and bursts, in a cache so small that sequences are preempted."""
    torch.manual_seed(0)
    model_type, options = MODELS[model]
    config = AutoConfig.for_model(model_type, **{**SMALL, **LAYERS, "sliding_window": WINDOW, **options})
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("sinks"):  # initialised near nothing
                parameter.normal_()
    theirs.save_pretrained(tmp_path)
    given = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 256}
    steps = {"decode_steps": 4, "strict": True, "graph_sizes": [32]}  # few graphs: captures take the most time
    eager = LLM(tmp_path, enforce_eager=True, **given)
    groups = eager.engine.core.cache_groups
    assert [group.window for group in groups] == [WINDOW] + [None] * (model != "like Mistral")
    small = int(1.5 * needed_bytes(groups, 200, 32, 4))
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    expected = [output.outputs[0].token_ids for output in eager.generate(prompts, params)]
    assert len({token for tokens in expected for token in tokens}) > 10, "the largest logits say little here"
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert_greedy(tokens, logits_behind(theirs, prompt, tokens), NEW_TOKENS)
    for caching in (True, False):
        for memory in (None, small):
            options = {**given, **steps, "enable_prefix_caching": caching, "kv_cache_memory": memory}
            llm = LLM(tmp_path, **{**options, "max_model_len": 200})
            for again in (False, True):
                outputs = llm.generate(prompts, params)
                assert [output.outputs[0].token_ids for output in outputs] == expected
                assert any(output.num_cached_tokens > 0 for output in outputs) or not (caching and again)
                assert caching or not any(output.num_cached_tokens for output in outputs)
            assert (llm.stats.preemptions > 0) == (memory is not None)
            assert llm.engine.core.scheduler.blocks.num_free == llm.engine.core.num_blocks


def test_a_sequence_holds_what_its_windows_need(tmp_path: Path) -> None:
    """The cache of an engine follows from the same numbers, and what a layer may read is what it was asked for."""
    model_type, options = MODELS["like Gemma 3"]
    config = AutoConfig.for_model(model_type, **{**SMALL, **LAYERS, "sliding_window": WINDOW, **options})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    llm = LLM(
        tmp_path, device="cpu", max_num_seqs=2, max_num_batched_tokens=16, max_model_len=256, kv_cache_memory=100_000
    )
    engine: EngineCore = llm.engine.core
    assert sum(cache.keys.nbytes + cache.values.nbytes for cache in engine.caches) <= 100_000
    assert [cache.window for cache in engine.caches] == [WINDOW] * 3 + [None]
    assert [len(cache.keys) for cache in engine.caches] == [engine.num_blocks[cache.group] for cache in engine.caches]
    tables = engine.runner.tables
    counted = buffers_needed(engine.limits, block_sizes=[16, 16]).device["block tables"]
    assert tables.tables.nbytes + tables.step_tables.nbytes == counted
    most = [0, 0]
    for output in llm.stream({"prompt_token_ids": [1] * 200}, SamplingParams(temperature=0, max_tokens=50)):
        assert output is not None
        free = engine.scheduler.blocks.num_free
        most = [max(held, total - left) for held, total, left in zip(most, engine.num_blocks, free, strict=True)]
    assert most[0] <= 3 + 1, "blocks behind the window are kept"
    assert most[1] == 16
