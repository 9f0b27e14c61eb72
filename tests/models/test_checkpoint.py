"""A model's files: no code of theirs is run unasked, no pickle is opened, and what cannot be loaded says why."""

import json
import pickle
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from typer.testing import CliRunner

from graphmode import LLM
from graphmode.cli import app
from graphmode.errors import ModelError
from graphmode.models.checkpoint import find_checkpoint
from graphmode.models.hf.versions import AutoImageProcessor
from graphmode.models.loader import load_model, read_model

pytestmark = pytest.mark.versions

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}


def load(folder: Path | str, **options: Any) -> Any:
    return load_model(read_model(folder, device=CPU, dtype="auto", **options))


def change(file: Path, **settings: Any) -> None:
    """Write settings into a JSON file, which need not exist; None takes one out."""
    known = json.loads(file.read_text()) if file.exists() else {}
    known |= settings
    file.write_text(json.dumps({name: value for name, value in known.items() if value is not None}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with a tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(Qwen3Config(**SMALL), dtype=torch.float32).save_pretrained(folder)
    words = WordLevel({f"w{at}": at for at in range(50)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0").save_pretrained(folder)
    return folder


# -- Python code that comes with a model


@pytest.fixture
def marker(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What code beside the model would leave behind, were it run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    left = tmp_path / "the-code-ran"
    (folder / "code.py").write_text(
        f"open({str(left)!r}, 'w').close()\n"
        "from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnModel(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    return left


OWN_MODEL = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}


def test_code_of_a_model_is_refused_by_the_flag_that_allows_it_and_runs_with_it(folder: Path, marker: Path) -> None:
    change(folder / "config.json", model_type="own", auto_map=OWN_MODEL)
    with pytest.raises(ModelError, match=r"config\.json needs Python code .*trust_remote_code=True \(--trust-remote"):
        load(folder)
    assert not marker.exists()
    loaded = load(folder, trust_remote_code=True)
    assert marker.exists()
    assert type(loaded.model).__name__ == "OwnModel"


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("config.json", {"auto_map": OWN_MODEL}, None),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "code.OwnModel"}, "model_type": "vit"}, "--trust-remote"),
        ("config.json", {"auto_map": {"AutoConfig": "someone/else--code.OwnConfig"}, "model_type": "own"}, "--trust-r"),
        ("config.json", {"auto_map": OWN_MODEL, "model_type": None}, "--trust-remote-code"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "code.OwnTokenizer"]}}, None),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["code.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"},
            None,
        ),
    ],
    ids=["known type", "model", "elsewhere", "no type", "tokenizer", "unknown tokenizer"],
)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_no_file_makes_code_run(
    folder: Path, marker: Path, file: str, settings: dict[str, Any], words: str | None, load_format: str
) -> None:
    change(folder / file, **settings)
    if words is None:
        assert type(load(folder, load_format=load_format).model).__module__.startswith("transformers.")
    else:
        with pytest.raises(ModelError, match=words):
            load(folder, load_format=load_format)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("auto", "file"),
    [
        (AutoConfig, "config.json"),
        (AutoTokenizer, "tokenizer_config.json"),
        (AutoImageProcessor, "preprocessor_config.json"),
        (AutoProcessor, "processor_config.json"),
    ],
)
def test_no_processor_makes_code_run(folder: Path, marker: Path, auto: Any, file: str) -> None:
    (folder / "tokenizer.json").unlink()
    reference = "code.OwnModel"
    auto_map = {auto.__name__: [reference, reference] if auto is AutoTokenizer else reference}
    change(folder / "config.json", model_type="own", auto_map={})
    change(folder / file, auto_map=auto_map)
    with pytest.raises(ModelError, match=r"--trust-remote-code|a slow tokenizer|requires the Torchvision"):
        find_checkpoint(folder).read(auto, "it")
    assert not marker.exists()


def test_code_that_generates_is_not_run(folder: Path, marker: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "code.py").rename(folder / "custom_generate" / "generate.py")
    load(folder)
    assert not marker.exists()


