"""A server with a scripted engine: it takes requests as the engine process does, and says what a test tells it to."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

from graphmode.engine.config import EngineOptions
from graphmode.engine.outputs import NewTokens
from graphmode.engine.reading import load_text
from graphmode.engine.requests import Request
from graphmode.errors import DeadlineExceededError, EngineDownError, InputError
from graphmode.models.bundled_model import bundled_model
from graphmode.serve.app import create_app
from graphmode.serve.limits import http_protocol
from graphmode.serve.options import ServeOptions
from graphmode.serve.run import listen
from graphmode.serve.security import ApiKeys
from tests.serve.fakes import FakeState

MAX_MODEL_LEN = 512
EOS = 0


@dataclass
class Info:
    max_model_len: int = MAX_MODEL_LEN
    vocab_size: int = 1024
    max_num_seqs: int = 8
    device: str = "a script"


class ScriptedStream:
    """The tokens of one request, in bursts of ``engine.burst``."""

    def __init__(self, engine: ScriptedEngine, request: Request, deadline_seconds: float | None) -> None:
        self.request_id = str(len(engine.requests))
        self.closed = False
        self.ended: dict[int, str] = {}
        self._engine, self._request = engine, request
        self._end = None if deadline_seconds is None else time.monotonic() + deadline_seconds
        self._script = [*engine.tokens, EOS]
        self._at = [0] * request.params.n
        self._finished = [False] * request.params.n

    def __aiter__(self) -> ScriptedStream:
        return self

    async def __anext__(self) -> list[NewTokens]:
        engine, params = self._engine, self._request.params
        if len(self._request.prompt_token_ids) >= MAX_MODEL_LEN:
            raise InputError(f"the prompt has {len(self._request.prompt_token_ids)} tokens; max_model_len is 512")
        while not engine.moves:
            if engine.failure is not None:
                raise engine.failure
            await asyncio.sleep(0.005)
            if self._end is not None and time.monotonic() > self._end:
                raise DeadlineExceededError("the request took longer than its deadline")
        await asyncio.sleep(0)
        if all(self._finished):
            raise StopAsyncIteration
        if engine.failure is not None and min(self._at) >= engine.fails_after:
            raise engine.failure
        most = min(params.max_tokens or engine.longest, engine.longest)
        tokens = self._script[:-1] * most if params.ignore_eos else self._script
        news = []
        for index, at in enumerate(self._at):
            if self._finished[index]:
                continue
            chunk = tokens[at : min(at + engine.burst, most)]
            self._at[index] = at = at + len(chunk)
            reason = "stop" if at == len(tokens) else "length" if at == most else None
            if index in self.ended:
                reason = self.ended[index]
            self._finished[index] = reason is not None
            scored = self._scored(self._request.prompt_token_ids[1:], params.prompt_logprobs) if index == 0 else None
            first = at == len(chunk)
            news.append(
                NewTokens(
                    self.request_id,
                    index,
                    chunk,
                    self._scored(chunk, params.logprobs),
                    scored if first else None,
                    engine.cached,
                    reason,
                )
            )
        return news

    @staticmethod
    def _scored(tokens: Any, count: int | None) -> Any:
        if count is None:
            return None
        return [
            {token: (-0.25, 1)} | {token + 1 + more: (-1.0 - more, 2 + more) for more in range(count - 1)}
            for token in tokens
        ]

    def end(self, index: int, reason: str = "stop") -> None:
        self.ended[index] = reason

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if not all(self._finished[index] or index in self.ended for index in range(len(self._at))):
                self._engine.aborted.append(self.request_id)

    async def aclose(self) -> None:
        self.close()


@dataclass
class ScriptedEngine:
    """What EngineClient is to the server.

    Attributes:
        answer: the text that it answers; or
        tokens: its tokens.
        burst: tokens that come together.
        moves: whether it makes any.
        failure: what a request in flight fails with, after ``fails_after`` tokens.
        refusal: what new requests are refused with.
        longest: tokens of an answer.
        cached: tokens of each prompt that it says were cached.
    """

    tokenizer: Any
    state: FakeState = field(default_factory=FakeState)
    info: Info | None = field(default_factory=Info)
    snapshot: Any = None
    on_snapshot: Any = None

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.state, self.info = FakeState(), Info()
        self.requests: list[Request] = []
        self.deadlines: list[float | None] = []
        self.streams: list[ScriptedStream] = []
        self.aborted: list[str] = []
        self.burst, self.moves, self.cached = 1, True, 0
        self.failure: Exception | None = None
        self.refusal: Exception | None = None
        self.cannot_start: Exception | None = None
        self.closed = False
        self.fails_after, self.longest = 0, MAX_MODEL_LEN
        self.answer = "Now is the winter of our discontent"

    @property
    def tokens(self) -> list[int]:
        return list(self.tokenizer(self.answer, add_special_tokens=False)["input_ids"])

    async def start(self) -> None: ...

    async def close(self, drain_seconds: float) -> None:
        self.closed, self.moves = True, False
        self.failure = EngineDownError("the server is stopping")

    async def wait_ready(self) -> None:
        if self.cannot_start is not None:
            raise self.cannot_start
        while self.state.phase != "ready":
            await asyncio.sleep(0.005)

    def generate(self, request: Request, deadline_seconds: float | None = None) -> ScriptedStream:
        if self.refusal is not None:
            raise self.refusal
        if self.state.phase != "ready":
            raise EngineDownError(self.state.cause or "the engine is starting", 3)
        self.requests.append(request)
        self.deadlines.append(deadline_seconds)
        self.streams.append(stream := ScriptedStream(self, request, deadline_seconds))
        return stream


@dataclass
class Served:
    """A server that runs.

    Attributes:
        url: where.
        engine: the scripted one.
        app: the application.
        client: of OpenAI's, for it.
        http: a plain one.
    """

    url: str
    engine: ScriptedEngine
    app: Any
    client: OpenAI
    http: httpx.Client

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.http.post(path, json=body, **more)


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Wait until something holds that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        threading.Event().wait(0.005)


def start(options: ServeOptions, keys: ApiKeys | None = None) -> Iterator[Served]:
    text = load_text(bundled_model(), EngineOptions())
    engine = ScriptedEngine(text.tokenizer)
    app = create_app(engine, text, options, keys)
    listener = listen("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that what is not read comes back soon
    protocol = http_protocol(options.slow_client_seconds)
    config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
    with client, httpx.Client(base_url=url, timeout=20) as http:
        yield Served(url, engine, app, client, http)
    server.should_exit = True
    thread.join(10)
    app.state.service.close()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The command line sets up logging for its process, which is that of all tests."""
    loggers = [logging.getLogger(name) for name in (None, "graphmode")]
    before = [(each, each.level, each.handlers[:]) for each in loggers]
    yield
    for each, level, handlers in before:
        each.setLevel(level)
        each.handlers[:] = handlers


@pytest.fixture
def scripted() -> ScriptedEngine:
    """An engine without a server."""
    return ScriptedEngine(load_text(bundled_model(), EngineOptions()).tokenizer)


@pytest.fixture(scope="package")
def running() -> Iterator[Served]:
    options = ServeOptions(
        served_model_name=["bard", "shakespeare"],
        slow_client_seconds=0.5,
        max_body_bytes=65536,
        max_prompts=4,
        max_answers=4,
    )
    yield from start(options)


@pytest.fixture
def served(running: Served) -> Served:
    """A server that is as it was at first."""
    running.engine.reset()
    running.app.state.service.draining = False
    return running
