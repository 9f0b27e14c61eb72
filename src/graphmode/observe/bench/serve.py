"""Load on an OpenAI-compatible endpoint: what its users would see."""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from graphmode.errors import EndpointError, InputError
from graphmode.observe.bench.drive import Phase, Seen, run
from graphmode.observe.bench.prompts import TokenPrompts, WordPrompts, find_prompts
from graphmode.observe.bench.results import Figure, Row, of_many
from graphmode.observe.bench.streams import Answer, endpoint
from graphmode.observe.bench.traffic import TOKENS, Lengths, Planned, arrival_times, read_trace
from graphmode.observe.endpoint import Server, advice, find_server, refusal

_LEAST = 20  # requests in waves
_STREAMS_PER_PROCESS = 64
_SLOW = 0.010  # seconds that the client may be behind before its times are doubtful


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the user asked for.

    Attributes:
        base_url: of the endpoint, with or without ``/v1``.
        key: sent as a bearer token; None for none.
        model: its name there; None: the first of ``/v1/models``.
        api: ``completions`` or ``chat``.
        waves: numbers of streams; each gives a row: waves in which all streams are sent at once.
        concurrency: numbers of streams; each gives a row: so many requests are in flight at any time.
        rates: requests a second; each gives a row.
        poisson: whether requests of a rate come as a Poisson process, else evenly spaced.
        trace: a file of requests, with their times where none of the three is given.
        prompt_tokens: of prompts.
        max_tokens: of answers.
        requests: of a row. Default: 3 waves, and at least 20 requests; 8 times the concurrency; 100 of a rate; the
            trace once.
        warmup: requests before each row, which are not counted in. Default: as many as streams, 8 of a rate.
        ignore_eos: ask for answers of exactly ``max_tokens``.
        body: what else requests hold, such as ``temperature``. Default: nothing, so that the server samples as it does
            for its users.
        seed: of lengths, prompts and times.
        vocab_size: draw the tokens of prompts from all below it, where prompts are tokens.
        processes: of the client. Default: one for 64 streams, as far as a quarter of the cores goes.
        timeout: seconds that a request may take.
        server_pid: a process whose CPU time, with that of its children, is measured; None measures none.
        label: the row's mode in tables.
    """

    base_url: str
    key: str | None = None
    model: str | None = None
    api: str = "completions"
    waves: tuple[int, ...] = ()
    concurrency: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    poisson: bool = True
    trace: Path | None = None
    prompt_tokens: Lengths = TOKENS
    max_tokens: Lengths = TOKENS
    requests: int | None = None
    warmup: int | None = None
    ignore_eos: bool = True
    body: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    vocab_size: int | None = None
    processes: int | None = None
    timeout: float = 600.0
    server_pid: int | None = None
    label: str = "served"

    def __post_init__(self) -> None:
        given = [name for name in ("waves", "concurrency", "rates") if getattr(self, name)]
        if len(given) > 1 or (not given and self.trace is None):
            raise InputError(
                f"given are {' and '.join(given) or 'no waves, concurrency, rates or trace'}; give one of them"
            )
        for name in ("waves", "concurrency", "rates"):
            if any(not 0 < each < math.inf for each in getattr(self, name)):
                raise InputError(f"{name} are {list(getattr(self, name))}; all must be positive")
        for name, least in (("requests", 1), ("warmup", 0), ("vocab_size", 2), ("processes", 1), ("timeout", 1e-3)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise InputError(f"{name} is {value}; it must be at least {least}")
        if self.api not in ("completions", "chat"):
            raise InputError(f"api is {self.api!r}; it must be completions or chat")


# What is sent


@dataclass(frozen=True)
class _Sender:
    """Makes the bodies of requests."""

    load: Load
    server: Server
    prompts: TokenPrompts | WordPrompts
    counts_tokens: bool

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.load.api == "chat" else "/v1/completions"

    def body(self, planned: Planned, rng: random.Random) -> bytes:
        prompt = planned.prompt if planned.prompt is not None else self.prompts.draw(planned.prompt_tokens, rng)
        usage = {"include_usage": True} | ({"continuous_usage_stats": True} if self.counts_tokens else {})
        values: dict[str, Any] = {"model": self.server.model, "max_tokens": planned.max_tokens, "stream": True}
        values |= {"messages": [{"role": "user", "content": prompt}]} if self.load.api == "chat" else {"prompt": prompt}
        values |= {"stream_options": usage} | ({"ignore_eos": True} if self.load.ignore_eos else {})
        return json.dumps(values | dict(self.load.body)).encode()


def _find_sender(load: Load, server: Server, http: httpx.Client) -> _Sender:
    """Find out which prompts the endpoint takes, and whether it counts tokens as they come."""
    prompts = find_prompts(http, server.url, server.headers, server.model, load.api, load.vocab_size)
    sender = _Sender(load, server, prompts, counts_tokens=True)
    rng = random.Random(load.seed)
    planned = Planned(prompts.least + 8, 2)
    for each in (sender, replace(sender, counts_tokens=False)):
        response = http.post(
            server.url + sender.path,
            content=each.body(planned, rng),
            headers=server.headers | {"Content-Type": "application/json"},
        )
        if response.status_code == 200:
            return each
    fix = advice(response.status_code)
    if "ignore_eos" in response.text:
        fix = "; leave out ignore_eos with --no-ignore-eos"
    raise EndpointError(f"POST {server.url}{sender.path}: {refusal(response)}{fix}")


def _plans(load: Load, longest: int | None) -> Iterator[tuple[str, float, list[list[Planned]], int]]:
    """Yield for each row: what it is, its number, its requests (one list a phase), and its streams (0 of a rate)."""
    kinds: list[tuple[str, float]] = [("wave", each) for each in load.waves]
    kinds += [("concurrency", each) for each in load.concurrency] + [("rate", each) for each in load.rates]
    for kind, number in kinds or [("trace", 0)]:
        rng = random.Random(load.seed)
        planned: list[Planned] = []
        if load.trace is not None:
            planned = read_trace(load.trace, load.max_tokens, rng)
            if load.requests is not None:
                planned = (
                    (planned * -(-load.requests // len(planned)))[: load.requests]
                    if kinds
                    else planned[: load.requests]
                )
        count = len(planned) or load.requests
        if count is None:
            streams = math.ceil(number)
            count = {"wave": max(3 * streams, -(-_LEAST // streams) * streams), "concurrency": 8 * streams}.get(
                kind, 100
            )
        if kind == "wave":
            count = max(1, count // int(number)) * int(number)
        planned = planned or [
            Planned(max(1, load.prompt_tokens.draw(rng)), load.max_tokens.draw(rng)) for _ in range(count)
        ]
        if longest is not None:
            planned = [_within(each, longest) for each in planned]
        if kind == "rate":
            times = arrival_times(len(planned), number, rng, poisson=load.poisson)
            planned = [replace(each, at=at) for each, at in zip(planned, times, strict=True)]
        elif kind != "trace":
            planned = [replace(each, at=None) for each in planned]
        elif planned[0].at is None:
            raise InputError(f"trace {load.trace} has no times; add --concurrency, --wave or --rate")
        size = int(number) if kind == "wave" else len(planned)
        phases = [planned[at : at + size] for at in range(0, len(planned) - size + 1, size)]
        yield kind, number, phases, int(number) if kind in ("wave", "concurrency") else 0


def _within(planned: Planned, longest: int) -> Planned:
    """Return a request that the model's length holds: distributions have tails."""
    max_tokens = min(planned.max_tokens, longest - 1)
    return replace(planned, max_tokens=max_tokens, prompt_tokens=min(planned.prompt_tokens, longest - max_tokens))


