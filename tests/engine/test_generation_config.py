"""generation_config.json: sampling parameters of requests that bring none, and end tokens beside config.json's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graphmode import LLM, SamplingParams
from graphmode.errors import InputError
from graphmode.models.loader import read_model

FILE = "generation_config.json"
ASKED = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.05,
    "max_new_tokens": 5,
    "pad_token_id": 0,
}
MEANT = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.05, max_tokens=5)


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to write into."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def write(folder: Path, text: Any, file: str = FILE) -> None:
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(text if isinstance(text, str) else json.dumps(text))


def llm(folder: Path, **options: Any) -> LLM:
    return LLM(folder, device="cpu", enforce_eager=True, **options)


def test_its_parameters_are_those_of_requests_that_bring_none(folder: Path) -> None:
    write(folder, ASKED)
    model = llm(folder)
    assert model.get_default_sampling_params() == MEANT
    prompt = {"prompt_token_ids": [5, 6, 7]}
    (asked,) = model.generate([prompt])
    assert len(asked.outputs[0].token_ids) == 5
    streamed = list(model.stream(prompt))[-1]
    assert len(streamed.outputs[0].token_ids) == 5
    assert len(model.generate(prompt, SamplingParams())[0].outputs[0].token_ids) == 16


def test_it_can_be_left_out_or_come_from_another_folder(folder: Path, tmp_path: Path) -> None:
    write(folder, ASKED)
    assert llm(folder, generation_config="vllm").get_default_sampling_params() == SamplingParams()
    write(tmp_path / "other", {"temperature": 0.3, "eos_token_id": 11})
    for other in (tmp_path / "other", str(tmp_path / "other")):
        model = llm(folder, generation_config=other)
        assert model.get_default_sampling_params() == SamplingParams(temperature=0.3)
        assert model.engine.core.loaded.shape.eos_token_ids == {11}


@pytest.mark.parametrize("value", ["", "Auto", "/no/such/folder", 5, None])
def test_a_source_that_is_none_is_refused_before_the_model_is_loaded(value: object) -> None:
    with pytest.raises(
        InputError, match=r"generation_config is .*; it must be auto, vllm or a folder with a generation"
    ):
        LLM("/no/such/model", device="cpu", generation_config=value)


@pytest.mark.parametrize(
    ("held", "meant"),
    [
        ({}, SamplingParams()),
        ({"do_sample": False, "max_new_tokens": 3}, SamplingParams(temperature=0, max_tokens=3)),
        ({"temperature": None, "top_k": None}, SamplingParams()),
        ({"temperature": 0.5}, SamplingParams(temperature=0.5)),
    ],
)
def test_what_it_does_not_say_is_as_ever(folder: Path, held: dict[str, Any], meant: SamplingParams) -> None:
    write(folder, held)
    assert llm(folder).get_default_sampling_params() == meant


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 7, "top_k": 3}, "top_p is 7"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": "many"}, "max_tokens is 'many'"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
        ({"eos_token_id": [1.5, 7]}, "eos_token_id is 1.5"),
        ({"eos_token_id": [10**9]}, "eos_token_id is 1000000000"),
        ("{not json", "is not valid JSON"),
        ("[]", "holds a list"),
    ],
)
def test_values_that_are_not_allowed_are_reported_and_left_out(
    folder: Path, held: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, held)
    model = llm(folder)
    assert words in caplog.text
    assert "left out" in caplog.text
    assert model.get_default_sampling_params().top_k == (3 if isinstance(held, dict) and held.get("top_k") == 3 else 0)
    assert model.engine.core.loaded.shape.eos_token_ids == ({7} if words == "eos_token_id is 1.5" else set())


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 5}, None, {5}),
        ({"eos_token_id": [5, 6]}, None, {5, 6}),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, {5, 7}),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 8]}, {5, 7, 8}),
        ({"eos_token_id": [5, 6]}, {}, {5, 6}),
        ({}, {"eos_token_id": [7, 8]}, {7, 8}),
        ({"eos_token_id": None}, {"eos_token_id": None}, set()),
        ({}, {}, set()),
        ({}, None, {2}),  # what Llama's class has as a default
    ],
)
def test_end_tokens_are_those_of_both_files(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, ends: set[int]
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    made = AutoConfig.for_model("llama", **sizes, vocab_size=20)
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["eos_token_id"]
    write(tmp_path, settings | config, "config.json")
    if generation is not None:
        write(tmp_path, generation)
    assert read_model(tmp_path, device=torch.device("cpu"), dtype="auto").eos_token_ids == ends


def test_each_end_token_ends_an_answer(folder: Path) -> None:
    write(folder, {"temperature": 0})
    (whole,) = llm(folder).generate([{"prompt_token_ids": [5, 6, 7]}])
    tokens = whole.outputs[0].token_ids
    first, second = tokens[2], next(token for token in tokens[4:] if token not in tokens[:4])
    write(folder, json.loads((folder / "config.json").read_text()) | {"eos_token_id": [198, first]}, "config.json")
    write(folder, {"temperature": 0, "eos_token_id": second})
    model = llm(folder)
    (ended,) = model.generate([{"prompt_token_ids": [5, 6, 7]}])
    assert ended.outputs[0].token_ids == tokens[: tokens.index(first) + 1]
    (later,) = model.generate([{"prompt_token_ids": [5, 6, 7, *tokens[:3]]}])
    assert later.outputs[0].finish_reason == "stop"
    assert later.outputs[0].token_ids[-1] == second
