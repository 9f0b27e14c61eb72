"""``/dashboard``: a page that shows what the server does, and the data that it asks for once a second."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from graphmode import __version__
from graphmode.serve.metrics import Metrics

router = APIRouter(include_in_schema=False)

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_FOLDER = files("graphmode.serve") / "dashboard"
_FILES = {each.name: each.read_bytes() for each in _FOLDER.iterdir() if each.name.rpartition(".")[2] in _TYPES}
_HEADERS = {
    # The page takes nothing from elsewhere, runs no script that a text might bring, and lies in no other's frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _file(name: str) -> Response:
    media_type = _TYPES[name.rpartition(".")[2]]
    return Response(_FILES[name], media_type=media_type, headers=_HEADERS)


@router.get("/dashboard")
async def page() -> Response:
    """Return the page."""
    return _file("index.html")


@router.get("/dashboard/data")
async def data(request: Request, after: int = Query(0, ge=0), started: float = 0.0) -> JSONResponse:
    """Return what the page shows.

    Args:
        request: the request.
        after: the number of the newest point that the page has.
        started: of the server that it has it from; where this is another, all points are sent.
    """
    service = request.app.state.service
    shown = data_of(service.metrics, service.engine.info, after, started)
    return JSONResponse(shown, headers={"Cache-Control": "no-store"})


@router.get("/dashboard/{name}")
async def file(name: str) -> Response:
    """Return a file of the page."""
    return _file(name) if name in _FILES else Response(status_code=404)


def data_of(metrics: Metrics, info: Any, after: int, started: float) -> dict[str, Any]:
    """Return what the page shows, as plain values.

    Args:
        metrics: the server's.
        info: the :class:`~graphmode.serve.messages.ModelInfo`; None before the engine has started.
        after: the number of the newest point that the page has.
        started: of the history that it has it from.
    """
    history, state, requests = metrics.history, metrics.engine.state, metrics.requests
    return {
        "version": __version__,
        "started": history.started,
        "number": history.number,
        "points": history.points(after if started == history.started else 0),
        "window": history.window(),
        "engine": {
            "phase": state.phase,
            "cause": state.cause,
            "captured": state.captured,
            "to_capture": state.to_capture,
            "restarts": state.restarts,
        },
        "model": {"name": metrics.model_name}
        | ({} if info is None else {name: getattr(info, name) for name in _OF_MODEL if hasattr(info, name)}),
        "now": {
            "running": metrics.running,
            "waiting": metrics.waiting,
            "kv": metrics.kv_cache_usage,
            "streams": requests.streams,
            "graphs": metrics.said("graphs"),
            "graph_bytes": metrics.said("graph_bytes"),
        },
        "totals": {
            "prompt_tokens": requests.prompt_tokens,
            "generation_tokens": requests.generation_tokens,
            "ended": requests.ended,
            "failed": requests.failed,
            "rejected": requests.rejected,
            "preemptions": metrics.counted("preemptions"),
            "capture_seconds": metrics.counted("capture_seconds"),
            "capture_failures": metrics.said("capture_failures"),
            "prefix_queries": metrics.counted("prefix_queries"),
            "prefix_hits": metrics.counted("prefix_hits"),
        },
    }


_OF_MODEL = ("device", "dtype", "max_model_len", "max_num_seqs", "graph_mode", "buckets")
