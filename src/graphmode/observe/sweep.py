"""The sweep: which of transformers' language models run, each tried as a tiny model with random weights.

A tiny model's tokens are compared with those that transformers generates for the same prompts one by one; where
graphmode runs a model with its vision part, some prompts have images. Nothing is downloaded. Models are tried in
processes of their own, so that one that crashes or hangs ends only itself.
"""

from __future__ import annotations

import multiprocessing
import queue
import re
import tempfile
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

from graphmode.engine.llm import LLM
from graphmode.engine.prompts import PromptParts
from graphmode.engine.sampling_params import SamplingParams
from graphmode.errors import CaptureError, ModelError
from graphmode.models.loader import LoadedModel, auto_class


class Status(StrEnum):
    """How a model runs."""

    FULL = "full"
    PIECEWISE = "piecewise"
    EAGER_ONLY = "eager only"
    UNSUPPORTED = "unsupported"
    UNTESTED = "untested"
    WRONG = "wrong"


_MEANING = {
    Status.FULL: "every step is one graph; tokens are those of transformers",
    Status.PIECEWISE: "the same with attention outside the graphs",
    Status.EAGER_ONLY: "tokens are those of transformers, without graphs",
    Status.UNSUPPORTED: "refused when it is loaded",
    Status.UNTESTED: "no tiny model of it could be made or run by transformers",
    Status.WRONG: "is not refused, and gives other tokens or an error: a defect",
}


@dataclass(frozen=True)
class Finding:
    """What the sweep found out about one model type.

    Attributes:
        model_type: transformers' name of the type.
        architecture: its class.
        status: how it runs.
        reason: why not as a full graph; empty if it does.
        fused_layers: of its layers, those that were fused.
    """

    model_type: str
    architecture: str
    status: Status
    reason: str = ""
    fused_layers: int = 0


CAUSAL_TYPES: Mapping[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_TYPES: Mapping[str, str] = {
    model_type: architecture
    for model_type, architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    if model_type not in CAUSAL_TYPES
}
MODEL_TYPES: Mapping[str, str] = {**CAUSAL_TYPES, **IMAGE_TYPES}
# The families that people ask for first.
_FAMILIES: Mapping[str, str] = {
    "Qwen3": "qwen3",
    "Qwen3 MoE": "qwen3_moe",
    "Qwen2, Qwen2.5": "qwen2",
    "Qwen2.5-VL": "qwen2_5_vl",
    "Qwen3-VL": "qwen3_vl",
    "Llama 2, 3": "llama",
    "Mistral": "mistral",
    "Mixtral": "mixtral",
    "DeepSeek-V3, R1": "deepseek_v3",
    "DeepSeek-V3.2": "deepseek_v32",
    "GLM-4.5, 4.6, 4.7": "glm4_moe",
    "GLM-4.7-Flash": "glm4_moe_lite",
    "GLM-4.5V": "glm4v_moe",
    "GLM-5": "glm_moe_dsa",
    "gpt-oss": "gpt_oss",
    "Gemma 2": "gemma2",
    "Gemma 3": "gemma3",
    "Phi-3": "phi3",
    "OLMo 2": "olmo2",
    "Granite": "granite",
}

# Sizes that every configuration gets for those of its fields that have these names.
_TINY: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "index_topk": 8,
    "vocab_size_per_layer_input": 131,
    "hidden_size_per_layer_input": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Of models of images and text.
    "image_token_id": 3,
    "video_token_id": 4,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
    "depth": 2,
    "embed_dim": 64,
    "num_heads": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 36,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
}
_FIRST_TEXT_TOKEN = 8
# Shorter than the prompts, where a type has a window at all.
_WINDOW = 8
# What a type, or a part of it, needs beyond that, or instead; None leaves a field as it is by default.
_OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
    },
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "falcon": {"head_dim": None},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gpt_neo": {"attention_types": [[["global"], 4]]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}

