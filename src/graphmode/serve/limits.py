"""What a connection may do: send a body of some size, leave an answer unread for some time, and go."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from graphmode.serve.errors import ApiError


class BodyLimit:
    """Refuses bodies that are too large, by their declared length or as they come, and those that do not come.

    Args:
        app: what gets the others.
        most: bytes of a body.
        seconds: that may pass until more of it comes.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(declared) > self._most:
            await self._too_large().response()(scope, receive, send)
            return
        taken, more = 0, True

        async def counted() -> Message:
            nonlocal taken, more
            try:
                async with asyncio.timeout(self._seconds if more else None):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            taken, more = taken + len(message.get("body", b"")), message.get("more_body", False)
            if taken > self._most:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_slow(self) -> ApiError:
        message = f"no more of the body has come for {self._seconds:g} s, which is slow_client_seconds; send it at once"
        return ApiError(408, message, code="body_too_slow", headers={"Connection": "close"})

    def _too_large(self) -> ApiError:
        message = f"the body has more than {self._most} bytes, which is max_body_bytes; send less"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


class EndWithClient:
    """Cancels what answers a request when its client leaves, so that its generation ends within a step.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        left = complete = False
        watcher: asyncio.Task[None] | None = None

        async def watch() -> None:
            nonlocal left
            while (await receive())["type"] != "http.disconnect":
                pass
            if not complete:
                left = True
                task.cancel()

        async def taken() -> Message:
            nonlocal watcher
            if watcher is not None:
                await watcher
                return {"type": "http.disconnect"}
            message = await receive()
            if not message.get("more_body", False):
                watcher = asyncio.create_task(watch())
            return message

        def sent(message: Message) -> Any:
            nonlocal complete
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            return send(message)

        try:
            await self._app(scope, taken, sent)
        except asyncio.CancelledError:
            if not left:
                raise
            task.uncancel()
        finally:
            if watcher is not None:
                watcher.cancel()


def http_protocol(slow_client_seconds: float) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with an end to connections whose client is silent, or does not read, for so long.

    What is not read waits in the transport's buffer, which is bounded: when it is full, writing pauses, and whoever
    writes waits. Aborting the connection then frees the buffer, and cancels what answers.
    """

    class Protocol(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.access_log = False  # the server has a line of its own, which holds no path
            self._start_timer()

        def on_headers_complete(self) -> None:
            if not self.flow.write_paused:
                self._end_timer()
            super().on_headers_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._start_timer()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._end_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_timer()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            self._timer = self.loop.call_later(slow_client_seconds, self.transport.abort)

        def _end_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Protocol
