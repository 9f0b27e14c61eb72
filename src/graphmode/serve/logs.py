"""What the server logs: a line a request. No line at any level holds a prompt, an answer or a key."""

from __future__ import annotations

import logging
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graphmode.serve.errors import api_error

log = logging.getLogger(__name__)

DIRECT_SEND = "graphmode.send"
"""The key of a scope under which a stream finds what sends an event past all that stands before the routes."""
CLIENT_LEFT = 499
"""In the log, in place of a status: the client left before there was an answer."""

_POLLED = frozenset({"/health", "/ready", "/metrics", "/dashboard/data"})
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._:-]")


@dataclass(slots=True)
class RequestRecord:
    """What is noted of an HTTP request for its line in the log.

    Attributes:
        request_id: the client's name of it, or one of ours.
        prompt_tokens: of all prompts.
        completion_tokens: of all answers, as far as they are sent.
    """

    request_id: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


CURRENT: ContextVar[RequestRecord | None] = ContextVar("request", default=None)


def request_id(given: str | None) -> str:
    """Return the name of a request: the client's without what does not belong into a log or a header, or a new one."""
    return _NOT_ALLOWED.sub("", given or "")[:128] or uuid.uuid4().hex


class _WithRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        current = CURRENT.get()
        record.request_id = "-" if current is None else current.request_id
        return True


def set_up_logging(level: str) -> None:
    """Log to standard error from a level on, each line with the name of the request that it is about."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_WithRequestId())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s id=%(request_id)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("graphmode").setLevel(level.upper())


def log_failure(log: logging.Logger, error: BaseException) -> None:
    """Log where an error was raised. Its message is left out: it may show a part of a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("a request has failed with %s at\n%s", type(error).__name__, frames)


class RequestLog:
    """Names each request, logs a line of it, and answers what nobody expected to fail.

    Args:
        app: what answers.
        answered: called with the method, the route and the status of each request.
    """

    def __init__(self, app: ASGIApp, answered: Callable[[str, str, int], None]) -> None:
        self._app = app
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        record = RequestRecord(request_id(given.decode("latin-1")))
        token = CURRENT.set(record)
        start, status = time.perf_counter(), 0

        def sent(message: Message) -> Any:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            return send(message)

        scope[DIRECT_SEND] = send
        try:
            await self._app(scope, receive, sent)
        except Exception as error:
            log_failure(log, error)
            if not status:
                await api_error(error).response()(scope, receive, sent)
        finally:
            milliseconds = 1e3 * (time.perf_counter() - start)
            route = getattr(scope.get("route"), "path", "unmatched")
            status = status or CLIENT_LEFT
            self._answered(scope["method"], route, status)
            log.log(
                logging.DEBUG if route in _POLLED else logging.INFO,
                "%s %s %d prompt_tokens=%d completion_tokens=%d ms=%.1f",
                scope["method"],
                route,
                status,
                record.prompt_tokens,
                record.completion_tokens,
                milliseconds,
            )
            CURRENT.reset(token)
