"""The command line: ``graphmode generate``, ``graphmode bench``, ``graphmode info``, ``graphmode sweep``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from graphmode import __version__
from graphmode.cli.options import Command, takes
from graphmode.engine import aliases, checks
from graphmode.engine.config import EngineOptions
from graphmode.engine.option_text import named_value, text_options
from graphmode.engine.sampling_params import SamplingParams
from graphmode.errors import GraphModeError, InputError

app = typer.Typer(
    name="graphmode",
    help="LLM inference in graph mode: the device work of a step is captured once and replayed ever after.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ENGINE = text_options(EngineOptions, aliases.ENGINE)
SAMPLING = text_options(SamplingParams, aliases.SAMPLING)
DEFAULTS = {"temperature": 0.0, "max_tokens": 128}
_BYTE_ORDER_MARK = "\ufeff"
DEFAULT_PROMPT = "ROMEO.\nBut soft! What light through yonder window breaks?\n"


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


@app.command(cls=Command)
@takes("The engine", "engine", ENGINE)
@takes("Sampling", "sampling", SAMPLING, **DEFAULTS)
def generate(
    model: Annotated[
        str | None,
        typer.Option(help="A local folder, a GGUF file or the hub name of a model. Default: the bundled one."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to continue; may be given several times.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line.", exists=True, dir_okay=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Continue texts, every step one replay of a graph.

    Sampling options that are not given are what the model's generation_config.json asks for, else the defaults below.
    """
    if model == "":
        raise typer.BadParameter("--model is empty; give a folder or a hub name, or leave it out for the bundled model")
    texts = _prompts(prompt, prompt_file, bundled=model is None)
    if not as_json and (sampling.keys() & {"logprobs", "prompt_logprobs"}):
        raise typer.BadParameter("log-probabilities are printed with --json alone; add it")
    from transformers.utils.logging import disable_progress_bar

    from graphmode.engine.llm import LLM

    disable_progress_bar()
    with _errors_in_one_line():
        prompts = [checks.text("a prompt", text) for text in texts]
        given = aliases.named("generate", sampling, [each.name for each in fields(SamplingParams)], aliases.SAMPLING)
        SamplingParams(**(DEFAULTS | given))  # raises what is wrong with them before the model is loaded
        llm = LLM(model, progress=not as_json and sys.stderr.isatty(), **engine)
        params = replace(llm.get_default_sampling_params(**DEFAULTS), **given)
        start = time.perf_counter()
        if as_json:
            outputs = llm.generate(prompts, params)
            typer.echo(json.dumps(_report(outputs, llm.stats)))
            return
        if len(prompts) == params.n == 1:
            _stream(llm, prompts[0], params)
        else:
            for output in llm.generate(prompts, params):
                for answer in output.outputs:
                    typer.echo(f"--- {output.prompt!r} ({answer.finish_reason})\n{answer.text}\n")
        typer.echo(_summary(llm.stats, time.perf_counter() - start))


@app.command(cls=Command)
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
    from transformers.utils.logging import disable_progress_bar

    from graphmode.observe.bench.plot import step_plot
    from graphmode.observe.bench.results import Row, as_json, comparable, read_rows, tables
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
    disable_progress_bar()

    def show(row: Row) -> None:
        figures = ", ".join(f"{figure.name} {figure.median:.3f}" for figure in row.figures)
        typer.echo(f"{row.mode}, batch {row.batch}: {figures}", err=True)

    with _errors_in_one_line():
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
        rows = measure(plan, show, progress=sys.stderr.isatty())
        if json_file is not None and str(json_file) != "-":
            _write(json_file, as_json(rows))
        if plot is not None:
            _write(plot, step_plot([*rows, *comparable(known, rows)]))
    typer.echo(as_json(rows) if str(json_file) == "-" else tables(rows, known), nl=False)


@app.command(cls=Command)
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show the devices that are here, what each can do, versions, and how every device is supported."""
    found = _info()
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found["versions"].items():
        typer.echo(f"{name:14} {value}")
    typer.echo()
    for device in found["devices"]:
        abilities = ", ".join(name for name, able in device["capabilities"].items() if able)
        typer.echo(f"{device['device']:8} {device['name']}: {abilities}")
    typer.echo(f"\nbackends: {', '.join(found['backends'])}\n")
    for device, support in found["support"].items():
        typer.echo(device)
        for name, words in support.items():
            typer.echo(f"  {name:11} {words}")


@app.command(cls=Command)
def sweep(
    model_type: Annotated[
        list[str] | None,
        typer.Option(help="A model type, such as qwen3; may be given several times. Default: all.", show_default=False),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the findings to this page.", dir_okay=False)] = None,
    workers: Annotated[int, typer.Option(help="Models tried at a time.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Try the language models of transformers, tiny and with random weights: which run, and why others do not.

    Ends with 1 if a model that is not refused gives other tokens than transformers.
    """
    from graphmode.observe import sweep as sweeping

    if unknown := sorted(set(model_type or ()) - sweeping.MODEL_TYPES.keys()):
        raise typer.BadParameter(f"transformers has no language models of types {', '.join(unknown)}")

    def show(finding: sweeping.Finding) -> None:
        typer.echo(f"{finding.model_type:28} {finding.status:12} {finding.reason}".rstrip())

    findings = sweeping.sweep(
        model_type or list(sweeping.MODEL_TYPES), workers=workers, found=_nothing if as_json else show
    )
    if markdown is not None:
        with _errors_in_one_line():
            _write(markdown, sweeping.as_markdown(findings))
    if as_json:
        typer.echo(json.dumps({"models": [asdict(finding) for finding in findings]}))
    else:
        typer.echo(f"\n{sweeping.summary(findings)}")
    if any(finding.status is sweeping.Status.WRONG for finding in findings):
        raise typer.Exit(1)


