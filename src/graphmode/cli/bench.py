"""``graphmode bench``: measure a model by graphs and beside others, or a server under load."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from functools import partial, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from graphmode.cli.options import ENGINE, Command, errors_in_one_line, takes, write
from graphmode.engine.option_text import named_value
from graphmode.errors import InputError

if TYPE_CHECKING:
    from graphmode.observe.bench.results import Row


_Number = TypeVar("_Number", int, float)

app = typer.Typer(no_args_is_help=True, help="Measure a model by graphs and beside others, or a server under load.")
_WORKLOADS = {
    "decode": "Measure a decode step, by graphs and beside others.",
    "prefill": "Measure the first token of prompts that are submitted together.",
    "offline": "Measure generated tokens a second, for requests of many lengths.",
    "latency": "Measure one request at a time: its first token, its tokens and CPU time.",
}


@takes("The engine", "engine", ENGINE)
def _measure(
    workload: str,
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
    from transformers import logging

    from graphmode.observe.bench.plot import step_plot
    from graphmode.observe.bench.results import as_json, comparable, read_rows, tables
    from graphmode.observe.bench.run import Plan
    from graphmode.observe.bench.run import bench as measure
    from graphmode.observe.bench.workloads import Workload

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


def _of(workload: str) -> Callable[..., None]:
    """Return the command of a workload."""
    command = update_wrapper(partial(_measure, workload=workload), _measure)
    signature = inspect.signature(_measure)
    parameters = [each for each in signature.parameters.values() if each.name != "workload"]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


for _workload, _help in _WORKLOADS.items():
    app.command(_workload, cls=Command, help=_help)(_of(_workload))


_LENGTHS = "a number, uniform:64:256, normal:128:32 or lognormal:128:0.5"


@app.command("serve", cls=Command)
def _serve(
    base_url: Annotated[str, typer.Option(help="The server, such as http://127.0.0.1:8000.")] = "http://127.0.0.1:8000",
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file whose first line is the key.", exists=True, dir_okay=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its name there. Default: the first that the server lists.")] = None,
    api: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    wave: Annotated[
        str | None, typer.Option(help="Streams that are sent at once, wave after wave: 1,16,64.", show_default=False)
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Streams in flight at any time: 1,16,64.", show_default=False)
    ] = None,
    rate: Annotated[str | None, typer.Option(help="Requests a second: 1,2.5.", show_default=False)] = None,
    arrivals: Annotated[str, typer.Option(help="Of --rate: poisson or constant.")] = "poisson",
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Requests as JSON lines: at, in seconds; prompt_tokens or prompt; max_tokens.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help=f"Tokens of prompts: {_LENGTHS}.")] = "128",
    max_tokens: Annotated[str, typer.Option(help=f"Tokens of answers: {_LENGTHS}.")] = "128",
    requests: Annotated[
        int | None,
        typer.Option(
            help="Of a row. Default: 3 waves, at least 20; 8 times --concurrency; 100 of a rate.",
            show_default=False,
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(help="Requests before, not counted. Default: as many as streams, else 8.", show_default=False),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of exactly --max-tokens.")] = True,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: the server's.", show_default=False)
    ] = None,
    body: Annotated[str, typer.Option(help='What else requests hold, as JSON: {"top_p": 0.9}.')] = "{}",
    seed: Annotated[int, typer.Option(help="Of lengths, prompts and arrivals.")] = 0,
    vocab_size: Annotated[
        int | None, typer.Option(help="Draw prompts from all token ids below it.", show_default=False)
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Of the client. Default: one for 64 streams, on a quarter of the cores.", show_default=False),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600,
    server_pid: Annotated[
        int | None,
        typer.Option(help="A process of which, with its children, CPU time is measured.", show_default=False),
    ] = None,
    label: Annotated[str, typer.Option(help="The mode of the rows.")] = "served",
    save: Annotated[Path | None, typer.Option(help="Write the rows to this file.", dir_okay=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of text.")] = False,
) -> None:
    """Send load to any OpenAI-compatible server, and show times to the first token, between tokens and to the end.

    Give --wave, --concurrency, --rate or --trace. Ends with 1 where no request was answered.
    """
    from graphmode.observe.bench.results import as_json as rows_as_json
    from graphmode.observe.bench.serve import Load, serve, summary
    from graphmode.observe.bench.traffic import lengths
    from graphmode.observe.endpoint import read_key

    if arrivals not in ("poisson", "constant"):
        raise typer.BadParameter(f"--arrivals {arrivals!r} is unknown; give poisson or constant")
    if save is not None and not save.parent.is_dir():
        raise typer.BadParameter(f"{save} cannot be written: there is no folder {save.parent}")
    with errors_in_one_line():
        more = _object("--body", body) | ({} if temperature is None else {"temperature": temperature})
        load = Load(
            base_url=base_url,
            key=None if api_key_file is None else read_key(api_key_file),
            model=model,
            api=api,
            waves=_numbers("--wave", wave) or (),
            concurrency=_numbers("--concurrency", concurrency) or (),
            rates=_numbers("--rate", rate, float) or (),
            poisson=arrivals == "poisson",
            trace=trace,
            prompt_tokens=lengths("--prompt-tokens", prompt_tokens),
            max_tokens=lengths("--max-tokens", max_tokens),
            requests=requests,
            warmup=warmup,
            ignore_eos=ignore_eos,
            body=more,
            seed=seed,
            vocab_size=vocab_size,
            processes=processes,
            timeout=timeout,
            server_pid=server_pid,
            label=label,
        )
        rows = serve(load, lambda row: None if as_json else typer.echo(summary(row)))
        if save is not None:
            write(save, rows_as_json(rows))
    if as_json:
        typer.echo(rows_as_json(rows), nl=False)
    if not all(row.details["answered"] for row in rows):
        raise typer.Exit(1)


def _object(option: str, text: str) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise InputError(f'{option} is {text!r}; give a JSON object such as {{"top_p": 0.9}}')
    return read


def _show(row: Row) -> None:
    figures = ", ".join(f"{figure.name} {figure.median:.3f}" for figure in row.figures)
    typer.echo(f"{row.mode}, batch {row.batch}: {figures}", err=True)


def _numbers(option: str, text: str | None, of: Callable[[str], _Number] = int) -> tuple[_Number, ...] | None:
    if text is None:
        return None
    try:
        return tuple(of(number) for number in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text!r} is not a list of numbers such as 1,2,4") from error
