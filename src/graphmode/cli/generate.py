"""``graphmode generate``: continue texts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphmode.cli.options import ENGINE, errors_in_one_line, takes
from graphmode.engine import aliases, checks
from graphmode.engine.option_text import text_options
from graphmode.engine.sampling_params import SamplingParams
from graphmode.errors import EngineError

if TYPE_CHECKING:
    from graphmode.engine.llm import LLM
    from graphmode.engine.outputs import CompletionOutput, RequestOutput
    from graphmode.engine.stats import EngineStats

SAMPLING = text_options(SamplingParams, aliases.SAMPLING)
DEFAULTS = {"temperature": 0.0, "max_tokens": 128}
DEFAULT_PROMPT = "ROMEO.\nBut soft! What light through yonder window breaks?\n"
_BYTE_ORDER_MARK = "\ufeff"


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
    with errors_in_one_line():
        prompts = [checks.text("a prompt", text) for text in texts]
        given = aliases.named("generate", sampling, [each.name for each in fields(SamplingParams)], aliases.SAMPLING)
        SamplingParams(**(DEFAULTS | given))  # raises what is wrong with them before the model is loaded
        llm = load(model, engine, progress=not as_json)
        params = replace(llm.get_default_sampling_params(**DEFAULTS), **given)
        if as_json:
            typer.echo(json.dumps(_as_json(llm.generate(prompts, params), llm.stats)))
        else:
            start = time.perf_counter()
            _print_answers(llm, prompts, params)
            typer.echo(_summary(llm.stats, time.perf_counter() - start))


def _prompts(prompts: list[str] | None, file: Path | None, *, bundled: bool) -> list[str]:
    texts = list(prompts or [])
    if file is not None:
        texts += _lines(file)
    if not texts and not bundled:
        raise typer.BadParameter("nothing to continue; give --prompt TEXT or --prompt-file FILE")
    return [text.removeprefix(_BYTE_ORDER_MARK) for text in texts] or [DEFAULT_PROMPT]


def _lines(file: Path) -> list[str]:
    """Return the lines of a file that are not blank. Only newlines end a line: ``str.splitlines`` knows more ends."""
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


def load(model: str | None, options: dict[str, Any], *, progress: bool) -> LLM:
    """Load a model; the progress of it is shown in a terminal alone."""
    from transformers import logging

    from graphmode.engine.llm import LLM

    logging.disable_progress_bar()
    return LLM(model, progress=progress and sys.stderr.isatty(), **options)


def _print_answers(llm: LLM, prompts: Sequence[str], params: SamplingParams) -> None:
    """Print a single answer as it comes; several, each under a line with its prompt, when all are there."""
    if len(prompts) > 1 or params.n > 1:
        for output in llm.generate(prompts, params):
            for answer in output.outputs:
                typer.echo(f"--- {output.prompt!r} ({answer.finish_reason})\n{answer.text}\n")
        return
    outputs = llm.stream(prompts[0], params)  # refuses what cannot run
    typer.echo(prompts[0], nl=False)
    shown = 0
    for output in outputs:
        (answer,) = output.outputs
        typer.echo(answer.text[shown:], nl=False)
        shown = len(answer.text)
        if answer.finish_reason == "error":
            typer.echo()
            raise EngineError(str(answer.stop_reason))
    typer.echo("\n")


def _as_json(outputs: Sequence[RequestOutput], stats: EngineStats) -> dict[str, Any]:
    rows = [_row(output, answer) for output in outputs for answer in output.outputs]
    return {"outputs": rows, "stats": stats.as_dict()}


def _row(output: RequestOutput, answer: CompletionOutput) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": output.prompt,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
    }
    for name, known in (("logprobs", answer.logprobs), ("prompt_logprobs", output.prompt_logprobs)):
        if known is not None:
            row[name] = [each and {token: asdict(found) for token, found in each.items()} for each in known]
    return row


def _summary(stats: EngineStats, seconds: float) -> str:
    """Return the closing line: speed, what the graphs cost, and how many steps they served."""
    speed = f"{stats.generated_tokens} tokens in {seconds:.2f} s, {stats.generated_tokens / seconds:.0f} tokens/s"
    if stats.decode_ms_per_step is not None:
        speed += f", {stats.decode_ms_per_step:.2f} ms a decode step"
    graphs = "no graphs"
    if stats.graphs:
        graphs = (
            f"{stats.graphs} graphs captured in {stats.capture_seconds:.1f} s, {stats.graph_bytes / 2**20:.1f} MiB; "
            f"hit rate {stats.hit_rate:.3f}, {stats.padding_ratio:.0%} padding"
        )
    if stats.capture_failures:
        graphs += f"; {len(stats.capture_failures)} could not be captured"
    misses = ", ".join(f"{count} {reason}" for reason, count in stats.misses.items())
    return f"{speed}; {graphs}; misses: {misses or 'none'}"
