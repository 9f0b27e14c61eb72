"""Layers are compiled only where that changes nothing, before any capture, and a program serves all layers alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_unflatten
from transformers import AutoConfig, AutoModelForCausalLM

from graphmode import LLM, SamplingParams
from graphmode.cache.specs import LayerCache
from graphmode.errors import StaleAddressError
from graphmode.models.hf import compiled
from graphmode.models.hf.attention import ATTENTION_NAME
from graphmode.models.hf.compiled import CompiledLayer, compile_layers
from tests.models.test_families import FAMILIES, PROMPTS, SMALL

pytestmark = pytest.mark.versions

GREEDY = SamplingParams(temperature=0, max_tokens=12)
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "max_model_len": 64,
    "strict": True,
}
needs_compiler = pytest.mark.skipif(which("g++") is None, reason="Inductor needs a C++ compiler (g++) on a CPU")


# A value that crosses attention; biases; latents; windows in layers of a kind of their own.
CUT = ("cohere", "starcoder2", "minicpm3", "cohere2")


def save(family: str, folder: Path) -> Path:
    model_type, options = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **options})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run as they were traced: what is cut and where is the same, and the compiler's time is saved."""
    monkeypatch.setattr(torch, "compile", lambda module: module)
    monkeypatch.setattr(compiled, "_programs", [])
    monkeypatch.setattr(compiled, "_places", {})


@needs_compiler
def test_compiled_layers_give_the_same_tokens_in_every_mode(tmp_path: Path) -> None:
    folder = save("gemma3", tmp_path)
    expected = tokens(LLM(folder, fuse="none", graph_mode="none", **OPTIONS))
    compiled_before, programs = counters["stats"]["unique_graphs"], len(compiled._programs)
    for mode in ("none", "full", "piecewise"):
        llm = LLM(folder, fuse="compile", graph_mode=mode, **OPTIONS)
        assert llm.engine.core.compiled_layers == 2
        assert tokens(llm) == expected
        assert llm.stats.hit_rate == (mode != "none")
    # One half up to attention and one from there on, for one token and for any number; nothing later, for any size.
    assert len(compiled._programs) - programs == 2
    assert counters["stats"]["unique_graphs"] - compiled_before == 4


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gemma3", *CUT])
def test_compiled_layers_are_captured_on_a_gpu(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path)
    options = {**OPTIONS, "device": "cuda"}
    expected = tokens(LLM(folder, fuse="none", graph_mode="none", **options))
    for mode in ("full", "piecewise"):
        llm = LLM(folder, fuse="compile", graph_mode=mode, graph_sizes=[1, 4, 24], **options)
        assert llm.engine.core.compiled_layers == 2
        compiled_before = counters["stats"]["unique_graphs"]
        assert tokens(llm) == expected
        assert llm.stats.hit_rate == 1
        assert counters["stats"]["unique_graphs"] == compiled_before


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", CUT)
def test_layers_are_cut_at_attention(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path)
    llm = LLM(folder, fuse="compile", graph_sizes=[1, 24], **OPTIONS)
    assert llm.engine.core.compiled_layers == 2
    assert tokens(llm) == tokens(LLM(folder, fuse="none", graph_mode="none", **OPTIONS))


@pytest.mark.usefixtures("uncompiled")
def test_padding_reaches_no_token_by_experts(tmp_path: Path) -> None:
    """In bfloat16: torch cannot trace the grouped product of float32."""
    llm = LLM(save("gpt_oss", tmp_path), fuse="compile", graph_mode="none", **{**OPTIONS, "dtype": "bfloat16"})
    engine = llm.engine.core
    assert engine.compiled_layers == 2
    results = []
    with torch.inference_mode():
        for value in (0.0, torch.nan):
            for layer, [call] in compiled._calls(engine.loaded.model, engine.caches, 8).items():
                call.batch.slot_mapping[0][6:] = -1
                args, kwargs = tree_unflatten(call.leaves, call.spec)
                args[0][:, 6:] = value
                results.append(layer(*args, **kwargs)[:, :6])
    assert torch.equal(torch.stack(results[:2]), torch.stack(results[2:]))


