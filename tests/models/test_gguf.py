"""GGUF files load like a folder, dequantized; broken ones say so."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from graphmode import LLM, SamplingParams
from graphmode.errors import ModelError
from graphmode.models.loader import load_model, read_model

gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.versions

HIDDEN, LAYERS, HEADS, KV_HEADS, FF = 64, 2, 4, 2, 96
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "Ġt", "he", "Ġthe"]
MERGES = ["Ġ t", "h e", "Ġt he"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>"


@pytest.fixture(scope="module", params=["F32", "Q4_1"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    quantization = gguf.GGMLQuantizationType[request.param]
    path = tmp_path_factory.mktemp("gguf") / f"tiny.{request.param}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(WORDS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    kv = HIDDEN * KV_HEADS // HEADS
    tensors = {"token_embd.weight": (len(WORDS), HIDDEN)}
    for layer in range(LAYERS):
        shapes = {"q": (HIDDEN, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "output": (HIDDEN, HIDDEN)}
        tensors |= {f"blk.{layer}.attn_{name}.weight": shape for name, shape in shapes.items()}
        shapes = {"gate": (FF, HIDDEN), "up": (FF, HIDDEN), "down": (HIDDEN, FF)}
        tensors |= {f"blk.{layer}.ffn_{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in tensors.items():
        values = random.normal(scale=0.2, size=shape).astype(np.float32)
        data = gguf.quants.quantize(values, quantization)
        writer.add_tensor(name, data, raw_dtype=quantization)
    for name in ("output_norm", *(f"blk.{layer}.{part}_norm" for layer in range(LAYERS) for part in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(file: Path) -> object:
    return load_model(read_model(file, device=torch.device("cpu"), dtype="auto"))


def test_its_tokens_are_those_of_transformers_and_its_tokenizer_is_whole(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "graphmode"):
        llm = LLM(str(file), device="cpu", max_num_seqs=2, max_num_batched_tokens=32, strict=True)
    assert "dequantized to float32" in caplog.text
    tokenizer = llm.get_tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (*WORDS[1:3], WORDS[0])
    assert llm.engine.core.loaded.shape.eos_token_ids == {2}
    assert llm.engine.core.loaded.shape.max_positions == 128
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "in the hat"}], tokenize=False)
    assert prompt == "<|im_start|>in the hat<|im_end|><|im_start|>"
    (ours,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12))
    assert ours.prompt_token_ids[0] == 1
    assert ours.prompt_token_ids.count(WORDS.index("Ġthe")) == 1
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    inputs = torch.tensor([ours.prompt_token_ids])
    tokens = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, do_sample=False)
    assert ours.outputs[0].token_ids == tokens[0, inputs.shape[1] :].tolist()


@pytest.mark.parametrize("share", [0, 0.001, 0.05, 0.3, 0.9])
def test_a_file_that_is_cut_short_is_told(file: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(ModelError, match=r"cut\.gguf.*(damaged|download it again)"):
        load(cut)


@pytest.mark.parametrize(
    "content", [b"", b"not a gguf file at all", b"GGUF", b"GGUF" + b"\xff" * 64, b"GGUF" + b"\0" * 64]
)
def test_a_file_that_is_no_gguf_is_told(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.gguf.*(damaged|download it again)"):
        load(file)


def test_a_kind_of_model_that_transformers_does_not_know_is_told(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "nonesuch")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"other\.gguf: .*nonesuch"):
        load(tmp_path / "other.gguf")


def test_without_its_package_it_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the package gguf, which is not installed; pip install gguf"):
        load(file)


def test_nothing_beside_it_is_read(file: Path, tmp_path: Path) -> None:
    """A GGUF file is all of its model: what lies in its folder belongs to others."""
    shutil.copy(file, tmp_path / "tiny.gguf")
    (tmp_path / "config.json").write_text("{not json")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.Own", null]}}')
    loaded = load(tmp_path / "tiny.gguf")
    assert loaded.shape.eos_token_ids == {2}  # type: ignore[attr-defined]
    assert not loaded.files.generation  # type: ignore[attr-defined]
