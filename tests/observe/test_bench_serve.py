"""Load tests: what is sent is what was asked for, and what is reported is what came, also where answers go wrong."""

import json
import os
import random
import statistics
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from graphmode.cli import app
from graphmode.errors import EndpointError, InputError
from graphmode.observe.bench.results import read_rows
from graphmode.observe.bench.serve import Load, measured, serve, summary
from graphmode.observe.bench.streams import Answer, Connection
from graphmode.observe.bench.traffic import Lengths, arrival_times, lengths, read_trace
from tests.observe.fake_server import WORDS_OF_TEMPLATE, FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer().running() as running:
        yield running


def load(server: FakeServer, **others: object) -> Load:
    return Load(**{"base_url": server.url, "max_tokens": Lengths("fixed", 6), "warmup": 0} | others)


# Traffic


@pytest.mark.parametrize("text", ["128", "uniform:64:256", "normal:128:32", "lognormal:128:0.5"])
def test_lengths_are_as_written_and_drawn_from_their_distribution(text: str) -> None:
    read = lengths("--max-tokens", text)
    assert str(read) == text
    drawn = [read.draw(random.Random(seed)) for seed in range(500)]
    assert min(drawn) >= 1
    assert 128 * 0.8 < statistics.median(drawn) < 256 * 0.8
    assert (len(set(drawn)) == 1) == (text == "128")


@pytest.mark.parametrize(
    "text",
    ["", "a", "0", "-1", "1.5", "uniform:5", "uniform:5:4", "normal:5", "normal:5:-1", "normal:nan:1", "zipf:1:2"],
)
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--prompt-tokens is .*; give 128, uniform"):
        lengths("--prompt-tokens", text)


@given(count=st.integers(1, 50), rate=st.floats(0.1, 1e4), seed=st.integers(0, 5), poisson=st.booleans())
def test_requests_arrive_in_order_from_zero_and_the_same_each_time(
    count: int, rate: float, seed: int, poisson: bool
) -> None:
    times = arrival_times(count, rate, random.Random(seed), poisson=poisson)
    assert len(times) == count
    assert times[0] == 0
    assert times == sorted(times) == arrival_times(count, rate, random.Random(seed), poisson=poisson)
    if not poisson:
        assert times[-1] == pytest.approx((count - 1) / rate)


