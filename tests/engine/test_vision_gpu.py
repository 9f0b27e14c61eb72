"""Qwen2.5-VL and Qwen3-VL at their true widths with few layers, random weights in bf16 on the GPU."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PretrainedConfig

from graphmode import LLM, SamplingParams
from tests.engine.test_vision import first_logits, tokens
from tests.multimodal import generate_greedily

pytestmark = pytest.mark.gpu

IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
TEXT = {"num_hidden_layers": 6, "vocab_size": 151936, "num_key_value_heads": 8, "max_position_embeddings": 32768}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_attention_heads": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        {"depth": 6, "fullatt_block_indexes": [2, 5], "out_hidden_size": 2048},
    ),
    "qwen3_vl": (
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6},
        },
        {"depth": 6, "deepstack_visual_indexes": [1, 3, 4], "out_hidden_size": 2560},
    ),
}
GRIDS = [[1, 16, 24], [1, 36, 52], [1, 34, 20]]


def make_config(model_type: str) -> PretrainedConfig:
    text, vision = CONFIGS[model_type]
    return CONFIG_MAPPING[model_type](text_config={**TEXT, **text}, vision_config=vision, **IDS, dtype="bfloat16")


def make_prompts(config: PretrainedConfig) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    vision = config.vision_config
    patch_size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    prompts = []
    for grid in GRIDS:
        patches = grid[1] * grid[2]
        text = torch.randint(0, 150000, (40,), generator=generator).tolist()
        prompts.append(
            {
                "prompt_token_ids": [*text[:9], 151652, *[151655] * (patches // 4), 151653, *text[9:]],
                "pixel_values": torch.randn(patches, patch_size, generator=generator),
                "image_grid_thw": torch.tensor([grid]),
            }
        )
    return prompts


@pytest.mark.parametrize("model_type", CONFIGS)
def test_images_are_as_exact_as_transformers_own_bf16_with_every_step_a_hit(tmp_path: Path, model_type: str) -> None:
    config = make_config(model_type)
    config.save_pretrained(tmp_path)
    prompts = make_prompts(config)
    torch.manual_seed(0)
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 1024, "max_model_len": 2048, "strict": True}
    llm = LLM(tmp_path, load_format="dummy", dtype="bfloat16", enable_prefix_caching=False, **options)
    state = llm.engine.core.loaded.model.state_dict()
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    logits: dict[torch.dtype, list[torch.Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForImageTextToText.from_config(deepcopy(config), attn_implementation="sdpa", dtype=dtype)
        model.load_state_dict({name: value.to(dtype) for name, value in state.items()})
        model = model.to("cuda").eval()
        logits[dtype] = [generate_greedily(model, prompt, 1)[1].float().cpu() for prompt in prompts]
        del model
    for prompt, exact, bf16 in zip(prompts, logits[torch.float32], logits[torch.bfloat16], strict=True):
        ours = first_logits(llm, prompt).float()
        errors["ours"].append(float((ours - exact).norm() / exact.norm()))
        errors["theirs"].append(float((bf16 - exact).norm() / exact.norm()))
    print(f"relative error to float32: {errors}")
    assert all(ours <= 1.5 * theirs for ours, theirs in zip(errors["ours"], errors["theirs"], strict=True))
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    first = tokens(llm.generate(prompts, params))
    llm.engine.core.runner.vision._kept.clear()  # type: ignore[union-attr]
    llm.engine.core.reset_stats()
    assert tokens(llm.generate(prompts, params)) == first
    print(llm.stats)
    assert llm.stats.hit_rate == 1.0
    assert llm.stats.vision_runs == len(prompts)
    assert llm.stats.vision_misses == {}
