"""The engine's options: what the user chose, checked and completed before any work starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from graphmode.engine import aliases, checks
from graphmode.engine.checks import unfit
from graphmode.engine.types import Family, Limits
from graphmode.errors import InputError
from graphmode.graph import Backend, CaptureFailure, make_buckets
from graphmode.graph.buckets import check_buckets, powers_of_two

GraphMode = Literal["none", "piecewise", "full", "full_decode_only", "full_and_piecewise"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Fuse = Literal["none", "layers", "compile"]
LoadFormat = Literal["auto", "dummy"]

_DTYPE_NAMES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}


@aliases.by_name(aliases.ENGINE, what="LLM")
@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the user may choose; None means that the engine does.

    The command line takes its options, their help and their types from here.

    Attributes:
        device: ``auto``, or a device such as ``cpu``, ``cuda`` or ``cuda:1``; in Python a backend object too.
        dtype: of the weights and the KV cache: ``float32``, ``bfloat16`` (``bf16``), ``float16`` (``half``), or in
            Python a ``torch.dtype``; ``auto`` takes the checkpoint's, on a CPU float32.
        load_format: ``auto`` reads the weights, ``dummy`` makes random ones.
        trust_remote_code: run Python code that comes with the model (``auto_map``). Without it none runs.
        generation_config: where the sampling parameters of requests without any come from: ``auto`` is the model's
            generation_config.json, ``vllm`` takes our own defaults; else a folder with such a file.
        enable_graph: whether steps replay graphs. Default: yes.
        enforce_eager: the opposite of ``enable_graph``: run every step eagerly.
        graph_mode: ``full`` (one graph a step, the default), ``piecewise`` (attention outside the graphs),
            ``full_decode_only`` (mixed steps run eagerly), ``full_and_piecewise`` (mixed steps piecewise), ``none``.
        graph_sizes: the buckets, in tokens of a step. Default: few, up to the largest step; on a CPU powers of two.
        max_graph_tokens: the threshold: larger steps run eagerly. Default: none is larger.
        max_padding_ratio: steps with a larger share of padding run eagerly.
        max_model_len: tokens of a sequence. Default: what the model was made for, or less where the KV cache cannot
            hold that; a warning says so.
        max_num_seqs: sequences in a step. Default: 256, on a CPU 32.
        max_num_batched_tokens: tokens in a step. Default: 8192, on a CPU 256.
        kv_cache_memory: bytes of the KV cache. Default: what all rows can use, if ``memory_share`` allows it.
        memory_share: the share of the device's free memory that weights, KV cache, graphs and buffers may take in all;
            it bounds the KV cache. On a CPU that is the host's available memory, control groups counted. Default: 0.9,
            on a CPU 0.7.
        enable_prefix_caching: prompts use the KV blocks of earlier sequences that begin alike.
        fuse: ``layers``: recognised layers compute with fewer kernels over the same weights; ``compile``: Inductor
            compiles the others; ``none``: all keep the code of transformers.
        decode_steps: decode steps that are launched together at most, so that the device does not wait for the host;
            their tokens come together. Default: 8, on a CPU 1.
        seed: of the requests that have none.
        strict: a capture that fails ends the start-up, instead of leaving that size to run eagerly.
        on_capture_failure: called with each graph that cannot be captured, a
            :class:`~graphmode.graph.CaptureFailure`; ``stats.capture_failures`` keeps them.
        warmup_iterations: how often a step runs before each capture of it.
        max_images_per_prompt: images in a prompt.
        max_videos_per_prompt: videos in a prompt.
        max_image_pixels: pixels of an image, or of a frame of a video. A larger one is refused before it is decoded.

    Raises:
        InputError: a value of another type or out of range, a contradiction, or a name that is not known or cannot be
            honoured.
    """

    device: str | torch.device | Backend = "auto"
    dtype: Dtype = "auto"
    load_format: LoadFormat = "auto"
    trust_remote_code: bool = False
    generation_config: str | Path = "auto"
    enable_graph: bool | None = None
    enforce_eager: bool | None = None
    graph_mode: GraphMode | None = None
    graph_sizes: Sequence[int] | None = None
    max_graph_tokens: int | None = None
    max_padding_ratio: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory: int | None = None
    memory_share: float | None = None
    enable_prefix_caching: bool = True
    fuse: Fuse = "layers"
    decode_steps: int | None = None
    seed: int = 0
    strict: bool = False
    on_capture_failure: Callable[[CaptureFailure], object] | None = None
    warmup_iterations: int = 1
    max_images_per_prompt: int = 64
    max_videos_per_prompt: int = 8
    max_image_pixels: int = 64 << 20

    def __post_init__(self) -> None:
        if not isinstance(self.device, (str, torch.device, Backend)) or self.device == "":
            raise unfit("device", self.device, "auto, a device such as cpu or cuda:1, or a backend object")
        settle = partial(checks.settle, self)
        settle(_dtype_name, "dtype")
        settle(checks.choice, "dtype", choices=get_args(Dtype))
        settle(checks.choice, "load_format", choices=get_args(LoadFormat))
        settle(checks.choice, "fuse", choices=get_args(Fuse))
        if not isinstance(self.generation_config, (str, Path)) or (
            self.generation_folder is not None and not (self.generation_folder / "generation_config.json").is_file()
        ):
            raise unfit(
                "generation_config", self.generation_config, "auto, vllm or a folder with a generation_config.json"
            )
        settle(checks.choice, "graph_mode", choices=get_args(GraphMode), optional=True)
        settle(checks.flag, "enable_graph", "enforce_eager", optional=True)
        settle(checks.flag, "strict", "trust_remote_code")
        # None is what vLLM's users may give for these two.
        settle(lambda _, value: True if value is None else value, "enable_prefix_caching")
        settle(checks.flag, "enable_prefix_caching")
        settle(lambda _, value: 0 if value is None else value, "seed")
        settle(checks.integer, "seed")
        settle(_sizes, "graph_sizes", optional=True)
        settle(checks.number, "max_padding_ratio", "memory_share", least=0, most=1, optional=True)
        if self.memory_share is not None:
            if self.memory_share == 0:
                raise unfit("memory_share", self.memory_share, "above 0, and 1 at most")
            if self.kv_cache_memory is not None:
                raise InputError("kv_cache_memory and memory_share both set the KV cache; give one of them")
        settle(checks.integer, "max_graph_tokens", "max_model_len", "max_num_seqs", least=1, optional=True)
        settle(checks.integer, "max_num_batched_tokens", "kv_cache_memory", "decode_steps", least=1, optional=True)
        settle(checks.integer, "warmup_iterations", "max_image_pixels", least=1)
        settle(checks.integer, "max_images_per_prompt", "max_videos_per_prompt", least=0)
        if self.on_capture_failure is not None and not callable(self.on_capture_failure):
            raise unfit("on_capture_failure", self.on_capture_failure, "a function of a CaptureFailure, or None")
        self._check_graphs()

    def _check_graphs(self) -> None:
        """Refuse what contradicts about graphs."""
        if self.enable_graph is not None and self.enable_graph is self.enforce_eager:
            raise InputError(
                f"enable_graph={self.enable_graph} and enforce_eager={self.enforce_eager} contradict each other; give "
                "one of them"
            )
        off = self.enforce_eager or self.enable_graph is False
        if (off and self.graph_mode not in (None, "none")) or (self.enable_graph and self.graph_mode == "none"):
            given = "enforce_eager=True" if self.enforce_eager else f"enable_graph={self.enable_graph}"
            raise InputError(f"{given} and graph_mode={self.graph_mode!r} contradict each other; give one of them")
        if self.resolved_graph_mode == "none":
            for name in ("graph_sizes", "max_graph_tokens", "max_padding_ratio"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} is {getattr(self, name)}, but graphs are off; leave one of the two out")
        if self.graph_sizes is not None and self.max_graph_tokens is not None:
            raise InputError("graph_sizes and max_graph_tokens both set the largest graph; give one of them")

    @property
    def generation_folder(self) -> Path | None:
        """The folder whose generation_config.json stands in for the model's."""
        named = self.generation_config
        return None if named in ("auto", "vllm") else Path(named).expanduser()

    @property
    def resolved_graph_mode(self) -> GraphMode:
        """The graph mode after defaults."""
        return "none" if self.enforce_eager or self.enable_graph is False else self.graph_mode or "full"