_MAX_PARAMETERS = 100_000_000
_PROMPT_LENGTHS = (1, 5, 13, 21)
_IMAGE = (6, 4)  # tokens by height and width: more than one of Qwen2.5-VL's windows, and than a step holds
_NEW_TOKENS = 8
_SEED = 0
_ENGINE: Mapping[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "decode_steps": 4,
}
_MODES: tuple[tuple[Status, Mapping[str, Any]], ...] = (
    (Status.FULL, {"graph_sizes": (2, 4, 16), "strict": True}),
    (Status.PIECEWISE, {"graph_sizes": (2, 4, 16), "strict": True, "graph_mode": "piecewise"}),
    (Status.EAGER_ONLY, {"enforce_eager": True}),
)


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return a configuration of a model small enough to try."""
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    parts = {name: getattr(default, name, None) for name in default.sub_configs}
    sizes: dict[str, Any] = {
        name: _sizes(part, part.model_type) for name, part in parts.items() if isinstance(part, PretrainedConfig)
    }
    sizes |= _sizes(default, model_type)
    if hasattr(AutoModel._model_mapping.get(cls, None), "get_rope_index"):
        sizes["text_config"] |= _grid_rope(default.get_text_config())
    return cls(**sizes)


def _grid_rope(text: PretrainedConfig) -> dict[str, Any]:
    """Return how many pairs of a tiny head's elements turn by each coordinate of a position."""
    rope = text.rope_parameters
    pairs = int(_TINY["head_dim"] * rope.get("partial_rotary_factor", 1)) // 2
    first = 3 * pairs // 8  # and the second, which for Ernie 4.5 are height and width and must be alike
    return {"rope_parameters": {**rope, "mrope_section": [first, first, pairs - 2 * first]}} if rope else {}


def _sizes(default: PretrainedConfig, model_type: str) -> dict[str, Any]:
    sizes = {name: value for name, value in _TINY.items() if _has(default, name)}
    if hasattr(default, "qk_rope_head_dim"):  # latent attention: other names for a head's size, and no shared heads
        sizes |= {"head_dim": None, "num_key_value_heads": sizes.get("num_attention_heads")}
    if getattr(default, "sliding_window", None):
        sizes["sliding_window"] = _WINDOW
    sizes |= _OVERRIDES.get(model_type, {})
    return {name: value for name, value in sizes.items() if value is not None}


def _has(config: PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except AmbiguousGlobalPerLayerAttributeError:
        return False


def save_tiny_model(model_type: str, folder: Path) -> None:
    """Save a tiny model with random weights, large enough that every part of it moves the tokens.

    Raises:
        ModelError: graphmode cannot run its class.
        ValueError: it would not be tiny, or could not be loaded again.
    """
    config = tiny_config(model_type)
    auto = auto_class(config)
    parts: list[Any] = [AutoModel._model_mapping.get(part, None) for part in config.sub_configs.values()]
    if TimmWrapperModel in parts:
        raise ValueError("a part of it is one of the timm library's models, of which none is tiny")
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"its smallest configuration known has {size / 1e6:.0f} million parameters")
    torch.manual_seed(_SEED)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.mul_(0.1)  # else what a layer adds drowns in it, and a model just repeats its last token
    if type(model.config) not in auto._model_mapping:
        raise ValueError("its text part cannot be loaded by itself")
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def prompts(loaded: LoadedModel) -> list[PromptParts]:
    """Return prompts of several lengths, as token ids; half of them with an image where the model takes images."""
    generator = torch.Generator().manual_seed(_SEED)
    made: list[PromptParts] = []
    for number, length in enumerate(_PROMPT_LENGTHS):
        text = torch.randint(_FIRST_TEXT_TOKEN, loaded.shape.vocab_size, (length,), generator=generator).tolist()
        if loaded.vision is None or number % 2 == 0:
            made.append({"prompt_token_ids": text})
            continue
        tower, (height, width) = loaded.vision, _IMAGE
        placeholders = [tower.image_token_id] * (height * width)
        made.append(
            {
                "prompt_token_ids": [*text[:2], *placeholders, *text[2:]],
                "pixel_values": torch.randn(
                    len(placeholders) * tower.patches_per_unit, tower.patch_size, generator=generator
                ),
                "image_grid_thw": torch.tensor([[1, height * tower.merge_size, width * tower.merge_size]]),
            }
        )
    return made