def test_the_command_line_asks_nothing(folder: Path, marker: Path) -> None:
    change(folder / "config.json", model_type="own", auto_map=OWN_MODEL)
    done = CliRunner().invoke(app, ["generate", "--model", str(folder), "--prompt", "w1"], input="y\n")
    assert done.exit_code == 1
    assert "--trust-remote-code" in done.output
    assert "Traceback" not in done.output
    assert not marker.exists(), "the answer to every question is yes here"


# -- pickles


class _Marks:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self._marker,)


_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


@pytest.fixture
def pickles(tmp_path: Path, folder: Path) -> Iterator[Path]:
    """A pickle under every name that one may have, each of which would leave a mark; none may be opened."""
    global _opened
    if _opened is None:
        sys.addaudithook(_note)  # for the life of the process
    mark = tmp_path / "the-pickle-ran"
    kinds = ("bin", "pt", "pth", "ckpt", "pkl")
    names = [f"{stem}.{kind}" for stem in ("pytorch_model", "model", "vocab", "adapter_model") for kind in kinds]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(_Marks(mark)))
    _opened = []
    yield folder
    opened, _opened = _opened, None
    assert not mark.exists()
    assert not [file for file in opened if Path(file).name in names]


def test_pickles_beside_the_weights_are_not_opened(pickles: Path) -> None:
    change(pickles / "pytorch_model.bin.index.json", weight_map={"lm_head.weight": "pytorch_model.bin"})
    expected = load_file(pickles / "model.safetensors")["model.norm.weight"]
    assert torch.equal(load(pickles).model.model.norm.weight, expected)


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        (None, {}, r"only .*pytorch_model\.bin.*never opened"),
        ("pytorch_model.bin.index.json", {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}, "never opened"),
        ("model.safetensors.index.json", {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}, "can run code"),
        ("model.safetensors.index.json", {"weight_map": {"lm_head.weight": "../x.safetensors"}}, "can run code"),
        ("config.json", {"transformers_weights": "adapter_model.bin"}, "transformers_weights is 'adapter_model.bin'"),
        ("config.json", {"transformers_weights": "pytorch_model.bin"}, "transformers_weights is 'pytorch_model.bin'"),
        ("config.json", {"transformers_weights": ["pytorch_model.bin"]}, "transformers_weights is"),
        ("adapter_config.json", {"base_model_name_or_path": "some/model"}, "adapter .* of some/model"),
    ],
)
def test_pickles_alone_are_refused(pickles: Path, file: str | None, settings: dict[str, Any], words: str) -> None:
    (pickles / "model.safetensors").unlink()
    if file:
        change(pickles / file, **settings)
    with pytest.raises(ModelError, match=words):
        load(pickles)


def test_a_pickle_under_the_name_of_safetensors_is_damaged(pickles: Path) -> None:
    (pickles / "pytorch_model.bin").rename(pickles / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: the weights are damaged"):
        load(pickles)


@pytest.mark.parametrize("tokenizer_class", ["TransfoXLTokenizer", "RagTokenizer"])
def test_tokenizers_that_read_pickles_do_not(pickles: Path, tokenizer_class: str) -> None:
    (pickles / "tokenizer.json").unlink()
    change(pickles / "tokenizer_config.json", tokenizer_class=tokenizer_class, pretrained_vocab_file="vocab.pkl")
    with suppress(ModelError):
        load(pickles)


# -- faults of files, each in its own words


def test_weights_of_other_shapes_are_named_with_both_shapes(folder: Path) -> None:
    change(folder / "config.json", intermediate_size=48)
    with pytest.raises(ModelError, match=r"mlp\.down_proj\.weight is \[32, 32\] in them and \[32, 48\] in the model"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_hidden_layers": 2, "layer_types": None}, r"they lack model\.layers\.1\..*more of the kind"),
        ({"num_hidden_layers": 0, "layer_types": []}, r"the model has no model\.layers\.0\."),
        ({"attention_bias": True}, r"they lack model\.layers\.0\.self_attn\.k_proj\.bias"),
    ],
)
def test_weights_of_another_model_are_refused(folder: Path, settings: dict[str, Any], words: str) -> None:
    change(folder / "config.json", **settings)
    with pytest.raises(ModelError, match=words):
        load(folder)