def own_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options by the names of :class:`EngineOptions`, which takes others too.

    Raises:
        InputError: a name that is not known or cannot be honoured, or a contradiction between two.
    """
    return aliases.named("LLM", options, [each.name for each in fields(EngineOptions)], aliases.ENGINE)


def _dtype_name(_: str, dtype: object) -> object:
    """Return our name of a dtype, where it has one: of torch's, or of what vLLM's users call it."""
    if isinstance(dtype, torch.dtype):
        return str(dtype).removeprefix("torch.")
    return _DTYPE_NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype


def _sizes(name: str, sizes: object, *, also: str) -> tuple[int, ...]:
    if not isinstance(sizes, Collection) or isinstance(sizes, (Mapping, str, bytes)) or not len(sizes):
        raise unfit(name, sizes, f"a list of sizes such as [1, 2, 4]{also}")
    return check_buckets([checks.integer("a size of graph_sizes", size, least=1) for size in sizes])


def resolve_dtype(dtype: Dtype) -> torch.dtype | Literal["auto"]:
    """Return torch's dtype of a name."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return "auto" if dtype == "auto" else named[dtype]


def resolve_limits(
    options: EngineOptions,
    max_positions: int,
    device: torch.device,
    *,
    most_positions: int | None = None,
    bursts: bool = True,
) -> Limits:
    """Complete the limits.

    Args:
        options: the user's.
        max_positions: what the model was made for.
        device: the device.
        most_positions: what the model can be stretched to; default: no more than it was made for.
        bursts: whether decode steps can follow each other there without the host.

    Raises:
        InputError: a limit that the model, the device or another limit does not allow.
    """
    on_cpu = device.type == "cpu"
    max_num_seqs = options.max_num_seqs or (32 if on_cpu else 256)
    max_num_batched_tokens = options.max_num_batched_tokens or max(256 if on_cpu else 8192, max_num_seqs)
    if max_num_batched_tokens < max_num_seqs:
        raise InputError(
            f"max_num_batched_tokens is {max_num_batched_tokens}, less than max_num_seqs={max_num_seqs}; a step "
            "must hold one token of every sequence. Raise the first or lower the second"
        )
    max_model_len = options.max_model_len or max_positions
    most = most_positions or max_positions
    if max_model_len > most:
        raise InputError(f"max_model_len is {max_model_len}; the model was made for {most} tokens. Lower it to that")
    if max_model_len < 2:
        raise InputError(f"max_model_len is {max_model_len}; a sequence needs at least 2, a prompt and an answer")
    if not bursts and (options.decode_steps or 1) > 1:
        raise InputError(
            f"decode_steps is {options.decode_steps}; attention on {device.type} takes lengths on the host, which are "
            "those of one step. Leave it out"
        )
    decode_steps = options.decode_steps or (1 if on_cpu or not bursts else 8)
    return Limits(max_num_seqs, max_num_batched_tokens, max_model_len, decode_steps)


