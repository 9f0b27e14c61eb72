"""``graphmode chat`` as a user meets it: through a pipe and in a terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from typer.testing import CliRunner

from graphmode import LLM, SamplingParams
from graphmode.cli import app
from tests.observe.fake_server import FakeServer

TEMPLATE = "{% for message in messages %}{{ message.role.upper() }}.\n{{ message.content }}\n\n{% endfor %}LORD.\n"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer().running() as running:
        yield running


def talk(lines: str, *arguments: str, code: int = 0) -> str:
    """Return what is printed: of a talk that ends well answers alone, else with errors."""
    result = CliRunner().invoke(app, ["chat", *arguments], input=lines)
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_a_local_model_answers_as_it_does_in_the_library(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    asked = ["--device", "cpu", "--enforce-eager", "--temperature", "0", "--max-tokens", "12", "--system", "A hall"]
    printed = talk("Good morrow\n\nWho is there?\n", *asked, "--chat-template", str(template))
    llm = LLM(device="cpu", enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=12, stop=["\n\n"])
    messages, expected = [{"role": "system", "content": "A hall"}], ""
    for text in ("Good morrow", "Who is there?"):
        messages.append({"role": "user", "content": text})
        answer = llm.chat(messages, params, chat_template=TEMPLATE)[0].outputs[0].text
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert printed == expected


def test_a_local_models_thoughts_are_set_apart(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE + "<think>\n{# until </think> #}")
    asked = ["--device", "cpu", "--enforce-eager", "--max-tokens", "5", "--chat-template", str(template)]
    result = CliRunner().invoke(app, ["chat", *asked], input="Good morrow\n")
    assert (result.exit_code, result.stdout.strip()) == (0, ""), "the model never comes to its answer"
    assert result.stderr.strip()


def test_commands_and_lines_that_go_on(server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = [
        "a",
        "b\\",
        "c",
        '"""',
        "d",
        "/exit",
        '"""',
        f"/save {file}",
        "/reset",
        "/system Be brief",
        "e",
        "/exit",
        "f",
    ]
    sampling = ["--top_k", "5", "--temperature=0", "--stop", "x", "--max-tokens", "2"]
    assert talk("\n".join(lines), "--base-url", server.url, *sampling) == "abab\n" * 4
    spoken = [[(each["role"], each["content"]) for each in asked["messages"]] for asked in server.asked]
    answer = ("assistant", "abab")
    three = [("user", "a"), answer, ("user", "b\nc"), answer, ("user", "d\n/exit")]
    assert spoken == [three[:1], three[:3], three, [("system", "Be brief"), ("user", "e")]]
    saved = json.loads(file.read_text())
    assert [(each["role"], each["content"]) for each in saved] == [*three, answer]
    sent = {"top_k": 5, "temperature": 0.0, "stop": ["x"], "max_tokens": 2}
    assert server.asked[0].items() >= {**sent, "model": "fake", "stream": True}.items()


@pytest.mark.parametrize("lines", ['"""\na\nb', "a\\\nb", "a\\\nb\\\n"])
def test_a_message_that_the_end_of_input_cuts_is_answered(server: FakeServer, lines: str) -> None:
    assert talk(lines, "--base-url", server.url) == "ababab\n"
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "a\nb"}]


def test_nothing_that_steers_a_terminal_is_printed(server: FakeServer) -> None:
    server.text, server.reasoning = "\x1b[31mä\x07\n", "hm\x9b2J"
    assert talk("hi\n", "--base-url", server.url) == "[31mä\n" * 3 + "\n"


def test_what_fails_is_told_and_the_talk_goes_on(server: FakeServer, tmp_path: Path) -> None:
    wrong = {0: "refused", 1: "cut", 2: "error"}
    server.breaks, server.step = wrong.get, 0.001
    printed = talk("a\nb\nc\nd\n/what\n/save\n", "--base-url", server.url, code=1)
    for words in (
        "429 come again",
        "does not answer",
        "the engine has died",
        "there is no /what",
        "/save needs a file",
    ):
        assert f"error: {words}" in printed or words in printed
    assert "Traceback" not in printed
    assert [each["content"] for each in server.asked[-1]["messages"]] == ["d"], "messages without an answer are dropped"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--base-url", "http://127.0.0.1:9"], 1, "does not answer"),
        (["--base-url", "nowhere"], 1, "base_url is 'nowhere'"),
        (["--base-url", "http://a", "--device", "cpu"], 2, "--device"),
        (["--temperature", "-1"], 1, "temperature is -1"),
        (["--n", "2"], 2, "--n"),
        ([""], 2, "MODEL is empty"),
        (["./nowhere"], 1, "nowhere"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], code: int, words: str) -> None:
    output = talk("", *arguments, code=code)
    assert words in output
    assert "Traceback" not in output


def test_the_key_is_needed(server: FakeServer, tmp_path: Path) -> None:
    server.key = "secret"
    key = tmp_path / "key"
    key.write_text("secret\n")
    assert "401 wrong key" in talk("", "--base-url", server.url, code=1)
    assert talk("a\n", "--base-url", server.url, "--api-key-file", str(key)) == "ababab\n"


class Terminal:
    """A program that runs in a terminal."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "graphmode", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def shows(self, words: str, seconds: float) -> bool:
        """Read until it shows these words, and go on behind them; False where it does not in time."""
        deadline = time.monotonic() + seconds
        while words not in self.shown:
            if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
            self.shown += os.read(self._master, 4096).decode()
        self.shown = self.shown.partition(words)[2]
        return True

    def wait_for(self, words: str) -> None:
        assert self.shows(words, 60), self.shown

    def interrupt(self, words: str) -> None:
        """Interrupt until it shows these words: a signal just before Python waits for a line is found with the next."""
        for _ in range(30):
            self.process.send_signal(signal.SIGINT)
            if self.shows(words, 2):
                return
        pytest.fail(self.shown)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_in_a_terminal_an_interrupt_stops_the_answer_and_not_the_program(server: FakeServer) -> None:
    server.step, server.reasoning = 0.01, "let me think"
    with Terminal("chat", "--base-url", server.url, "--max-tokens", "100000") as terminal:
        terminal.wait_for("fake at http")
        terminal.wait_for(">>> ")
        terminal.type("tell me all\r")
        terminal.wait_for("\x1b[2mlet me think")
        terminal.wait_for("ababab")
        terminal.interrupt("stopped after")
        terminal.wait_for(">>> ")
        terminal.interrupt(">>> ")
        terminal.type("/system short\rmore\r")
        terminal.wait_for("abab")
        terminal.interrupt("stopped after")
        terminal.wait_for(">>> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    roles = [each["role"] for each in server.asked[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"], "what was said before the interrupt is kept"
