"""Clients of every kind, good and bad, and what a server must hold to whatever they do."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.serve.process import ServerProcess, wait_for

KEY = "soak-key"
CLIENTS = 50
PROMPTS = [
    f"{name}.\nMy lord, {words}" for name in ("ROMEO", "HAMLET", "NURSE") for words in ("what news?", "the queen", "I")
]
CHAT = "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}
BOMBS: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "((a{1,999}){1,999}){1,999}"}},
    {"structured_outputs": {"regex": "(a|b)*a" + "(a|b)" * 40}},
    {"structured_outputs": {"regex": "(" * 5000 + ")" * 5000}},
    {"structured_outputs": {"grammar": "start: a0\n" + "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(300))}},
    {"structured_outputs": {"json": {"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}}},
    {"structured_outputs": {"choice": ["x" * 50] * 20000}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"minLength": 10**9, "type": "string"}},
        }
    },
]
MALFORMED: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"[1]", 400),
    (b'{"prompt": 5}', 400),
    (b'{"prompt": "a", "max_tokens": -1}', 400),
    (b'{"prompt": "a", "temperature": 1e99}', 400),
    (b'{"prompt": "a", "no_such_field": 1}', 400),
    (b'{"prompt": "a", "model": "no-such-model"}', 404),
    (b'{"prompt": "' + b"a" * 70000 + b'"}', 413),
    (b'{"prompt": "\xff\xfe"}', 400),
    (b"[" * 30000, 400),
]


@dataclass
class Response:
    """An answer of the server.

    Attributes:
        status: of HTTP.
        body: as far as it was read.
        whole: whether it came to its end.
    """

    status: int
    body: bytes = b""

    @property
    def events(self) -> list[dict[str, Any]]:
        payloads = re.findall(rb"data: (\{.*\})\n\n", self.body)
        return [json.loads(payload) for payload in payloads]

    @property
    def text(self) -> str:
        """The answer's text; of an event stream, all of it."""
        found = self.events if b"data: " in self.body else [json.loads(self.body)]
        return "".join(choice["text"] for each in found for choice in each["choices"])

    @property
    def error(self) -> dict[str, Any] | None:
        """What failed, in OpenAI's shape."""
        found = self.events if b"data: " in self.body else [json.loads(self.body)]
        return next((each["error"] for each in found if "error" in each), None)


