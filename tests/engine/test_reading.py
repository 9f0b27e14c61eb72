"""Prompts become tokens, and tokens text, without a model's weights."""

import shutil
from pathlib import Path

import pytest
import torch

from graphmode import LLM, SamplingParams
from graphmode.engine.config import EngineOptions
from graphmode.engine.reading import load_text
from graphmode.errors import InputError, ModelError
from tests.multimodal import make_prompt, save_model


def without_weights(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


def test_requests_are_those_of_the_llm(bundled: Path, tmp_path: Path) -> None:
    options = {"device": "cpu", "enforce_eager": True, "max_model_len": 32, "max_num_seqs": 2}
    llm = LLM(bundled, **options)
    text = load_text(without_weights(bundled, tmp_path / "copy"), EngineOptions(**options))
    assert text.vocab_size == llm.engine.core.loaded.shape.vocab_size
    assert text.eos_token_ids == llm.engine.core.loaded.shape.eos_token_ids
    assert text.default_sampling_params(max_tokens=7) == llm.get_default_sampling_params(max_tokens=7)
    params = SamplingParams(temperature=0, max_tokens=4, truncate_prompt_tokens=5)
    request = text.request("JULIET.\nO Romeo", params, 32, request_id="mine", stream=False, priority=3)
    (output,) = llm.generate("JULIET.\nO Romeo", params)
    assert (request.prompt_token_ids, request.prompt) == (output.prompt_token_ids, output.prompt)
    assert (request.request_id, request.stream, request.priority) == ("mine", False, 3)
    whole = text.request({"prompt_token_ids": range(100)}, SamplingParams(truncate_prompt_tokens=-1), 32)
    assert list(whole.prompt_token_ids) == list(range(69, 100))


def test_what_needs_no_engine_is_refused(tiny: Path, tmp_path: Path) -> None:
    text = load_text(without_weights(tiny, tmp_path / "copy"), EngineOptions(device="cpu"))
    assert text.tokenizer is None
    for prompt, params, words in (
        ("a", SamplingParams(), "without a tokenizer"),
        ({"prompt_token_ids": [1]}, SamplingParams(stop="a"), "stop texts cannot be found"),
        ({"prompt_token_ids": [1], "multi_modal_data": {"image": [object()]}}, SamplingParams(), "takes text alone"),
    ):
        with pytest.raises(InputError, match=words):
            text.request(prompt, params, 32)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="there is no such folder"):
        load_text(tmp_path / "none", EngineOptions(device="cpu"))


def test_images_are_read_without_the_tower(tmp_path: Path) -> None:
    save_model("qwen2_5_vl", tmp_path / "model")
    text = load_text(without_weights(tmp_path / "model", tmp_path / "copy"), EngineOptions(device="cpu", dtype="bf16"))
    prompt = make_prompt("qwen2_5_vl", [3, ("image", [1, 4, 6]), 2], 0)
    request = text.request(prompt, SamplingParams(), 64)  # type: ignore[arg-type]
    assert text.takes_images
    assert request.vision is not None
    (span,) = request.vision.spans
    assert span.item.pixels.dtype == torch.bfloat16
    assert request.vision.positions.shape == (len(request.prompt_token_ids), 3)
