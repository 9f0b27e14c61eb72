"""The engine: takes requests, steps them, gives what is new of each."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Lock

import torch

from graphmode.cache.allocate import make_cache
from graphmode.cache.block_manager import BlockManager
from graphmode.cache.specs import group_layers
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
from graphmode.engine.types import Batch, Limits
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


class Engine:
    """Continuous batching on one device: requests are submitted and aborted from any thread, and one thread steps.

    Args:
        model: a local folder or hub name.
        options: everything else.
        progress: whether to show a progress bar while graphs are captured.

    Raises:
        ModelError: the model cannot be loaded or run.
        InputError: an option out of range.
        BackendError: the device is not there.
    """

    def __init__(self, model: str | Path, options: EngineOptions, progress: bool = False) -> None:
        self.model = model
        self.options = options
        backend = get_backend(options.device)
        self.device = backend.device
        self._attention = NPU_ATTENTION if backend.capabilities.host_arguments else PORTABLE_ATTENTION
        self._refuse_what_no_model_runs_with()
        self.loaded = load_model(
            model,
            device=self.device,
            dtype=resolve_dtype(options.dtype),
            load_format=options.load_format,
            trust_remote_code=options.trust_remote_code,
            generation_config=options.generation_folder,
        )
        tokenizer = self.loaded.tokenizer
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer, model)
        self.cache_groups = group_layers(self.loaded.shape.caches, self.loaded.model.dtype, self._attention.block_size)
        self.limits, self.num_blocks = self._fit_memory()
        self._prepare_layers()
        self.scheduler = self._make_scheduler()
        self.runner = StepRunner(
            self.loaded,
            self.caches,
            backend,
            self.limits,
            self._buckets(self.limits),
            attention=self._attention,
            piecewise=piecewise_families(options.resolved_graph_mode),
            max_padding_ratio=options.max_padding_ratio,
            strict=options.strict,
            on_capture_failure=options.on_capture_failure,
            warmup_iterations=options.warmup_iterations,
        )
        self._clock = _Clock()
        self._in_flight: StepInFlight | None = None
        self._numbers = count()
        self._active: dict[str, ActiveRequest] = {}
        self._aborted: deque[ActiveRequest] = deque()
        self._lock = Lock()  # held to change which requests there are
        self._stepping = Lock()
        log.info(
            "graph mode %s on %s, %s, KV cache of %s blocks",
            options.resolved_graph_mode,
            self.device,
            self.loaded.model.dtype,
            self._cache_in_words(),
        )
        self.runner.probe()
        self.runner.capture(progress=progress)

    def _refuse_what_no_model_runs_with(self) -> None:
        """Check the options before a model is loaded."""
        if self.options.fuse == "compile" and self._attention is not PORTABLE_ATTENTION:
            raise InputError(
                f"fuse is 'compile'; attention on {self.device.type} takes lengths on the host, which the compiled "
                "layers are not tried with. Use 'layers' or 'none'"
            )
        least = self._limits(self.options.max_model_len or 2)
        self._buckets(least)
        free, host_free = free_memory(self.device), free_memory(torch.device("cpu"))
        check_buffers(least, self.device, free, host_free, block_sizes=[self._attention.block_size])

    def _limits(self, max_positions: int, most_positions: int | None = None) -> Limits:
        bursts = self._attention.host_lengths is None  # lengths on the host are those of one step
        return resolve_limits(self.options, max_positions, self.device, most_positions=most_positions, bursts=bursts)

    def _buckets(self, limits: Limits) -> dict[str, tuple[int, ...]] | None:
        if self.options.resolved_graph_mode == "none":
            return None
        return resolve_buckets(self.options, limits, few=self.device.type == "cpu")

    def _fit_memory(self) -> tuple[Limits, tuple[int, ...]]:
        """Return the limits and the blocks of each cache group.

        ``max_model_len`` is lowered to what fits where the user did not give it.
        """
        options, shape, model = self.options, self.loaded.shape, self.loaded.model
        block_sizes = [group.block_size for group in self.cache_groups]
        limits = self._limits(shape.max_positions, shape.most_positions)
        embedding = model.get_input_embeddings().weight
        assert isinstance(embedding, torch.Tensor)
        sizes = {"vocab_size": shape.vocab_size, "hidden_size": embedding.shape[1], "itemsize": model.dtype.itemsize}
        weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        free, host_free = free_memory(self.device), free_memory(torch.device("cpu"))
        smallest = replace(limits, max_model_len=options.max_model_len or 2)
        buffers = check_buffers(smallest, self.device, free, host_free, block_sizes=block_sizes, **sizes)
        memory = cache_memory(self.device, free, weights, buffers, options.memory_share, options.kv_cache_memory)
        limits, blocks = fit_cache(limits, memory, self.cache_groups, lower=options.max_model_len is None)
        check_buffers(limits, self.device, free, host_free, block_sizes=block_sizes, **sizes)
        return limits, blocks

    def _prepare_layers(self) -> None:
        """Make the layers' caches; fuse or compile the layers as asked for."""
        model, length = self.loaded.model, self.limits.max_model_len
        fix_rotary_embeddings(model, length)
        # Fused layers attend by the portable kernel.
        fused = self.options.fuse != "none" and self._attention is PORTABLE_ATTENTION
        self.fused_layers = fuse(model, length) if fused else 0
        self.caches = make_cache(self.cache_groups, self.loaded.shape.caches, self.num_blocks, self.device)
        compiled = self.options.fuse == "compile" and not self.fused_layers
        self.compiled_layers = compile_layers(model, self.caches, length) if compiled else 0

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
        for token in request.token_range:
            if not 0 <= token < (vocab_size := self.loaded.shape.vocab_size):
                raise InputError(f"the prompt holds token id {token}; the model's ids are 0 to {vocab_size - 1}")

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
        _note_logprobs(before.batch, result, changed)
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


def _note_logprobs(batch: Batch, result: StepResult, changed: Mapping[Sequence, int]) -> None:
    """Give the log-probabilities of a step to its sequences: of tokens that they took, and of their prompts."""
    if result.logprobs is None:
        return
    scored = iter(result.prompt_logprobs)
    for row, logprobs in zip(batch.scheduled, result.logprobs, strict=True):
        sequence = row.sequence
        sequence.prompt_logprobs += [next(scored) for _ in row.scored]
        if sequence.params.logprobs is not None:
            sequence.logprobs += logprobs[: changed.get(sequence, 0)]
