"""Errors as clients see them: a status, and OpenAI's shape ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from graphmode.engine.checks import shown
from graphmode.errors import DeadlineExceededError, EngineDownError, GraphModeError, InputError, OverloadedError

_NAMES = re.compile(r"[A-Za-z_]\w*(?:\[\d+\])*(?:\.\w+)*")


class ApiError(HTTPException):
    """A request that is refused or failed.

    Args:
        status: of HTTP.
        message: what is wrong, the limit and what to do.
        type: the kind of error, in OpenAI's words.
        param: the parameter that is wrong; None where none is.
        code: a word that programs read; None where the status says it all.
        headers: of the answer, beside those that every answer has.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.type, self.param, self.code = message, type, param, code

    def body(self) -> bytes:
        """Return the error in OpenAI's shape, as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()  # in ASCII: a message may show what no UTF-8 text has

    def response(self) -> Response:
        """Return the answer."""
        return Response(self.body(), self.status_code, self.headers, media_type="application/json")


def api_error(error: BaseException) -> ApiError:
    """Return an error as clients see it. What is no fault of theirs does not say more than that something failed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        message = str(error)
        return ApiError(400, message, param=_parameter(message), code="invalid_value")
    if isinstance(error, OverloadedError):
        after = {"Retry-After": str(max(1, round(error.retry_after or 1)))}
        return ApiError(429, str(error), type="rate_limit_error", code="queue_full", headers=after)
    if isinstance(error, DeadlineExceededError):
        again = {"X-Should-Retry": "false"}  # clients of OpenAI's would send it again by themselves
        return ApiError(504, str(error), type="timeout_error", code="deadline_exceeded", headers=again)
    if isinstance(error, (EngineDownError, GraphModeError)):
        return ApiError(503, str(error), type="server_error", code="engine_unavailable", headers={"Retry-After": "5"})
    return ApiError(500, "the server has failed at this request; its log says where", type="server_error")


def _parameter(message: str) -> str | None:
    """Return the parameter that a message begins with: ours name the value first."""
    first, _, rest = message.partition(" ")
    first = first.removesuffix(":")
    if first == "prompt_token_ids" or (first in ("the", "a") and rest.startswith("prompt")):
        return "prompt"
    return first if _NAMES.fullmatch(first) and first not in ("the", "a", "an") else None


async def _known(_: Request, error: Exception) -> Response:
    return api_error(error).response()


async def _http(_: Request, error: Exception) -> Response:
    """Answer what the framework refuses: no such route, method not allowed, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    code = {404: "not_found", 405: "method_not_allowed"}.get(status)
    message = str(error.detail)
    if message == status.phrase:
        message = f"{message.lower()}; /docs shows which routes there are"
    return ApiError(status, message, code=code, headers=error.headers).response()


async def _invalid(request: Request, error: Exception) -> Response:
    """Answer what does not fit the declared body."""
    assert isinstance(error, RequestValidationError)
    bodies = [each.field_info.annotation for each in request.scope["route"].dependant.body_params]
    known = [name for body in bodies for name in getattr(body, "model_fields", ())]
    return _validation_error(error.errors(), known).response()


def _validation_error(errors: Any, known: Sequence[str]) -> ApiError:
    """Return the error that says most: of a union, each member that does not fit has one.

    Args:
        errors: pydantic's.
        known: the names of the body's parameters.
    """

    # A value of the wrong type tells least, and the deeper, the more: a list is no text, but it may be meant as a list.
    def says(error: Any) -> tuple[bool, bool, int]:
        return error["type"] == "extra_forbidden", not error["type"].endswith("_type"), len(error["loc"])

    first = max(errors, key=says)
    where = [part for part in first["loc"][first["loc"][:1] == ("body",) :] if not _is_type_name(part)]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".") or None
    kind, said = first["type"], first["msg"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', said)}", code="invalid_json")
    if param is None:
        return ApiError(
            400, "the body must be a JSON object, sent with Content-Type: application/json", code="invalid_json"
        )
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(param, known, n=1)
        meant = f"did you mean {near[0]}?" if near else "leave it out"
        return ApiError(400, f"there is no parameter {param}; {meant}", param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{param} is missing; give it", param=param, code="missing_required_parameter")
    message = f"{param} is {shown(first.get('input'))}: {said[:1].lower()}{said[1:]}"
    return ApiError(400, message, param=param, code="invalid_type")


def _is_type_name(part: object) -> bool:
    """Return whether a part of a location is pydantic's name of a member of a union, not of a field."""
    return (isinstance(part, str) and not part.isidentifier()) or part in ("str", "int", "float", "bool")


def install_error_handlers(app: FastAPI) -> None:
    """Let the app answer every error in OpenAI's shape."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(GraphModeError, _known)
    app.add_exception_handler(ApiError, _known)
    app.add_exception_handler(HTTPException, _http)
