"""Loading a causal language model, with its vision part if it has one, and its tokenizer from a checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from graphmode.cache.specs import CacheShape
from graphmode.errors import ModelError
from graphmode.models.checkpoint import Checkpoint, LoadFormat, find_checkpoint
from graphmode.models.generation_config import end_tokens, read_generation_config
from graphmode.models.hf.attention import ATTENTION_NAME
from graphmode.models.hf.auto import auto_class, silence_padding_warnings
from graphmode.models.hf.dry_run import cache_shapes, check_class, check_features_apart
from graphmode.models.hf.experts import EXPERTS_NAME, share_real_rows
from graphmode.models.hf.latent import keep_latents
from graphmode.models.hf.rotary import context_length
from graphmode.models.hf.sparse import use_indexers
from graphmode.models.hf.tokenizer import name_special_tokens
from graphmode.models.hf.versions import AutoImageProcessor
from graphmode.models.hf.vision import VisionLayout, VisionTower

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelShape:
    """What the engine must know of a model.

    Attributes:
        caches: what each decoder layer caches.
        vocab_size: rows of the embedding.
        max_positions: tokens of a sequence that the model was made for.
        most_positions: what it can be stretched to where the user asks for more.
        eos_token_ids: tokens that end a text.
    """

    caches: tuple[CacheShape, ...]
    vocab_size: int
    max_positions: int
    most_positions: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True)
class ModelFiles:
    """A model's files, and all that is read of them but the weights. What may not be needed is read when it is.

    Attributes:
        checkpoint: the files.
        config: its configuration.
        auto: transformers' class that makes the model.
        device: where its weights go.
        dtype: of its weights.
        load_format: ``"dummy"``: it gets random weights.
        generation: what its generation_config.json, or the one given instead, holds; None where there is none.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    auto: Any
    device: torch.device
    dtype: torch.dtype
    load_format: LoadFormat
    generation: Mapping[str, Any] | None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None where it comes without one.

        Raises:
            ModelError: it cannot be read.
        """
        return _tokenizer(self.checkpoint, self.config) if self.checkpoint.has_tokenizer else None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.config.get_text_config().vocab_size)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        return end_tokens(self.checkpoint, self.config, self.generation, self.vocab_size)

    @property
    def takes_images(self) -> bool:
        """Whether prompts may have images and videos."""
        return self.auto is AutoModelForImageTextToText

    @cached_property
    def vision(self) -> VisionLayout | None:
        """How images are cut; None where the model takes text alone.

        Raises:
            ModelError: graphmode cannot run its vision part.
        """
        if not self.takes_images:
            return None
        with torch.device("meta"), _refusals(self.checkpoint, self.config):
            model = self.checkpoint.attempt("config.json", self.auto.from_config, self.config, dtype=self.dtype)
            return VisionLayout(model)

    @cached_property
    def image_processor(self) -> Any:
        """What prepares images. It needs packages that graphmode does not require."""
        return self.checkpoint.read(AutoImageProcessor, "the processor of images")

    @cached_property
    def processor(self) -> Any:
        """What prepares texts with videos. It needs packages that graphmode does not require."""
        return self.checkpoint.read(AutoProcessor, "the processor of videos")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: transformers' module, in evaluation mode, with our attention and experts.
        shape: its sizes.
        files: where it comes from.
        vision: its vision tower; None where it takes text alone.
    """

    model: PreTrainedModel
    shape: ModelShape
    files: ModelFiles
    vision: VisionTower | None = None


def read_model(
    name: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    load_format: LoadFormat = "auto",
    trust_remote_code: bool = False,
    generation_config: Path | None = None,
) -> ModelFiles:
    """Find a model's files and read what comes before the weights.

    Args:
        name: a local folder, a GGUF file, or the hub's name of a model.
        device: where its weights go.
        dtype: of its weights; ``"auto"`` takes the checkpoint's, on a CPU float32, which is faster there.
        load_format: ``"dummy"`` makes random weights from the configuration alone, to measure speed.
        trust_remote_code: whether Python code that comes with the model may run.
        generation_config: a folder with a generation_config.json to take instead of the model's own.

    Raises:
        ModelError: it cannot be read, or graphmode cannot run it.
    """
    checkpoint = find_checkpoint(name, load_format=load_format, trust_remote_code=trust_remote_code)
    config = checkpoint.read(AutoConfig, "config.json" if checkpoint.gguf_file is None else "the configuration")
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else (config.dtype or torch.bfloat16)
    with _refusals(checkpoint, config):
        auto = auto_class(config, trust_remote_code=trust_remote_code)
    source = generation_config or (checkpoint.folder if checkpoint.gguf_file is None else None)
    generation = None if source is None else read_generation_config(source)
    return ModelFiles(checkpoint, config, auto, device, dtype, load_format, generation)


