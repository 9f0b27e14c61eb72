"""Tiny models with vision towers, prompts with random images for them, and what transformers makes of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

IMAGE, VIDEO, VISION_START, VISION_END, VIDEO_START, VIDEO_END = 190, 191, 192, 193, 194, 195
PATCH = 3 * 2 * 4 * 4
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 200,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
VISION = {"depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "initializer_range": 0.3}
QWEN3_TEXT = {
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4},
}
QWEN3_VISION = {
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
}
QWEN2_TEXT = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
# What text and vision configuration of each type need beyond TEXT and VISION.
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (QWEN2_TEXT, {"embed_dim": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": (
        QWEN2_TEXT,
        {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (QWEN3_TEXT, QWEN3_VISION),
    # GLM-4.5V, whose tower looks up positions by the size of the frame that a patch lies in.
    "glm4v_moe": (
        {
            **QWEN2_TEXT,
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
        {"intermediate_size": 48, "out_hidden_size": 32, "image_size": 24},
    ),
    "qwen3_vl_moe": (
        {**QWEN3_TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        QWEN3_VISION,
    ),
}

# Types that write the frames of a video as images, between two tokens of their own.
GLM = ("glm4v_moe",)

Part = int | tuple[str, list[int]]


def make_model(model_type: str) -> PreTrainedModel:
    """A model with random weights, wild enough that the largest logit means something."""
    text, vision = TYPES[model_type]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](
        text_config={**TEXT, **text},
        vision_config={**VISION, **vision},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        **({"video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END} if model_type in GLM else {}),
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def save_model(model_type: str, folder: Path) -> PreTrainedModel:
    model = make_model(model_type)
    model.save_pretrained(folder)
    return model


def save_processors(folder: Path) -> None:
    """A tokenizer of single characters, with the placeholders, and an image processor, both of Qwen2.5-VL's kind."""
    special = {
        "<|image_pad|>": IMAGE,
        "<|video_pad|>": VIDEO,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
    }
    vocabulary = {chr(code): code - 31 for code in range(32, 127)} | {"<unk>": 0} | special
    vocabulary |= {f"<{token}>": token for token in range(200) if token not in vocabulary.values()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(special))
    fast.save_pretrained(folder)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"size": {"shortest_edge": 64, "longest_edge": 1024}}
    processor = {"image_processor_type": "Qwen2VLImageProcessor", **sizes, **limits}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def make_prompt(model_type: str, parts: list[Part], seed: int) -> dict[str, Any]:
    """A prompt of random text, images and videos, prepared as the type's own processor would.

    Args:
        model_type: one of ``TYPES``.
        parts: in order: a number of text tokens, or ``("image" or "video", grid)``.
        seed: of the text and the pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = []
    pixels: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            token_ids += torch.randint(1, 180, (part,), generator=generator).tolist()
            continue
        kind, (frames, height, width) = part
        patches = frames * height * width
        pixels[kind].append(torch.randn(patches, PATCH, generator=generator))
        grids[kind].append([frames, height, width])
        if kind == "video" and model_type.startswith("qwen3"):  # every frame by itself, after its time
            for frame in range(frames):
                token_ids += [5 + frame, VISION_START, *[VIDEO] * (patches // frames // 4), VISION_END]
        elif kind == "video" and model_type in GLM:
            token_ids.append(VIDEO_START)
            for frame in range(frames):
                token_ids += [VISION_START, *[IMAGE] * (patches // frames // 4), VISION_END, 5 + frame]
            token_ids.append(VIDEO_END)
        else:
            token_ids += [VISION_START, *[IMAGE if kind == "image" else VIDEO] * (patches // 4), VISION_END]
    prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
    for kind, names in {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }.items():
        if pixels[kind]:
            prompt |= {names[0]: torch.cat(pixels[kind]), names[1]: torch.tensor(grids[kind])}
    if grids["video"] and model_type == "qwen2_5_vl":
        prompt["second_per_grid_ts"] = [2.0] * len(grids["video"])
    return prompt


def generate_greedily(
    model: PreTrainedModel, prompt: dict[str, Any], new_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """What transformers' own ``generate`` gives for a prompt alone, and the logits behind its first token."""
    given = {name: torch.as_tensor(value) for name, value in prompt.items() if name != "prompt_token_ids"}
    ids = torch.tensor([prompt["prompt_token_ids"]], device=model.device)
    image, video = ids == model.config.image_token_id, ids == model.config.video_token_id
    in_video = torch.zeros_like(image)
    if (start := getattr(model.config, "video_start_token_id", None)) is not None:
        in_video = (ids == start).cumsum(1) > (ids == model.config.video_end_token_id).cumsum(1)
    types = image.int() + 2 * video.int() + (image & in_video).int()
    model.base_model.rope_deltas = None
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=types,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **{name: value.to(model.device) for name, value in given.items()},
    )
    return made.sequences[0, ids.shape[1] :].tolist(), made.logits[0][0]
