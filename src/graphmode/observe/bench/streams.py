"""A client of streamed answers that takes little of the machine: HTTP/1.1 and server-sent events on asyncio.

Hundreds of streams bring tens of thousands of events a second, and each is stamped when it comes. General HTTP clients
take a multiple of the time that a server takes to send an event.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

_MOST_OF_AN_ERROR = 2000  # characters


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    Attributes:
        host: a name or an address.
        port: of the host.
        secure: whether by TLS.
        path: of the requests.
        headers: sent with each, by name.
    """

    host: str
    port: int
    secure: bool
    path: str
    headers: tuple[tuple[str, str], ...] = ()

    def request(self, body: bytes) -> bytes:
        """Return an HTTP request with a JSON body, as bytes."""
        lines = [
            f"POST {self.path} HTTP/1.1",
            f"Host: {f'[{self.host}]' if ':' in self.host else self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def endpoint(url: str, path: str, headers: Mapping[str, str]) -> Endpoint:
    """Return the endpoint of a path below a URL such as ``http://127.0.0.1:8000``."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    return Endpoint(parts.hostname or "", port, secure, parts.path + path, tuple(headers.items()))


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are those of ``time.perf_counter``, in seconds.

    Attributes:
        start: when it was sent.
        end: when its answer was complete, or failed.
        late: seconds from when it was to be sent until it was.
        error: None where the answer is complete; otherwise the status, or what else failed.
        message: what the server said of the error.
        times: when tokens came; events that were read together count as one arrival.
        tokens: the number of tokens of each arrival.
        prompt_tokens: of the prompt, as the server counts; None where it does not say.
        counted: whether the server said how many tokens each event carries; otherwise they are shared out by text.
    """

    start: float
    end: float = 0.0
    late: float = 0.0
    error: str | None = None
    message: str = ""
    times: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: int | None = None
    counted: bool = False

    @property
    def num_tokens(self) -> float:
        """The tokens of the answer."""
        return sum(self.tokens)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


def _text_length(choice: _Choice) -> int:
    if choice.text is not None:
        return len(choice.text)
    delta = choice.delta
    if delta is None:
        return 0
    length = len(delta.content or "") + len(delta.reasoning_content or delta.reasoning or "")
    return length + len(str(delta.tool_calls)) if delta.tool_calls else length


class _Events:
    """Takes the body of a streamed answer in, and notes when how many tokens came."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._rest = b""
        self._characters = array("d")  # of each arrival
        self._total: int | None = None
        self._finished = False
        self.done = False

    def feed(self, text: bytes, now: float) -> None:
        """Take what came at a time."""
        text = self._rest + text
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        *events, self._rest = text.split(b"\n\n")
        characters, before = 0, self._total or 0
        for event in events:
            data = event if event.startswith(b"data:") else event[event.find(b"\ndata:") + 1 :]
            payload = data[5:].strip()
            if not data.startswith(b"data:") or payload == b"[DONE]":  # else a comment, which keeps connections open
                self.done |= payload == b"[DONE]"
                continue
            try:
                read = _decode(payload)
            except msgspec.DecodeError as error:
                self._fail(f"event that is no JSON of a completion: {error}", payload)
                continue
            if read.error is not None:
                self._fail("error event", payload)
                continue
            for choice in read.choices:
                characters += _text_length(choice)
                self._finished |= choice.finish_reason is not None
            if (usage := read.usage) is not None:
                self._answer.prompt_tokens = usage.prompt_tokens
                self._answer.counted |= bool(read.choices)
                self._total = usage.completion_tokens
        counted = (self._total or 0) - before if self._answer.counted else 0
        if counted > 0 or (characters and not self._answer.counted):
            self._answer.times.append(now)
            self._answer.tokens.append(counted)
            self._characters.append(characters)

    def _fail(self, error: str, payload: bytes) -> None:
        self._answer.error = self._answer.error or error
        self._answer.message = self._answer.message or payload.decode(errors="replace")[:_MOST_OF_AN_ERROR]

    def end(self) -> None:
        """Note that the body has ended."""
        answer = self._answer
        if not answer.counted:  # shared out by text, of as many tokens as the server says, or else one an event
            total = len(self._characters) if self._total is None else self._total
            text = sum(self._characters) or 1
            answer.tokens = array("d", (total * characters / text for characters in self._characters))
        if answer.error is None and not (self.done or self._finished):
            answer.error = "stream that ended early"


class Connection(asyncio.Protocol):
    """A connection that is kept open; it takes a request at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    async def send(self, request: bytes, answer: Answer) -> None:
        """Send a request and take its answer in.

        Raises:
            ConnectionResetError: the connection was closed before the answer began.
        """
        assert self._transport is not None
        self._answer, self._events = answer, _Events(answer)
        self._head = self._raw = b""
        self._body: list[bytes] = []  # of an answer that is not streamed
        self._status = 0
        self._left: int | None = None  # bytes of the body or the chunk; None: until the connection is closed
        self._chunked = self._keeps_open = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._answer = self._done = None
        if answer.error is None and self._status != 200:
            answer.error = str(self._status)
            answer.message = b"".join(self._body).decode(errors="replace")[:_MOST_OF_AN_ERROR]

    def close(self) -> None:
        """Close the connection at once."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes in."""
        now = time.perf_counter()
        if self._answer is None or self._done is None or self._done.done():
            self.close()  # nobody asked for it
            return
        if not self._status:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            try:
                self._read_head(head.decode("latin-1"))
            except ValueError as error:
                self._end(f"answer that is no HTTP: {error}")
                return
        self._raw += data
        body, ended = self._unframe()
        if body:
            if self._streamed:
                self._events.feed(body, now)
            else:
                self._body.append(body)
        if ended:
            self._end(None)

    def _read_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        version, status, *_ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._status = int(status)
        self._streamed = self._status == 200 and headers.get("content-type", "").startswith("text/event-stream")
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._keeps_open = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        length = headers.get("content-length")
        self._left = 0 if self._chunked else None if length is None else int(length)
        if self._status == 200 and not self._streamed:
            raise ValueError(f"content type {headers.get('content-type')!r}, not text/event-stream")

    def _unframe(self) -> tuple[bytes, bool]:
        """Return what of the body has come, and whether that is its end."""
        if self._left is None:
            body, self._raw = self._raw, b""
            return body, False
        if not self._chunked:
            body, self._raw = self._raw[: self._left], self._raw[self._left :]
            self._left -= len(body)
            return body, self._left == 0
        parts, raw, at = [], self._raw, 0
        ended = False
        while True:
            if self._left == 0:
                end = raw.find(b"\r\n", at)
                if end == at and raw.startswith(b"\r\n", at):  # after a chunk
                    at += 2
                    continue
                if end < 0:
                    break
                self._left = int(raw[at:end].partition(b";")[0], 16)
                if self._left == 0:
                    ended = raw.find(b"\r\n\r\n", end) >= 0  # what follows the last chunk has come too
                    break
                at = end + 2
            part = raw[at : at + self._left]
            parts.append(part)
            at += len(part)
            self._left -= len(part)
            if self._left:
                break
        self._raw = raw[at:]
        return b"".join(parts), ended

    def _end(self, error: str | None) -> None:
        assert self._answer is not None
        assert self._done is not None
        self._answer.end = time.perf_counter()
        self._answer.error = self._answer.error or error
        if self._status == 200 and self._streamed:
            self._events.end()
        if not self._keeps_open or error is not None:
            self.close()
        if not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """End the answer that is incomplete."""
        self.is_open = False
        if self._done is None or self._done.done():
            return
        if not self._status and not self._head:
            self._done.set_exception(ConnectionResetError(str(error or "closed by the server")))
        else:
            until_closed = self._left is None and error is None
            self._end(None if until_closed else f"connection that was lost: {error or 'closed by the server'}")


class Client:
    """Sends requests to an endpoint, each on a connection of its own, and keeps connections for later ones.

    Args:
        to: the endpoint.
        seconds: the longest that a request may take.
    """

    def __init__(self, to: Endpoint, seconds: float) -> None:
        self._to = to
        self._seconds = seconds
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if to.secure else None

    async def ask(self, body: bytes, due: float | None = None) -> Answer:
        """Return the answer to a request with a JSON body; errors are in it.

        Args:
            body: as it is sent.
            due: when it was to be sent.
        """
        request = self._to.request(body)
        answer = Answer(time.perf_counter())
        answer.late = 0.0 if due is None else answer.start - due
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    connection, is_new = await self._connection()
                    try:
                        await connection.send(request, answer)
                        break
                    except ConnectionResetError:  # one that was kept, and that the server has closed meanwhile
                        if is_new:
                            raise
        except TimeoutError:
            answer.error = f"timeout after {self._seconds:g} s"
        except OSError as error:
            answer.error, answer.message = f"connection that failed: {type(error).__name__}", str(error)
        finally:
            if connection is not None:
                if answer.end == 0:  # given up in the middle
                    connection.close()
                elif connection.is_open:
                    self._idle.append(connection)
        answer.end = answer.end or time.perf_counter()
        return answer

    async def _connection(self) -> tuple[Connection, bool]:
        """Return an open connection, and whether it is new."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection, False
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection, self._to.host, self._to.port, ssl=self._tls
        )
        return connection, True

    def close(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
