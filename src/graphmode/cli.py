"""The command line: ``graphmode generate``, ``graphmode bench``, ``graphmode info``, ``graphmode sweep``."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from graphmode import __version__
from graphmode.graph.errors import GraphModeError

app = typer.Typer(
    name="graphmode",
    help="LLM inference in graph mode: the device work of a step is captured once and replayed ever after.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


@app.command()
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
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate for each prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; higher is more varied.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from that many of the most likely tokens; 0 takes all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Sample from tokens at least this share as likely as the best.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens of prompt and answer become less likely.")
    ] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken from the logits of the answer's tokens.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time that a token came.")] = 0.0,
    min_tokens: Annotated[int, typer.Option(help="Tokens before which nothing ends an answer.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends an answer; may be given several times.", show_default=False),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of each prompt's random numbers.", show_default=False)] = None,
    enable_graph: Annotated[
        bool | None,
        typer.Option(
            "--enable-graph/--no-enable-graph", help="Whether steps replay graphs. [default: yes]", show_default=False
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model (auto_map).")
    ] = False,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="The same as --no-enable-graph.")] = False,
    graph_mode: Annotated[
        str | None,
        typer.Option(
            help="full, piecewise, full_decode_only, full_and_piecewise or none. [default: full]", show_default=False
        ),
    ] = None,
    graph_sizes: Annotated[
        str | None, typer.Option(help="Sizes that get a graph, in tokens of a step: 1,2,4.", show_default=False)
    ] = None,
    max_graph_tokens: Annotated[
        int | None,
        typer.Option(help="Steps of more tokens run eagerly. [default: no step is larger]", show_default=False),
    ] = None,
    max_padding_ratio: Annotated[
        float | None, typer.Option(help="Steps with a larger share of padding run eagerly.", show_default=False)
    ] = None,
    fuse: Annotated[
        str,
        typer.Option(help="layers: known layers take fewer kernels; compile: others by Inductor too; none."),
    ] = "layers",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, npu, ... or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Continue texts, every step one replay of a graph."""
    prompts = _prompts(prompt, prompt_file, bundled=model is None)
    if enforce_eager and enable_graph:
        raise typer.BadParameter("--enable-graph and --enforce-eager contradict each other; choose one")
    from transformers.utils.logging import disable_progress_bar

    from graphmode.engine.llm import LLM
    from graphmode.engine.sampling_params import SamplingParams

    disable_progress_bar()
    interactive = not as_json and sys.stderr.isatty()
    try:
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=stop or (),
            ignore_eos=ignore_eos,
            seed=seed,
        )
        llm = LLM(
            model,
            progress=interactive,
            trust_remote_code=trust_remote_code,
            enforce_eager=enforce_eager or enable_graph is False,
            graph_mode=graph_mode,
            graph_sizes=_numbers("--graph-sizes", graph_sizes),
            max_graph_tokens=max_graph_tokens,
            max_padding_ratio=max_padding_ratio,
            fuse=fuse,
            device=device,
            dtype=dtype,
        )
        start = time.perf_counter()
        if as_json:
            outputs = llm.generate(prompts, params)
            typer.echo(json.dumps(_report(outputs, llm.stats)))
            return
        if len(prompts) == 1:
            _stream(llm, prompts[0], params)
        else:
            for output in llm.generate(prompts, params):
                typer.echo(f"--- {output.prompt!r} ({output.outputs[0].finish_reason})\n{output.outputs[0].text}\n")
        typer.echo(_summary(llm.stats, time.perf_counter() - start))
    except GraphModeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
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
            help='Measure these beside graphs: eager,transformers. [default: by latency eager, "" for none]',
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Requests submitted together: 1,8,64. [default: 1,8,64,256; offline 256]", show_default=False
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of an answer; offline the longest prompt and answer. [default: 129; offline 1024]",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Timed runs. [default: 3; latency 20 requests]", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, npu, ... or auto.")] = "auto",
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
        Path | None, typer.Option(help="Write step time against batch to this SVG file.", dir_okay=False)
    ] = None,
) -> None:
    """Measure a model by graphs, beside eager runs, transformers and the floor of the device."""
    from transformers.utils.logging import disable_progress_bar

    from graphmode.observe.bench.plot import step_plot
    from graphmode.observe.bench.results import Row, as_json, comparable, read_rows, tables
    from graphmode.observe.bench.run import Plan, parse_option
    from graphmode.observe.bench.run import bench as measure
    from graphmode.observe.bench.workloads import Workload

    if workload not in list(Workload):
        raise typer.BadParameter(f"there is no workload {workload!r}; give {', '.join(Workload)}")
    if plot is not None and workload != Workload.DECODE:
        raise typer.BadParameter(f"--plot draws decode steps; {workload} has none to draw")
    for file in (json_file, plot):
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(f"{file} cannot be written: there is no folder {file.parent}")
    disable_progress_bar()

    def show(row: Row) -> None:
        figures = ", ".join(f"{figure.name} {figure.median:.3f}" for figure in row.figures)
        typer.echo(f"{row.mode}, batch {row.batch}: {figures}", err=True)

    try:
        known = [] if peers is None else read_rows(peers)
        plan = Plan(
            Workload(workload),
            model,
            compare=None if compare is None else tuple(filter(None, compare.split(","))),
            batches=_numbers("--batch", batch),
            tokens=tokens,
            repeats=repeats,
            options={"device": device} | dict(parse_option(each) for each in option or []),
        )
        rows = measure(plan, show, progress=sys.stderr.isatty())
    except GraphModeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if json_file is not None and str(json_file) != "-":
        json_file.write_text(as_json(rows), encoding="utf-8")
    if plot is not None:
        plot.write_text(step_plot([*rows, *comparable(known, rows)]), encoding="utf-8")
    typer.echo(as_json(rows) if str(json_file) == "-" else tables(rows, known), nl=False)


@app.command()
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


@app.command()
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
        markdown.write_text(sweeping.as_markdown(findings), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({"models": [asdict(finding) for finding in findings]}))
    else:
        typer.echo(f"\n{sweeping.summary(findings)}")
    if any(finding.status is sweeping.Status.WRONG for finding in findings):
        raise typer.Exit(1)


def _nothing(finding: object) -> None:
    pass


def _prompts(prompts: list[str] | None, file: Path | None, *, bundled: bool) -> list[str]:
    texts = list(prompts or [])
    if file is not None:
        texts += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts and not bundled:
        raise typer.BadParameter("nothing to continue; give --prompt TEXT or --prompt-file FILE")
    return texts or [DEFAULT_PROMPT]


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
        sys.stdout.flush()
        shown = len(text)
    typer.echo("\n")


def _report(outputs: Any, stats: Any) -> dict[str, Any]:
    rows = [
        {
            "prompt": output.prompt,
            "text": output.outputs[0].text,
            "token_ids": output.outputs[0].token_ids,
            "finish_reason": output.outputs[0].finish_reason,
        }
        for output in outputs
    ]
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
    try:
        app()
    except GraphModeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
