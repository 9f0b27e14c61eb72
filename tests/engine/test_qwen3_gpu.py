"""Qwen3-0.6B with random weights in bf16 on the GPU: as exact as transformers' own bf16, every step a hit."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from graphmode import LLM, SamplingParams
from graphmode.engine.sequence import Sequence
from graphmode.engine.types import Batch, ScheduledSequence
from tests import steps

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder: Path = tmp_path_factory.mktemp("qwen3-0.6b")
    Qwen3Config(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        rope_theta=1e6,
        eos_token_id=151645,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    return LLM(
        folder, load_format="dummy", dtype="bfloat16", max_model_len=2048, max_num_seqs=64, max_num_batched_tokens=512
    )


def test_logits_are_as_close_to_float32_as_transformers_own_bf16(llm: LLM) -> None:
    engine = llm.engine.core
    config = deepcopy(engine.loaded.model.config)
    exact = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    exact.load_state_dict({name: value.float() for name, value in engine.loaded.model.state_dict().items()})
    exact = exact.to("cuda").eval()
    theirs = AutoModelForCausalLM.from_config(exact.config, attn_implementation="sdpa", dtype=torch.bfloat16)
    theirs.load_state_dict(engine.loaded.model.state_dict())
    theirs = theirs.to("cuda").eval()
    generator = torch.Generator().manual_seed(0)
    ours_error, their_error = [], []
    for length in (5, 64, 300):
        ids = torch.randint(0, 151936, (length,), generator=generator)
        with torch.inference_mode():
            reference = exact(ids[None].cuda()).logits[0, -1]
            bf16 = theirs(ids[None].cuda()).logits[0, -1].float()
        sequence = Sequence("0", ids.tolist(), SamplingParams(temperature=0), 0, state_index=1)
        engine.scheduler.blocks.begin(sequence, read_prefix=False)
        engine.scheduler.blocks.extend([(sequence, length)])
        # All but the last token as a prompt, then the last as a decode step: both families are in the result.
        for start, count, family in ((0, length - 1, "mixed"), (length - 1, 1, "decode")):
            admitted = () if start else (sequence,)
            batch = Batch(family, (ScheduledSequence(sequence, start, count, samples=1),), count, admitted)
            logits = steps.logits(engine.runner, batch)
        engine.scheduler.blocks.release(sequence)
        ours_error.append(float((logits[0].float() - reference).norm() / reference.norm()))
        their_error.append(float((bf16 - reference).norm() / reference.norm()))
    print(f"relative error to float32: ours {ours_error}, transformers' bf16 {their_error}")
    assert all(ours <= 1.2 * theirs for ours, theirs in zip(ours_error, their_error, strict=True))


def test_64_requests_run_with_every_step_a_hit(llm: LLM) -> None:
    llm.engine.core.reset_stats()
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 400, (64,), generator=generator).tolist()
    prompts = [
        {"prompt_token_ids": torch.randint(0, 151936, (length,), generator=generator).tolist()} for length in lengths
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))
    assert all(len(output.outputs[0].token_ids) == 32 for output in outputs)
    print(llm.stats)
    assert llm.stats.hit_rate == 1.0
    assert llm.stats.replays == llm.stats.steps > 0
