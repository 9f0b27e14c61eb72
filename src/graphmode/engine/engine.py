"""The engine: takes requests, steps them, hands back what changed."""

from __future__ import annotations

import hashlib
import logging
import time
from array import array
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from graphmode.cache.allocate import block_bytes, make_cache
from graphmode.cache.block_pool import BlockPool
from graphmode.engine.config import (
    EngineOptions,
    piecewise_families,
    resolve_buckets,
    resolve_dtype,
    resolve_limits,
)
from graphmode.engine.memory import cache_memory, check_buffers, fit_cache
from graphmode.engine.multimodal import VisionPrompt
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.scheduler import Scheduler
from graphmode.engine.sequence import Sequence
from graphmode.engine.stats import EngineStats, _Clock
from graphmode.engine.text import Detokenizer
from graphmode.engine.types import Batch
from graphmode.engine.worker import StepInFlight, StepResult, StepRunner
from graphmode.errors import InputError
from graphmode.graph import RunnerStats, get_backend
from graphmode.graph.memory import free_memory
from graphmode.layers.attention import PORTABLE_ATTENTION
from graphmode.layers.attention_npu import NPU_ATTENTION
from graphmode.models.hf.compiled import compile_layers
from graphmode.models.hf.fuse import fuse
from graphmode.models.hf.rotary import fix_rotary_embeddings
from graphmode.models.loader import load_model

log = logging.getLogger(__name__)


