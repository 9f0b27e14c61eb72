"""Loading a causal language model, with its vision part if it has one, and its tokenizer from a folder or the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from graphmode.models.attention import ATTENTION_NAME, CacheShape
from graphmode.models.dry_run import cache_shapes, check_class, check_features_apart
from graphmode.models.errors import ModelError
from graphmode.models.experts import EXPERTS_NAME, share_real_rows
from graphmode.models.latent import keep_latents
from graphmode.models.sparse import use_indexers
from graphmode.models.vision import VisionTower

LoadFormat = Literal["auto", "dummy"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ModelShape:
    """What the engine must know of a model.

    Attributes:
        caches: what each decoder layer caches.
        vocab_size: rows of the embedding.
        max_positions: tokens that the model was made for.
        eos_token_ids: tokens that end a text.
    """

    caches: tuple[CacheShape, ...]
    vocab_size: int
    max_positions: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: transformers' module, in evaluation mode, with our attention and experts.
        shape: its sizes.
        tokenizer: None where the model comes without one; then prompts must be token ids.
        vision: its vision tower; None where it takes text alone.
    """

    model: PreTrainedModel
    shape: ModelShape
    tokenizer: PreTrainedTokenizerBase | None
    vision: VisionTower | None = None


def load_model(
    name: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    load_format: LoadFormat = "auto",
) -> LoadedModel:
    """Load a model.

    Args:
        name: a local folder or the hub's name of a model.
        device: where its weights go.
        dtype: of its weights; ``"auto"`` takes the checkpoint's, on a CPU float32, which is faster there.
        load_format: ``"dummy"`` makes random weights from the configuration alone, to measure speed.

    Raises:
        ModelError: it cannot be read, or graphmode cannot run it.
    """
    _check_folder(name, load_format)
    config = _read(partial(AutoConfig.from_pretrained, name), name, "config.json")
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else (config.dtype or torch.bfloat16)
    architecture = (config.architectures or [config.model_type])[0]
    with _refusals(name, architecture):
        auto = auto_class(config)
    options = {"dtype": dtype, "attn_implementation": ATTENTION_NAME, "experts_implementation": EXPERTS_NAME}
    if load_format == "dummy":
        with device:
            model = _read(partial(auto.from_config, config, **options), name, "config.json")
    else:
        # Each tensor goes from its shard to the device: the host never holds the weights.
        load = partial(auto.from_pretrained, name, output_loading_info=True, device_map={"": device}, **options)
        model, report = _read(load, name, "the weights")
        if report["missing_keys"]:
            raise ModelError(
                f"{name}: the weights lack {', '.join(sorted(report['missing_keys']))}, which config.json asks for; "
                "the two are not of the same model"
            )
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = _no_warning  # type: ignore[method-assign]
    share_real_rows(model)
    with _refusals(name, architecture):
        keep_latents(model)
        use_indexers(model)
        caches = cache_shapes(model)
        vision = VisionTower(model) if auto is AutoModelForImageTextToText else None
        if vision is not None:
            check_features_apart(model, vision.embed(*vision.spoiled_features()))
    shape: ModelShape = _read(partial(_shape, model, caches), name, "the shape of its KV cache")
    tokenizer = None
    if _has_tokenizer(name):
        tokenizer = _read(partial(AutoTokenizer.from_pretrained, name), name, "the tokenizer")
    return LoadedModel(model, shape, tokenizer, vision)


def auto_class(config: PretrainedConfig) -> Any:
    """Return what makes the model: with its vision part where its positions are those of a grid, as in Qwen2-VL.

    Raises:
        ModelError: its class is none that graphmode can run; why, in words that follow the model's name.
    """
    base: Any = AutoModel._model_mapping.get(type(config), None)
    vision = AutoModelForImageTextToText._model_mapping.get(type(config), None)
    auto = AutoModelForImageTextToText if vision and hasattr(base, "get_rope_index") else AutoModelForCausalLM
    cls: Any = auto._model_mapping.get(type(config), None)
    if cls is None and vision:
        raise ModelError("it is a model of images and text, of a kind that graphmode does not run")
    if cls is None:
        raise ModelError("transformers has no causal language model of its type")
    check_class(cls, config)
    return auto


def _check_folder(name: str | Path, load_format: LoadFormat) -> None:
    """Give a local folder's faults their own words; the hub's names pass."""
    path = Path(name)
    if not path.exists():
        if isinstance(name, Path) or path.is_absolute() or str(name).startswith((".", "~")):
            raise ModelError(f"{name}: there is no such folder; give a folder with a config.json or a hub name")
        return
    if not path.is_dir():
        raise ModelError(f"{name} is a file; give the folder that holds it and its config.json")
    config = path / "config.json"
    if not config.is_file():
        raise ModelError(f"{config} is missing; {path} is not a model saved by transformers")
    try:
        json.loads(config.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{config} is not valid JSON ({error}); download or save the model again") from error
    if load_format == "auto" and not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{path} holds no *.safetensors file; convert the weights (save_pretrained), or use load_format='dummy' "
            "for random ones"
        )


@contextmanager
def _refusals(name: str | Path, architecture: str) -> Iterator[None]:
    """Put the model's name and class before the reason why it is refused."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{name}: graphmode cannot run {architecture}: {error}") from error


def _no_warning(*args: object, **kwargs: object) -> None:
    """Stand for a warning about padding, which reads tokens on the host; a step pads by slots."""


def _read(load: Callable[[], Any], name: str | Path, part: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        raise ModelError(f"{name}: {part} cannot be loaded: {type(error).__name__}: {error}") from error


def _has_tokenizer(name: str | Path) -> bool:
    return not Path(name).is_dir() or any((Path(name) / file).is_file() for file in _TOKENIZER_FILES)


def _shape(model: PreTrainedModel, caches: tuple[CacheShape, ...]) -> ModelShape:
    config = model.config.get_text_config()
    eos = model.generation_config.eos_token_id if model.generation_config else config.eos_token_id
    return ModelShape(
        caches=caches,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or ()),
    )
