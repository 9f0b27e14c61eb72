"""``graphmode chat``: talk to a local model or a served one in the terminal."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

import typer

from graphmode.cli.generate import SAMPLING, load
from graphmode.cli.options import ENGINE, errors_in_one_line, takes, write
from graphmode.engine import aliases
from graphmode.engine.sampling_params import SamplingParams
from graphmode.errors import EndpointError, GraphModeError, InputError

if TYPE_CHECKING:
    import httpx
    from rich.console import Console

    from graphmode.engine.llm import LLM
    from graphmode.observe.endpoint import Server
    from graphmode.serve.parsing.parts import Part

DEFAULTS = {"temperature": 0.7, "max_tokens": 1024}
_END_OF_SPEECH = "\n\n"  # of the bundled model, which would go on with the next speaker
# A conversation has one answer, and shows its text.
_NOT_HERE = ("n", "best_of", "logprobs", "prompt_logprobs", "detokenize", "truncate_prompt_tokens")
_HELP = """\
/reset         forget the conversation
/system TEXT   set what the model is told first; without TEXT: nothing
/save FILE     write the conversation to a file, as JSON
/exit          end; so does the end of input
A line that ends with a backslash goes on in the next; so does all between two lines of three quotes.
Ctrl-C stops an answer."""
# What moves the cursor or rings the bell: an answer must not steer the terminal.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@takes("The engine", "engine", ENGINE)
@takes("Sampling", "sampling", {name: each for name, each in SAMPLING.items() if name not in _NOT_HERE}, **DEFAULTS)
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A local folder, a GGUF file or a hub name; of a server the model's name there. Default: the bundled "
            "model, or the first that the server lists.",
            show_default=False,
        ),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Talk to this server, such as http://127.0.0.1:8000.", show_default=False)
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file whose first line is the server's key.", exists=True, dir_okay=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.", show_default=False)] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="A file of Jinja text instead of a local model's template.", exists=True, dir_okay=False),
    ] = None,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Talk to a model: local, or served with --base-url.

    Sampling options that are not given are what the model or the server asks for, else the defaults below. Type /help
    to see what you can do while you talk. Where input is no terminal it is read line by line, and only answers printed.
    """
    if model == "":
        raise typer.BadParameter("MODEL is empty; give a folder or a hub name, or leave it out for the bundled model")
    if base_url is not None and (engine or chat_template is not None):
        local = [*engine, *(["chat_template"] if chat_template else [])]
        names = ", ".join(f"--{name.replace('_', '-')}" for name in local)
        raise typer.BadParameter(f"{names}: only for a local model, and --base-url names a server; give one of them")
    with errors_in_one_line():
        given = aliases.named("chat", sampling, [each.name for each in fields(SamplingParams)], aliases.SAMPLING)
        SamplingParams(**(DEFAULTS | given))  # raises what is wrong with them before anything is loaded
        with _speaker(model, base_url, api_key_file, chat_template, engine, given) as speaker:
            failed = _Talk(speaker, system).run()
    if failed:
        raise typer.Exit(1)


class Piece(NamedTuple):
    """A part of an answer."""

    text: str
    is_reasoning: bool = False


class Speaker(Protocol):
    """Who answers."""

    name: str

    def answer(self, messages: list[dict[str, str]]) -> Iterator[Piece]:
        """Yield the answer to a conversation, piece by piece; an interrupt ends it as ``KeyboardInterrupt``.

        Raises:
            GraphModeError: there is none.
        """


@contextmanager
def _speaker(
    model: str | None,
    base_url: str | None,
    key_file: Path | None,
    template: Path | None,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> Iterator[Speaker]:
    if base_url is None:
        from graphmode.serve.options import read_text

        text = None if template is None else read_text("chat_template", template)
        if model is None:
            sampling = {"stop": _END_OF_SPEECH} | sampling
        yield _Local(load(model, engine, progress=True), model or "the bundled model", text, sampling)
        return
    import httpx

    from graphmode.observe.endpoint import find_server, read_key

    with httpx.Client(timeout=httpx.Timeout(600, connect=10)) as http:
        key = None if key_file is None else read_key(key_file)
        yield _Served(http, find_server(http, base_url, key, model), sampling)


class _Local:
    """A model in this process."""

    def __init__(self, llm: LLM, name: str, template: str | None, sampling: Mapping[str, Any]) -> None:
        from graphmode.engine.chat import ChatTemplate
        from graphmode.serve.parsing.formats import reasoning_format, template_text

        self.name = name
        self._llm = llm
        tokenizer = llm.get_tokenizer()
        self._template = ChatTemplate(tokenizer=tokenizer, takes_images=False, chat_template=template)
        self._reasoning = reasoning_format("auto", template or template_text(tokenizer.chat_template))
        self._params = replace(llm.get_default_sampling_params(**DEFAULTS), **sampling)

    def answer(self, messages: list[dict[str, str]]) -> Iterator[Piece]:
        from graphmode.serve.parsing.parser import AnswerParser

        prompt = self._template.prompt(messages)
        begun = self._reasoning is not None and prompt["prompt"].rstrip().endswith(self._reasoning.begin)
        parser = AnswerParser(reasoning=self._reasoning, thinking=begun)
        shown = 0
        outputs = self._llm.stream(prompt, self._params)
        # An exception in the middle of a step would end the engine: the answer is given up after it.
        with _noted_interrupts() as interrupts, closing(outputs):  # type: ignore[type-var]
            for output in outputs:
                text = output.outputs[0].text
                yield from map(_piece, parser.feed(text[shown:]))
                shown = len(text)
                if interrupts:
                    raise KeyboardInterrupt
        yield from map(_piece, parser.end())


def _piece(part: Part) -> Piece:
    from graphmode.serve.parsing.parts import Content, Reasoning

    assert isinstance(part, (Content, Reasoning)), "no tools are offered"
    return Piece(part.text, isinstance(part, Reasoning))


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Note interrupts instead of raising them; the third ends the program all the same."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        if len(noted) > 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


class _Served:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, http: httpx.Client, server: Server, sampling: Mapping[str, Any]) -> None:
        self.name = f"{server.model} at {server.url}"
        self._http = http
        self._server = server
        self._sampling = sampling

    def answer(self, messages: list[dict[str, str]]) -> Iterator[Piece]:
        import httpx

        from graphmode.observe.endpoint import advice, refusal

        url = f"{self._server.url}/v1/chat/completions"
        body = {"model": self._server.model, "messages": messages, "stream": True, **self._sampling}
        try:
            with self._http.stream("POST", url, json=body, headers=self._server.headers) as response:
                if response.status_code != 200:
                    response.read()
                    raise EndpointError(refusal(response) + advice(response.status_code))
                for line in response.iter_lines():
                    if line.startswith("data:") and line[5:].strip() != "[DONE]":
                        yield from _pieces(json.loads(line[5:]))
        except httpx.HTTPError as error:
            raise EndpointError(f"{self._server.url} does not answer: {error or type(error).__name__}") from error
        except ValueError as error:
            raise EndpointError(f"{url} sent what is no event of a chat: {error}") from error