@dataclass
class Engine:
    """Continuous batching on one device.

    Args:
        model: a local folder or hub name.
        options: everything else.
        progress: whether to show a progress bar while graphs are captured.

    Raises:
        ModelError: the model cannot be loaded or run.
        InputError: an option out of range.
        BackendError: the device is not there.
    """

    model: str | Path
    options: EngineOptions
    progress: bool = False
    _next_id: int = field(default=0, init=False)
    _clock: _Clock = field(default_factory=_Clock, init=False)
    _in_flight: StepInFlight | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        options = self.options
        backend = get_backend(options.device)
        attention = NPU_ATTENTION if backend.capabilities.host_arguments else PORTABLE_ATTENTION
        self.device = backend.device
        if options.fuse == "compile" and attention is not PORTABLE_ATTENTION:
            raise InputError(
                f"fuse is 'compile'; attention on {self.device.type} takes lengths on the host, which the compiled "
                "layers are not tried with. Use 'layers' or 'none'"
            )
        bursts = attention.host_lengths is None  # lengths on the host are those of one step
        mode, on_cpu = options.resolved_graph_mode, self.device.type == "cpu"
        # What no model could run with is refused before one is loaded.
        least = resolve_limits(options, options.max_model_len or 2, self.device, bursts=bursts)
        if mode != "none":
            resolve_buckets(options, least, few=on_cpu)
        free, host_free = free_memory(self.device), free_memory(torch.device("cpu"))
        check_buffers(least, self.device, free, host_free, block_size=attention.block_size)
        self.loaded = load_model(
            self.model,
            device=self.device,
            dtype=resolve_dtype(options.dtype),
            load_format=options.load_format,
            trust_remote_code=options.trust_remote_code,
            generation_config=options.generation_folder,
        )
        tokenizer = self.loaded.tokenizer
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer, self.model)
        shape, dtype = self.loaded.shape, self.loaded.model.dtype
        self.limits = resolve_limits(
            options, shape.max_positions, self.device, most_positions=shape.most_positions, bursts=bursts
        )
        num_blocks = self._count_memory(attention.block_size)
        fix_rotary_embeddings(self.loaded.model, self.limits.max_model_len)
        # Fused layers attend by the portable kernel.
        fused = options.fuse != "none" and attention is PORTABLE_ATTENTION
        self.fused_layers = fuse(self.loaded.model, self.limits.max_model_len) if fused else 0
        buckets = None if mode == "none" else resolve_buckets(options, self.limits, few=on_cpu)
        self.caches = make_cache(shape.caches, dtype, num_blocks, self.device, attention.block_size)
        self.compiled_layers = 0
        if options.fuse == "compile" and not self.fused_layers:
            self.compiled_layers = compile_layers(self.loaded.model, self.caches, self.limits.max_model_len)
        self.scheduler = Scheduler(
            self.limits, BlockPool(num_blocks, attention.block_size), prefix_caching=options.enable_prefix_caching
        )
        self.runner = StepRunner(
            self.loaded,
            self.caches,
            backend,
            self.limits,
            buckets,
            attention=attention,
            piecewise=piecewise_families(mode),
            max_padding_ratio=options.max_padding_ratio,
            strict=options.strict,
            on_capture_failure=options.on_capture_failure,
            warmup_iterations=options.warmup_iterations,
        )
        log.info("graph mode %s on %s, %s, KV cache of %d blocks", mode, self.device, dtype, num_blocks)
        self.runner.probe()
        self.runner.capture(progress=self.progress)

    def _count_memory(self, block_size: int) -> int:
        """Return the blocks of the KV cache, lowering ``max_model_len`` to what fits where the user did not give it."""
        options, shape, model = self.options, self.loaded.shape, self.loaded.model
        embedding = model.get_input_embeddings().weight
        assert isinstance(embedding, torch.Tensor)
        sizes = {"vocab_size": shape.vocab_size, "hidden_size": embedding.shape[1], "itemsize": model.dtype.itemsize}
        weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        free, host_free = free_memory(self.device), free_memory(torch.device("cpu"))
        smallest = replace(self.limits, max_model_len=options.max_model_len or 2)
        buffers = check_buffers(smallest, self.device, free, host_free, block_size=block_size, **sizes)
        memory = cache_memory(self.device, free, weights, buffers, options.memory_share, options.kv_cache_memory)
        self.limits, blocks = fit_cache(
            self.limits,
            memory,
            block_bytes(shape.caches, model.dtype, block_size),
            block_size,
            lower=options.max_model_len is None,
        )
        check_buffers(self.limits, self.device, free, host_free, block_size=block_size, **sizes)
        return blocks

    def add(
        self, prompt_token_ids: SequenceOf[int], params: SamplingParams, vision: VisionPrompt | None = None
    ) -> list[Sequence]:
        """Queue a request, with the images of its prompt, and return its sequences, ``params.n`` of them.

        Raises:
            InputError: the prompt holds a token that the model does not have, or does not fit the limits.
        """
        self.check(prompt_token_ids, params)
        sequences = self.make(prompt_token_ids, params, vision)
        for sequence in sequences:
            self.scheduler.add(sequence)
        return sequences

    def make(
        self, prompt_token_ids: SequenceOf[int], params: SamplingParams, vision: VisionPrompt | None = None
    ) -> list[Sequence]:
        """Return the sequences of a request that is checked, for :meth:`Scheduler.feed`. Requests count in this order.

        Arguments as of :meth:`add`.
        """
        request_id, self._next_id = self._next_id, self._next_id + 1
        seed = _derived_seed(self.options.seed, request_id) if params.seed is None else params.seed
        seeds = [seed, *(_derived_seed(seed, index) for index in range(1, params.n))]
        token_ids = list(prompt_token_ids)
        # The prompt is the same for all completions: one scores it.
        others = params if params.prompt_logprobs is None else replace(params, prompt_logprobs=None)
        return [
            Sequence(request_id, token_ids, others if index else params, each, vision)
            for index, each in enumerate(seeds)
        ]

    def check(self, prompt_token_ids: SequenceOf[int], params: SamplingParams) -> None:
        """Check a request without queueing it.

        Raises:
            InputError: as for :meth:`add`.
        """
        self.scheduler.check(len(prompt_token_ids), params.max_tokens)
        self.runner.sampler.check(params)
        _check_tokens(prompt_token_ids, self.loaded.shape.vocab_size)

    def step(self) -> list[Sequence]:
        """Launch the next batch, then take in the one before; return the sequences that got tokens from it.

        The device computes a batch while the host reads the one before: what ends a sequence is known a batch late,
        and what was made for it since is dropped.
        """
        start = time.perf_counter()
        batch = self.scheduler.schedule()
        before, self._in_flight = self._in_flight, None if batch is None else self.runner.launch(batch)
        if before is None:
            return []
        result = before.result()
        changed = self.scheduler.update(before.batch, result.tokens, self.loaded.shape.eos_token_ids)
        _note_logprobs(before.batch, result, changed.keys())
        self._clock.tokens += sum(changed.values())
        if batch is not None and batch.family == before.batch.family == "decode":
            self._clock.steps += before.batch.steps
            self._clock.seconds += time.perf_counter() - start
        return list(changed)

    @property
    def stats(self) -> EngineStats:
        """What the steps did since the start or the last :meth:`reset_stats`."""
        graphs, clock = self.runner.graphs.stats, self._clock
        vision = self.runner.vision.graphs.stats if self.runner.vision else RunnerStats()
        return EngineStats(
            steps=graphs.steps,
            replays=graphs.replays,
            eager_steps=graphs.eager_steps,
            hit_rate=graphs.hit_rate,
            misses={str(reason): count for reason, count in graphs.misses.items()},
            padding_ratio=graphs.padding_ratio,
            graphs=graphs.graphs + vision.graphs,
            capture_seconds=graphs.capture_seconds + vision.capture_seconds,
            graph_bytes=graphs.graph_bytes + vision.graph_bytes,
            capture_peak_bytes=max(graphs.capture_peak_bytes, vision.capture_peak_bytes),
            capture_failures=graphs.capture_failures + vision.capture_failures,
            decode_ms_per_step=1e3 * clock.seconds / clock.steps if clock.steps else None,
            generated_tokens=clock.tokens,
            preemptions=self.scheduler.preemptions,
            vision_runs=vision.steps,
            vision_misses={str(reason): count for reason, count in vision.misses.items()},
        )

    def reset_stats(self) -> None:
        """Forget the steps so far; keep what is known of the graphs."""
        self.runner.graphs.stats.reset_steps()
        if self.runner.vision:
            self.runner.vision.graphs.stats.reset_steps()
        self._clock = _Clock()


def _check_tokens(token_ids: SequenceOf[int], vocab_size: int) -> None:
    try:
        # Without a sign, what is below 0 is too large.
        if np.maximum.reduce(np.frombuffer(array("q", token_ids), np.uint64)) < vocab_size:
            return
    except OverflowError:
        pass
    token = next(token for token in token_ids if not 0 <= token < vocab_size)
    raise InputError(f"the prompt holds token id {token}; the model's ids are 0 to {vocab_size - 1}")


def _derived_seed(seed: int, index: int) -> int:
    """Return the seed of a request, or of a further completion, by its index: the same in each run."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _note_logprobs(batch: Batch, result: StepResult, changed: Collection[Sequence]) -> None:
    """Give the log-probabilities of a step to its sequences: of tokens that they took, and of their prompts."""
    if result.logprobs is None:
        return
    scored = iter(result.prompt_logprobs)
    for row, logprobs in zip(batch.rows, result.logprobs, strict=True):
        sequence = row.sequence
        sequence.prompt_logprobs += [next(scored) for _ in row.scored]
        if row.samples and sequence in changed and sequence.params.logprobs is not None:
            sequence.logprobs.append(logprobs)
