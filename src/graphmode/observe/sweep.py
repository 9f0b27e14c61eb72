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
from transformers import AutoConfig, PreTrainedModel

from graphmode.engine.llm import LLM
from graphmode.engine.prompts import PromptParts
from graphmode.engine.sampling_params import SamplingParams
from graphmode.errors import CaptureError, ModelError
from graphmode.models.hf.auto import auto_class
from graphmode.models.hf.tiny import FIRST_TEXT_TOKEN, IMAGE_TYPES, MODEL_TYPES, SIZES, save_tiny_model
from graphmode.models.loader import LoadedModel


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

_PROMPT_LENGTHS = (1, 5, 13, 21)
_IMAGE = (6, 4)  # tokens by height and width: more than one of Qwen2.5-VL's windows, and than a step holds
_NEW_TOKENS = 8
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


def prompts(loaded: LoadedModel) -> list[PromptParts]:
    """Return prompts of several lengths, as token ids; half of them with an image where the model takes images."""
    generator = torch.Generator().manual_seed(0)
    made: list[PromptParts] = []
    for number, length in enumerate(_PROMPT_LENGTHS):
        text = torch.randint(FIRST_TEXT_TOKEN, loaded.shape.vocab_size, (length,), generator=generator).tolist()
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
        requests = prompts(llm.engine.core.loaded)
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
        return status, failures[0] if failures else "", llm.engine.core.fused_layers
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
    layers = SIZES["num_hidden_layers"]
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
