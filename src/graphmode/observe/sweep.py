"""The sweep: which of transformers' causal language models run, each tried as a tiny model with random weights.

A tiny model's tokens are compared with those that transformers generates for the same prompts one by one. Nothing is
downloaded. Models are tried in processes of their own, so that one that crashes or hangs ends only itself.
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
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from graphmode.engine.llm import LLM
from graphmode.engine.prompts import Prompt
from graphmode.engine.sampling_params import SamplingParams
from graphmode.graph.errors import CaptureError
from graphmode.models.dry_run import check_class
from graphmode.models.errors import ModelError


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
    """

    model_type: str
    architecture: str
    status: Status
    reason: str = ""


MODEL_TYPES: Mapping[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Sizes that every configuration gets for those of its fields that have these names.
_TINY: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
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
}
# Shorter than the prompts, where a type has a window at all.
_WINDOW = 8
# What a type needs beyond that, or instead; None leaves a field as it is by default.
_OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
    },
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
_NEW_TOKENS = 8
_SEED = 0
_ENGINE: Mapping[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
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
    overrides = dict(_OVERRIDES.get(model_type, {}))
    parts = {name: getattr(default, name, None) for name in default.sub_configs}
    sizes: dict[str, Any] = {
        name: _sizes(part, {}) for name, part in parts.items() if isinstance(part, PretrainedConfig)
    }
    sizes |= _sizes(default, overrides)
    return cls(**sizes)


def _sizes(default: PretrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {name: value for name, value in _TINY.items() if _has(default, name)}
    if hasattr(default, "qk_rope_head_dim"):  # latent attention: other names for a head's size, and no shared heads
        sizes |= {"head_dim": None, "num_key_value_heads": sizes.get("num_attention_heads")}
    if getattr(default, "sliding_window", None):
        sizes["sliding_window"] = _WINDOW
    sizes |= overrides
    return {name: value for name, value in sizes.items() if value is not None}


def _has(config: PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except AmbiguousGlobalPerLayerAttributeError:
        return False


def save_tiny_model(model_type: str, folder: Path) -> None:
    """Save a tiny model with random weights, large enough that every part of it moves the tokens.

    Raises:
        ValueError: it would not be tiny, or could not be loaded again.
    """
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"its smallest configuration known has {size / 1e6:.0f} million parameters")
    torch.manual_seed(_SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.mul_(0.1)  # else what a layer adds drowns in it, and a model just repeats its last token
    if type(model.config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError("its text part cannot be loaded by itself")
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def prompts(vocab_size: int) -> list[list[int]]:
    """Return prompts of several lengths, as token ids."""
    generator = torch.Generator().manual_seed(_SEED)
    return [torch.randint(4, vocab_size, (length,), generator=generator).tolist() for length in _PROMPT_LENGTHS]


def reference_tokens(folder: Path) -> list[list[int]]:
    """Return what transformers generates, greedily and for each prompt alone."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    tokens = []
    for prompt in prompts(model.config.get_text_config().vocab_size):
        inputs = torch.tensor([prompt])
        output = model.generate(  # type: ignore[operator]
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        tokens.append(output[0, len(prompt) :].tolist())
    return tokens


def try_model(model_type: str) -> Finding:
    """Find out how a model type runs, in this process."""
    with tempfile.TemporaryDirectory() as name:
        status, reason = _try_folder(model_type, Path(name))
        reason = textwrap.shorten(reason.replace(name, ""), 160, placeholder=" ...")
        return Finding(model_type, MODEL_TYPES[model_type], status, reason)


def _try_folder(model_type: str, folder: Path) -> tuple[Status, str]:
    try:
        check_class(getattr(transformers, MODEL_TYPES[model_type]), CONFIG_MAPPING[model_type]())
        save_tiny_model(model_type, folder)
    except ModelError as error:
        return Status.UNSUPPORTED, str(error)
    except Exception as error:
        return Status.UNTESTED, f"{type(error).__name__}: {error}"
    failures: list[str] = []
    expected = None
    for status, options in _MODES:
        try:
            llm = LLM(folder, **_ENGINE, **options)
        except ModelError as error:
            return Status.UNSUPPORTED, _words(error, folder)
        except CaptureError as error:
            file, _, code = (error.location or "").partition(":")
            failures.append(f"{error.operator} in {Path(file).name}:{code}")
            continue
        if expected is None:
            try:
                expected = reference_tokens(folder)
            except Exception as error:
                return Status.UNTESTED, f"transformers: {type(error).__name__}: {error}"
        requests: list[Prompt] = [
            {"prompt_token_ids": prompt} for prompt in prompts(llm.engine.loaded.shape.vocab_size)
        ]
        outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True))
        tokens = [output.outputs[0].token_ids for output in outputs]
        if tokens != expected:
            different = sum(mine != theirs for mine, theirs in zip(tokens, expected, strict=True))
            return Status.WRONG, f"{status}: {different} of {len(tokens)} prompts are continued otherwise"
        return status, failures[0] if failures else ""
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
    lines = [
        "# Models",
        "",
        "Every causal language model that transformers registers, tried by `graphmode sweep --markdown FILE`: a tiny",
        "model of the type with random weights, in float32 on a CPU, continues "
        f"{len(_PROMPT_LENGTHS)} prompts of {min(_PROMPT_LENGTHS)} to",
        f"{max(_PROMPT_LENGTHS)} tokens together by {_NEW_TOKENS} tokens each; transformers {transformers.__version__} "
        "continues each alone and greedily. Models of",
        "several parts are tried with text alone.",
        "",
        f"{len(findings)} types: {summary(findings)}.",
        "",
        *(f"- **{status}**: {_MEANING[status]}." for status in Status),
        "",
        "| type | class | runs | why not full |",
        "|---|---|---|---|",
    ]
    for finding in sorted(findings, key=lambda finding: finding.model_type):
        reason = finding.reason.replace("|", "\\|")
        lines.append(f"| {finding.model_type} | {finding.architecture} | {finding.status} | {reason} |")
    return "\n".join(lines) + "\n"
