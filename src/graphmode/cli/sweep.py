"""``graphmode sweep``: which language models of transformers run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphmode.cli.options import errors_in_one_line, write

if TYPE_CHECKING:
    from graphmode.observe.sweep import Finding


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
    from graphmode.models.hf.tiny import MODEL_TYPES
    from graphmode.observe import sweep as sweeping

    if unknown := sorted(set(model_type or ()) - MODEL_TYPES.keys()):
        raise typer.BadParameter(f"transformers has no language models of types {', '.join(unknown)}")

    def show(finding: Finding) -> None:
        if not as_json:
            typer.echo(f"{finding.model_type:28} {finding.status:12} {finding.reason}".rstrip())

    findings = sweeping.sweep(model_type or list(MODEL_TYPES), workers=workers, found=show)
    if markdown is not None:
        with errors_in_one_line():
            write(markdown, sweeping.as_markdown(findings))
    if as_json:
        typer.echo(json.dumps({"models": [asdict(finding) for finding in findings]}))
    else:
        typer.echo(f"\n{sweeping.summary(findings)}")
    if any(finding.status is sweeping.Status.WRONG for finding in findings):
        raise typer.Exit(1)
