"""A model's files: where they are, and how they are read. No code among them runs unasked, no pickle is opened."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from graphmode.errors import GraphModeError, ModelError

LoadFormat = Literal["auto", "dummy"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TEXT_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, checked. All that is read from them is read by :meth:`read`.

    Attributes:
        name: as the user gave it, for messages.
        folder: where they are.
        gguf_file: the file in it that holds everything; None where transformers saved the folder.
        trust_remote_code: whether Python code among them may run.
    """

    name: str
    folder: Path
    gguf_file: str | None = None
    trust_remote_code: bool = False

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer is among the files."""
        return self.gguf_file is not None or any((self.folder / file).is_file() for file in _TOKENIZER_FILES)

    def check_weights(self) -> None:
        """Check the files of weights, before any is read.

        Raises:
            ModelError: they are missing, damaged, or not safetensors.
        """
        if self.gguf_file is None:
            _check_weights(self.name, self.folder, read_json(self.folder / "config.json"))

    def read(self, auto: Any, part: str, **options: Any) -> Any:
        """Read a part of the checkpoint.

        Args:
            auto: one of transformers' classes that have ``from_pretrained``.
            part: what it reads, for messages.
            **options: for ``from_pretrained``.

        Raises:
            ModelError: it cannot be read, or needs code that may not run.
        """
        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        if not self.trust_remote_code:  # trusted code may lie in another repository of the hub
            options["local_files_only"] = True
        options |= {"trust_remote_code": self.trust_remote_code}
        # Looked up inside: a class that needs a missing package raises when it is used.
        return self.attempt(part, lambda: auto.from_pretrained(self.folder, **options))

    def attempt(self, part: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function that works on what was read.

        Whatever it raises is the fault of the files: transformers raises errors of every kind for those.

        Raises:
            ModelError: it failed; the message names the model and ``part``.
        """
        try:
            return function(*arguments, **options)
        except (GraphModeError, MemoryError):
            raise
        except Exception as error:
            if isinstance(error, ValueError) and not self.trust_remote_code and "trust_remote_code" in str(error):
                raise ModelError(
                    f"{self.name}: {part} needs Python code that comes with the model (auto_map), which is not run "
                    "unasked. Read it, and if you trust it give trust_remote_code=True (--trust-remote-code)"
                ) from error
            gguf = " from the GGUF file, which is damaged or of a kind that transformers does not read"
            raise ModelError(
                f"{self.name}: {part} cannot be loaded{gguf if self.gguf_file else ''}: {type(error).__name__}: {error}"
            ) from error


def find_checkpoint(
    name: str | Path, *, load_format: LoadFormat = "auto", trust_remote_code: bool = False
) -> Checkpoint:
    """Find a model's files and check them; fetch them first if the name is one of the hub's.

    Args:
        name: a local folder, a GGUF file, or the hub's name of a model.
        load_format: ``"dummy"`` needs no weights.
        trust_remote_code: whether Python code among the files may run.

    Raises:
        ModelError: there is no such model, or its files cannot be loaded.
    """
    if not str(name).strip():
        raise ModelError("the name of the model is empty; give a folder, a GGUF file or a hub name")
    path = Path(os.path.expanduser(name))
    try:
        if os.path.isfile(path):
            return Checkpoint(str(name), path.parent, _gguf(path, load_format), trust_remote_code)
        if os.path.isdir(path):
            folder = path
        elif isinstance(name, Path) or not _HUB_NAME.fullmatch(str(name)) or str(name).endswith(_FILE_ENDINGS):
            raise ModelError(
                f"{name}: there is no such folder or file; give a folder with a config.json, a GGUF file or a hub name "
                "such as Qwen/Qwen3-0.6B"
            )
        else:
            folder = _fetch(str(name), load_format, trust_remote_code)
        _check_folder(str(name), folder)
    except OSError as error:
        raise ModelError(f"{name}: the files cannot be read: {error}") from error
    return Checkpoint(str(name), folder, None, trust_remote_code)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ModelError: it holds none.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} is not valid JSON ({error}); download or save the model again") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{file} holds a {type(settings).__name__}, not an object {{...}}; download or save it again")
    return settings


