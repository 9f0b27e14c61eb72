"""The engine: takes requests, steps them, gives what is new of each."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from threading import Lock

import torch

from graphmode.cache.allocate import make_cache
from graphmode.cache.block_manager import BlockManager
from graphmode.cache.specs import CacheGroup, group_layers
from graphmode.engine import checks
from graphmode.engine.config import (
    EngineOptions,
    piecewise_families,
    resolve_buckets,
    resolve_dtype,
    resolve_limits,
)
from graphmode.engine.memory import cache_memory, check_buffers, fit_cache
from graphmode.engine.outputs import RequestOutput
from graphmode.engine.requests import ActiveRequest, Request, derived_seed
from graphmode.engine.scheduler import Scheduler
from graphmode.engine.sequence import Sequence
from graphmode.engine.stats import EngineStats, _Clock
from graphmode.engine.text import Detokenizer
from graphmode.engine.types import Batch
from graphmode.engine.worker import StepInFlight, StepResult, StepRunner
from graphmode.errors import EngineError, InputError
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
    _clock: _Clock = field(default_factory=_Clock, init=False)
    _in_flight: StepInFlight | None = field(default=None, init=False)
    _numbers: Iterator[int] = field(default_factory=count, init=False)
    _active: dict[str, ActiveRequest] = field(default_factory=dict, init=False)
    _aborted: deque[ActiveRequest] = field(default_factory=deque, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)  # of which requests there are
    _stepping: Lock = field(default_factory=Lock, init=False)

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
        self.cache_groups = group_layers(shape.caches, dtype, attention.block_size)
        if len(self.cache_groups) > 1:  # steps carry the blocks of one group
            size = sum(group.block_bytes for group in self.cache_groups)
            layers = tuple(range(len(shape.caches)))
            self.cache_groups = (CacheGroup("full", layers, dtype, attention.block_size, size),)
        self.num_blocks = self._count_memory(attention.block_size)
        fix_rotary_embeddings(self.loaded.model, self.limits.max_model_len)
        # Fused layers attend by the portable kernel.
        fused = options.fuse != "none" and attention is PORTABLE_ATTENTION
        self.fused_layers = fuse(self.loaded.model, self.limits.max_model_len) if fused else 0
        buckets = None if mode == "none" else resolve_buckets(options, self.limits, few=on_cpu)
        self.caches = make_cache(self.cache_groups, shape.caches, self.num_blocks, self.device)
        self.compiled_layers = 0
        if options.fuse == "compile" and not self.fused_layers:
            self.compiled_layers = compile_layers(self.loaded.model, self.caches, self.limits.max_model_len)
        self.scheduler = self._make_scheduler()
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
        log.info("graph mode %s on %s, %s, KV cache of %s blocks", mode, self.device, dtype, self._cache_in_words())
        self.runner.probe()
        self.runner.capture(progress=self.progress)

    def _make_scheduler(self) -> Scheduler:
        blocks = BlockManager(
            self.cache_groups,
            self.num_blocks,
            step_tokens=self.limits.max_num_batched_tokens,
            decode_steps=self.limits.decode_steps,
            prefix_caching=self.options.enable_prefix_caching,
        )
        return Scheduler(self.limits, blocks)

    def _cache_in_words(self) -> str:
        return " and ".join(
            f"{count} {group.kind}" if group.window is None else f"{count} {group.kind} ({group.window} tokens)"
            for group, count in zip(self.cache_groups, self.num_blocks, strict=True)
        )

    def _count_memory(self, block_size: int) -> tuple[int, ...]:
        """Return the blocks of each cache group, lowering ``max_model_len`` to what fits where the user gave none."""
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
            self.cache_groups,
            lower=options.max_model_len is None,
        )
        check_buffers(self.limits, self.device, free, host_free, block_size=block_size, **sizes)
        return blocks

    def check(self, request: Request) -> None:
        """Check a request without queueing it.

        Raises:
            InputError: the prompt holds a token that the model does not have or does not fit the limits, or the model
                cannot sample so.
        """
        if request.request_id is not None and not (isinstance(request.request_id, str) and request.request_id):
            raise checks.unfit("request_id", request.request_id, "a text that is not empty, or None")
        if request.params.stop and self.detokenizer is None:
            raise InputError("the model comes without a tokenizer, so stop texts cannot be found; use stop_token_ids")
        self.scheduler.check(len(request.prompt_token_ids), request.params.max_tokens)
        self.runner.sampler.check(request.params)
        request.check_tokens(self.loaded.shape.vocab_size)

    def submit(self, request: Request) -> str:
        """Queue a request and return its name, by which outputs and :meth:`abort` know it. Any thread may call it.

        Raises:
            InputError: as for :meth:`check`, or a request of that name has not ended.
        """
        self.check(request)
        with self._lock:
            number = next(self._numbers)
            while request.request_id is None and str(number) in self._active:
                number = next(self._numbers)
            request_id = str(number) if request.request_id is None else request.request_id
            if request_id in self._active:
                raise InputError(f"request_id {request_id!r} is that of a request that has not ended; give another")
            seed = request.params.seed
            if seed is None:
                seed = derived_seed(self.options.seed, number)
            self._active[request_id] = active = ActiveRequest(request, request_id, seed, self.detokenizer)
            self.scheduler.add(active.sequences())
        return request_id

    def abort(self, request_id: str) -> None:
        """Let a request end at the next :meth:`step`, which gives its last output. Any thread may call it.

        A name that no request has, or one that has ended, is left alone.
        """
        if (request := self._active.get(request_id)) is not None:
            self._aborted.append(request)

    @property
    def has_requests(self) -> bool:
        """Whether any request has not had its last output."""
        return bool(self._active)

    def step(self) -> list[RequestOutput]:
        """Launch the next batch, then take in the one before; return the outputs that follow.

        The device computes a batch while the host reads the one before: what ends a sequence is known a batch late,
        and what was made for it since is dropped. One thread steps at a time.

        Returns:
            What is new, in the order in which it came: of a request that streams an output for every token, of others
            the last one alone. The last output of a request says that it is finished.

        Raises:
            EngineError: requests have not ended, and there is nothing to run.
            Exception: whatever a step raises. All requests have then ended without a last output; the engine has
                forgotten them and what its cache holds, and takes new ones.
        """
        with self._stepping:
            try:
                return self._step()
            except BaseException:
                self._start_anew()
                raise

    def _step(self) -> list[RequestOutput]:
        start = time.perf_counter()
        outputs = self._end_aborted()
        with self._lock:
            unfinished = len(self._active)
        batch = self.scheduler.schedule()
        before, self._in_flight = self._in_flight, None if batch is None else self.runner.launch(batch)
        if before is None:
            if batch is None and unfinished:
                raise EngineError(f"{unfinished} requests have not ended, and the engine finds nothing to run for them")
            return outputs
        result = before.result()
        changed = self.scheduler.update(before.batch, result.tokens, self.loaded.shape.eos_token_ids)
        _note_logprobs(before.batch, result, changed.keys())
        self._clock.tokens += sum(changed.values())
        if batch is not None and batch.family == before.batch.family == "decode":
            self._clock.steps += before.batch.steps
            self._clock.seconds += time.perf_counter() - start
        return outputs + self._take_in(changed)

    def _end_aborted(self) -> list[RequestOutput]:
        outputs = []
        while self._aborted:
            request = self._aborted.popleft()
            if self._active.get(request.request_id) is request:  # otherwise it has ended meanwhile
                outputs.append(request.abort())
                for answer in request.answers:
                    self.scheduler.drop(answer.sequence)
                del self._active[request.request_id]
        return outputs

    def _take_in(self, changed: Iterable[Sequence]) -> list[RequestOutput]:
        """Let requests take in the new tokens of their sequences, and end what this ends."""
        outputs = []
        for sequence in changed:
            request = self._active[sequence.request_id]
            outputs += request.take_in(sequence.index)
            if sequence.finish_reason is not None:
                self.scheduler.drop(sequence)  # which still runs where its text has come to a stop text
                if request.finished:
                    del self._active[request.request_id]
        return outputs

    def _start_anew(self) -> None:
        """Forget all requests and what the cache holds: a step that was broken off may have left any half done."""
        preemptions = self.scheduler.preemptions
        with self._lock:
            self._active.clear()
            self._aborted.clear()
            self._in_flight = None
            self.scheduler = self._make_scheduler()
            self.scheduler.preemptions = preemptions

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
