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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import typer
import uvicorn

from graphmode.engine.config import EngineOptions
from graphmode.engine.reading import load_text
from graphmode.errors import InputError
from graphmode.models.bundled_model import bundled_model
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
        text = load_text(name, engine_options)
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
        app = create_app(engine, text, options, keys)
        config = uvicorn.Config(
            app,
            http=http_protocol(options.slow_client_seconds),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(config, listener, app.state.service, start))


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
    """uvicorn's server, which leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


async def _serve(config: uvicorn.Config, listener: socket.socket, service: Service, start: float) -> None:
    """Serve until a signal comes, or the engine turns out not to start."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def stopped() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped)
    server = _Server(config)
    await service.engine.start()
    serving = asyncio.create_task(server.serve([listener]))
    stopping = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(service.engine.wait_ready())
    hurrying = asyncio.create_task(hurry.wait())
    try:
        await asyncio.wait({serving, stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            # What is there now stays: a pass of the collector through all of it would stop every stream.
            gc.collect()
            gc.freeze()
            _say_ready(service, listener, time.perf_counter() - start)
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        draining = asyncio.create_task(service.drain(service.options.drain_seconds))
        await asyncio.wait({serving, draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
    finally:
        await service.engine.close(0)
        server.should_exit = True
        await serving
        for task in (stopping, starting, hurrying):
            task.cancel()
    if hurry.is_set():
        sys.exit(1)


def _say_ready(service: Service, listener: socket.socket, seconds: float) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    names = ", ".join(service.served)
    typer.echo(f"serving {names} at {url}, ready after {seconds:.1f} s")
    sys.stdout.flush()