def _fetch(name: str, load_format: LoadFormat, trust_remote_code: bool) -> Path:
    """Fetch a model from the hub, or find it in the hub's cache. Pickles stay where they are."""
    wanted = [*_TEXT_FILES, *(["*.py"] if trust_remote_code else []), *(["*.safetensors"] * (load_format == "auto"))]
    try:
        return Path(
            snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*.safetensors", "consolidated*"])
        )
    except Exception as error:
        raise ModelError(
            f"{name}: there is no such folder here, and the hub gives no model of that name: {type(error).__name__}: "
            f"{error}. Mend the path, or the name and the connection"
        ) from error


def _gguf(file: Path, load_format: LoadFormat) -> str:
    """Return the name of a GGUF file that can be read."""
    if file.suffix != ".gguf":
        raise ModelError(f"{file} is a file; give the folder that holds it and its config.json, or a GGUF file")
    if load_format == "dummy":
        raise ModelError(f"{file}: load_format='dummy' takes the sizes from a config.json; give a folder that has one")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{file}: reading GGUF needs the package gguf, which is not installed; pip install gguf")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelError(f"{file} is not a GGUF file: it does not begin with GGUF; download it again")
    return file.name


def _check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that does not hold a model, by what it holds instead."""
    config = folder / "config.json"
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ModelError(
            f"{name} holds an adapter (adapter_config.json, LoRA) of {base}, which graphmode does not apply; merge it "
            "into that model (peft: merge_and_unload, then save_pretrained) and give the folder of the result"
        )
    if not config.is_file():
        if not any(folder.iterdir()):
            raise ModelError(
                f"{name} is an empty folder, config.json is missing; give one that holds it and *.safetensors"
            )
        if files := sorted(file.name for file in folder.glob("*.gguf")):
            raise ModelError(f"{name} holds GGUF files and no config.json; give the file itself: {folder / files[0]}")
        raise ModelError(f"{config} is missing; {name} is not a model saved by transformers")
    settings = read_json(config)
    if not isinstance(settings.get("model_type"), str) and "auto_map" not in settings:
        raise ModelError(
            f'{config} has no model_type, such as "llama", which says what kind of model it is; save the model again '
            "with save_pretrained, or add it"
        )
    architectures = settings.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
        raise ModelError(f"{config}: architectures is {architectures!r}; it must be a list of names, or left out")


def _check_weights(name: str, folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse weights that are not all safetensors files in the folder: other files may be pickles."""
    first = settings.get("transformers_weights")
    if first is None:
        first = _WEIGHTS if (folder / _WEIGHTS).is_file() else _INDEX
    if not isinstance(first, str) or not first.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f"{folder / 'config.json'}: transformers_weights is {first!r}; only *.safetensors are read, for another "
            "format can run code. Save the weights again with save_pretrained"
        )
    if first.endswith(".index.json"):
        if not (folder / first).is_file():
            raise ModelError(f"{name} holds {_others(folder)}")
        index = read_json(folder / first).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise ModelError(f"{folder / first} has no weight_map of names to files; download it again")
        files = sorted(set(index.values()))
    else:
        files = [first]
    if odd := [file for file in files if not file.endswith(".safetensors") or Path(file).name != file]:
        raise ModelError(
            f"{folder / first} names {', '.join(odd)}; only *.safetensors in the folder itself are read, for another "
            "format can run code. Save the weights again with save_pretrained"
        )
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ModelError(f"{name} lacks {', '.join(missing)}, which hold weights; download them")
    for file in files:
        try:
            with safe_open(folder / file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{folder / file}: the weights are damaged or cut short ({error}); download the file again"
            ) from error


def _others(folder: Path) -> str:
    """Return what a folder without readable weights holds instead, and what to do."""
    if found := sorted(file.name for file in folder.glob("*.safetensors")):
        return (
            f"{', '.join(found)}, but neither {_WEIGHTS} nor {_INDEX}, which says what is where; rename a single file "
            f"to {_WEIGHTS}, or download the index"
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    instead = f", only {', '.join(pickles)}, which can run code and is never opened" if pickles else ""
    return (
        f"no *.safetensors file{instead}; convert the weights (save_pretrained), or use load_format='dummy' for random "
        "ones"
    )
