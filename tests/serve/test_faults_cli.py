"""Faults as those who run ``graphmode serve`` meet them: through HTTP, signals, exit statuses and the command line."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graphmode.cli import app
from graphmode.models.bundled_model import bundled_model
from tests.observe.fake_server import FakeServer
from tests.serve import soak
from tests.serve.process import ServerProcess, serving, wait_for

EAGER = ["--device", "cpu", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that follow, in their order: each leaves it running, but for the last."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "key").write_text(soak.KEY)
    with serving(folder, *soak.OPTIONS, "--api-key-file", str(folder / "key"), key=soak.KEY) as running:
        yield running


def run(*arguments: str, code: int) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


# Before it serves


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} cannot be listened on" in run("serve", "--port", str(port), *EAGER, code=1)


@pytest.mark.parametrize(
    ("arguments", "text", "words"),
    [
        (["./nowhere"], "", "nowhere"),
        (["--chat-template", "FILE"], "{% for %}", "is no Jinja template: line 1"),
        (["--chat-template", "./nowhere"], "", "chat_template ./nowhere cannot be read"),
        (["--api-key-file", "FILE"], "\n", "has no key"),
        (["--api-key", "secret"], "", "--api-key-file"),
        (["--max-queue", "0"], "", "max_queue is 0"),
    ],
)
def test_what_cannot_be_served_ends_with_a_message(tmp_path: Path, arguments: list[str], text: str, words: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    given = [str(file) if each == "FILE" else each for each in arguments]
    assert words in run("serve", "--port", "0", *EAGER, *given, code=1)


@pytest.mark.slow
def test_weights_that_are_cut_short_end_the_server_with_their_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bundled_model(), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in run("serve", str(folder), "--port", "0", *EAGER, code=1)


def test_a_full_disk_is_named_where_results_are_saved() -> None:
    with FakeServer().running() as fake:
        asked = ["bench", "serve", "--base-url", fake.url, "--wave", "1", "--max-tokens", "2", "--save", "/dev/full"]
        assert "/dev/full cannot be written: No space left on device" in run(*asked, code=1)
        result = CliRunner().invoke(app, ["chat", "--base-url", fake.url], input="a\n/save /dev/full\n")
        assert (result.exit_code, "/dev/full cannot be written" in result.output) == (1, True)


# While it serves


def test_a_wrong_key(server: ServerProcess) -> None:
    assert server.http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert server.http.get("/health", headers={"Authorization": ""}).status_code == 200
    assert "401" in run("bench", "serve", "--base-url", server.url, "--wave", "1", code=1)


def test_clients_of_every_kind_for_some_seconds(server: ServerProcess) -> None:
    soak.check(server, seconds=4)


def test_an_engine_that_is_killed_in_a_stream_fails_it_with_the_cause_and_is_started_again(
    server: ServerProcess,
) -> None:
    _breaks_and_recovers(server, signal.SIGKILL, "SIGKILL")


def test_a_signal_lets_what_runs_end(server: ServerProcess) -> None:
    events = []
    with server.http.stream("POST", "/v1/completions", json=_long(max_tokens=100)) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line)
                if len(events) == 3:
                    server.popen.send_signal(signal.SIGTERM)
    assert events[-1] == "data: [DONE]"
    assert sum(bool(json.loads(each[6:])["choices"]) for each in events[:-1]) >= 90
    assert server.popen.wait(30) == 0


@pytest.mark.slow
def test_an_engine_that_stands_still_is_started_again_while_the_disk_of_the_log_is_full(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    with serving(tmp_path, *EAGER, "--stall-seconds", "3") as running:
        _breaks_and_recovers(running, signal.SIGSTOP, "no sign of life")
        assert running.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_restarts_a_dead_engine_stays_dead_and_says_why(tmp_path: Path, number: int) -> None:
    with serving(tmp_path, *EAGER, "--no-restart", "--stall-seconds", "3") as running:
        failed = _break(running, number)
        assert running.http.get("/health").status_code == 503
        wait_for(lambda: running.http.get("/health").json()["status"] == "dead")  # once it is killed
        for _ in range(3):
            health = running.http.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "dead")
            assert health.json()["cause"] in failed["message"]
            refused = running.http.post("/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503
            assert health.json()["cause"] in refused.json()["error"]["message"]
        assert running.end() == 0


def _breaks_and_recovers(server: ServerProcess, number: int, words: str) -> None:
    """Send the engine a signal in the middle of a stream: all fails with the cause until it runs again."""
    before = server.complete()
    assert words in _break(server, number)["message"]
    health = server.http.get("/health")
    assert (health.status_code, words in health.text) == (503, True)
    refused = server.http.post("/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, words in refused.json()["error"]["message"]) == (503, True)
    wait_for(lambda: server.http.get("/ready").status_code == 200, 120)
    assert server.http.get("/health").status_code == 200
    assert server.complete() == before


def _long(max_tokens: int = 200) -> dict[str, Any]:
    return {"prompt": "ROMEO.\n", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


def _break(server: ServerProcess, number: int) -> dict[str, Any]:
    """Send the engine a signal in the middle of a stream; return the error that the stream ends with."""
    events = []
    with server.http.stream("POST", "/v1/completions", json=_long()) as response:
        for line in response.iter_lines():
            events += [line] if line.startswith("data: ") else []
            if len(events) == 3:
                server.engine.send_signal(number)
                events.append("")
    assert "[DONE]" not in events[-1]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert isinstance(error, dict)
    return error