def _nothing(finding: object) -> None:
    pass


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """End the command with 1 and a line that says why, where graphmode refuses something."""
    try:
        yield
    except GraphModeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}; name another file") from error


def _prompts(prompts: list[str] | None, file: Path | None, *, bundled: bool) -> list[str]:
    texts = list(prompts or [])
    if file is not None:
        texts += _lines(file)
    if not texts and not bundled:
        raise typer.BadParameter("nothing to continue; give --prompt TEXT or --prompt-file FILE")
    return [text.removeprefix(_BYTE_ORDER_MARK) for text in texts] or [DEFAULT_PROMPT]


def _lines(file: Path) -> list[str]:
    """Return the lines of a file that are not blank. Only newlines end a line, as in no other reader of Python's."""
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise typer.BadParameter(f"--prompt-file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"--prompt-file {file} is not a text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}; "
            "convert it"
        ) from error
    if "\0" in text:
        raise typer.BadParameter(f"--prompt-file {file} is not a text: it holds zero bytes")
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip().strip(_BYTE_ORDER_MARK)]
    if not lines:
        raise typer.BadParameter(f"--prompt-file {file} holds no prompt; write one a line, or leave it out")
    return lines


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text!r} is not a list of numbers such as 1,2,4") from error


def _stream(llm: Any, prompt: str, params: Any) -> None:
    """Print a prompt and its continuation as it comes."""
    typer.echo(prompt, nl=False)
    shown = 0
    for output in llm.stream(prompt, params):
        text = output.outputs[0].text
        typer.echo(text[shown:], nl=False)
        shown = len(text)
    typer.echo("\n")


def _report(outputs: Any, stats: Any) -> dict[str, Any]:
    rows = []
    for output in outputs:
        for answer in output.outputs:
            row = {
                "prompt": output.prompt,
                "text": answer.text,
                "token_ids": answer.token_ids,
                "finish_reason": answer.finish_reason,
            }
            for name, known in (("logprobs", answer.logprobs), ("prompt_logprobs", output.prompt_logprobs)):
                if known is not None:
                    row[name] = [each and {token: asdict(found) for token, found in each.items()} for each in known]
            rows.append(row)
    return {"outputs": rows, "stats": stats.as_dict()}


def _summary(stats: Any, seconds: float) -> str:
    """Return the closing line: what it gave, what graphs cost, how often they served."""
    speed = f"{stats.generated_tokens} tokens in {seconds:.2f} s, {stats.generated_tokens / seconds:.0f} tokens/s"
    if stats.decode_ms_per_step is not None:
        speed += f", {stats.decode_ms_per_step:.2f} ms a decode step"
    if not stats.graphs:
        graphs = "no graphs"
    else:
        graphs = (
            f"{stats.graphs} graphs captured in {stats.capture_seconds:.1f} s, {stats.graph_bytes / 2**20:.1f} MiB; "
            f"hit rate {stats.hit_rate:.3f}, {stats.padding_ratio:.0%} padding"
        )
    if stats.capture_failures:
        graphs += f"; {len(stats.capture_failures)} could not be captured"
    misses = ", ".join(f"{count} {reason}" for reason, count in stats.misses.items())
    return f"{speed}; {graphs}; misses: {misses or 'none'}"


def _info() -> dict[str, Any]:
    import torch

    from graphmode.graph import available_backends, device_support, get_backend
    from graphmode.observe.machine import device_name, versions

    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type in available_backends():
        found += [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]
    devices = []
    for device in found:
        capabilities = get_backend(device).capabilities
        devices.append({"device": str(device), "name": device_name(device), "capabilities": vars(capabilities)})
    return {
        "versions": versions(),
        "devices": devices,
        "backends": sorted(available_backends()),
        "support": {device: asdict(support) for device, support in device_support().items()},
    }


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must not end an answer
    try:
        app()
    except (GraphModeError, OSError) as error:  # such as a full disk; that a reader has gone is handled before
        sys.exit(f"error: {error}")
