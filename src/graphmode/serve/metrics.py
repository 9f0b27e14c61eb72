"""What the server counts, and how Prometheus reads it.

Requests are counted here, in the process that speaks HTTP, as they pass. What the engine counts comes in its snapshots.
:data:`METRICS` is the one list of all series; :class:`Metrics` reads their values when it is scraped. Names are vLLM's
where the meaning is the same, so that dashboards and autoscalers made for vLLM read them too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from graphmode import __version__
from graphmode.engine.stats import QUEUE_BOUNDS
from graphmode.graph import Reason
from graphmode.serve.client import EngineState
from graphmode.serve.histograms import Buckets, Histogram
from graphmode.serve.history import History, Totals
from graphmode.serve.messages import STEP_BOUNDS, EngineSnapshot


class Engine(Protocol):
    """What has the state of the engine process: an :class:`~graphmode.serve.client.EngineClient`."""

    state: EngineState


# vLLM's bounds, and finer ones below, where its first would take in everything.
_FIRST_TOKEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
    *(0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
_LENGTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_ANSWERS = (1, 2, 5, 10, 20)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""What Prometheus' text format is called."""
SUCCESS = ("stop", "length", "abort")
"""The finish reasons of requests that did not fail. What else ends one is the cause of its failure."""
FAILURES = ("engine_down", "deadline", "error")
"""Causes for which a request fails that was accepted."""
REJECTIONS = ("queue_full", "invalid", "unauthorized", "too_large", "engine_down", "draining")
"""Reasons for which a request is not accepted."""
_REFUSALS = {400: "invalid", 401: "unauthorized", 413: "too_large"}  # by the status of the answer


def _zeros(names: Sequence[str]) -> Callable[[], Counter[str]]:
    """Return what makes counters that are there before anything is counted: a rate sees the first event only so."""
    return lambda: Counter(dict.fromkeys(names, 0))


