"""The server as a process: it listens, loads, serves, drains and ends."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import typer
import uvicorn
from fastapi import FastAPI

from graphmode.engine.config import EngineOptions
from graphmode.engine.reading import load_text
from graphmode.errors import InputError
from graphmode.models.bundled_model import bundled_model
from graphmode.models.checkpoint import find_checkpoint
from graphmode.serve.app import create_app
from graphmode.serve.client import EngineClient, QueueLimits
from graphmode.serve.limits import http_protocol
from graphmode.serve.logs import set_up_logging
from graphmode.serve.options import ServeOptions
from graphmode.serve.security import KEY_VARIABLE, read_keys
from graphmode.serve.service import Service

log = logging.getLogger(__name__)


def run_server(model: str | Path | None, engine_options: EngineOptions, options: ServeOptions) -> None:
    """Serve a model until a signal ends it: SIGTERM or SIGINT lets what runs end, a second one does not.

    Args:
        model: a folder, a GGUF file or a hub name; None: the bundled model.
        engine_options: of the engine.
        options: of the server.

    Raises:
        InputError: an option that does not fit, or an address that cannot be listened on; before anything is loaded.
        ModelError: the model is not there, or its tokenizer does not work.
        EngineDownError: the engine cannot start.
        SystemExit: a second signal ended it, with status 1.
    """
    start = time.perf_counter()
    set_up_logging(options.log_level)
    keys = read_keys(options.api_key_file)
    options.chat_template_text()  # raises what is wrong with it before anything is loaded
    with listen(options.host, options.port) as listener:
        if keys is None and not _is_loopback(listener):
            log.warning(
                "other machines reach %s, and no key is asked for: anybody there may use the model and read the "
                "metrics. Give --api-key-file or %s",
                options.host,
                KEY_VARIABLE,
            )
        name = bundled_model() if model is None else model
        # A model that is not there is told before another process begins to load it; one of a hub is fetched once.
        find_checkpoint(
            name, load_format=engine_options.load_format, trust_remote_code=engine_options.trust_remote_code
        )
        if not options.served_model_name:
            served = Path(name).name if Path(name).exists() else str(name)
            options = replace(options, served_model_name=(served,))
        engine = EngineClient(
            name,
            engine_options,
            limits=QueueLimits(max_waiting=options.max_queue),
            restart=options.restart,
            stall_seconds=options.stall_seconds,
        )

        def make_app() -> FastAPI:
            return create_app(engine, load_text(name, engine_options), options, keys)

        with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
            runner.run(serve(engine, make_app, listener, options, start))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        InputError: it cannot; the message says what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise InputError(
            f"host {host}, port {port} cannot be listened on: {reason}; give another --host or --port, or end what "
            "listens there"
        ) from error


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


class _Server(uvicorn.Server):
    """uvicorn's server as it is used here. It leaves signals to us."""

    def __init__(self, app: FastAPI, options: ServeOptions) -> None:
        config = uvicorn.Config(
            app,
            http=http_protocol(options.slow_client_seconds),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


async def serve(
    engine: EngineClient,
    make_app: Callable[[], FastAPI],
    listener: socket.socket,
    options: ServeOptions,
    start: float,
) -> None:
    """Serve until a signal comes.

    Args:
        engine: what is started, and closed at the end.
        make_app: makes the application, beside the start of the engine: both take seconds.
        listener: where it listens.
        options: the server's.
        start: when the server was started, as of ``time.perf_counter``.

    Raises:
        ModelError: as of :func:`run_server`; so are the others.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()

    def stopped() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped)
    stopping, hurrying = asyncio.create_task(stop.wait()), asyncio.create_task(hurry.wait())
    starting = asyncio.create_task(engine.wait_ready())
    closing: Callable[[], Awaitable[None]] | None = None
    await engine.start()
    try:
        making = asyncio.create_task(asyncio.to_thread(make_app))
        await asyncio.wait({making, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            return
        app = making.result()
        service: Service = app.state.service
        server = _Server(app, options)
        serving = asyncio.create_task(server.serve([listener]))
        closing = partial(_close, server, serving, service)
        await asyncio.wait({serving, stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            # What is there now stays: a pass of the collector through all of it would stop every stream.
            gc.collect()
            gc.freeze()
            _say_ready(service, listener, time.perf_counter() - start)
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        draining = asyncio.create_task(service.drain(options.drain_seconds))
        await asyncio.wait({serving, draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
    finally:
        await engine.close(0)
        if closing is not None:
            await closing()
        gc.unfreeze()
        for task in (stopping, starting, hurrying):
            task.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    if hurry.is_set():
        sys.exit(1)


async def _close(server: _Server, serving: asyncio.Task[None], service: Service) -> None:
    """End the server once it has sent what there is."""
    server.should_exit = True
    await serving
    service.close()


def _say_ready(service: Service, listener: socket.socket, seconds: float) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    names = ", ".join(service.served)
    typer.echo(f"serving {names} at {url}, ready after {seconds:.1f} s")
    sys.stdout.flush()