def resolve_buckets(options: EngineOptions, limits: Limits, *, few: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the buckets of the two families: every step of the scheduler's has one unless the user said otherwise.

    Args:
        options: the user's.
        limits: what a step may hold.
        few: whether the default is as few as powers of two: on a CPU a capture costs what eager steps cost.

    Raises:
        InputError: a bucket larger than any step.
    """
    largest = limits.max_num_batched_tokens
    if options.graph_sizes is not None:
        sizes = check_buckets(options.graph_sizes)
    else:
        sizes = (powers_of_two if few else make_buckets)(min(largest, options.max_graph_tokens or largest))
    asked = options.max_graph_tokens or sizes[-1]
    if max(asked, sizes[-1]) > largest:
        raise InputError(
            f"a graph of {max(asked, sizes[-1])} tokens was asked for; no step has more than "
            f"max_num_batched_tokens={largest}. Lower the one or raise the other"
        )
    decode = [size for size in sizes if size < limits.max_num_seqs]
    if sizes[-1] >= limits.max_num_seqs:
        decode.append(limits.max_num_seqs)
    return {"decode": tuple(decode), "mixed": () if options.resolved_graph_mode == "full_decode_only" else sizes}


def piecewise_families(mode: GraphMode) -> frozenset[Family]:
    """Return the families whose attention runs outside their graphs."""
    if mode == "piecewise":
        return frozenset({"decode", "mixed"})
    return frozenset({"mixed"} if mode == "full_and_piecewise" else ())