@dataclass
class Soak:
    """Clients of a server, and what became of their requests."""

    server: ServerProcess
    alone: dict[tuple[str, int], str]
    until: float
    seen: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        host, port = self.server.url.removeprefix("http://").split(":")
        self._address = host, int(port)

    async def run(self) -> None:
        """Let all clients do what they do until it is time."""
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._client(random.Random(number)))

    async def _client(self, rng: random.Random) -> None:
        kinds: list[tuple[int, Callable[[random.Random], Coroutine[Any, Any, None]]]] = [
            (6, self._whole),
            (6, self._streamed),
            (3, self._sampled),
            (2, self._chat),
            (3, self._leaves),
            (3, self._resets),
            (2, self._slow),
            (3, self._malformed),
            (1, self._oversized),
            (1, self._bomb),
            (1, self._structured),
            (1, self._wrong_key),
            (1, self._hurried),
            (1, self._no_http),
        ]
        weights = [weight for weight, _ in kinds]
        while time.monotonic() < self.until:
            [(_, act)] = rng.choices(kinds, weights)
            refused = self.statuses[429]
            await act(rng)
            self.seen[act.__name__] += 1
            if self.statuses[429] > refused:
                await asyncio.sleep(rng.random() / 4)

    # The wire

    @asynccontextmanager
    async def _sent(
        self, body: bytes, path: str = "/v1/completions", key: str = KEY
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(*self._address, limit=4096)
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            writer.write(head.encode() + body)
            yield reader, writer
        finally:
            writer.close()

    async def _ask(self, body: Any, path: str = "/v1/completions", key: str = KEY) -> Response:
        """Return the whole answer; one that is not 200 must say why."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self._sent(data, path, key) as (reader, _), asyncio.timeout(120):
            response = await self._head(reader)
            try:
                while part := await reader.read(65536):
                    response.body += part
            except ConnectionResetError:  # of a body that was refused before it was read
                assert response.status == 413
                return response
        if response.status != 200:
            assert response.error is not None, response
            assert response.error["message"], response
        return response

    async def _head(self, reader: asyncio.StreamReader) -> Response:
        head = await reader.readuntil(b"\r\n\r\n")
        response = Response(int(head.split(b" ", 2)[1]))
        self.statuses[response.status] += 1
        if response.status >= 500 and response.status not in (503, 504):
            raise AssertionError(head + await reader.read())
        if response.status in (429, 503):
            assert b"retry-after" in head.lower(), head
        return response

    def _greedy(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        prompt, max_tokens = rng.choice(list(self.alone))
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return self.alone[prompt, max_tokens], body

    # What clients do

    async def _whole(self, rng: random.Random) -> None:
        text, body = self._greedy(rng)
        response = await self._ask(body)
        assert response.status in (200, 429)
        assert response.status == 429 or response.text == text

    async def _streamed(self, rng: random.Random) -> None:
        text, body = self._greedy(rng)
        response = await self._ask(body | {"stream": True})
        assert response.status in (200, 429)
        if response.status == 200:
            assert response.error is None, response.error
            assert response.text == text
            assert b"data: [DONE]" in response.body

    async def _sampled(self, rng: random.Random) -> None:
        body = {"prompt": rng.choice(PROMPTS), "n": rng.randrange(1, 4), "max_tokens": 12, "logprobs": 2, "top_p": 0.9}
        response = await self._ask(body | {"stream": rng.random() < 0.5, "repetition_penalty": 1.1, "seed": 3})
        assert response.status in (200, 429)
        assert response.status == 429 or response.text

    async def _chat(self, rng: random.Random) -> None:
        body = {"messages": [{"role": "user", "content": rng.choice(PROMPTS)}], "max_tokens": 12, "stop": ["\n\n"]}
        response = await self._ask(body | {"stream": rng.random() < 0.5}, "/v1/chat/completions")
        assert response.status in (200, 429)

    async def _begin(self, rng: random.Random, reader: asyncio.StreamReader) -> bool:
        if (await self._head(reader)).status != 200:
            return False
        for _ in range(rng.randrange(3)):
            await reader.read(200)
        return True

    def _long(self, rng: random.Random) -> bytes:
        body = {
            "prompt": rng.choice(PROMPTS),
            "max_tokens": 400,
            "stream": True,
            "ignore_eos": True,
            "n": rng.randrange(1, 3),
        }
        return json.dumps(body).encode()

    async def _leaves(self, rng: random.Random) -> None:
        async with self._sent(self._long(rng)) as (reader, _):
            await self._begin(rng, reader)

    async def _resets(self, rng: random.Random) -> None:
        """A client that is killed: its sockets are reset, before the answer begins or in its middle."""
        async with self._sent(self._long(rng)) as (reader, writer):
            if rng.random() < 0.5:
                await self._begin(rng, reader)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _slow(self, rng: random.Random) -> None:
        """A client that reads little, and gives up at last."""
        async with self._sent(self._long(rng)) as (reader, _):
            if await self._begin(rng, reader):
                for _ in range(10):
                    await asyncio.sleep(0.05)
                    if not await reader.read(64):
                        break

    async def _malformed(self, rng: random.Random) -> None:
        body, status = rng.choice(MALFORMED)
        response = await self._ask(body)
        assert response.status in (status, 422), (body[:100], response)

    async def _oversized(self, rng: random.Random) -> None:
        response = await self._ask({"prompt": "word " * 3000, "max_tokens": 5})
        assert response.status == 400, response
        assert response.error is not None
        assert "256" in response.error["message"], "the limit is named"

    async def _bomb(self, rng: random.Random) -> None:
        """A grammar that is expensive: refused with a cause, or answered."""
        path, asked = rng.choice([CHAT, ("/v1/completions", {"prompt": "a"})])
        response = await self._ask(asked | {"max_tokens": 4} | rng.choice(BOMBS), path)
        assert response.status in (200, 400, 413, 429), response

    async def _structured(self, rng: random.Random) -> None:
        path, asked = CHAT
        response = await self._ask(asked | {"structured_outputs": {"choice": ["yea", "nay"]}}, path)
        assert response.status in (200, 429), response
        if response.status == 200:
            assert json.loads(response.body)["choices"][0]["message"]["content"] in ("yea", "nay")

    async def _wrong_key(self, rng: random.Random) -> None:
        path = rng.choice(["/v1/completions", "/v1/models", "/metrics", "/tokenize", "/no-such-route"])
        assert (await self._ask(self._long(rng), path, key="wrong")).status == 401

    async def _hurried(self, rng: random.Random) -> None:
        """A request whose deadline is short: its answer is whole, or says that it came too late."""
        text, body = self._greedy(rng)
        response = await self._ask(body | {"timeout": 0.1})
        assert response.status in (200, 408, 429, 504), response
        assert response.status != 200 or response.text == text

    async def _no_http(self, rng: random.Random) -> None:
        reader, writer = await asyncio.open_connection(*self._address)
        writer.write(
            rng.choice(
                [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9\r\n\r\n", b"\r\n" * 100, b"POST /v1/completions HTTP/1.1\r\n"]
            )
        )
        try:
            async with asyncio.timeout(0.2):
                await reader.read()
        except (TimeoutError, ConnectionResetError):
            pass
        finally:
            writer.close()


@dataclass(frozen=True)
class Held:
    """What the server's processes hold."""

    descriptors: tuple[int, int]
    processes: int
    tasks: Counter[str]


def held(server: ServerProcess) -> Held:
    """Return what an idle server holds."""
    processes = server.process.children(recursive=True)
    return Held((server.process.num_fds(), server.engine.num_fds()), len(processes), Counter(server.tasks()))


def idle(server: ServerProcess) -> None:
    """Wait until nothing runs; then no block is in use, and no stream is open."""
    for name in (
        "graphmode_requests_active",
        "graphmode_streams_open",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
    ):
        wait_for(lambda name=name: server.metric(name) == 0)


async def watched(server: ServerProcess, soak: Soak, every: float) -> np.ndarray:
    """Run the clients; return seconds and bytes of the two processes, a row a look."""
    rows = []
    running = asyncio.create_task(soak.run())
    while not running.done():
        rows.append((time.monotonic(), server.process.memory_info().rss, server.engine.memory_info().rss))
        await asyncio.wait([running], timeout=every)
    await running
    return np.array(rows)


OPTIONS = [
    *("--device", "cpu", "--graph-sizes", "1,16", "--max-num-seqs", "16", "--max-model-len", "256"),
    *("--kv-cache-memory", str(24 << 20), "--max-num-batched-tokens", "64"),
    *("--max-queue", "40", "--slow-client-seconds", "2", "--max-body-bytes", "65536", "--log-level", "warning"),
]
"""Of a server that is soon full, so that requests wait and are preempted."""


def check(server: ServerProcess, seconds: float) -> None:
    """Let all clients do what they do for so long, and check that nothing leaks and each got its answer or a cause."""
    alone = {(prompt, size): server.complete(prompt, size) for prompt in PROMPTS for size in (1, 9, 24)}
    # What is made once, such as the process that tries grammars, is there afterwards.
    asyncio.run(Soak(server, alone, time.monotonic() + min(seconds / 4, 30)).run())
    idle(server)
    before = held(server)
    soak = Soak(server, alone, time.monotonic() + seconds)
    memory = asyncio.run(watched(server, soak, min(1.0, seconds / 20)))
    idle(server)
    wait_for(lambda: held(server) == before)
    assert server.complete(PROMPTS[0], 9) == alone[PROMPTS[0], 9]
    assert server.metric("graphmode_engine_restarts_total") == 0
    assert server.http.get("/health").status_code == 200
    # The slope of a line through the memory after the first third, times what that spans.
    late = memory[len(memory) // 3 :]
    grown = [np.polyfit(late[:, 0], late[:, at], 1)[0] * (late[-1, 0] - late[0, 0]) for at in (1, 2)]
    print(f"\n{sum(soak.seen.values())} requests in {seconds} s: {dict(soak.seen)}; statuses {dict(soak.statuses)}")
    print(
        f"memory grew by {grown[0] / 2**20:.2f} MiB (HTTP) and {grown[1] / 2**20:.2f} MiB (engine), of "
        f"{late[0, 1] / 2**20:.0f} and {late[0, 2] / 2**20:.0f}; held in the end as before: {before}"
    )
    assert max(grown) < (8 << 20 if seconds > 60 else 64 << 20), memory.tolist()
    log = server.log.read_text()
    assert "Traceback" not in log, log
    assert KEY not in log
