"""Runs the benchmark: checks everything that was asked for, then measures mode after mode."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from graphmode.engine.config import EngineOptions, own_names, resolve_limits
from graphmode.engine.llm import LLM
from graphmode.errors import InputError, ModelError
from graphmode.graph import get_backend
from graphmode.models.bundled_model import bundled_model
from graphmode.models.checkpoint import Checkpoint, find_checkpoint
from graphmode.models.hf.rotary import context_length
from graphmode.observe.bench.contestants import Contestant, Ours, Transformers, graph_free
from graphmode.observe.bench.results import Figure, Row, of_many, of_runs
from graphmode.observe.bench.roofline import ModelCost, Roofline, Work, measure_roofline, model_cost
from graphmode.observe.bench.workloads import (
    OFFLINE_LONGEST,
    OFFLINE_REQUESTS,
    PROMPT_TOKENS,
    RANDOM_MODELS,
    Request,
    Workload,
    offline_requests,
    random_requests,
    write_config,
)
from graphmode.observe.machine import device_name, versions

COMPARABLE = ("eager", "transformers")
"""What can be measured beside ``graph``."""

_BATCHES = (1, 8, 64, 256)
_MODEL_LEN = 2048
# Slow modes measure a step as exactly with fewer tokens.
_MOST_TOKENS = {"eager": 33, "transformers": 17}
_TRANSFORMERS_LARGEST = 64


@dataclass(frozen=True)
class Plan:
    """What the user asked for; None means the workload's default.

    Attributes:
        workload: what to measure.
        model: ``bundled``, one of :data:`RANDOM_MODELS`, a local folder or a hub name.
        compare: what to measure beside graphs. Default: by ``latency`` eager runs, else nothing.
        batches: requests submitted together. Default: 1, 8, 64 and 256, as far as a step holds them; offline 256.
        tokens: generated for each request; offline the longest prompt and answer. Default 129; offline 1024. Eagerly
            at most 33, by transformers at most 17, except by ``latency``.
        repeats: runs that are timed, after one that is not; default 3. By ``latency`` requests, default 20.
        options: of the engine. By default ``max_model_len`` is 2048 and prefix caching is off.
    """

    workload: Workload
    model: str = "bundled"
    compare: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    tokens: int | None = None
    repeats: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def bench(plan: Plan, found: Callable[[Row], None] = lambda row: None, *, progress: bool = False) -> list[Row]:
    """Measure what a plan asks for.

    Args:
        plan: what to measure.
        found: called with each row as soon as it is there.
        progress: whether to show a progress bar while graphs are captured.

    Raises:
        InputError: the plan holds something that cannot be run; nothing is run then.
        ModelError: the model is not there or cannot be run.
        BackendError: the device is not there.
    """
    with model_folder(plan.model) as folder:
        plan = resolve(plan, folder)
        rows: list[Row] = []

        def take(row: Row) -> None:
            rows.append(row)
            found(row)

        scale: _Scale | None = None
        assert plan.compare is not None
        for mode in ("graph", *plan.compare):
            scale = _run_mode(plan, mode, folder, scale, progress, take)
            gc.collect()  # an engine is a reference cycle; the next mode needs its memory
            if scale.device.type != "cpu":
                torch.accelerator.empty_cache()
    return rows


@contextmanager
def model_folder(model: str) -> Iterator[str | Path]:
    """Yield the folder of a model, or its hub name; for one with random weights, a folder of its configuration."""
    if model == "bundled":
        yield bundled_model()
    elif model in RANDOM_MODELS:
        with tempfile.TemporaryDirectory() as folder:
            write_config(model, Path(folder))
            yield Path(folder)
    elif Path(model).exists() or ("/" in model and not model.startswith(("/", ".", "~"))):
        yield model
    else:
        raise ModelError(
            f"there is no model {model!r}; give bundled, {', '.join(RANDOM_MODELS)}, a folder or a hub name such as "
            "Qwen/Qwen3-0.6B"
        )


def resolve(plan: Plan, folder: str | Path) -> Plan:
    """Complete a plan and check it, before any work starts.

    Args:
        plan: what the user asked for.
        folder: what holds the model.

    Raises:
        InputError: something that cannot be run.
        ModelError: the model's configuration cannot be read.
    """
    given = own_names(plan.options)
    if EngineOptions(**given).resolved_graph_mode == "none":
        raise InputError("the options turn graphs off; leave that out and give --compare eager")
    offline, latency = plan.workload is Workload.OFFLINE, plan.workload is Workload.LATENCY
    compare = plan.compare if plan.compare is not None else ("eager",) if latency else ()
    if unknown := sorted(set(compare) - set(COMPARABLE)):
        raise InputError(f"cannot compare with {unknown}; there are {list(COMPARABLE)}")
    if offline and "transformers" in compare:
        raise InputError("generate of transformers takes no requests of different lengths; compare offline with eager")
    least = 2 if plan.workload in (Workload.DECODE, Workload.LATENCY) else 1
    default = OFFLINE_LONGEST if offline else 1 if plan.workload is Workload.PREFILL else 129
    tokens = default if plan.tokens is None else plan.tokens
    if tokens < least:
        raise InputError(f"tokens is {tokens}; {plan.workload} needs at least {least}")
    if plan.workload is Workload.PREFILL and tokens > 1:
        raise InputError(f"tokens is {tokens}; prefill makes one token a request. Leave it out")
    repeats = plan.repeats if plan.repeats is not None else 20 if latency else 3
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; it must be at least 1")
    options = {"enable_prefix_caching": False, **given}
    if plan.model in RANDOM_MODELS:
        options.setdefault("load_format", "dummy")
    positions = context_length(_checkpoint(folder, options).read(AutoConfig, "config.json"))[0]
    options.setdefault("max_model_len", min(_MODEL_LEN, positions))
    limits = resolve_limits(EngineOptions(**options), positions, get_backend(options.get("device", "auto")).device)
    longest = 2 * tokens if offline else PROMPT_TOKENS + tokens
    if longest > limits.max_model_len:
        raise InputError(
            f"a sequence gets {longest} tokens, more than max_model_len={limits.max_model_len}; lower tokens from "
            f"{tokens}" + (f", or raise max_model_len to {longest}" if longest <= positions else "")
        )
    if plan.batches is not None:
        batches = plan.batches
    elif offline or latency:
        batches = (OFFLINE_REQUESTS if offline else 1,)
    else:
        batches = tuple(batch for batch in _BATCHES if batch <= limits.max_num_seqs)
    if not batches or min(batches) < 1:
        raise InputError(f"batches are {list(batches)}; each must be at least 1")
    if latency and batches != (1,):
        raise InputError(f"batches are {list(batches)}; latency runs one request at a time. Leave them out")
    if not offline and max(batches) > limits.max_num_seqs:
        raise InputError(
            f"batch {max(batches)} is more than max_num_seqs={limits.max_num_seqs}, the sequences of a step; lower it, "
            "or raise max_num_seqs"
        )
    return replace(plan, compare=compare, tokens=tokens, repeats=repeats, batches=batches, options=options)


def _checkpoint(folder: str | Path, options: Mapping[str, Any]) -> Checkpoint:
    return find_checkpoint(
        folder,
        load_format=options.get("load_format", "auto"),
        trust_remote_code=options.get("trust_remote_code", False),
    )


@dataclass(frozen=True)
class _Scale:
    """What all modes of a run share.

    Attributes:
        device: where they run.
        dtype: of the weights.
        vocab_size: of the model.
        cost: of the model's steps; None where it is not known.
        roofline: of the device; None on a CPU, whose caches may hold a model.
    """

    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    cost: ModelCost | None
    roofline: Roofline | None

    def seconds(self, work: Callable[[ModelCost], Work]) -> float | None:
        """Return the floor of a work, in seconds."""
        return None if self.cost is None or self.roofline is None else self.roofline.seconds(work(self.cost))


def _run_mode(
    plan: Plan, mode: str, folder: str | Path, scale: _Scale | None, progress: bool, found: Callable[[Row], None]
) -> _Scale:
    """Measure one mode at all batches. The first mode is ours; the others share its device, dtype and floor."""
    torch.manual_seed(0)
    start = time.perf_counter()
    llm: LLM | None = None
    options: Mapping[str, Any] = {}
    contestant: Contestant
    if mode == "transformers":
        assert scale is not None
        load_format = plan.options.get("load_format", "auto")
        contestant = Transformers(_checkpoint(folder, plan.options), load_format, scale.device, scale.dtype)
    else:
        options = graph_free(plan.options) if mode == "eager" else plan.options
        llm = LLM(folder, progress=progress, **options)
        contestant = Ours(llm)
    setting: dict[str, Any] = {"startup_seconds": time.perf_counter() - start}
    if scale is None:
        assert llm is not None
        scale = _scale(llm)
    setting["dtype"] = str(scale.dtype).removeprefix("torch.")
    if llm is not None:
        setting |= {"graphs": llm.stats.graphs, "graph_bytes": llm.stats.graph_bytes, "options": _plain(options)}
    if scale.roofline is not None:
        setting["roofline"] = vars(scale.roofline)
    assert plan.batches is not None
    for batch in plan.batches:
        if mode == "transformers" and batch > _TRANSFORMERS_LARGEST:
            continue
        if llm is not None:
            llm.engine.core.reset_stats()
        figures, details = _measure(plan, mode, batch, contestant, scale)
        if llm is not None:
            details["hit_rate"] = llm.stats.hit_rate
        found(
            Row(
                plan.workload.value,
                shown_name(plan.model),
                mode,
                batch,
                tuple(figures),
                device_name(scale.device),
                versions(),
                datetime.now(UTC).date().isoformat(),
                details | setting,
            )
        )
    return scale


def _scale(llm: LLM) -> _Scale:
    loaded, device = llm.engine.core.loaded, llm.engine.core.device
    cost = model_cost(loaded.model, loaded.shape.caches)
    roofline = None
    if device.type != "cpu":
        roofline = measure_roofline(device, loaded.model.dtype)
        torch.accelerator.empty_cache()
    return _Scale(device, loaded.model.dtype, loaded.shape.vocab_size, cost, roofline)


def shown_name(model: str) -> str:
    """Return the model's name in results."""
    return Path(model).resolve().name if Path(model).exists() else model


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, (int, float, str, list)) else str(value) for name, value in options.items()
    }


