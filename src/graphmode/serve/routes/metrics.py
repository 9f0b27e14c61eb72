"""``/metrics``, which Prometheus reads."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from graphmode.serve.metrics import CONTENT_TYPE

router = APIRouter(tags=["operations"])


@router.get("/metrics", summary="Metrics in Prometheus' text format", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Return all metrics."""
    return Response(request.app.state.service.metrics.exposition(), media_type=CONTENT_TYPE)
