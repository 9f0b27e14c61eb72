"""Latent caches and sparse attention: what is cached, what is recognised, and that memory pressure changes no token."""

from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graphmode import LLM, SamplingParams
from graphmode.cache.specs import CacheShape
from graphmode.errors import ModelError
from graphmode.models.hf.attention import ATTENTION_NAME
from graphmode.models.hf.dry_run import cache_shapes
from graphmode.models.hf.latent import keep_latents
from graphmode.models.hf.sparse import use_indexers
from tests.models.test_families import LATENT, NEW_TOKENS, PROMPTS, SMALL, SPARSE, assert_greedy, logits_behind

pytestmark = pytest.mark.versions

RANK, ROPE = LATENT["kv_lora_rank"], LATENT["qk_rope_head_dim"]
LATENT_CACHE = CacheShape(1, RANK + ROPE, RANK, values_in_keys=True)
OPTIONS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 24, "max_model_len": 64}


def make(model_type: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **options})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION_NAME).eval()


def shapes(model: PreTrainedModel) -> tuple[CacheShape, ...]:
    keep_latents(model)
    use_indexers(model)
    return cache_shapes(model)


def test_a_layer_of_latents_caches_these_and_the_rotated_part() -> None:
    assert shapes(make("deepseek_v2", **LATENT)) == (LATENT_CACHE,) * 2
    assert LATENT_CACHE.elements == RANK + ROPE


def test_a_sparse_layer_also_caches_the_key_of_its_indexer() -> None:
    model = make("glm_moe_dsa", **{**SPARSE, "indexer_types": ["full", "shared"]})
    with_indexer = CacheShape(1, RANK + ROPE, RANK, values_in_keys=True, index_dim=SPARSE["index_head_dim"])
    assert shapes(model) == (with_indexer, LATENT_CACHE)


def test_layers_may_cache_different_sizes() -> None:
    options = {"head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
    assert shapes(make("gemma4_text", **options)) == (CacheShape(2, 8, 8, window=512), CacheShape(2, 16, 16))


def test_no_weight_is_kept_twice() -> None:
    model = make("deepseek_v3", **LATENT)
    before = {tensor.data_ptr() for tensor in model.state_dict().values()}
    shapes(model)
    assert {tensor.data_ptr() for tensor in model.state_dict().values()} == before
    attention = model.model.layers[0].self_attn
    assert not [value for value in vars(attention).values() if isinstance(value, torch.Tensor)]


def save(folder: Path, model_type: str, options: dict[str, Any]) -> None:
    make(model_type, **options).save_pretrained(folder)


@pytest.mark.parametrize(
    ("model_type", "options", "elements"),
    [
        ("deepseek_v3", LATENT, RANK + ROPE),
        ("deepseek_v32", SPARSE, RANK + ROPE + SPARSE["index_head_dim"]),
    ],
)
def test_memory_pressure_changes_no_token(
    tmp_path: Path, model_type: str, options: dict[str, Any], elements: int
) -> None:
    """The cache has the bytes of latents and no more; chunks, preemption and shared prefixes give the same tokens."""
    save(tmp_path, model_type, options)
    prompts = [*PROMPTS, PROMPTS[-1], PROMPTS[-1][:25]]
    answers = []
    block = 2 * 16 * elements * 4
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    for mode in ("none", "full", "piecewise"):
        llm = LLM(tmp_path, kv_cache_memory=6 * block, graph_mode=mode, strict=True, **OPTIONS)
        [group] = llm.engine.core.cache_groups
        assert (group.kind, group.block_bytes) == ("latent", block)
        held = {
            part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
            for cache in llm.engine.core.caches
            for part in (cache.keys, cache.values, cache.index_keys)
            if part is not None
        }
        assert sum(held.values()) == 6 * block
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        answers.append([output.outputs[0].token_ids for output in outputs])
        assert llm.stats.preemptions > 0
    assert answers[0] == answers[1] == answers[2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    for prompt, tokens in zip(prompts, answers[0], strict=True):
        assert_greedy(tokens, logits_behind(model, prompt, tokens), NEW_TOKENS)


def test_picking_every_key_is_attention_to_all(tmp_path: Path) -> None:
    """With as many picks as there are tokens, a sparse model and the same weights without indexers agree."""
    save(tmp_path / "sparse", "deepseek_v32", {**SPARSE, "index_topk": 64})
    sparse = LLM(tmp_path / "sparse", **OPTIONS)
    dense_model = make("deepseek_v3", **LATENT)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32).state_dict()
    missing, _ = dense_model.load_state_dict(weights, strict=False)
    assert not missing
    dense_model.save_pretrained(tmp_path / "dense")
    dense = LLM(tmp_path / "dense", **OPTIONS)
    params = SamplingParams(temperature=0, max_tokens=12)
    requests: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    tokens = [[each.outputs[0].token_ids for each in llm.generate(requests, params)] for llm in (sparse, dense)]
    assert tokens[0] == tokens[1]


def test_an_expansion_of_another_kind_is_cached_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("deepseek_v3", **LATENT)
    cls = type(model.model.layers[0].self_attn)
    theirs = cls.expand_kv

    def doubled(module: torch.nn.Module, latent: torch.Tensor, rotated: torch.Tensor) -> Any:
        key, value = theirs(module, latent, rotated)
        return key, 2 * value

    monkeypatch.setattr(cls, "expand_kv", doubled)
    heads, key_dim = SMALL["num_attention_heads"], LATENT["qk_nope_head_dim"] + ROPE
    assert shapes(model) == (CacheShape(heads, key_dim, LATENT["v_head_dim"]),) * 2


def other_names(theirs: Any) -> Any:
    """An indexer's forward whose parameters have other names; one is gone, and the cache is given by keyword alone."""

    def forward(self: Any, x: Any, latent: Any, angles: Any, bias: Any, *, store: Any = None) -> Any:
        return theirs(self, x, latent, angles, bias, None, store)

    return forward


def other_scores(theirs: Any) -> Any:
    """An indexer's forward that ranks the other way round."""

    @wraps(theirs)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return theirs(*args, **kwargs).flip(-1)

    return forward


def change_indexers(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    cls = type(model.model.layers[0].self_attn.indexer)
    monkeypatch.setattr(cls, "forward", change(cls.forward))


def test_an_indexer_is_known_by_what_it_does_whatever_its_parameters_are_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("deepseek_v32", **SPARSE)
    change_indexers(model, monkeypatch, other_names)
    keep_latents(model)
    use_indexers(model)
    indexer = model.model.layers[0].self_attn.indexer
    tokens = 3
    angles = torch.ones(1, tokens, ROPE)
    inputs = [torch.randn(1, tokens, size) for size in (indexer.wk.in_features, indexer.wq_b.in_features)]
    batch = Mock()
    batch.select.return_value = torch.zeros(tokens, 1, dtype=torch.int32)
    indexer(inputs[0], latent=inputs[1], angles=(angles, angles), bias=batch, store=None)
    assert batch.select.call_args.args[1].shape == (tokens, indexer.n_heads, indexer.head_dim)


@pytest.mark.parametrize("change", [other_scores, lambda theirs: lambda self, hidden_states: None])
def test_an_indexer_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    model = make("deepseek_v32", **SPARSE)
    change_indexers(model, monkeypatch, change)
    with pytest.raises(ModelError, match="picks keys in a way of its own"):
        shapes(model)


def test_sparse_attention_that_nothing_picks_for_is_refused() -> None:
    model = make("deepseek_v3", **LATENT)
    model.config.layer_types = ["indexed_attention"] * 2
    with pytest.raises(ModelError, match="nothing picks its keys"):
        shapes(model)
