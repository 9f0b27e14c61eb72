"""The application: routes, and what stands before all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware import Middleware

from graphmode import __version__
from graphmode.serve.errors import install_error_handlers
from graphmode.serve.limits import BodyLimit, EndWithClient
from graphmode.serve.logs import RequestLog
from graphmode.serve.metrics import Metrics
from graphmode.serve.options import ServeOptions
from graphmode.serve.routes import chat, completions, dashboard, metrics, models, operations, responses, tokenize
from graphmode.serve.security import ApiKeys, Authentication
from graphmode.serve.service import Service

if TYPE_CHECKING:
    from graphmode.engine.reading import ModelText
    from graphmode.serve.client import EngineClient

ROUTERS = (
    chat.router,
    responses.router,
    completions.router,
    models.router,
    tokenize.router,
    operations.router,
    metrics.router,
    dashboard.router,
)


def create_app(engine: EngineClient, text: ModelText, options: ServeOptions, keys: ApiKeys | None = None) -> FastAPI:
    """Return the application.

    Args:
        engine: the engine process.
        text: prompts to tokens and tokens to text.
        options: the server's; they name the model.
        keys: that are let in; None where no key is asked for.
    """
    counts = Metrics(options.served_model_name[0], engine)
    engine.on_snapshot = counts.engine_snapshot
    service = Service(engine, text, options, counts)
    middleware = [Middleware(RequestLog, answered=counts.response)]
    if keys is not None:
        middleware.append(Middleware(Authentication, keys=keys))
    middleware += [Middleware(BodyLimit, most=options.max_body_bytes, seconds=options.slow_client_seconds)]
    middleware.append(Middleware(EndWithClient))
    app = FastAPI(title="graphmode", version=__version__, middleware=middleware, redirect_slashes=False)
    app.state.service = service
    install_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the schema of all routes, which is made once. Bodies that do not fit get 400 here, never 422."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for operations_ in schema["paths"].values():
            for operation in operations_.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}, {}]  # whether a key is asked for is the server's choice
        app.openapi_schema = schema
    return app.openapi_schema