def _measure(
    plan: Plan, mode: str, batch: int, contestant: Contestant, scale: _Scale
) -> tuple[list[Figure], dict[str, Any]]:
    """Measure one batch: the figures, and what else describes them."""
    assert plan.tokens is not None
    assert plan.repeats is not None
    if plan.workload is Workload.OFFLINE:
        offline = offline_requests(batch, plan.tokens, scale.vocab_size)
        made = sum(request.max_tokens for request in offline)
        rates = [made / _seconds(contestant, offline) for _ in range(plan.repeats + 1)][1:]
        least = scale.seconds(lambda cost: cost.requests(offline))
        figures = [of_runs("tokens_per_s", rates, made / least if least else None)]
        return figures, {"tokens": plan.tokens, "repeats": plan.repeats, "generated_tokens": made}

    tokens = plan.tokens
    if plan.workload is not Workload.LATENCY:  # whose CPU time a token holds a share of the prompt's
        tokens = min(tokens, _MOST_TOKENS.get(mode, tokens))
    requests = random_requests(batch, tokens, scale.vocab_size)
    first = _ms(scale.seconds(lambda cost: cost.prefill(batch, PROMPT_TOKENS)))
    step = _ms(scale.seconds(lambda cost: cost.decode_step(batch, tokens, PROMPT_TOKENS))) if tokens > 1 else None
    if plan.workload is Workload.PREFILL:
        figures = [of_runs("first_token_ms", prefill_ms(contestant, requests, plan.repeats), first)]
    elif plan.workload is Workload.DECODE:
        figures = [of_runs("step_ms", decode_ms(contestant, requests, plan.repeats), step)]
    else:
        figures = latency_ms(contestant, requests[0], plan.repeats, step, first)
    return figures, {"prompt_tokens": PROMPT_TOKENS, "tokens": tokens, "repeats": plan.repeats}