@dataclass
class _Requests:
    """What was counted of requests since the server started."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    ended: Counter[str] = field(default_factory=_zeros(SUCCESS))
    failed: Counter[str] = field(default_factory=_zeros(FAILURES))
    rejected: Counter[str] = field(default_factory=_zeros(REJECTIONS))
    responses: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    active: int = 0
    streams: int = 0
    first_token: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN))
    inter_token: Histogram = field(default_factory=lambda: Histogram(_TOKEN))
    latency: Histogram = field(default_factory=lambda: Histogram(_REQUEST))
    prompt_length: Histogram = field(default_factory=lambda: Histogram(_LENGTH))
    answer_length: Histogram = field(default_factory=lambda: Histogram(_LENGTH))
    answers: Histogram = field(default_factory=lambda: Histogram(_ANSWERS))


class RequestTiming:
    """The times of one request. Made by :meth:`Metrics.request` when the request is accepted."""

    __slots__ = ("_counts", "_generated", "_last", "_prompt_tokens", "_start")

    def __init__(self, counts: _Requests, prompt_tokens: int) -> None:
        self._counts = counts
        self._prompt_tokens = prompt_tokens
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}
        self._generated = 0
        counts.active += 1

    def tokens(self, index: int, count: int) -> None:
        """Count ``count`` new tokens of the answer ``index``, which came together."""
        now, counts, last = time.perf_counter(), self._counts, self._last
        before = last.get(index)
        if before is not None:
            counts.inter_token.observe((now - before) / count, count)
        elif not last:
            counts.first_token.observe(now - self._start)
            counts.prompt_tokens += self._prompt_tokens
        last[index] = now
        self._generated += count
        counts.generation_tokens += count

    def ended(self, reason: str) -> None:
        """Count the end of the request, once.

        Args:
            reason: one of :data:`SUCCESS`, or the cause of its failure; ``invalid`` where the engine refused it, which
                counts as the rejection that its answer is.
        """
        counts = self._counts
        counts.active -= 1
        if reason in SUCCESS:
            counts.ended[reason] += 1
            counts.latency.observe(time.perf_counter() - self._start)
            counts.prompt_length.observe(self._prompt_tokens)
            counts.answer_length.observe(self._generated)
        elif reason != "invalid":
            counts.failed[reason] += 1


Value = float | Buckets | Mapping[Any, float] | None


@dataclass(frozen=True, slots=True)
class Series:
    """One metric.

    Attributes:
        name: as Prometheus knows it; counters get ``_total`` behind it.
        kind: of Prometheus' kinds.
        help: what it counts.
        value: reads it: a number or a histogram, or numbers by the values of ``labels``. None where it is not known.
        labels: beside ``model_name``.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    value: Callable[[Metrics], Value]
    labels: tuple[str, ...] = ()

    @property
    def exposed(self) -> str:
        """The name to ask Prometheus for, without the suffixes of a histogram."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    def family(self, metrics: Metrics) -> Metric:
        """Return the metric with its values now."""
        value, labels = self.value(metrics), ("model_name", *self.labels)
        made: Any = _FAMILIES[self.kind](self.name, self.help, labels=labels)
        if isinstance(value, Buckets):
            bounds = [*map(floatToGoString, value.bounds), "+Inf"]
            counts = accumulate(value.counts)
            made.add_metric([metrics.model_name], list(zip(bounds, counts, strict=True)), value.total)
        elif isinstance(value, Mapping):
            for key, number in value.items():
                values = key if isinstance(key, tuple) else (key,)
                made.add_metric([metrics.model_name, *map(str, values)], number)
        elif value is not None:
            made.add_metric([metrics.model_name], value)
        return made  # type: ignore[no-any-return]


_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


class Metrics(Collector):
    """All metrics of one server. Use it in the thread of the event loop alone.

    Args:
        model_name: the name under which the model is served: the label ``model_name`` of every series.
        engine: whose state is read when the metrics are.
    """

    def __init__(self, model_name: str, engine: Engine) -> None:
        self.model_name = model_name
        self.engine = engine
        self.requests = _Requests()
        self._snapshot: EngineSnapshot | None = None
        self._restarts = 0  # before the engine process of the snapshot
        self._counted: dict[str, Any] = {}  # what that process has counted
        self._before: dict[str, Any] = {}  # what those before it had counted, which are no more
        self.history = History()
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def request(self, prompt_tokens: int, answers: int = 1) -> RequestTiming:
        """Count a request that was accepted, and return what takes its times."""
        self.requests.answers.observe(answers)
        return RequestTiming(self.requests, prompt_tokens)

    def rejected(self, reason: str) -> None:
        """Count a request that was not accepted, by a reason of :data:`REJECTIONS` that its status does not tell."""
        self.requests.rejected[reason] += 1

    def response(self, method: str, route: str, status: int) -> None:
        """Count an answer of the HTTP server; ``route`` is the template of the path, never the path itself."""
        self.requests.responses[method if method in _METHODS else "other", route, str(status)] += 1
        if method == "POST" and status in _REFUSALS:  # a page that asks for the key is no rejection
            self.rejected(_REFUSALS[status])

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count a stream as open as long as the context is."""
        self.requests.streams += 1
        try:
            yield
        finally:
            self.requests.streams -= 1

    def engine_snapshot(self, snapshot: EngineSnapshot) -> None:
        """Take in what an engine process says of itself. A new process begins at zero; the sums here go on."""
        if self.engine.state.restarts != self._restarts:
            self._before = {name: self.counted(name) for name in {**self._before, **self._counted}}
            self._restarts = self.engine.state.restarts
        self._snapshot, self._counted = snapshot, _counters(snapshot)
        if self.history.wants():
            self.history.add(self.totals())

    @property
    def snapshot(self) -> EngineSnapshot | None:
        """The last that the engine process said; None before its first word, and once it has died."""
        state = self.engine.state
        alive = state.phase in ("ready", "stalled", "stopping") and state.restarts == self._restarts
        return self._snapshot if alive else None

    def said(self, name: str) -> Any:
        """Return what the engine's stats say now under ``name``; None if there are none."""
        return None if self.snapshot is None else self.snapshot.stats.get(name)

    def counted(self, name: str) -> Any:
        """Return what all engine processes have counted under ``name``: a number, numbers by key, or a list of them."""
        return _sum(self._before.get(name), self._counted.get(name))

    def totals(self) -> Totals:
        """Return what the history keeps of now."""
        requests = self.requests
        return Totals(
            time=self.history.now(),
            prompt_tokens=requests.prompt_tokens,
            generation_tokens=requests.generation_tokens,
            first_token=requests.first_token.buckets,
            inter_token=requests.inter_token.buckets,
            running=self.running or 0,
            waiting=self.waiting or 0,
            kv_cache_usage=self.kv_cache_usage or 0.0,
            steps=self.counted("steps") or 0,
            misses=self.misses,
            rows=self.counted("rows") or 0,
            padded_rows=self.counted("padded_rows") or 0,
            bucket_replays=self.counted("bucket_replays") or {},
            step_seconds=self.histogram("step_seconds", STEP_BOUNDS) or Histogram(STEP_BOUNDS).buckets,
        )

    def histogram(self, name: str, bounds: Sequence[float]) -> Buckets | None:
        """Return the histogram that engine processes have counted under ``name``, with its sum under ``name_sum``."""
        counts = self.counted(name)
        return None if counts is None else Buckets(bounds, counts, self.counted(f"{name}_sum") or 0.0)

    @property
    def running(self) -> int | None:
        """Sequences that the engine computes; None without an engine."""
        return None if self.snapshot is None else self.snapshot.running

    @property
    def waiting(self) -> int | None:
        """Sequences that wait for room in the engine; None without one."""
        return None if self.snapshot is None else self.snapshot.waiting

    @property
    def misses(self) -> dict[str, int]:
        """Steps that did not find their graph captured, by every reason there is."""
        return {str(reason): 0 for reason in Reason} | (self.counted("misses") or {})

    @property
    def hit_rate(self) -> float | None:
        """Share of the steps that found their graph captured, since the server started; None before the first."""
        steps = self.counted("steps")
        return (steps - sum(self.misses.values())) / steps if steps else None

    @property
    def kv_cache_usage(self) -> float | None:
        """Share of the KV cache's blocks that sequences hold, of the fullest cache group; None without an engine."""
        now = self.snapshot
        if now is None:
            return None
        return max(used / total for used, total in zip(now.kv_blocks_used, now.kv_blocks_total, strict=True))

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics with their values now."""
        for series in METRICS:
            yield series.family(self)

    def exposition(self) -> bytes:
        """Return all metrics as text of :data:`CONTENT_TYPE`.

        There is no OpenMetrics: prometheus-client writes colons as underscores there, and vLLM's names have them.
        """
        return generate_latest(self.registry)


_OF_STATS = (
    *("steps", "replays", "eager_steps", "misses", "rows", "padded_rows", "captures", "capture_seconds"),
    *("replay_seconds", "preemptions", "decode_steps", "decode_seconds", "queue_seconds", "queue_seconds_sum"),
)


def _counters(snapshot: EngineSnapshot) -> dict[str, Any]:
    """Return what an engine process has counted since it started."""
    stats = snapshot.stats
    return {name: stats[name] for name in _OF_STATS if stats.get(name) is not None} | {
        "capture_failures": len(stats["capture_failures"]),
        "bucket_replays": snapshot.replays,
        "prefix_queries": snapshot.prefix_queries,
        "prefix_hits": snapshot.prefix_hits,
        "failed_steps": snapshot.failed_steps,
        "step_seconds": snapshot.step_seconds,
        "step_seconds_sum": snapshot.step_seconds_sum,
    }


def _sum(one: Any, other: Any) -> Any:
    """Return the sum of numbers, of numbers by key, or of lists of numbers; None counts as nothing."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, Mapping):
        return {key: _sum(one.get(key), other.get(key)) for key in {**one, **other}}
    if isinstance(one, Sequence):
        return [_sum(first, second) for first, second in zip(one, other, strict=True)]
    return one + other