def reference_tokens(folder: Path, requests: Iterable[PromptParts]) -> list[list[int]]:
    """Return what transformers generates, greedily and for each prompt alone."""
    model: PreTrainedModel = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=False)).from_pretrained(
        folder,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    tokens = []
    for request in requests:
        inputs = torch.tensor([request["prompt_token_ids"]])
        given = {name: value for name, value in request.items() if name != "prompt_token_ids"}
        if given:
            given["mm_token_type_ids"] = (inputs == model.config.image_token_id).int()
        output = model.generate(  # type: ignore[operator]
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            **given,
        )
        tokens.append(output[0, inputs.shape[1] :].tolist())
    return tokens


def try_model(model_type: str) -> Finding:
    """Find out how a model type runs, in this process."""
    with tempfile.TemporaryDirectory() as name:
        status, reason, fused_layers = _try_folder(model_type, Path(name))
        reason = textwrap.shorten(reason.replace(name, ""), 160, placeholder=" ...")
        return Finding(model_type, MODEL_TYPES[model_type], status, reason, fused_layers)


def _try_folder(model_type: str, folder: Path) -> tuple[Status, str, int]:
    try:
        auto_class(CONFIG_MAPPING[model_type]())
        save_tiny_model(model_type, folder)
    except ModelError as error:
        return Status.UNSUPPORTED, str(error), 0
    except Exception as error:
        return Status.UNTESTED, f"{type(error).__name__}: {error}", 0
    failures: list[str] = []
    expected = None
    for status, options in _MODES:
        try:
            llm = LLM(folder, **_ENGINE, **options)
        except ModelError as error:
            return Status.UNSUPPORTED, _words(error, folder), 0
        except CaptureError as error:
            file, _, code = (error.location or "").partition(":")
            failures.append(f"{error.operator} in {Path(file).name}:{code}")
            continue
        requests = prompts(llm.engine.loaded)
        if expected is None:
            try:
                expected = reference_tokens(folder, requests)
            except Exception as error:
                return Status.UNTESTED, f"transformers: {type(error).__name__}: {error}", 0
        outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True))
        tokens = [output.outputs[0].token_ids for output in outputs]
        if tokens != expected:
            different = sum(mine != theirs for mine, theirs in zip(tokens, expected, strict=True))
            return Status.WRONG, f"{status}: {different} of {len(tokens)} prompts are continued otherwise", 0
        return status, failures[0] if failures else "", llm.engine.fused_layers
    raise AssertionError("an eager start-up captures nothing that could fail")


def _words(error: ModelError, folder: Path) -> str:
    """Return what an error says of the model, without its name."""
    return re.sub(r"^graphmode cannot run \w+: ", "", str(error).removeprefix(f"{folder}: "))