def test_weights_that_the_model_would_leave_out_are_refused_and_those_of_another_task_are_not(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "v_head.weight": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    load(folder)
    assert "1 weights are not used: v_head.weight" in caplog.text
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file({**weights, **bias}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"the model has no model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_nan_are_named(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"the weights hold NaN, in {name}"):
        load(folder)


def test_weights_too_large_for_their_dtype_are_told(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load(folder)
    with pytest.raises(ModelError, match="beyond the range of float16; use dtype='bfloat16' or 'float32'"):
        load_model(read_model(folder, device=CPU, dtype=torch.float16))


@pytest.mark.parametrize("size", [0, 5, 400, 10_000])
def test_weights_that_are_cut_short_are_told(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"model\.safetensors: the weights are damaged or cut short.*download"):
        load(folder)


def test_shards_that_are_missing_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"model-00001.*neither model\.safetensors nor .*download the index"):
        load(folder)
    index = {"lm_head.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    change(folder / "model.safetensors.index.json", weight_map=index)
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors"):
        load(folder)
    change(folder / "model.safetensors.index.json", weight_map=[1])
    with pytest.raises(ModelError, match="has no weight_map"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[1, 2]", "holds a list, not an object"),
        ("7", "holds a int, not an object"),
        ("{}", "has no model_type"),
        ('{"model_type": 5}', "has no model_type"),
        ('{"model_type": "llama", "architectures": 5}', "architectures is 5; it must be a list of names"),
        ('{"model_type": "llama", "architectures": [7]}', r"architectures is \[7\]"),
        ('{"model_type": "nonesuch"}', "nonesuch"),
        ('{"model_type": "qwen3", "hidden_size": "large"}', r"config\.json cannot be loaded"),
    ],
)
def test_a_bad_config_is_told(folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        load(folder)


@pytest.mark.parametrize("text", ["{not json", "", "[]", "{}", '{"model": {"type": "none"}}', "\udcff\udcfe"])
def test_a_damaged_tokenizer_is_told(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        _ = read_model(folder, device=CPU, dtype="auto").tokenizer


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/place",
        "./model",
        "~/no-such-model",
        "some/deep/folder",
        "folder/",
        "model.gguf",
        "a b",
        "~none/m",
        "a/" * 3000,
        "x\0y",
        "..\\m",
    ],
)
def test_what_is_plainly_a_path_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphmode.models.checkpoint.snapshot_download", lambda *args, **kwargs: pytest.fail(name))
    with pytest.raises(ModelError, match="there is no such folder or file"):
        find_checkpoint(name)


def test_a_name_of_the_hub_is_fetched_without_pickles_or_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if name == "no/model":
            raise OSError("no connection")
        return str(folder)

    monkeypatch.setattr("graphmode.models.checkpoint.snapshot_download", fetch)
    assert find_checkpoint("some/model").folder == folder
    assert not [pattern for pattern in asked[0] if pattern.endswith((".py", ".bin", ".pt"))]
    assert "*.safetensors" in asked[0]
    find_checkpoint("some/model", load_format="dummy", trust_remote_code=True)
    assert "*.py" in asked[1]
    assert "*.safetensors" not in asked[1]
    with pytest.raises(ModelError, match=r"no/model: there is no such folder here, and the hub .* no connection"):
        find_checkpoint("no/model")


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="the name of the model is empty"):
        find_checkpoint(name)


def test_folders_that_hold_no_model_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is an empty folder"):
        load(tmp_path)
    (tmp_path / "model.q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"give the file itself: .*model\.q4\.gguf"):
        load(tmp_path)


def test_a_path_may_begin_with_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_checkpoint("~/model").folder == folder


def test_faults_reach_the_user_of_llm_as_they_are(folder: Path) -> None:
    change(folder / "config.json", intermediate_size=48)
    with pytest.raises(ModelError, match="are not those that"):
        LLM(folder, device="cpu", enforce_eager=True)