def prefill_ms(contestant: Contestant, requests: Sequence[Request], repeats: int) -> list[float]:
    """Return the times of ``generate`` for one token a request, in milliseconds, after a run that is not timed."""
    one = [replace(request, max_tokens=1) for request in requests]
    return [1e3 * _seconds(contestant, one) for _ in range(repeats + 1)][1:]


def decode_ms(contestant: Contestant, requests: Sequence[Request], repeats: int) -> list[float]:
    """Return the times of a decode step in milliseconds, each (time for n tokens - time for 1 token) / (n - 1)."""
    steps = requests[0].max_tokens - 1
    _seconds(contestant, requests)
    firsts = prefill_ms(contestant, requests, repeats)
    return [(1e3 * _seconds(contestant, requests) - first) / steps for first in firsts]


def latency_ms(
    contestant: Contestant, request: Request, repeats: int, step: float | None, first: float | None
) -> list[Figure]:
    """Return the figures of a request that runs alone, ``repeats`` times after one that is not timed.

    Args:
        contestant: who runs it.
        request: at least two tokens.
        repeats: how often.
        step: the floor of a token, in milliseconds.
        first: the floor of the first token, in milliseconds.

    Returns:
        The first token, the mean time of a token after it in each request, the pauses between tokens as they come, and
        the time that all CPU cores together spent on each request, in seconds a token of its answer.
    """
    contestant.arrivals(request)
    firsts, steps, gaps, cpu = [], [], [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        times = contestant.arrivals(request)
        cpu.append((time.process_time() - cpu_start) / len(times))
        firsts.append(1e3 * (times[0] - start))
        steps.append(1e3 * (times[-1] - times[0]) / (len(times) - 1))
        gaps += [1e3 * (later - earlier) for earlier, later in pairwise(times)]
    return [
        of_many("step_ms", steps, step),
        of_many("first_token_ms", firsts, first),
        of_many("gap_ms", gaps),
        of_many("cpu_seconds_per_token", cpu),
    ]


def _seconds(contestant: Contestant, requests: Sequence[Request]) -> float:
    start = time.perf_counter()
    contestant.generate(requests)
    return time.perf_counter() - start


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