def _counted(name: str) -> Callable[[Metrics], Value]:
    return lambda metrics: metrics.counted(name)


def _said(name: str) -> Callable[[Metrics], Value]:
    return lambda metrics: metrics.said(name)


def _bucket_replays(metrics: Metrics) -> Value:
    counted = metrics.counted("bucket_replays")
    return counted and {tuple(key.split(":", 1)): steps for key, steps in counted.items()}


METRICS: tuple[Series, ...] = (
    # As vLLM has them.
    Series(
        "vllm:num_requests_running",
        "gauge",
        "Sequences that the engine computes.",
        lambda metrics: metrics.running,
    ),
    Series(
        "vllm:num_requests_waiting",
        "gauge",
        "Sequences that wait for room in the engine.",
        lambda metrics: metrics.waiting,
    ),
    Series(
        "vllm:kv_cache_usage_perc",
        "gauge",
        "Share of the KV cache's blocks in use, of the fullest cache group: 1 is all.",
        lambda metrics: metrics.kv_cache_usage,
    ),
    Series(
        "vllm:prefix_cache_queries",
        "counter",
        "Prompt tokens that were looked up in the prefix cache.",
        _counted("prefix_queries"),
    ),
    Series("vllm:prefix_cache_hits", "counter", "Of them, tokens that were found.", _counted("prefix_hits")),
    Series(
        "vllm:num_preemptions",
        "counter",
        "Times that a sequence gave up its blocks for want of memory, to be computed again.",
        _counted("preemptions"),
    ),
    Series(
        "vllm:prompt_tokens",
        "counter",
        "Prompt tokens of requests that got their first token.",
        lambda metrics: metrics.requests.prompt_tokens,
    ),
    Series(
        "vllm:generation_tokens",
        "counter",
        "Tokens generated for requests.",
        lambda metrics: metrics.requests.generation_tokens,
    ),
    Series(
        "vllm:request_success",
        "counter",
        "Requests that ended without a failure; a client that left is an abort.",
        lambda metrics: metrics.requests.ended,
        ("finished_reason",),
    ),
    Series(
        "vllm:time_to_first_token_seconds",
        "histogram",
        "From a request's acceptance to its first token.",
        lambda metrics: metrics.requests.first_token.buckets,
    ),
    Series(
        "vllm:inter_token_latency_seconds",
        "histogram",
        "Between two tokens of an answer; tokens that come together share the time since those before.",
        lambda metrics: metrics.requests.inter_token.buckets,
    ),
    Series(
        "vllm:e2e_request_latency_seconds",
        "histogram",
        "From a request's acceptance to its end, failures left out.",
        lambda metrics: metrics.requests.latency.buckets,
    ),
    Series(
        "vllm:request_queue_time_seconds",
        "histogram",
        "From a request's arrival in the engine to its first step.",
        lambda metrics: metrics.histogram("queue_seconds", QUEUE_BOUNDS),
    ),
    Series(
        "vllm:request_prompt_tokens",
        "histogram",
        "Prompt tokens of a request.",
        lambda metrics: metrics.requests.prompt_length.buckets,
    ),
    Series(
        "vllm:request_generation_tokens",
        "histogram",
        "Tokens generated for a request.",
        lambda metrics: metrics.requests.answer_length.buckets,
    ),
    Series(
        "vllm:request_params_n",
        "histogram",
        "Answers that a request asks for.",
        lambda metrics: metrics.requests.answers.buckets,
    ),
    # Requests, where vLLM has no name.
    Series(
        "graphmode_requests_active",
        "gauge",
        "Requests that were accepted and have not ended.",
        lambda metrics: metrics.requests.active,
    ),
    Series(
        "graphmode_requests_failed",
        "counter",
        "Requests that were accepted and failed, by cause.",
        lambda metrics: metrics.requests.failed,
        ("reason",),
    ),
    Series(
        "graphmode_requests_rejected",
        "counter",
        "Requests that were not accepted, by reason.",
        lambda metrics: metrics.requests.rejected,
        ("reason",),
    ),
    Series("graphmode_streams_open", "gauge", "Streams that are open.", lambda metrics: metrics.requests.streams),
    Series(
        "graphmode_http_responses",
        "counter",
        "Answers of the HTTP server.",
        lambda metrics: metrics.requests.responses,
        ("method", "route", "status"),
    ),
    # Graphs and steps.
    Series("graphmode_steps", "counter", "Steps that the engine ran.", _counted("steps")),
    Series("graphmode_replays", "counter", "Of them, replays of a graph.", _counted("replays")),
    Series("graphmode_eager_steps", "counter", "Of them, steps that ran eagerly.", _counted("eager_steps")),
    Series(
        "graphmode_misses",
        "counter",
        "Steps that did not find their graph captured, by reason.",
        lambda metrics: metrics.misses,
        ("reason",),
    ),
    Series(
        "graphmode_hit_rate",
        "gauge",
        "Share of the steps since the server started that found their graph captured.",
        lambda metrics: metrics.hit_rate,
    ),
    Series("graphmode_replayed_rows", "counter", "True rows of the replayed steps.", _counted("rows")),
    Series("graphmode_padding_tokens", "counter", "Padding rows of the replayed steps.", _counted("padded_rows")),
    Series(
        "graphmode_bucket_replays",
        "counter",
        "Replays by the captured size that served them.",
        _bucket_replays,
        ("family", "size"),
    ),
    Series(
        "graphmode_step_seconds",
        "histogram",
        "Wall time of a step: scheduling, launch, and the wait for the step before.",
        lambda metrics: metrics.histogram("step_seconds", STEP_BOUNDS),
    ),
    Series(
        "graphmode_failed_steps",
        "counter",
        "Steps that raised, which ends the requests that run.",
        _counted("failed_steps"),
    ),
    Series(
        "graphmode_replay_seconds",
        "counter",
        "Time that the host spent in replays: on a CPU what steps took, elsewhere what launches did.",
        _counted("replay_seconds"),
    ),
    Series("graphmode_graphs", "gauge", "Graphs that the engine holds.", _said("graphs")),
    Series("graphmode_graph_bytes", "gauge", "Device memory that the graphs keep.", _said("graph_bytes")),
    Series("graphmode_captures", "counter", "Captures that succeeded.", _counted("captures")),
    Series("graphmode_capture_failures", "counter", "Graphs that could not be captured.", _counted("capture_failures")),
    Series("graphmode_capture_seconds", "counter", "Time in captures.", _counted("capture_seconds")),
    # The engine process.
    Series(
        "graphmode_engine_up",
        "gauge",
        "1 if the engine takes requests, else 0.",
        lambda metrics: float(metrics.engine.state.phase == "ready"),
    ),
    Series(
        "graphmode_engine_stalled",
        "gauge",
        "1 if requests run and no step has ended for too long, else 0.",
        lambda metrics: float(metrics.engine.state.phase == "stalled"),
    ),
    Series(
        "graphmode_engine_restarts",
        "counter",
        "Times that the engine process was started again.",
        lambda metrics: metrics.engine.state.restarts,
    ),
    Series(
        "graphmode_captures_pending",
        "gauge",
        "Graphs that the engine has still to capture before it takes requests.",
        lambda metrics: metrics.engine.state.to_capture - metrics.engine.state.captured,
    ),
    Series("graphmode_info", "gauge", "1, with the version of graphmode.", lambda _: {__version__: 1.0}, ("version",)),
)
"""Every metric that the server has, in the order of the documentation."""