@pytest.mark.usefixtures("uncompiled")
def test_the_runner_sees_the_memory_of_weights(tmp_path: Path) -> None:
    llm = LLM(save("olmo2", tmp_path), fuse="compile", graph_sizes=[1, 24], **OPTIONS)
    norm = llm.engine.core.loaded.model.model.layers[1].post_attention_layernorm.weight
    norm.data = norm.data.clone()
    with pytest.raises(StaleAddressError, match="compiled"):
        tokens(llm)


def model_and_caches() -> tuple[Any, list[LayerCache]]:
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmo2", **SMALL)
    options = {"dtype": torch.float32, "attn_implementation": ATTENTION_NAME}
    model = AutoModelForCausalLM.from_config(config, **options).eval().requires_grad_(False)
    caches = [LayerCache(torch.zeros(4, 16, 2, 8), torch.zeros(4, 16, 2, 8)) for _ in range(2)]
    return model, caches


def replace_mlp(layer: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: change(own(x))


def attend_twice(layer: Any) -> None:
    own = layer.self_attn.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        own(*args, **kwargs)
        return own(*args, **kwargs)

    layer.self_attn.forward = forward


def branch_on_the_number_of_tokens(layer: Any) -> None:
    replace_mlp(layer, lambda x: x if x.shape[1] > 30 else 2 * x)


def read_other_memory(layer: Any) -> None:
    scale = torch.full((32,), 2.0)
    replace_mlp(layer, lambda x: x * scale)


def change_what_is_given(layer: Any) -> None:
    own = layer.forward

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return own(hidden_states.mul_(2), **kwargs)

    layer.forward = forward


def read_a_value(layer: Any) -> None:
    replace_mlp(layer, lambda x: x if bool(x.sum() > 0) else -x)


def differ_by_call(layer: Any) -> None:
    calls: list[int] = []

    def change(x: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return x.roll(len(calls), -1)

    replace_mlp(layer, change)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (attend_twice, "it calls attention 2 times"),
        (branch_on_the_number_of_tokens, "its code depends on the number of tokens"),
        (read_other_memory, "neither weights nor arguments"),
        (change_what_is_given, "it changes what it is given"),
        (read_a_value, "data-dependent"),
        (differ_by_call, "other results"),
    ],
)
def test_what_cannot_be_compiled_keeps_its_code_and_says_why(
    change: Callable[[Any], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, caches = model_and_caches()
    first, second = model.model.layers
    change(second)
    own = second.forward
    assert compile_layers(model, caches, 64) == 1
    assert isinstance(first.forward, CompiledLayer)
    assert second.forward == own
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert reason in record.getMessage()
    assert record.getMessage().startswith("1 layers are not compiled")


def test_a_compiler_that_fails_is_asked_once_and_leaves_layers_as_they_are(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def fail(*inputs: object) -> None:
        attempts.append(inputs)
        raise RuntimeError("no compiler is found")

    monkeypatch.setattr(torch, "compile", lambda module: fail)
    model, caches = model_and_caches()
    assert compile_layers(model, caches, 64) == 0
    assert len(attempts) == 1
    assert "2 layers are not compiled: RuntimeError: no compiler is found" in caplog.text


@pytest.mark.usefixtures("uncompiled")
def test_a_call_of_another_kind_takes_the_layer_s_own_code() -> None:
    model, caches = model_and_caches()
    layer = model.model.layers[0]
    assert compile_layers(model, caches, 64) == 2
    with torch.inference_mode():
        [call] = compiled._calls(model, caches, 5)[layer]
        args, kwargs = tree_unflatten(call.leaves, call.spec)
        assert torch.equal(layer(*args, **kwargs), call.output)
        layer.mlp.forward = torch.zeros_like
        assert torch.equal(layer(*args, **kwargs), call.output)
        assert not torch.equal(layer(*args, **kwargs, output_attentions=False), call.output)
