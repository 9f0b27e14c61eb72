"""``graphmode serve``: serve a model by OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graphmode.cli.options import ENGINE, errors_in_one_line, takes
from graphmode.engine.config import EngineOptions
from graphmode.engine.option_text import text_options
from graphmode.serve.options import SERVER, ServeOptions

OPTIONS = text_options(ServeOptions, SERVER)


@takes("The engine", "engine", ENGINE)
@takes("The server", "server", OPTIONS)
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="A local folder, a GGUF file or the hub name of a model. Default: the bundled one."),
    ] = None,
    *,
    server: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Serve a model by OpenAI's API over HTTP, every step one replay of a graph.

    It prints a line when it is ready. SIGTERM and Ctrl-C let what runs end; a second one ends it at once.
    """
    if model == "":
        raise typer.BadParameter("MODEL is empty; give a folder or a hub name, or leave it out for the bundled model")
    with errors_in_one_line():
        options = ServeOptions(**server)
        engine_options = EngineOptions(**engine)

        from transformers import logging

        from graphmode.serve.run import run_server

        logging.disable_progress_bar()
        run_server(model, engine_options, options)
