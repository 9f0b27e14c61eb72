"""The command line, one file a command: `generate`, `serve`, `chat`, `bench`, `info` and `sweep`."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from graphmode import __version__
from graphmode.cli import bench, chat, generate, info, serve, sweep
from graphmode.cli.options import Command
from graphmode.errors import GraphModeError

app = typer.Typer(
    name="graphmode",
    help="LLM inference in graph mode: the device work of a step is captured once and replayed ever after.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate.generate, serve.serve, chat.chat, info.info, sweep.sweep):
    app.command(cls=Command)(command)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphmode {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must not end an answer
    try:
        app()
    except (GraphModeError, OSError) as error:  # such as a full disk; typer itself handles a reader that has gone
        sys.exit(f"error: {error}")