def sweep(
    model_types: Sequence[str],
    *,
    workers: int = 2,
    timeout: float = 120,
    found: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Try model types, each in a process that it may take down.

    Args:
        model_types: of ``MODEL_TYPES``.
        workers: processes at a time.
        timeout: seconds for each type.
        found: called with each finding as it comes, from any thread.

    Returns:
        The findings in the order of ``model_types``.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for model_type in model_types:
        waiting.put(model_type)
    findings: dict[str, Finding] = {}

    def serve() -> None:
        worker = _Worker(timeout)
        try:
            while not waiting.empty():
                try:
                    model_type = waiting.get_nowait()
                except queue.Empty:
                    return
                findings[model_type] = worker.run(model_type)
                found(findings[model_type])
        finally:
            worker.stop()

    threads = [threading.Thread(target=serve) for _ in range(min(workers, len(model_types)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [findings[model_type] for model_type in model_types]


class _Worker:
    """A process that tries one type after another, replaced when one crashes or hangs it."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, model_type: str) -> Finding:
        """Try a type in the process."""
        try:
            self._pipe.send(model_type)
            if self._pipe.poll(self._timeout):
                finding: Finding = self._pipe.recv()
                return finding
            reason = f"no result in {self._timeout:.0f} seconds"
        except (EOFError, BrokenPipeError):
            self._process.join()
            reason = f"its process ended with exit code {self._process.exitcode}"
        self.stop()
        self._start()
        return Finding(model_type, MODEL_TYPES[model_type], Status.UNTESTED, reason)

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection) -> None:
    """Try types as they come, without network and on one thread."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    while True:
        model_type = pipe.recv()
        try:
            finding = try_model(model_type)
        except Exception as error:
            finding = Finding(model_type, MODEL_TYPES[model_type], Status.WRONG, f"{type(error).__name__}: {error}")
        pipe.send(finding)


def summary(findings: Iterable[Finding]) -> str:
    """Return the number of types of each status, in a line."""
    counts = Counter(finding.status for finding in findings)
    return ", ".join(f"{counts[status]} {status}" for status in Status if counts[status])


def as_markdown(findings: Sequence[Finding]) -> str:
    """Return the page that documents the findings."""
    layers = _TINY["num_hidden_layers"]
    found = {finding.model_type: finding for finding in findings}
    fused = sum(finding.fused_layers > 0 for finding in findings)
    families = [
        f"| {name} | {model_type} | {found[model_type].status} | {found[model_type].fused_layers or ''} | "
        f"{'text and images' if model_type in IMAGE_TYPES else 'text'} |"
        for name, model_type in _FAMILIES.items()
        if model_type in found
    ]
    rows = {
        finding.model_type: f"| {finding.model_type} | {finding.architecture} | {finding.status} | "
        f"{finding.fused_layers or ''} | {finding.reason.replace('|', chr(92) + '|')} |"
        for finding in sorted(findings, key=lambda finding: finding.model_type)
    }
    columns = ("type", "class", "runs", "fused layers", "why not full")
    lines = [
        "# Models",
        "",
        "Every model type that transformers registers for causal language modelling or for images and text, tried by",
        f"`graphmode sweep --markdown FILE`: a tiny model of the type, of {layers} layers with random weights, in",
        f"float32 on a CPU, continues {len(_PROMPT_LENGTHS)} prompts of {min(_PROMPT_LENGTHS)} to "
        f"{max(_PROMPT_LENGTHS)} tokens together by {_NEW_TOKENS} tokens each; transformers {transformers.__version__}",
        "continues each alone and greedily. Recognised layers are fused, and decode steps come in bursts.",
        "",
        f"{len(findings)} types: {summary(findings)}. {fused} of them run with fused layers.",
        "",
        *(f"- **{status}**: {_MEANING[status]}." for status in Status),
        *_table("Often asked for", ("family", "type", "runs", "fused layers", "tried with"), families),
        *_table(
            "Causal language models",
            columns,
            [row for model_type, row in rows.items() if model_type not in IMAGE_TYPES],
            "Those of several parts are tried with text alone.",
        ),
        *_table(
            "Images and text",
            columns,
            [row for model_type, row in rows.items() if model_type in IMAGE_TYPES],
            "Types that are not registered as causal language models too. Half of the prompts have an image.",
        ),
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, columns: Sequence[str], rows: Sequence[str], words: str = "") -> list[str]:
    """Return the lines of a section with a table, none where it would be empty."""
    if not rows:
        return []
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return ["", f"## {title}", "", *([words, ""] if words else []), *head, *rows]
