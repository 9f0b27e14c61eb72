"""An OpenAI-compatible server whose answers come at known times: what load tests are tested against."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

WORDS_OF_TEMPLATE = 7


@dataclass
class FakeServer:
    """How the server answers; and what it was asked.

    Attributes:
        first: seconds to the first token.
        step: seconds between events.
        per_event: tokens of an event.
        tokenizes: whether it has ``/tokenize``.
        takes_ids: whether prompts may be token ids.
        counts: whether it says how many tokens each event carries; asked for it, it refuses otherwise.
        key: the key that it wants.
        text: of a token.
        reasoning: what a chat says before its answer.
        breaks: given a request's number (from 0), how its answer goes wrong; None: not at all.
        asked: bodies of all generating requests, in order.
    """

    first: float = 0.0
    step: float = 0.0
    per_event: int = 1
    tokenizes: bool = True
    takes_ids: bool = True
    counts: bool = True
    key: str | None = None
    text: str = "ab"
    reasoning: str = ""
    breaks: Callable[[int], str | None] = lambda number: None
    asked: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    connections: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split("\r\n")[0].split(" ")
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if self.key is not None and headers.get("authorization") != f"bearer {self.key}":
                    self.say(writer, 401, {"error": {"message": "wrong key"}})
                else:
                    await self.answer(writer, path, json.loads(body) if method == "POST" else {})
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    def say(self, writer: asyncio.StreamWriter, status: int, values: Any) -> None:
        body = json.dumps(values).encode()
        kind = "application/json"
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)

    async def answer(self, writer: asyncio.StreamWriter, path: str, asked: dict[str, Any]) -> None:
        if path == "/v1/models":
            return self.say(writer, 200, {"data": [{"id": "fake", "max_model_len": 512}]})
        if path == "/version":
            return self.say(writer, 200, {"version": "1", "device": "a fake"})
        if path == "/tokenize" and self.tokenizes:
            tokens = [len(word) + 10 * ord(word[0]) for word in asked["prompt"].split()]
            return self.say(writer, 200, {"count": len(tokens), "tokens": tokens, "max_model_len": 512})
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return self.say(writer, 404, {"error": {"message": f"no {path}"}})
        is_chat = "chat" in path
        prompt = asked["messages"][0]["content"] if is_chat else asked["prompt"]
        if isinstance(prompt, list) and not self.takes_ids:
            return self.say(writer, 400, {"error": {"message": "prompts are texts"}})
        options = asked.get("stream_options", {})
        if options.get("continuous_usage_stats") and not self.counts:
            return self.say(writer, 400, {"error": {"message": "unknown continuous_usage_stats"}})
        count = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        count += WORDS_OF_TEMPLATE if is_chat else 0
        if not asked.get("stream"):
            usage = {"prompt_tokens": count, "completion_tokens": 1, "total_tokens": count + 1}
            return self.say(writer, 200, {"choices": [{"index": 0, "text": "a"}], "usage": usage})
        number = len(self.asked)
        self.asked.append(asked)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.stream(writer, is_chat, count, asked, self.breaks(number))
        finally:
            self.in_flight -= 1
        return None

    async def stream(
        self, writer: asyncio.StreamWriter, is_chat: bool, count: int, asked: dict[str, Any], wrong: str | None
    ) -> None:
        if wrong == "refused":
            return self.say(writer, 429, {"error": {"message": "come again"}})
        if wrong == "silent":
            await asyncio.sleep(3600)
        max_tokens = asked.get("max_tokens", 3)
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head.encode())

        def send(values: Any) -> None:
            event = b"data: " + (values if isinstance(values, bytes) else json.dumps(values).encode()) + b"\n\n"
            writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")

        if is_chat:
            send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        if self.reasoning:
            send({"choices": [{"index": 0, "delta": {"reasoning_content": self.reasoning}}]})
        await asyncio.sleep(self.first)
        for made in range(0, max_tokens, self.per_event):
            if made:
                await asyncio.sleep(self.step)
            if made and wrong == "cut":
                await writer.drain()
                writer.transport.abort()
                return None
            if made and wrong == "error":
                send({"error": {"message": "the engine has died"}})
                break
            now = min(self.per_event, max_tokens - made)
            choice = {
                "index": 0,
                ("delta" if is_chat else "text"): {"content": self.text * now} if is_chat else self.text * now,
            }
            usage = {"prompt_tokens": count, "completion_tokens": made + now}
            send({"choices": [choice]} | ({"usage": usage} if self.counts else {}))
        else:
            send({"choices": [], "usage": {"prompt_tokens": count, "completion_tokens": max_tokens}})
        send(b"[DONE]")
        writer.write(b"0\r\n\r\n")
        return None

    @contextmanager
    def running(self) -> Iterator[FakeServer]:
        """Serve from a thread of its own, on a free port."""
        loop = asyncio.new_event_loop()
        started = threading.Event()

        async def main() -> None:
            server = await asyncio.start_server(self.connected, "127.0.0.1", 0, backlog=512)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            self.stop = asyncio.Event()
            await self.stop.wait()
            server.close()

        thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
        thread.start()
        started.wait()
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(self.stop.set)
            thread.join()
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()