def _pieces(event: dict[str, Any]) -> Iterator[Piece]:
    if (error := event.get("error")) is not None:
        raise EndpointError(error["message"] if isinstance(error, dict) and "message" in error else str(error))
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            yield Piece(thought, is_reasoning=True)
        if text := delta.get("content"):
            yield Piece(text)


@dataclass
class _Talk:
    """A conversation in the terminal."""

    speaker: Speaker
    system: str | None

    def __post_init__(self) -> None:
        from rich.console import Console

        self._messages: list[dict[str, str]] = []
        self._at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._console: Console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._errors: Console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def run(self) -> bool:
        """Talk until the input ends; return whether something failed that nobody at a terminal has seen."""
        failed = False
        if self._at_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  (input() then edits lines and keeps a history)
            self._console.print(f"{self.speaker.name}; /help says what you can do", style="dim")
        for text in self._inputs():
            if text.strip() in ("/exit", "/quit"):
                break
            try:
                if text.startswith("/"):
                    name, _, argument = text.strip().partition(" ")
                    self._command(name, argument.strip())
                elif text.strip():
                    self._answer(text)
            except GraphModeError as error:
                self._errors.print(f"error: {error}", style="red")
                failed = not self._at_terminal
        return failed

    def _inputs(self) -> Iterator[str]:
        """Yield what the user says; an interrupt drops the lines so far."""
        while True:
            lines: list[str] = []
            try:
                line = self._line(">>> ")
                if line.strip() == '"""':
                    while (line := self._line("... ")).strip() != '"""':
                        lines.append(line)
                else:
                    while line.endswith("\\"):
                        lines.append(line[:-1])
                        line = self._line("... ")
                    lines.append(line)
                yield "\n".join(lines)
            except KeyboardInterrupt:
                self._console.print()
                if not self._at_terminal:
                    raise
            except EOFError:
                if lines:  # the input ends before the message does
                    yield "\n".join(lines)
                if self._at_terminal:
                    self._console.print()
                return
            except UnicodeDecodeError as error:
                raise InputError(f"the input is no text in UTF-8: {error}; convert it") from error

    def _line(self, prompt: str) -> str:
        return input(prompt if self._at_terminal else "")

    def _command(self, name: str, argument: str) -> None:
        if name == "/reset":
            self._messages.clear()
        elif name == "/system":
            self.system = argument or None
        elif name == "/save":
            if not argument:
                raise InputError("/save needs a file: /save talk.json")
            write(Path(argument).expanduser(), json.dumps(self._conversation(), ensure_ascii=False, indent=2) + "\n")
        elif name == "/help":
            self._console.print(_HELP)
        else:
            raise InputError(
                f"there is no {name}; there are /reset, /system, /save, /exit and /help. A message that "
                "begins with a slash begins with a space"
            )

    def _conversation(self) -> list[dict[str, str]]:
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self._messages]

    def _answer(self, text: str) -> None:
        """Show the answer to a message, and keep both; of an answer that is stopped, what there is."""
        self._messages.append({"role": "user", "content": text})
        said: list[str] = []
        start, was_reasoning, stopped = time.perf_counter(), False, False
        try:
            with closing(self.speaker.answer(self._conversation())) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    if was_reasoning and not piece.is_reasoning:
                        self._show("\n\n", True)
                    was_reasoning = piece.is_reasoning
                    self._show(piece.text, piece.is_reasoning)
                    if not piece.is_reasoning:
                        said.append(piece.text)
        except KeyboardInterrupt:
            if not self._at_terminal:
                raise
            stopped = True
        except GraphModeError:
            self._messages.pop()
            if said:
                self._console.print()
            raise
        self._console.print()
        self._messages.append({"role": "assistant", "content": "".join(said)})
        if self._at_terminal:
            self._console.print(
                f"{'stopped after ' if stopped else ''}{time.perf_counter() - start:.1f} s", style="dim"
            )

    def _show(self, text: str, is_reasoning: bool) -> None:
        """Show a piece of an answer; where no terminal reads it, thoughts go with the errors."""
        console = self._errors if is_reasoning and not self._at_terminal else self._console
        console.print(text.translate(_CONTROL), end="", style="dim" if is_reasoning else None)
        console.file.flush()