# The run


def serve(load: Load, found: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Send the load, and return a row for each number of streams or rate.

    Args:
        load: what is sent.
        found: called with each row as soon as it is there.

    Raises:
        InputError: the load cannot be sent.
        EndpointError: the endpoint is not there or refuses it.
    """
    plans = list(_plans(load, None))  # what is wrong with it is said before anything is sent
    watched = _processes_of(load.server_pid)
    rows = []
    with httpx.Client(timeout=load.timeout) as http:
        server = find_server(http, load.base_url, load.key, load.model)
        sender = _find_sender(load, server, http)
        if server.longest is not None:
            plans = list(_plans(load, server.longest))
        for kind, number, planned, streams in plans:
            rows.append(_row(sender, kind, number, planned, streams, watched))
            found(rows[-1])
    return rows


def _processes_of(pid: int | None) -> list[psutil.Process]:
    if pid is None:
        return []
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error as error:
        raise InputError(f"server_pid is {pid}: {error}; give the id of a process that runs here") from error


def _device(server: Server) -> str:
    """Return the name of the server's device; of a server on another machine, what it calls it."""
    import torch

    from graphmode.observe.machine import device_name

    named = server.version.get("device")
    if not isinstance(named, str):
        return "unknown device"
    if urlsplit(server.url).hostname in ("127.0.0.1", "localhost", "::1"):
        with suppress(RuntimeError):  # it is a name already
            return device_name(torch.device(named))
    return named


def _command(process: psutil.Process) -> str:
    """Return what of a command line tells processes of Python apart: the module that it runs, or the program."""
    line = process.cmdline()
    return " ".join(line[1:3] if line[1:2] == ["-m"] else line[:1])


def _row(
    sender: _Sender, kind: str, number: float, planned: list[list[Planned]], streams: int, watched: list[psutil.Process]
) -> Row:
    load = sender.load
    rng = random.Random(f"{load.seed} {kind} {number}")
    warmup = (streams or 8) if load.warmup is None else load.warmup
    first = planned[0]
    warm = [replace(first[index % len(first)], at=None) for index in range(warmup)]
    phases = [Phase([sender.body(each, rng) for each in warm], None, streams or min(8, max(1, warmup)), False)]
    for part in planned:
        due = [each.at for each in part if each.at is not None]
        phases.append(Phase([sender.body(each, rng) for each in part], due or None, streams, True))
    most = streams or _STREAMS_PER_PROCESS
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = load.processes or max(1, min(-(-most // _STREAMS_PER_PROCESS), cores // 4))
    processes = min(processes, min(len(phase.bodies) for phase in phases[1:]))
    cpu: list[list[float]] = []

    def look() -> None:
        cpu.append([sum(process.cpu_times()[:2]) for process in watched])

    to = endpoint(sender.server.url, sender.path, sender.server.headers)
    done = run(to, phases, load.timeout, processes, look)
    parts = [[answer for each in done for answer in each.phases[index]] for index in range(len(phases))]
    asked = [each.max_tokens for part in planned for each in part]
    row = measured(parts[1:], is_wave=kind == "wave")
    details = {
        **row.details,
        "kind": kind,
        "number": number,
        "api": load.api,
        "prompts": sender.prompts.kind,
        "prompt_tokens_asked": str(load.prompt_tokens) if load.trace is None else "trace",
        "max_tokens_asked": str(load.max_tokens) if load.trace is None else "trace",
        "mean_max_tokens": sum(asked) / len(asked),
        "sampling": dict(load.body) or "the server's default",
        "ignore_eos": load.ignore_eos,
        "arrivals": ("poisson" if load.poisson else "constant") if kind == "rate" else kind,
        "warmup": {"requests": warmup, "errors": _errors(parts[0])},
        "client": _client(done),
        "server": dict(sender.server.version),
    }
    figures = row.figures
    if watched and (tokens := row.details["output_tokens"]):
        took = [(after - before) / tokens for before, after in zip(cpu[1], cpu[-1], strict=True)]
        figures += (Figure("cpu_seconds_per_token", sum(took)),)
        details["processes"] = [
            {"command": _command(process), "cpu_seconds_per_token": each}
            for process, each in zip(watched, took, strict=True)
        ]
    return replace(
        row,
        model=sender.server.model,
        mode=load.label,
        batch=streams,
        figures=figures,
        device=_device(sender.server),
        details=details,
    )


def measured(waves: Sequence[Sequence[Answer]], *, is_wave: bool) -> Row:
    """Return the figures of answers; those that failed count as errors alone.

    Args:
        waves: the answers of each wave, or all of them as one.
        is_wave: whether the requests of each were sent at once: tokens are then also timed after the last first one.
    """
    from graphmode.observe.machine import commit, versions  # imports torch, which processes of the client do without

    answers = [answer for wave in waves for answer in wave]
    good = [answer for answer in answers if answer.error is None and len(answer.times)]
    figures: list[Figure] = []

    def add(name: str, samples: Iterable[float]) -> None:
        if milliseconds := [1e3 * each for each in samples]:
            figures.append(of_many(name, milliseconds))

    add("first_token_ms", (answer.times[0] - answer.start for answer in good))
    add("token_ms", (each for answer in good if (each := _seconds_a_token(answer, answer.times[0])) is not None))
    add("gap_ms", (gap for answer in good for gap in _gaps(answer)))
    if is_wave:
        add("after_last_first_token_ms", (each for wave in waves for each in _after_last_first(wave)))
    add("request_ms", (answer.end - answer.start for answer in good))
    seconds = sum(max(each.end for each in wave) - min(each.start for each in wave) for wave in waves)
    tokens = round(sum(answer.num_tokens for answer in good))
    figures += [Figure("requests_per_s", len(good) / seconds), Figure("tokens_per_s", tokens / seconds)]
    counts = [answer.prompt_tokens for answer in good if answer.prompt_tokens]
    details = {
        "requests": len(answers),
        "answered": len(good),
        "errors": _errors(answers),
        "messages": list(dict.fromkeys(answer.message for answer in answers if answer.message))[:3],
        "seconds": seconds,
        "output_tokens": tokens,
        "prompt_tokens": sum(counts) / len(counts) if counts else None,
        "tokens_counted_by": "server" if all(answer.counted for answer in good) else "text",
        "events_per_token": sum(len(answer.times) for answer in good) / tokens if tokens else None,
        "late_ms": 1e3 * max((answer.late for answer in answers), default=0.0),
        "commit": commit(),
    }
    today = datetime.now(UTC).date().isoformat()
    return Row("serve", "", "", len(answers), tuple(figures), "", versions(), today, details)


def _seconds_a_token(answer: Answer, since: float) -> float | None:
    """Return the mean time of a token that came after the first arrival at a time or later; None if there is none."""
    first = next((index for index, at in enumerate(answer.times) if at >= since), len(answer.times))
    tokens = sum(answer.tokens[first + 1 :])
    return (answer.times[-1] - answer.times[first]) / tokens if tokens else None


def _gaps(answer: Answer) -> Iterator[float]:
    """Yield the time of each token after the first arrival; those that came together share theirs."""
    for (before, after), tokens in zip(pairwise(answer.times), answer.tokens[1:], strict=True):
        yield from [(after - before) / tokens] * max(1, round(tokens)) if tokens else ()


def _after_last_first(wave: Sequence[Answer]) -> list[float]:
    """Return each answer's time of a token after all answers of a wave have their first."""
    good = [answer for answer in wave if answer.error is None and len(answer.times)]
    last_first = max((answer.times[0] for answer in good), default=0.0)
    return [each for answer in good if (each := _seconds_a_token(answer, last_first)) is not None]


def _errors(answers: Iterable[Answer]) -> dict[str, int]:
    causes = (answer.error or ("answer without tokens" if not len(answer.times) else "") for answer in answers)
    return dict(Counter(filter(None, causes)))


def _client(done: Sequence[Seen]) -> dict[str, float]:
    """Return how busy the client itself was: times that it was late by are in every figure."""
    delays = sorted(delay for each in done for delay in each.delays) or [0.0]
    return {
        "processes": len(done),
        "cores": sum(each.cpu_seconds / each.wall_seconds for each in done if each.wall_seconds),
        "delay_p50_ms": 1e3 * delays[len(delays) // 2],
        "delay_p99_ms": 1e3 * delays[-(-99 * len(delays) // 100) - 1],
        "delay_most_ms": 1e3 * delays[-1],
    }


# What is printed

_TABLE = {
    "first_token_ms": "first token",
    "token_ms": "a token, mean of each answer",
    "gap_ms": "a token, each",
    "after_last_first_token_ms": "a token, after the last first one",
    "request_ms": "whole answer",
}


def summary(row: Row) -> str:
    """Return what a person reads of a row."""
    details, figures = row.details, {figure.name: figure for figure in row.figures}
    number = details["number"]
    what = {
        "wave": f"{number:g} streams at once, {details['requests'] // number if number else 0:g} waves",
        "concurrency": f"{number:g} streams",
        "rate": f"{number:g} requests/s ({details['arrivals']})",
        "trace": "the trace's times",
    }[details["kind"]]
    prompts = "" if details["prompt_tokens"] is None else f" (mean {details['prompt_tokens']:.1f}, says the server)"
    lines = [
        f"{row.model}, {details['api']}: {what}; {details['answered']} of {details['requests']} requests answered in "
        f"{details['seconds']:.2f} s, after {details['warmup']['requests']} to warm up",
        f"prompts of {details['prompt_tokens_asked']} tokens by {details['prompts']}{prompts}, answers of "
        f"{details['max_tokens_asked']}; sampling: {details['sampling']}",
        f"{'milliseconds':36}" + "".join(f"{name:>10}" for name in ("mean", "p50", "p90", "p99")),
    ]
    for name, title in _TABLE.items():
        if (figure := figures.get(name)) is not None:
            spread = figure.spread
            values = (spread["mean"], figure.median, spread["p90"], spread["p99"])
            lines.append(f"  {title:34}" + "".join(f"{value:10.2f}" for value in values))
    rates = f"{figures['requests_per_s'].median:.2f} requests/s, {figures['tokens_per_s'].median:.1f} tokens/s"
    if "cpu_seconds_per_token" in figures:
        rates += f"; the server's CPU time is {1e6 * figures['cpu_seconds_per_token'].median:.0f} µs a token: "
        rates += ", ".join(
            f"{each['command']} {1e6 * each['cpu_seconds_per_token']:.0f}" for each in details["processes"]
        )
    lines.append(rates)
    if details["events_per_token"] and details["events_per_token"] < 0.999:
        lines.append(f"tokens came {1 / details['events_per_token']:.2f} at a time; their times are shared out")
    if details["tokens_counted_by"] == "text":
        lines.append("the server does not say how many tokens an event carries; they are shared out by length of text")
    if short := _cut_short(row):
        lines.append(short)
    for when, errors in (("", details["errors"]), ("to warm up: ", details["warmup"]["errors"])):
        if errors:
            lines.append(f"errors {when}" + ", ".join(f"{count} x {cause}" for cause, count in errors.items()))
    lines += [f"  the server said: {message}" for message in details["messages"]]
    client = details["client"]
    lines.append(
        f"the client: {client['processes']} processes, {client['cores']:.2f} cores; behind by "
        f"{client['delay_p50_ms']:.2f} ms (p50), {client['delay_p99_ms']:.2f} ms (p99), {client['delay_most_ms']:.2f} "
        f"ms (most); requests sent late by {details['late_ms']:.2f} ms at most"
    )
    if client["delay_p99_ms"] > 1e3 * _SLOW:
        lines.append("  it was too slow for exact times: give --processes, or run it on another machine")
    return "\n".join(lines) + "\n"


def _cut_short(row: Row) -> str | None:
    details = row.details
    expected = details["mean_max_tokens"]
    if not details["answered"] or not details["ignore_eos"]:
        return None
    mean = details["output_tokens"] / details["answered"]
    return None if mean > 0.99 * expected else f"answers have {mean:.1f} tokens on average, not {expected:.1f}"
