"""Model families as transformers has them: the engine, eager and by graphs, gives what transformers gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graphmode import LLM, SamplingParams
from graphmode.engine.core import EngineCore
from graphmode.engine.sequence import Sequence
from graphmode.engine.types import Batch, ScheduledSequence
from tests import steps

pytestmark = pytest.mark.versions

WINDOW = 8
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Every token takes every expert: another choice of experts, by a rounding in bfloat16, says nothing of attention.
ALL_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
LATENT = {  # multi-head latent attention, with sizes that are no powers of two
    **ALL_EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
# Sparse, with fewer keys than most prompts have, and heads enough that no score is 0 of every head: ties are arbitrary.
SPARSE = {**LATENT, "index_topk": 7, "index_n_heads": 16, "index_head_dim": 12}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA4 = {
    **HYBRID,
    "head_dim": 8,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 200,
    "hidden_size_per_layer_input": 16,
}
# The model type and what its configuration sets beyond SMALL: all that its attention can ask for, windows that cut.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "ministral": ("ministral", {**HYBRID, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen2_moe, windows not passed": ("qwen2_moe", {**HYBRID, "use_sliding_window": True, "num_experts": 4}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {**HYBRID, "head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**HYBRID, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phimoe, windows not passed": ("phimoe", {"sliding_window": WINDOW, "num_local_experts": 4}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", HYBRID),
    "granite": ("granite", {"attention_multiplier": 0.4, "residual_multiplier": 0.8, "logits_scaling": 2.0}),
    "granite_swa": ("granite_swa", HYBRID),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "cohere": ("cohere", {"use_qk_norm": True, "logit_scale": 1.0}),
    "cohere2": ("cohere2", {**HYBRID, "logit_scale": 1.0}),
    "smollm3": ("smollm3", {**HYBRID, "use_sliding_window": True, "no_rope_layers": [1, 0]}),
    "exaone4": ("exaone4", {**HYBRID, "sliding_window_pattern": 2}),
    "glm": ("glm", {"head_dim": 8}),
    "glm4": ("glm4", {"head_dim": 8, "attention_bias": True}),
    "gemma4, layers of two sizes": ("gemma4_text", GEMMA4),
    "gemma4, layers that share keys and values": (
        "gemma4_text",
        {
            **GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
        },
    ),
    "mimo_v2_flash, keys wider than values": (
        "mimo_v2_flash",
        {**HYBRID, **ALL_EXPERTS, "head_dim": 12, "v_head_dim": 8},
    ),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "rope_parameters": {**YARN, "mscale_all_dim": 1.0}}),
    "deepseek_v3, other ways": (
        "deepseek_v3",
        {**LATENT, "q_lora_rank": None, "rope_interleave": False, "attention_bias": True},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {**LATENT, "mlp_layer_types": ["dense", "sparse"]}),
    "minicpm3": ("minicpm3", LATENT),
    "youtu": ("youtu", LATENT),
    "axk1": ("axk1", LATENT),
    "deepseek_v32": ("deepseek_v32", SPARSE),
    "glm_moe_dsa": ("glm_moe_dsa", SPARSE),
    "glm_moe_dsa, picks shared by layers": ("glm_moe_dsa", {**SPARSE, "indexer_types": ["full", "shared"]}),
    "axk2": ("axk2", SPARSE),
    "hy_v4, sparse with sinks": ("hy_v4", SPARSE),
    "gpt2": ("gpt2", {"n_inner": 48, "num_key_value_heads": None}),
    "gpt_oss": ("gpt_oss", {**HYBRID, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
PROMPTS = [[(7 * at + 3 * length) % 199 + 1 for at in range(length)] for length in (1, 5, 8, 9, 17, 30)]
NEW_TOKENS = 9


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A saved model of the family with random weights, small and wild enough that the largest logit means something."""
    model_type, options = request.param
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # initialised near nothing
                parameter.normal_()
    model.save_pretrained(tmp_path)
    return tmp_path


def logits_behind(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The logits that transformers' own model gives, with no cache, where each token of an answer comes next."""
    with torch.inference_mode():
        return model(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]


def assert_greedy(tokens: list[int], logits: torch.Tensor, count: int) -> None:
    """Each token is the most likely one behind those before it, so transformers would have chosen the same."""
    assert logits.argmax(1).tolist() == tokens
    assert len(tokens) == count


def compute_logits(engine: EngineCore, tokens: list[int], prompt_len: int) -> torch.Tensor:
    """The engine's logits for every token after the prompt: the prompt as one mixed step, the rest by decode steps."""
    sequence = Sequence("0", tokens, SamplingParams(temperature=0), 0, state_index=1)
    engine.scheduler.blocks.begin(sequence, read_prefix=False)
    engine.scheduler.blocks.extend([(sequence, len(tokens))])
    parts = [ScheduledSequence(sequence, 0, prompt_len, samples=1)]
    parts += [ScheduledSequence(sequence, at, 1, samples=1) for at in range(prompt_len, len(tokens))]
    logits = []
    for part in parts:
        family, admitted = ("decode", ()) if part.start else ("mixed", (sequence,))
        logits.append(steps.logits(engine.runner, Batch(family, (part,), part.num_tokens, admitted)))
    engine.scheduler.blocks.release(sequence)
    return torch.cat(logits)


def test_family_is_token_for_token_transformers(folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    options = {
        "device": "cpu",
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 24,
        "max_model_len": 64,
    }
    answers = []
    for graph_mode in ("none", "piecewise", "full"):
        sizes = None if graph_mode == "none" else [24]  # few graphs, of the largest steps: captures take the most time
        llm = LLM(folder, graph_mode=graph_mode, graph_sizes=sizes, strict=True, **options)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
        answers.append([output.outputs[0].token_ids for output in outputs])
        assert llm.stats.hit_rate == (graph_mode != "none")
    assert answers[0] == answers[1] == answers[2]
    assert len({token for tokens in answers[0] for token in tokens}) > 10, "the largest logits say little here"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for prompt, tokens in zip(PROMPTS, answers[0], strict=True):
        logits = logits_behind(model, prompt, tokens)
        assert_greedy(tokens, logits, NEW_TOKENS)
        ours = compute_logits(llm.engine.core, [*prompt, *tokens[:-1]], len(prompt))
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_family_on_a_gpu_is_as_exact_as_transformers_bf16(folder: Path) -> None:
    """Every step replays a graph, and logits are about as far from float32 as those of transformers in bf16 are."""
    if AutoConfig.from_pretrained(folder).model_type == "phimoe":
        pytest.skip("its rotary embedding copies from the host at every step, so on a GPU it runs eagerly")
    prompt = max(PROMPTS, key=len)
    exact, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval().cuda()
        for dtype in (torch.float32, torch.bfloat16)
    )
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "max_model_len": 64, "graph_sizes": [1, 4, 24]}
    llm = LLM(folder, device="cuda", dtype="bfloat16", strict=True, **options)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    outputs = llm.generate([{"prompt_token_ids": each} for each in PROMPTS], params)
    assert all(len(output.outputs[0].token_ids) == NEW_TOKENS for output in outputs)
    assert llm.stats.hit_rate == 1.0
    with torch.inference_mode():
        reference = exact(torch.tensor([prompt], device="cuda"), use_cache=False).logits[0, -1]
        bf16 = theirs(torch.tensor([prompt], device="cuda"), use_cache=False).logits[0, -1].float()
    ours = compute_logits(llm.engine.core, prompt, len(prompt))[-1].float()
    error, their_error = (float((logits - reference).norm() / reference.norm()) for logits in (ours, bf16))
    assert error <= 2 * their_error + 0.01, (error, their_error)
