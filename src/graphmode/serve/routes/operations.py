"""``/health``, ``/ready`` and ``/version``: for those who run the server."""

from __future__ import annotations

import platform
from importlib.metadata import version as version_of

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from graphmode import __version__
from graphmode.serve.protocol import Responses, answer, errors, json_response
from graphmode.serve.service import get_service

router = APIRouter(tags=["operations"])


class Status(msgspec.Struct, omit_defaults=True):
    """How the server is.

    Attributes:
        status: ``ok``; else what the engine does instead, in a word.
        cause: why, in a sentence.
        captured: graphs that are captured, while the engine starts.
        to_capture: how many there will be.
        restarts: how often the engine was started again.
    """

    status: str
    cause: str | None = None
    captured: int | None = None
    to_capture: int | None = None
    restarts: int = 0


class Version(msgspec.Struct):
    """What runs.

    Attributes:
        version: of graphmode.
        versions: of Python and packages.
        device: the name of what the engine runs on; null until it is ready.
    """

    version: str
    versions: dict[str, str]
    device: str | None


def _unavailable() -> Responses:
    described = answer(Status)[200]
    return {503: described | {"description": "It is not so; the cause says why."}}


@router.get("/health", responses=answer(Status) | _unavailable())
async def health(request: Request) -> Response:
    """Tell whether the server lives: 503 from when the engine fails until it runs again. It needs no key."""
    state = get_service(request).engine.state
    if state.phase in ("dead", "stalled") or (state.phase == "starting" and state.cause is not None):
        return json_response(Status(state.phase, state.cause, restarts=state.restarts), 503)
    return json_response(Status("ok", restarts=state.restarts))


@router.get("/ready", responses=answer(Status) | _unavailable() | errors(401))
async def ready(request: Request) -> Response:
    """Tell whether requests are taken: 503 until all graphs are captured, and while the server shuts down."""
    service = get_service(request)
    state = service.engine.state
    if service.draining:
        return json_response(Status("draining", "the server is shutting down"), 503)
    if state.phase == "ready":
        return json_response(Status("ok", restarts=state.restarts))
    return json_response(Status(state.phase, state.cause, state.captured, state.to_capture, state.restarts), 503)


@router.get("/version", responses=answer(Version) | errors(401))
async def version(request: Request) -> Response:
    """Tell which versions run."""
    info = get_service(request).engine.info
    versions = {"graphmode": __version__, "python": platform.python_version()}
    versions |= {package: version_of(package) for package in ("torch", "transformers")}
    return json_response(Version(__version__, versions, None if info is None else info.device))
