"""The engine's core: takes requests, steps them, gives the new tokens of each answer. It knows nothing of text."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from threading import Lock
from weakref import WeakSet

import torch

from graphmode.cache.allocate import make_cache
from graphmode.cache.block_manager import BlockManager
from graphmode.cache.specs import group_layers
from graphmode.engine import checks
from graphmode.engine.config import (
    EngineOptions,
    piecewise_families,
    resolve_buckets,
    resolve_limits,
)
from graphmode.engine.grammar import GrammarCompiler, GrammarState, GrammarWorkers
from graphmode.engine.memory import cache_memory, check_buffers, fit_cache
from graphmode.engine.outputs import FinishReason, NewTokens, TokenLogprobs
from graphmode.engine.reading import read_files
from graphmode.engine.requests import Request, derived_seed
from graphmode.engine.scheduler import Scheduler
from graphmode.engine.sequence import Sequence
from graphmode.engine.stats import EngineStats, _Clock
from graphmode.engine.types import Batch, Limits
from graphmode.engine.worker import StepInFlight, StepResult, StepRunner
from graphmode.errors import EngineError, InputError
from graphmode.graph import RunnerStats, get_backend
from graphmode.graph.axes import volume
from graphmode.graph.memory import free_memory
from graphmode.layers.attention import PORTABLE_ATTENTION
from graphmode.layers.attention_npu import NPU_ATTENTION
from graphmode.models.hf.compiled import compile_layers
from graphmode.models.hf.fuse import fuse
from graphmode.models.hf.rotary import fix_rotary_embeddings
from graphmode.models.loader import ModelFiles, load_model

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Submitted:
    """A request that has not ended.

    Attributes:
        request: what was asked.
        request_id: its name.
        seed: of the first answer's random numbers; those of the others follow from it.
        since: when it was submitted, as ``time.perf_counter`` has it; None once an answer has begun to run.
        sequences: of its answers, once the first of them may run; none before.
        unfinished: how many of them have not ended.
    """

    request: Request
    request_id: str
    seed: int
    since: float | None = field(default_factory=time.perf_counter)
    sequences: list[Sequence] = field(default_factory=list)
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = self.request.params.n

    def begin(self, follow: Callable[[Sequence], GrammarState] | None = None) -> Iterator[Sequence]:
        """Give the sequences that are to run, which are made when the first is asked for.

        Args:
            follow: begins a sequence's grammar; None where they are free.
        """
        self.make()
        for sequence in self.sequences:
            if sequence.finish_reason is None:  # it is not if the request was aborted meanwhile
                if follow is not None:
                    sequence.grammar = follow(sequence)
                yield sequence

    def make(self) -> None:
        """Make the sequences, if that is not done."""
        if self.sequences:
            return
        params, vision = self.request.params, self.request.vision
        token_ids = list(self.request.prompt_token_ids)
        # The prompt is the same for all answers: one scores it.
        others = params if params.prompt_logprobs is None else replace(params, prompt_logprobs=None)
        for index in range(params.n):
            seed = derived_seed(self.seed, index) if index else self.seed
            each = others if index else params
            self.sequences.append(Sequence(self.request_id, token_ids, each, seed, vision, index))


class EngineCore:
    """Continuous batching on one device: requests are submitted and aborted from any thread, and one thread steps.

    Args:
        model: a local folder or hub name, or what was read of its files.
        options: everything else.
        progress: whether to show a progress bar while graphs are captured.
        on_capture: called during start-up with how many graphs have been captured and how many there will be.

    Raises:
        ModelError: the model cannot be loaded or run.
        InputError: an option out of range.
        BackendError: the device is not there.
    """

    def __init__(
        self,
        model: str | Path | ModelFiles,
        options: EngineOptions,
        progress: bool = False,
        on_capture: Callable[[int, int], object] | None = None,
    ) -> None:
        self.options = options
        backend = get_backend(options.device)
        self.device = backend.device
        self._attention = NPU_ATTENTION if backend.capabilities.host_arguments else PORTABLE_ATTENTION
        self._refuse_what_no_model_runs_with()
        files = model if isinstance(model, ModelFiles) else read_files(model, options)
        self.loaded = load_model(files)
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
        shape = self.loaded.shape
        self._grammars = GrammarCompiler(self.loaded.files.tokenizer, shape.vocab_size, shape.eos_token_ids)
        self._grammar_workers = GrammarWorkers()
        self._clock = _Clock()
        self._in_flight: StepInFlight | None = None
        self._numbers = count()
        self._active: dict[str, _Submitted] = {}
        self._fitting: WeakSet[Request] = WeakSet()  # what was checked: many are before they are submitted
        self._aborted: deque[tuple[_Submitted, int | None, FinishReason, str | None]] = deque()
        self._lock = Lock()  # held to change which requests there are
        log.info(
            "graph mode %s on %s, %s, KV cache of %s blocks",
            options.resolved_graph_mode,
            self.device,
            self.loaded.model.dtype,
            self._cache_in_words(),
        )
        self.runner.probe()
        self.runner.capture(progress=progress, on_capture=on_capture)

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
        """Check a request without queueing it. To try a grammar that is new takes up to a second.

        Raises:
            InputError: the prompt holds a token that the model does not have or does not fit the limits, or the model
                cannot sample so, or the answers cannot be held to ``structured_outputs``.
        """
        self._check(request)
        if (structured := request.params.structured_outputs) is not None:
            self._grammars.check(structured)

    def _check(self, request: Request) -> None:
        if request in self._fitting:
            return
        if request.request_id is not None and not (isinstance(request.request_id, str) and request.request_id):
            raise checks.unfit("request_id", request.request_id, "a text that is not empty, or None")
        self.scheduler.check(len(request.prompt_token_ids), request.params.max_tokens)
        self.runner.sampler.check(request.params)
        for token in request.token_range:
            if not 0 <= token < (vocab_size := self.loaded.shape.vocab_size):
                raise InputError(f"the prompt holds token id {token}; the model's ids are 0 to {vocab_size - 1}")
        self._fitting.add(request)

    def submit(self, request: Request, taken: Collection[str] = ()) -> str:
        """Queue a request and return its name, by which outputs and :meth:`abort` know it. Any thread may call it.

        A grammar is not tried: :meth:`check` must have let it pass, in this process or another. It is compiled by
        another thread, and the request joins the queue when that is done.

        Args:
            request: what is asked.
            taken: names that it must not have, beside those of requests that have not ended.

        Raises:
            InputError: as for :meth:`check`, or its name is taken.
        """
        self._check(request)
        with self._lock:
            number = next(self._numbers)
            while request.request_id is None and (str(number) in self._active or str(number) in taken):
                number = next(self._numbers)
            request_id = str(number) if request.request_id is None else request.request_id
            if request_id in self._active or request_id in taken:
                raise InputError(f"request_id {request_id!r} is that of a request that has not ended; give another")
            seed = request.params.seed
            if seed is None:
                seed = derived_seed(self.options.seed, number)
            self._active[request_id] = submitted = _Submitted(request, request_id, seed)
            if request.params.structured_outputs is None:
                self.scheduler.add(submitted.begin(), request.priority)
        if request.params.structured_outputs is not None:
            self._grammar_workers.run(partial(self._begin_in_grammar, submitted))
        return request_id

    def _begin_in_grammar(self, submitted: _Submitted) -> None:
        """Queue a request when its grammar is compiled, in a worker's thread."""
        params, request_id = submitted.request.params, submitted.request_id
        assert params.structured_outputs is not None
        try:
            grammar = self._grammars.compile(params.structured_outputs)
        except BaseException as error:  # also a panic of Rust: it ends this request, and harms no other
            self._abort(submitted, None, "error", str(error))
            return

        def follow(sequence: Sequence) -> GrammarState:
            fail = partial(self._abort, submitted, sequence.index, "error")
            return GrammarState(grammar, sequence.params, fail)

        with self._lock:
            if self._active.get(request_id) is submitted:  # otherwise it was aborted, or the engine started anew
                self.scheduler.add(submitted.begin(follow), submitted.request.priority)

    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "abort") -> None:
        """Let a request, or one of its answers, end at the next :meth:`step`. Any thread may call it.

        A name that no request has, or one that has ended, is left alone. What the step before has made and was not
        returned yet is dropped.

        Args:
            request_id: the request's name.
            index: the answer's number; None ends all.
            reason: what its last :class:`~graphmode.engine.outputs.NewTokens` says: ``"stop"`` where its text has come
                to a stop text.
        """
        if (request := self._active.get(request_id)) is not None:
            self._abort(request, index, reason)

    def _abort(self, request: _Submitted, index: int | None, reason: FinishReason, cause: str | None = None) -> None:
        self._aborted.append((request, index, reason, cause))

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._active)

    def step(self) -> list[NewTokens]:
        """Launch the next batch, then take in the one before; return the new tokens that follow.

        The device computes a batch while the host reads the one before: what ends a sequence is known a batch late,
        and what was made for it since is dropped. One thread steps at a time.

        Returns:
            For each answer that got tokens or ended, what is new. What says why an answer ended is its last.

        Raises:
            EngineError: requests have not ended, and there is nothing to run.
            Exception: whatever a step raises. All requests have then ended without a last output; the engine has
                forgotten them and what its cache holds, and takes new ones.
        """
        try:
            return self._step()
        except BaseException:
            self.start_anew()
            raise

    def _step(self) -> list[NewTokens]:
        start = time.perf_counter()
        news = self.end_aborted()
        with self._lock:
            unfinished = len(self._active)
        jobs_done = self._grammar_workers.finished
        batch = self.scheduler.schedule()
        before, self._in_flight = self._in_flight, None if batch is None else self.runner.launch(batch)
        if batch is not None:
            self._note_admitted(batch.admitted, start)
        if before is None:
            # Where all wait for their grammars, so does the engine; otherwise nothing is left that could go on.
            if batch is None and unfinished and not self._grammar_workers.wait(jobs_done):
                raise EngineError(f"{unfinished} requests have not ended, and the engine finds nothing to run for them")
            return news
        result = before.result()
        changed = self.scheduler.update(before.batch, result.tokens, self.loaded.shape.eos_token_ids)
        logprobs = _noted_logprobs(before.batch, result) if result.logprobs is not None else {}
        drawn: list[tuple[GrammarState, list[int]]] = []
        for sequence, token_ids in changed.items():
            self._clock.tokens += len(token_ids)
            news.append(_new_tokens(sequence, token_ids, logprobs.get(sequence)))
            if sequence.finish_reason is not None:
                self._note_end(sequence)
            elif sequence.grammar is not None:
                drawn.append((sequence.grammar, token_ids))
        if drawn:
            self._grammar_workers.advance(drawn)
        if batch is not None and batch.family == before.batch.family == "decode":
            self._clock.steps += before.batch.steps
            self._clock.seconds += time.perf_counter() - start
        return news

    def end_aborted(self) -> list[NewTokens]:
        """End what was aborted, as :meth:`step` does first, and return the last that there is of it."""
        news = []
        while self._aborted:
            request, index, reason, cause = self._aborted.popleft()
            if self._active.get(request.request_id) is not request:
                continue
            request.make()
            for sequence in request.sequences if index is None else request.sequences[index : index + 1]:
                if sequence.finish_reason is None:  # otherwise it has ended meanwhile
                    sequence.finish_reason, sequence.stop_reason = reason, cause
                    self.scheduler.drop(sequence)
                    news.append(_new_tokens(sequence, [], None))
                    self._note_end(sequence)
        return news

    def _note_admitted(self, sequences: Iterable[Sequence], now: float) -> None:
        """Note how long requests have waited whose first answer begins to run."""
        for sequence in sequences:
            request = self._active[sequence.request_id]
            if request.since is not None:
                self._clock.note_queued(now - request.since)
                request.since = None

    def _note_end(self, sequence: Sequence) -> None:
        """Note that an answer has ended, and forget the request if it was the last one."""
        sequence.grammar = None
        request = self._active[request_id := sequence.request_id]
        request.unfinished -= 1
        if not request.unfinished:
            del self._active[request_id]

    def start_anew(self) -> None:
        """Forget all requests and what the cache holds: a step that was broken off may have left any half done."""
        old = self.scheduler
        with self._lock:
            self._active.clear()
            self._aborted.clear()
            self._in_flight = None
            self.scheduler = self._make_scheduler()
            self.scheduler.preemptions = old.preemptions
            self.scheduler.prefix_queries, self.scheduler.prefix_hits = old.prefix_queries, old.prefix_hits

    @property
    def stats(self) -> EngineStats:
        """What runs now, and what the steps did since the start or the last :meth:`reset_stats`. Any thread may ask."""
        graphs, clock, scheduler = self.runner.graphs.stats, self._clock, self.scheduler
        vision = self.runner.vision.graphs.stats if self.runner.vision else RunnerStats()
        running = len(scheduler.running)
        unfinished = sum(request.unfinished for request in list(self._active.values()))
        buckets: dict[str, dict[int, int]] = {}
        for (family, size), replays in graphs.buckets.copy().items():
            buckets.setdefault(family, {})[volume(size)] = replays
        return EngineStats(
            running=running,
            waiting=max(0, unfinished - running),
            blocks_used=[pool.num_blocks - pool.num_free for pool in scheduler.blocks.pools],
            blocks_total=[pool.num_blocks for pool in scheduler.blocks.pools],
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            steps=graphs.steps,
            replays=graphs.replays,
            eager_steps=graphs.eager_steps,
            hit_rate=graphs.hit_rate,
            misses={str(reason): count for reason, count in graphs.misses.copy().items()},
            rows=graphs.rows,
            padded_rows=graphs.padded_rows,
            padding_ratio=graphs.padding_ratio,
            buckets=buckets,
            replay_seconds=graphs.replay_seconds,
            graphs=graphs.graphs + vision.graphs,
            captures=graphs.captures + vision.captures,
            capture_seconds=graphs.capture_seconds + vision.capture_seconds,
            graph_bytes=graphs.graph_bytes + vision.graph_bytes,
            capture_peak_bytes=max(graphs.capture_peak_bytes, vision.capture_peak_bytes),
            capture_failures=graphs.capture_failures + vision.capture_failures,
            decode_steps=clock.steps,
            decode_seconds=clock.seconds,
            decode_ms_per_step=1e3 * clock.seconds / clock.steps if clock.steps else None,
            queue_seconds=list(clock.queued),
            queue_seconds_sum=clock.queued_seconds,
            generated_tokens=clock.tokens,
            preemptions=scheduler.preemptions,
            vision_runs=vision.steps,
            vision_misses={str(reason): count for reason, count in vision.misses.copy().items()},
        )

    def reset_stats(self) -> None:
        """Forget the steps so far; keep what is known of the graphs, of the cache and of what runs."""
        self.runner.graphs.stats.reset_steps()
        if self.runner.vision:
            self.runner.vision.graphs.stats.reset_steps()
        self._clock = _Clock()


def _noted_logprobs(batch: Batch, result: StepResult) -> dict[Sequence, list[TokenLogprobs]]:
    """Note the log-probabilities of prompts with their sequences; return those of the tokens that a batch made."""
    assert result.logprobs is not None
    scored = iter(result.prompt_logprobs)
    made = {}
    for row, logprobs in zip(batch.scheduled, result.logprobs, strict=True):
        row.sequence.prompt_logprobs += [next(scored) for _ in row.scored]
        if row.sequence.params.logprobs is not None:
            made[row.sequence] = logprobs
    return made


def _new_tokens(sequence: Sequence, token_ids: list[int], logprobs: list[TokenLogprobs] | None) -> NewTokens:
    scored = None
    if sequence.params.prompt_logprobs is not None and len(sequence.output_token_ids) == len(token_ids):
        scored = sequence.prompt_logprobs
    return NewTokens(
        sequence.request_id,
        sequence.index,
        token_ids,
        None if logprobs is None else logprobs[: len(token_ids)],
        scored,
        max(0, sequence.num_cached),
        sequence.finish_reason,
        sequence.stop_reason,
    )
