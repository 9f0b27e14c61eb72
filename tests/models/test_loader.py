"""Models that cannot be read or run are refused in words; the bundled one is what it should be."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen3Config,
    ViTConfig,
)

from graphmode import LLM, SamplingParams, bundled_model
from graphmode.errors import ModelError
from graphmode.models.loader import load_model, read_model
from tests.models.test_checkpoint import CPU, SMALL

pytestmark = pytest.mark.versions


def load(folder: Path | str, **options: str) -> object:
    return load_model(read_model(folder, device=CPU, dtype="auto", **options))  # type: ignore[arg-type]


def test_the_bundled_model_is_small_and_recognisable() -> None:
    folder = bundled_model()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 16 << 20
    loaded = load_model(read_model(folder, device=CPU, dtype="auto"))
    assert 4e6 < sum(parameter.numel() for parameter in loaded.model.parameters()) < 8e6
    assert loaded.model.dtype == torch.float32
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    text = (
        LLM(folder, device="cpu", enforce_eager=True)
        .generate(
            "HAMLET.\nTo be, or not to be",
            SamplingParams(temperature=0.8, seed=0, max_tokens=200, ignore_eos=True),
        )[0]
        .outputs[0]
        .text
    )
    speakers = [line for line in text.splitlines() if line.isupper() and line.endswith(".")]
    assert len(speakers) >= 2, text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "config.json is missing"),
        ({"config.json": "{not json"}, "not valid JSON"),
        ({"config.json": '{"model_type": "qwen3"}'}, r"no \*\.safetensors"),
        ({"config.json": '{"model_type": "nonesuch"}', "model.safetensors": ""}, "nonesuch"),
        ({"config.json": json.dumps({"model_type": "qwen3", **SMALL}), "model.safetensors": "broken"}, "the weights"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_in_words(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=words) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_path_that_is_not_there_or_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        load(tmp_path / "model.safetensors")


def test_weights_that_do_not_match_the_configuration_are_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(Qwen3Config(**SMALL)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ModelError, match="the weights"):
        load(tmp_path)


def test_weights_that_are_missing_are_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(Qwen3Config(**SMALL)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model\.layers\.1"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlavaConfig(), "llava: it is a model of images and text"),
        (LlavaConfig(architectures=["LlavaForConditionalGeneration"]), "LlavaForConditionalGeneration: it is a model"),
        (ViTConfig(), "vit: transformers has no causal language model"),
    ],
    ids=["images and text", "its class is named", "no language model"],
)
def test_a_type_that_is_no_causal_language_model_is_refused_before_its_weights(
    tmp_path: Path, config: PreTrainedConfig, words: str
) -> None:
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("never read")
    with pytest.raises(ModelError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            Gemma3TextConfig(**SMALL, use_bidirectional_attention=True, architectures=["Gemma3ForCausalLM"]),
            "its attention is not causal",
        ),
        (
            Llama4TextConfig(**SMALL, num_local_experts=2, architectures=["Llama4ForCausalLM"]),
            "chunked_attention",
        ),
    ],
    ids=["sees later tokens", "sees its chunk only"],
)
def test_attention_that_the_kernel_does_not_do_is_refused_at_start(
    tmp_path: Path, config: PreTrainedConfig, words: str, enforce_eager: bool
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words):
        LLM(tmp_path, device="cpu", load_format="dummy", enforce_eager=enforce_eager)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("rwkv", "graphmode cannot run rwkv: it keeps a state beside keys and values"),
        ("bloom", "graphmode cannot run bloom: it does not call transformers' attention interface"),
    ],
)
def test_a_model_that_cannot_be_paged_is_refused_before_its_weights_are_read(
    tmp_path: Path, model_type: str, words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "model.safetensors").write_text("never read")
    with pytest.raises(ModelError, match=words):
        load(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Tied weights in many files."""
    config = Qwen3Config(**{**SMALL, "num_hidden_layers": 6, "vocab_size": 500}, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    return tmp_path


def test_weights_come_from_all_shards_and_tied_ones_stay_one(sharded: Path, device: str) -> None:
    expected = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    loaded = load_model(read_model(sharded, device=torch.device(device), dtype=torch.float32))
    names = dict(loaded.model.named_parameters())
    assert names.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert names[name].device.type == device
        assert torch.equal(names[name].cpu(), parameter)
    model = loaded.model
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.gpu
def test_loading_takes_the_memory_of_the_weights_and_at_most_a_shard(sharded: Path) -> None:
    config = AutoConfig.from_pretrained(sharded)
    config.hidden_size, config.vocab_size = 1024, 50_000
    folder = sharded / "larger"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="30MB")
    shards = [file.stat().st_size for file in folder.glob("*.safetensors")]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = load_model(read_model(folder, device=torch.device("cuda", 0), dtype=torch.float32))
    assert torch.cuda.max_memory_allocated() - before <= sum(shards) + max(shards)
    assert loaded.model.device.type == "cuda"
