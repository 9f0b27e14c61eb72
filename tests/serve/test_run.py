"""``graphmode serve`` as a process: what ends it at once, and how it starts, serves and ends."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from graphmode.cli import app
from graphmode.errors import InputError
from graphmode.models.bundled_model import bundled_model
from graphmode.serve.options import ServeOptions

from .conftest import wait_for

SMALL = ["--device", "cpu", "--graph-sizes", "1,8", "--max-num-seqs", "8", "--max-num-batched-tokens", "64"]


def refused(*arguments: str, status: int = 1) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    lines = result.output.strip().splitlines()
    assert status == 2 or len(lines) == 1, result.output
    return lines[-1] if status == 1 else result.output


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused("--port", port)
        assert f"host 127.0.0.1, port {port} cannot be listened on" in line
        assert "in use; give another --host or --port" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/model"], "/nowhere/model"),
        (["--api-key-file", "/nowhere/keys"], "api_key_file /nowhere/keys cannot be read: No such file"),
        (["--chat-template", "/nowhere/template"], "chat_template /nowhere/template cannot be read"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--port", "70000"], "port is 70000; it must be an integer from 0 to 65535"),
        (["--max-queue", "0"], "max_queue is 0"),
        (["--drain-seconds", "-1"], "drain_seconds"),
        (["--log-level", "loud"], "log_level is 'loud'; it must be one of debug, info, warning, error"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--api-key", "secret"], "--api-key-file"),
        (["--ssl-keyfile", "x"], "reverse proxy"),
        (["--tool-call-parser", "none-such"], "none-such"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_loaded(arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


def test_what_the_command_line_cannot_read_ends_with_2() -> None:
    assert "--prot" in refused("--prot", "1", status=2)
    refused("", status=2)


def test_a_template_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for message in messages %}\n{{ message")
    assert "is no Jinja template: line 2" in refused("--chat-template", str(file))


def test_a_key_on_the_command_line_is_not_repeated() -> None:
    with pytest.raises(InputError):
        ServeOptions(api_key="sk-secret")  # type: ignore[call-arg]


def test_a_model_that_cannot_start_ends_the_server_with_its_cause(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(bundled_model(), model)
    weights = next(model.glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)
    with running(str(model)) as server:
        assert server.wait(60) == 1
        assert server.stdout is not None
        assert server.stderr is not None
        assert server.stdout.read() == ""
        last = server.stderr.read().strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert weights.name in last


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "graphmode", "serve", *arguments, *SMALL, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("GRAPHMODE_API_KEY", None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            yield server
        finally:
            server.kill()


def test_it_serves_drains_and_ends(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-secret\n")
    with running("--api-key-file", str(keys), "--served-model-name", "bard", "--served-model-name", "b") as server:
        assert server.stdout is not None
        assert server.stderr is not None
        line = server.stdout.readline()
        found = re.fullmatch(r"serving bard, b at (http://127.0.0.1:\d+), ready after [\d.]+ s\n", line)
        assert found, line
        headers = {"authorization": "Bearer sk-secret"}
        with httpx.Client(base_url=found[1], headers=headers, timeout=60) as client:
            assert client.get("/ready").json() == {"status": "ok"}
            body = {"model": "b", "prompt": "ROMEO.\n", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
            whole = client.post("/v1/completions", json=body).json()
            assert whole["usage"]["completion_tokens"] == 60
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                lines = stream.iter_lines()
                text = next(lines)
                server.send_signal(signal.SIGTERM)
                wait_for(lambda: httpx.get(f"{found[1]}/ready", headers=headers).status_code == 503)
                refusal = httpx.post(f"{found[1]}/v1/completions", json=body, headers=headers)
                assert refusal.json()["error"]["code"] == "shutting_down"
                text += "".join(lines)
            assert text.endswith("data: [DONE]")
        assert server.wait(20) == 0
        logged = server.stderr.read()
        assert "sk-secret" not in logged
        assert "ROMEO" not in logged
        assert "POST /v1/completions 200 prompt_tokens=" in logged


def test_a_second_signal_ends_it_at_once() -> None:
    with running("--drain-seconds", "1000") as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[3].removesuffix(",")
        body = {"prompt": "ROMEO.\n", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 8}
        with (
            httpx.Client(base_url=url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 1
            assert "[DONE]" not in "".join(lines)
