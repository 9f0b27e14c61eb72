"""``GET /v1/models``: what is served."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from graphmode.serve.protocol import answer, errors, json_response
from graphmode.serve.service import Service, get_service

router = APIRouter(tags=["models"])


class Model(msgspec.Struct):
    """A name of the model.

    Attributes:
        root: the model's path or hub name.
        max_model_len: tokens of a prompt and its answer together; null until the engine is ready.
    """

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    max_model_len: int | None


class Models(msgspec.Struct):
    """All names."""

    object: str
    data: list[Model]


def _model(service: Service, name: str) -> Model:
    info = service.engine.info
    length = None if info is None else info.max_model_len
    return Model(name, "model", service.created, "graphmode", service.served[0], length)


@router.get("/v1/models", responses=answer(Models) | errors(401))
async def list_models(request: Request) -> Response:
    """List the names of the served model."""
    service = get_service(request)
    return json_response(Models("list", [_model(service, name) for name in service.served]))


@router.get("/v1/models/{model:path}", responses=answer(Model) | errors(401, 404))
async def retrieve_model(request: Request, model: str) -> Response:
    """Describe a served model."""
    service = get_service(request)
    return json_response(_model(service, service.check_model(model)))
