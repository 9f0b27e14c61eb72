"""``graphmode serve`` as a process: what ends it at once, and how it starts, serves and ends."""

import asyncio
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from graphmode.cli import app
from graphmode.engine.config import EngineOptions
from graphmode.engine.reading import load_text
from graphmode.errors import EngineDownError, InputError
from graphmode.models.bundled_model import bundled_model
from graphmode.serve.app import create_app
from graphmode.serve.options import ServeOptions
from graphmode.serve.run import listen, serve

from .conftest import ScriptedEngine, wait_for

LONG = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}


def refused(*arguments: str, status: int = 1) -> str:
    result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    lines = result.output.strip().splitlines()
    assert status == 2 or len(lines) == 1, result.output
    return lines[-1] if status == 1 else result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/model"], "/nowhere/model"),
        (["--api-key-file", "/nowhere/keys"], "api_key_file /nowhere/keys cannot be read: No such file"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--port", "70000"], "port is 70000; it must be an integer from 0 to 65535"),
        (["--drain-seconds", "-1"], "drain_seconds"),
        (["--log-level", "loud"], "log_level is 'loud'; it must be one of debug, info, warning, error"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--ssl-keyfile", "x"], "reverse proxy"),
        (["--tool-call-parser", "none-such"], "none-such"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_loaded(arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


def test_what_the_command_line_cannot_read_ends_with_2() -> None:
    assert "--prot" in refused("--prot", "1", status=2)
    refused("", status=2)


def test_a_key_on_the_command_line_is_not_repeated() -> None:
    with pytest.raises(InputError, match="--api-key-file") as refusal:
        ServeOptions(api_key="sk-secret")  # type: ignore[call-arg]
    assert "secret" not in str(refusal.value)


class Serving:
    """``serve`` in this thread, with a scripted engine; another thread plays its clients and the terminal.

    Args:
        scripted: the engine.
        drain_seconds: as of the options.
    """

    def __init__(self, scripted: ScriptedEngine, drain_seconds: float) -> None:
        self.engine = scripted
        self.options = ServeOptions(served_model_name=["bard"], drain_seconds=drain_seconds)
        self.listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def run(self, play: Callable[[], Any]) -> Any:
        """Serve until the play has ended it, and return what the play has found."""

        def make_app() -> FastAPI:
            return create_app(self.engine, load_text(bundled_model(), EngineOptions()), self.options)

        with ThreadPoolExecutor(1) as pool, asyncio.Runner() as runner:
            playing = pool.submit(play)
            try:
                runner.run(serve(self.engine, make_app, self.listener, self.options, 0.0))  # type: ignore[arg-type]
            finally:
                self.found = playing.result(10)
        return self.found

    def status(self) -> int:
        """The status of /ready; 0 where nothing listens."""
        try:
            return httpx.get(f"{self.url}/ready").status_code
        except httpx.TransportError:
            return 0

    @contextmanager
    def stream_that_rests(self) -> Iterator[Iterator[str]]:
        """The lines of a stream behind the first, of an engine that makes nothing more until it is told to."""
        wait_for(lambda: self.status() == 200)
        with httpx.stream("POST", f"{self.url}/v1/completions", json=LONG, timeout=10) as stream:
            lines = stream.iter_lines()
            next(lines)
            self.engine.moves = False
            yield lines


def test_a_signal_lets_what_runs_end_and_nothing_begin(scripted: ScriptedEngine) -> None:
    serving = Serving(scripted, drain_seconds=1000)

    def play() -> str:
        with serving.stream_that_rests() as lines:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: serving.status() == 503)
            refusal = httpx.post(f"{serving.url}/v1/completions", json=LONG).json()
            assert refusal["error"]["code"] == "shutting_down"
            assert httpx.get(f"{serving.url}/health").status_code == 200
            scripted.moves = True
            return "".join(lines)

    assert serving.run(play).endswith("data: [DONE]")
    assert scripted.closed


def test_a_second_signal_ends_it_at_once(capsys: pytest.CaptureFixture[str], scripted: ScriptedEngine) -> None:
    serving = Serving(scripted, drain_seconds=1000)

    def play() -> str:
        with serving.stream_that_rests() as lines:
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: serving.status() == 503)
            os.kill(os.getpid(), signal.SIGTERM)
            return "".join(lines)

    with pytest.raises(SystemExit) as ended:
        serving.run(play)
    assert ended.value.code == 1
    assert "the server is stopping" in serving.found
    assert "[DONE]" not in serving.found
    assert re.fullmatch(r"serving bard at http://127.0.0.1:\d+, ready after [\d.]+ s\n", capsys.readouterr().out)


def test_what_does_not_end_in_time_is_cut(scripted: ScriptedEngine) -> None:
    serving = Serving(scripted, drain_seconds=0.2)

    def play() -> httpx.Response:
        wait_for(lambda: serving.status() == 200)
        scripted.moves = False
        wait_for_request = ThreadPoolExecutor(1).submit(
            httpx.post, f"{serving.url}/v1/completions", json={"prompt": "a"}, timeout=10
        )
        wait_for(lambda: scripted.requests)
        os.kill(os.getpid(), signal.SIGTERM)
        return wait_for_request.result()

    response = serving.run(play)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")


def test_an_engine_that_cannot_start_ends_the_server_with_its_cause(
    capsys: pytest.CaptureFixture[str], scripted: ScriptedEngine
) -> None:
    scripted.cannot_start = EngineDownError("the weights are not those of config.json")
    serving = Serving(scripted, drain_seconds=1000)
    with pytest.raises(EngineDownError, match="the weights"):
        serving.run(lambda: None)
    assert capsys.readouterr().out == ""


def test_a_signal_before_it_is_ready_ends_it(capsys: pytest.CaptureFixture[str], scripted: ScriptedEngine) -> None:
    scripted.state.phase = "starting"
    serving = Serving(scripted, drain_seconds=1000)

    def play() -> None:
        wait_for(lambda: serving.status() == 503)
        os.kill(os.getpid(), signal.SIGTERM)

    serving.run(play)
    assert scripted.closed
    assert capsys.readouterr().out == ""
