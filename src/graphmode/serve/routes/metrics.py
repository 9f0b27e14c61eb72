"""``/metrics``, which Prometheus reads."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from graphmode.serve.metrics import CONTENT_TYPE
from graphmode.serve.protocol import errors

router = APIRouter(tags=["operations"])


@router.get("/metrics", response_class=PlainTextResponse, responses=errors(401))
async def metrics(request: Request) -> Response:
    """Return what was counted and measured, in Prometheus' text format."""
    return Response(request.app.state.service.metrics.exposition(), media_type=CONTENT_TYPE)
