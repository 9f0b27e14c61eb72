"""Server-sent events, in the format of OpenAI's: ``data: {...}``, at last ``data: [DONE]``."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from graphmode.serve.errors import api_error
from graphmode.serve.logs import DIRECT_SEND, log_failure

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies hand each event on at once
_encode = msgspec.json.Encoder().encode


def event(data: bytes | Any, name: bytes | None = None) -> bytes:
    """Return an event.

    Args:
        data: JSON, or what msgspec makes JSON of.
        name: of the event; None for the one that most are.
    """
    json = data if isinstance(data, bytes) else _encode(data)
    return b"data: %b\n\n" % json if name is None else b"event: %b\ndata: %b\n\n" % (name, json)


async def event_stream(events: AsyncIterator[bytes]) -> Response:
    """Return an answer that sends events as they come.

    It waits for the first one, so that what fails before has a status of its own. What fails later becomes an event
    ``error``, and the stream ends without ``[DONE]``.
    """
    return _EventStream(await anext(events), events)


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. A client that leaves cancels this."""

        direct = scope.get(DIRECT_SEND, send)

        def sent(data: bytes) -> Awaitable[None]:
            return direct({"type": "http.response.body", "body": data, "more_body": True})  # type: ignore[no-any-return]

        with scope["app"].state.service.metrics.stream():
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await sent(self._first)
                try:
                    async for data in self._events:
                        await sent(data)
                except Exception as error:
                    failed = api_error(error)
                    if failed.status_code == 500:
                        log_failure(log, error)
                    await sent(event(failed.body(), b"error"))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                await self._events.aclose()  # type: ignore[attr-defined]