def load_model(files: ModelFiles) -> LoadedModel:
    """Load a model's weights.

    Raises:
        ModelError: they cannot be read, or graphmode cannot run the model.
    """
    checkpoint, config, auto = files.checkpoint, files.config, files.auto
    options = {"dtype": files.dtype, "attn_implementation": ATTENTION_NAME, "experts_implementation": EXPERTS_NAME}
    if files.load_format == "dummy":
        options["trust_remote_code"] = checkpoint.trust_remote_code
        with files.device:
            model = checkpoint.attempt("config.json", auto.from_config, config, **options)
    else:
        model = load_weights(checkpoint, auto, config, files.device, options)
    model.eval().requires_grad_(False)
    silence_padding_warnings(model)
    share_real_rows(model)
    with _refusals(checkpoint, config):
        check_class(type(model), config)
        keep_latents(model)
        use_indexers(model)
        caches = cache_shapes(model)
        vision = VisionTower(model) if files.takes_images else None
        if vision is not None:
            check_features_apart(model, vision.embed(*vision.spoiled_features()))
    shape = checkpoint.attempt("the shape of its KV cache", _shape, files, model, caches)
    return LoadedModel(model, shape, files, vision)


def load_weights(
    checkpoint: Checkpoint, auto: Any, config: PretrainedConfig, device: torch.device, options: Mapping[str, Any]
) -> PreTrainedModel:
    """Load a model, each tensor from its file to the device: the host never holds the weights.

    Args:
        checkpoint: its files.
        auto: the class that makes it, as of :func:`auto_class`.
        config: its configuration.
        device: where the weights go.
        options: for ``auto.from_pretrained``; ``dtype`` among them.

    Raises:
        ModelError: they cannot be read, or are not those of the configuration, or hold NaN.
    """
    checkpoint.check_weights()
    if checkpoint.gguf_file is not None:
        options = {**options, "quantization_config": GgufConfig(dequantize=True)}
        dtype = str(options["dtype"]).removeprefix("torch.")
        log.info("%s: its weights are dequantized to %s, which takes more memory than the file", checkpoint.name, dtype)
    model, report = checkpoint.read(
        auto,
        "the weights",
        config=config,
        generation_config=GenerationConfig(),  # the file is read by itself: a fault in it is no fault of the model
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
        device_map={"": device},
        **options,
    )
    assert isinstance(model, PreTrainedModel)
    faults = [f"they lack {key}" for key in sorted(report["missing_keys"])]
    faults += [
        f"{key} is {list(stored)} in them and {list(wanted)} in the model"
        for key, stored, wanted in sorted(report["mismatched_keys"])
    ]
    foreign = sorted(report["unexpected_keys"])
    faults += [f"the model has no {key}" for key in foreign if _belongs_to(model, key)]
    if faults:
        more = f", and {len(faults) - 5} more of the kind" if len(faults) > 5 else ""
        raise ModelError(
            f"{checkpoint.name}: the weights are not those that config.json asks for: {'; '.join(faults[:5])}{more}. "
            "The two are not of the same model: download both again"
        )
    if foreign:
        log.warning("%s: %d weights are not used: %s", checkpoint.name, len(foreign), ", ".join(foreign[:5]))
    if spoiled := _hold_nan(model):
        raise ModelError(
            f"{checkpoint.name}: the weights hold NaN, in {', '.join(spoiled[:5])}; the file is damaged, or its "
            "training went wrong. Download it again, or give an earlier checkpoint"
        )
    return model


def _tokenizer(checkpoint: Checkpoint, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    if checkpoint.gguf_file is None:
        return checkpoint.read(AutoTokenizer, "the tokenizer")  # type: ignore[no-any-return]
    # transformers would also read files of other tokenizers in the folder, so it gets one with this file alone.
    with TemporaryDirectory() as folder:
        (Path(folder) / checkpoint.gguf_file).symlink_to((checkpoint.folder / checkpoint.gguf_file).resolve())
        tokenizer: PreTrainedTokenizerBase = replace(checkpoint, folder=Path(folder)).read(
            AutoTokenizer, "the tokenizer"
        )
    name_special_tokens(tokenizer, config)
    return tokenizer


def _hold_nan(model: PreTrainedModel) -> list[str]:
    """Return the names of the weights that hold NaN. The device is waited for once."""
    # The least of a tensor is NaN if any is. Floats of 8 bits have none to take.
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.dtype.itemsize > 1 and weight.numel()
    }
    if not weights:
        return []
    is_nan = torch.stack([weight.amin().float() for weight in weights.values()]).isnan().tolist()
    return [name for name, spoiled in zip(weights, is_nan, strict=True) if spoiled]


def _belongs_to(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight that the model has no place for belongs to a part that it has: then it would compute wrongly.

    A head for another task, or layers for drafting beyond the last, do not matter.
    """
    drafts = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    modules = dict(model.named_modules())
    for match in re.finditer(r"\.(\d+)(?=\.)", key):
        layers = modules.get(key[: match.start()])
        if isinstance(layers, torch.nn.ModuleList) and int(match[1]) >= len(layers):
            return int(match[1]) >= len(layers) + drafts
    return key.rpartition(".")[0] in modules


@contextmanager
def _refusals(checkpoint: Checkpoint, config: PretrainedConfig) -> Iterator[None]:
    """Put the model's name and class before the reason why it is refused."""
    try:
        yield
    except ModelError as error:
        architecture = (config.architectures or [config.model_type])[0]
        raise ModelError(f"{checkpoint.name}: graphmode cannot run {architecture}: {error}") from error


def _shape(files: ModelFiles, model: PreTrainedModel, caches: tuple[CacheShape, ...]) -> ModelShape:
    max_positions, most_positions = context_length(model.config.get_text_config())
    return ModelShape(caches, files.vocab_size, max_positions, most_positions, files.eos_token_ids)
