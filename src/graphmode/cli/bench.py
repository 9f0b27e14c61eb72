"""``graphmode bench``: measure a model by graphs and beside others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphmode.cli.options import ENGINE, errors_in_one_line, takes, write
from graphmode.engine.option_text import named_value

if TYPE_CHECKING:
    from graphmode.observe.bench.results import Row


@takes("The engine", "engine", ENGINE)
def bench(
    workload: Annotated[str, typer.Argument(help="decode, prefill, offline or latency.", metavar="WORKLOAD")],
    model: Annotated[
        str,
        typer.Option(
            help="bundled; qwen3-0.6b, qwen3-1.7b or qwen3-8b with random weights; a local folder or a hub name."
        ),
    ] = "bundled",
    compare: Annotated[
        str | None,
        typer.Option(
            help='Measure these beside graphs: eager,transformers. Default: by latency eager; "" for none.',
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="Requests submitted together: 1,8,64. Default: 1,8,64,256; offline 256.", show_default=False),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of an answer; offline the longest prompt and answer. Default: 129; offline 1024.",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Timed runs. Default: 3; latency 20 requests.", show_default=False)
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="An engine option, NAME=VALUE; may be given several times.", metavar="NAME=VALUE", show_default=False
        ),
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option(help="Results to print beside, where their device is this one.", exists=True, dir_okay=False),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the rows to this file; - prints them instead of the table.", dir_okay=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write step time against batch to this SVG file.", dir_okay=False, writable=True)
    ] = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Measure a model by graphs, beside eager runs, transformers and the floor of the device."""
    from transformers import logging

    from graphmode.observe.bench.plot import step_plot
    from graphmode.observe.bench.results import as_json, comparable, read_rows, tables
    from graphmode.observe.bench.run import Plan
    from graphmode.observe.bench.run import bench as measure
    from graphmode.observe.bench.workloads import Workload

    if workload not in list(Workload):
        raise typer.BadParameter(f"there is no workload {workload!r}; give {', '.join(Workload)}")
    if model == "":
        raise typer.BadParameter("--model is empty; leave it out for the bundled model")
    if plot is not None and workload != Workload.DECODE:
        raise typer.BadParameter(f"--plot draws decode steps; {workload} has none to draw")
    for file in (json_file, plot):
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(f"{file} cannot be written: there is no folder {file.parent}")
    logging.disable_progress_bar()
    with errors_in_one_line():
        known = [] if peers is None else read_rows(peers)
        plan = Plan(
            Workload(workload),
            model,
            compare=None if compare is None else tuple(filter(None, compare.split(","))),
            batches=_numbers("--batch", batch),
            tokens=tokens,
            repeats=repeats,
            options=engine | dict(named_value(each, ENGINE) for each in option or []),
        )
        rows = measure(plan, _show, progress=sys.stderr.isatty())
        if json_file is not None and str(json_file) != "-":
            write(json_file, as_json(rows))
        if plot is not None:
            write(plot, step_plot([*rows, *comparable(known, rows)]))
    typer.echo(as_json(rows) if str(json_file) == "-" else tables(rows, known), nl=False)


def _show(row: Row) -> None:
    figures = ", ".join(f"{figure.name} {figure.median:.3f}" for figure in row.figures)
    typer.echo(f"{row.mode}, batch {row.batch}: {figures}", err=True)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text!r} is not a list of numbers such as 1,2,4") from error