def test_poisson_gaps_have_the_mean_of_the_rate() -> None:
    assert arrival_times(10_001, 50.0, random.Random(0))[-1] == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "holds no request"),
        ("{", "trace.jsonl:1 is no JSON"),
        ('{"prompt_tokens": 3}\n[]', r"trace.jsonl:2 is \[\]"),
        ('{"max_tokens": 3}', "trace.jsonl:1 is"),
        ('{"prompt_tokens": 3, "prompt": "a"}', "trace.jsonl:1 is"),
        ('{"prompt_tokens": 0}', "trace.jsonl:1 is"),
        ('{"prompt_tokens": 3, "at": -1}', "trace.jsonl:1 is"),
        ('{"prompt_tokens": 3, "when": 1}', "trace.jsonl:1 is"),
        ('{"prompt_tokens": 3, "at": 1}\n{"prompt_tokens": 3}', "on some lines only"),
    ],
)
def test_a_trace_that_is_none_is_refused(tmp_path: Path, lines: str, words: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(lines)
    with pytest.raises(InputError, match=words):
        read_trace(file, Lengths("fixed", 5), random.Random(0))


def test_a_trace_is_sent_as_it_stands(server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"at": 0.02, "prompt": "and so on", "max_tokens": 3}\n\n{"at": 0, "prompt_tokens": 5}\n')
    [row] = serve(load(server, trace=file))
    assert [(len(each["prompt"]), each["max_tokens"]) for each in server.asked[1:]] == [(5, 6), (9, 3)], (
        "after the one that is tried"
    )
    assert row.details["seconds"] >= 0.02
    assert (row.details["answered"], row.details["output_tokens"]) == (2, 9)
    server.asked.clear()
    serve(load(server, trace=file, concurrency=(1,), requests=3))
    assert [each["max_tokens"] for each in server.asked[1:]] == [6, 3, 6]


# Figures


def answer(start: float, times: list[float], tokens: list[float], error: str | None = None) -> Answer:
    return Answer(start, times[-1], error=error, times=array("d", times), tokens=array("d", tokens), counted=True)


def test_an_events_interval_is_shared_by_its_tokens_and_waves_count_after_the_last_first_token() -> None:
    wave = [
        answer(1.0, [1.1, 1.3, 1.7], [1, 4, 2]),
        answer(1.0, [1.2, 1.4, 1.5], [2, 1, 1]),
        answer(1, [1.3], [1], "429"),
    ]
    row = measured([wave], is_wave=True)
    figures = {figure.name: figure for figure in row.figures}
    assert figures["first_token_ms"].spread["mean"] == pytest.approx(150)
    assert figures["token_ms"].spread["mean"] == pytest.approx((600 / 6 + 300 / 2) / 2)
    assert figures["gap_ms"].spread["mean"] == pytest.approx((4 * 50 + 2 * 200 + 200 + 100) / 8)
    assert figures["gap_ms"].median == pytest.approx((50 + 100) / 2)
    # The last first token came at 1.2: the first answer then has 2 tokens in 400 ms, the second 2 in 300.
    assert figures["after_last_first_token_ms"].spread["mean"] == pytest.approx((200 + 150) / 2)
    assert figures["request_ms"].spread["mean"] == pytest.approx(600)
    assert figures["tokens_per_s"].median == pytest.approx(11 / 0.7)
    assert (row.details["requests"], row.details["answered"], row.details["errors"]) == (3, 2, {"429": 1})
    assert "after_last_first_token_ms" not in {figure.name for figure in measured([wave], is_wave=False).figures}


@given(st.data())
def test_a_stream_reads_the_same_however_its_bytes_are_cut(data: st.DataObject) -> None:
    """Chunks, events and packets end wherever they like."""
    import asyncio

    event = 'data: {{"choices": [{{"text": "ä"}}], "usage": {{"prompt_tokens": 3, "completion_tokens": {}}}}}'
    body = ": hello\n\n" + "".join(event.format(number) + "\r\n\r\n" for number in (1, 2, 12)) + "data: [DONE]\n\n"
    raw = body.encode()
    at, framed = 0, b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    while at < len(raw):
        size = data.draw(st.integers(1, len(raw)))
        part = raw[at : at + size]
        framed += f"{len(part):X};x=y\r\n".encode() + part + b"\r\n"
        at += size
    framed += b"0\r\n\r\n"
    cuts = sorted(data.draw(st.lists(st.integers(1, len(framed)), max_size=30)))

    class Transport(asyncio.Transport):
        def write(self, data: bytes) -> None: ...  # type: ignore[override]

    async def read() -> Answer:
        connection, found = Connection(), Answer(0.0)
        connection.connection_made(Transport())
        task = asyncio.create_task(connection.send(b"", found))
        await asyncio.sleep(0)
        for start, end in zip([0, *cuts], [*cuts, len(framed)], strict=True):
            if start < end:
                connection.data_received(framed[start:end])
        await task
        assert connection.is_open
        return found

    found = asyncio.run(read())
    assert found.error is None
    assert found.num_tokens == 12
    assert found.prompt_tokens == 3


# A whole run


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("tokenizes", [True, False])
@pytest.mark.parametrize("takes_ids", [True, False])
def test_prompts_have_the_tokens_that_were_asked_for(
    server: FakeServer, api: str, tokenizes: bool, takes_ids: bool
) -> None:
    server.tokenizes, server.takes_ids = tokenizes, takes_ids
    [row] = serve(load(server, waves=(2,), requests=4, api=api, prompt_tokens=lengths("", "uniform:20:40")))
    ids = api == "completions" and takes_ids
    assert row.details["prompts"].startswith("token ids" if ids else "words of one" if tokenizes else "words, of about")
    sent = [each["messages"][0]["content"] if api == "chat" else each["prompt"] for each in server.asked[-4:]]
    sizes = [len(each) if ids else len(each.split()) + WORDS_OF_TEMPLATE * (api == "chat") for each in sent]
    assert len(set(map(str, sent))) == 4
    assert all(20 <= size <= 40 for size in sizes)
    assert row.details["prompt_tokens"] == sum(sizes) / 4


@pytest.mark.parametrize(("counts", "counted_by"), [(True, "server"), (False, "text")])
def test_times_are_those_of_the_server(server: FakeServer, counts: bool, counted_by: str) -> None:
    server.first, server.step, server.per_event, server.counts = 0.02, 0.004, 2, counts
    [row] = serve(load(server, concurrency=(2,), requests=6, api="chat", label="fake"))
    figures = {figure.name: figure for figure in row.figures}
    assert row.details["tokens_counted_by"] == counted_by
    # A client sees an event late, never early.
    assert figures["first_token_ms"].spread["mean"] >= 20
    assert figures["token_ms"].spread["mean"] >= 0.9 * 4 / 2, "an event has two tokens"
    assert figures["request_ms"].spread["mean"] >= 20 + 2 * 4
    assert row.details["output_tokens"] == 36
    assert row.details["events_per_token"] <= 0.5
    assert server.most_in_flight == 2
    assert server.connections <= 4, "connections are kept"
    assert (row.mode, row.model, row.device, row.batch) == ("fake", "fake", "a fake", 2)


def test_waves_are_sent_at_once_by_several_processes_and_warm_ups_count_apart(server: FakeServer) -> None:
    server.first = 0.05
    [row] = serve(load(server, waves=(6,), requests=13, warmup=3, processes=2))
    assert server.most_in_flight == 6
    assert (row.details["requests"], row.details["answered"], len(server.asked)) == (12, 12, 1 + 3 + 12)
    assert row.details["client"]["processes"] == 2
    assert row.details["warmup"] == {"requests": 3, "errors": {}}


def test_the_servers_cpu_time_is_measured(server: FakeServer) -> None:
    [row] = serve(load(server, waves=(2,), requests=4, server_pid=os.getpid()))
    took = [each["cpu_seconds_per_token"] for each in row.details["processes"]]  # in ticks of the system's clock
    assert row.as_dict()["cpu_seconds_per_token"] == sum(took) >= 0
    assert "µs a token" in summary(row)


def test_a_rate_sends_without_waiting_for_answers(server: FakeServer) -> None:
    server.first = 0.1
    [row] = serve(load(server, rates=(400.0,), requests=20, poisson=False))
    assert server.most_in_flight > 5
    assert row.details["answered"] == 20
    assert "400 requests/s (constant)" in summary(row)


def test_errors_are_counted_by_cause_and_harm_no_other_answer(server: FakeServer) -> None:
    wrong = {1: "refused", 2: "refused", 4: "cut", 5: "error", 7: "silent"}
    server.breaks = wrong.get
    [row] = serve(load(server, waves=(4,), requests=12, timeout=0.5))
    assert row.details["answered"] == 7
    lost = next(cause for cause in row.details["errors"] if cause.startswith("connection that was lost: "))
    assert row.details["errors"] == {"429": 2, lost: 1, "error event": 1, "timeout after 0.5 s": 1}
    assert row.details["output_tokens"] == 7 * 6
    text = summary(row)
    assert "7 of 12 requests answered" in text
    assert "2 x 429" in text
    assert "come again" in text


def test_the_server_samples_as_it_does_for_its_users_unless_it_is_told(server: FakeServer) -> None:
    serve(load(server, waves=(1,), requests=1))
    serve(load(server, waves=(1,), requests=1, body={"temperature": 0, "top_p": 0.5}, ignore_eos=False))
    asked = server.asked[0] | server.asked[-1]
    assert server.asked[0].keys() == {"model", "prompt", "max_tokens", "stream", "stream_options", "ignore_eos"}
    assert (asked["temperature"], asked["top_p"]) == (0, 0.5)
    assert "ignore_eos" not in server.asked[-1]


# The command


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", "serve", *arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def test_rows_are_printed_and_saved(server: FakeServer, tmp_path: Path) -> None:
    key, file = tmp_path / "key", tmp_path / "rows.json"
    key.write_text("secret\n")
    server.key, server.step = "secret", 0.002
    asked = ["--base-url", f"{server.url}/v1/", "--api-key-file", str(key), "--wave", "1,2", "--max-tokens", "4"]
    printed = json.loads(run(*asked, "--warmup", "0", "--temperature", "0", "--json", "--save", str(file)))["rows"]
    assert [(row["batch"], row["requests"], row["answered"]) for row in printed] == [(1, 20, 20), (2, 20, 20)]
    assert printed[0]["sampling"] == {"temperature": 0.0}
    assert printed[0].keys() >= {"date", "versions", "device", "commit", "first_token_ms_spread", "requests_per_s"}
    assert [row.as_dict() for row in read_rows(file)] == printed
    assert "secret" not in json.dumps(printed)
    text = run(*asked)
    for words in (
        "first token",
        "after the last first one",
        "requests/s",
        "tokens/s",
        "the client:",
        "after 2 to warm up",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 1, "no waves, concurrency, rates or trace"),
        (["--wave", "1", "--rate", "2"], 1, "waves and rates"),
        (["--wave", "0"], 1, "all must be positive"),
        (["--wave", "a"], 2, "--wave"),
        (["--rate", "nan"], 1, "all must be positive"),
        (["--wave", "1", "--max-tokens", "none"], 1, "--max-tokens is 'none'"),
        (["--wave", "1", "--body", "[]"], 1, "--body is '[]'"),
        (["--wave", "1", "--api", "edits"], 1, "api is 'edits'"),
        (["--wave", "1", "--base-url", "ftp://a"], 1, "base_url is 'ftp://a'"),
        (["--wave", "1", "--base-url", "http://127.0.0.1:9"], 1, "does not answer"),
        (["--wave", "1", "--server-pid", "999999999"], 1, "server_pid is 999999999"),
        (["--wave", "1", "--save", "nowhere/x.json"], 2, "nowhere"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], code: int, words: str) -> None:
    output = run(*arguments, code=code)
    assert words in output
    assert "Traceback" not in output


def test_a_server_that_refuses_is_quoted(server: FakeServer) -> None:
    server.key = "secret"
    with pytest.raises(EndpointError, match="401 wrong key; give the key's file"):
        serve(load(server, waves=(1,)))
    server.key = None
    server.breaks = lambda number: "refused"
    with pytest.raises(EndpointError, match="429 come again"):
        serve(load(server, waves=(1,)))


def test_a_prompt_that_is_shorter_than_the_template_is_refused(server: FakeServer) -> None:
    with pytest.raises(InputError, match=r"prompt of 5 tokens is too short: the server adds about 7 of its own"):
        serve(load(server, waves=(1,), api="chat", prompt_tokens=Lengths("fixed", 5)))
