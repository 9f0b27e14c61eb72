"""What padding costs: decode steps of some rows in the bucket that holds them, and by a graph of exactly that size.

Run ``python benchmarks/padding.py --model qwen3-0.6b``. One engine has both graphs; they replay in turns, over the same
weights, contexts and cache, without the scheduler: a burst of steps, timed from the copy of its inputs to its end.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer

from graphmode import LLM, SamplingParams
from graphmode.engine.sampler import SamplingLevel
from graphmode.engine.sequence import Sequence
from graphmode.engine.step_inputs import StepInputs, step_inputs
from graphmode.engine.types import Batch, ScheduledSequence
from graphmode.graph import make_buckets
from graphmode.observe.bench.results import Row, as_json, of_runs
from graphmode.observe.bench.run import Plan, model_folder, resolve, shown_name
from graphmode.observe.bench.workloads import PROMPT_TOKENS, Workload
from graphmode.observe.machine import device_name, versions

# The sizes of graphs on a GPU by default.
BUCKETS = make_buckets(8192)


def bucket_of(size: int) -> int:
    """Return the bucket that a step of ``size`` rows runs in."""
    return BUCKETS[bisect_left(BUCKETS, size)]


def decode_steps(llm: LLM, rows: int, sizes: list[int], steps: int) -> list[StepInputs]:
    """Return a burst of decode steps at each of some sizes: sequences after a prompt, and padding after them.

    Args:
        llm: the engine, which runs nothing else.
        rows: sequences.
        sizes: rows with padding, the graphs'.
        steps: the decode steps that the sequences have room for.
    """
    runner, blocks = llm.engine.core.runner, llm.engine.core.scheduler.blocks
    length, params = PROMPT_TOKENS + 1, SamplingParams(temperature=0)
    tokens = torch.randint(llm.engine.core.loaded.shape.vocab_size, (rows, length)).tolist()
    sequences = [Sequence(str(row), tokens[row], params, 0, state_index=row + 1) for row in range(rows)]
    for sequence in sequences:
        blocks.begin(sequence, read_prefix=False)
    blocks.extend([(sequence, length + steps) for sequence in sequences])
    scheduled = tuple(ScheduledSequence(each, length - 1, 1, samples=1, steps=steps) for each in sequences)
    # The first run brings the sequences' block tables to the device, which are no part of what is timed.
    runner.launch(Batch("decode", scheduled, rows, tuple(sequences))).result()
    step = step_inputs(Batch("decode", scheduled, rows), runner.tables)
    for sequence in sequences:
        blocks.release(sequence)
    return [padded(runner.inputs, step, size) for size in sizes]


def padded(inputs: StepInputs, step: StepInputs, size: int) -> StepInputs:
    """Return a decode step with padding up to ``size`` rows."""
    wide = {}
    for name, values in vars(step).items():
        spec = getattr(inputs, name)
        axes = {"tokens": size, "seqs": size, "logits": size}
        if values is not None and axes.keys() & set(spec.shape):
            shape = [axes.get(axis, length) for axis, length in zip(spec.shape, values.shape, strict=True)]
            wide[name] = torch.full(shape, spec.padding, dtype=spec.dtype)
            wide[name][tuple(map(slice, values.shape))] = torch.as_tensor(values)
    return replace(step, **wide)


def step_ms(llm: LLM, step: StepInputs, steps: int) -> float:
    """Return the time of a decode step in a burst of them, in milliseconds."""
    graphs = llm.engine.core.runner.graphs
    graphs.backend.synchronize()
    start = time.perf_counter()
    graphs(family="decode", level=SamplingLevel.PLAIN, repeats=steps, step=step)
    graphs.backend.synchronize()
    return 1e3 * (time.perf_counter() - start) / steps


def main(
    model: Annotated[str, typer.Option(help="As of graphmode bench.")] = "bundled",
    sizes: Annotated[str, typer.Option(help="Rows of a step; none may be a bucket.")] = "9,17,33,100",
    steps: Annotated[int, typer.Option(help="Decode steps of a burst.")] = 64,
    repeats: Annotated[int, typer.Option(help="Bursts of each graph that are timed, after one that is not.")] = 15,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file.", dir_okay=False)
    ] = None,
) -> None:
    """Measure what padding costs a decode step."""
    asked = [int(size) for size in sizes.split(",")]
    if wrong := [size for size in asked if not 0 < size < BUCKETS[-1] or size == bucket_of(size)]:
        raise typer.BadParameter(f"sizes {wrong} are not padded; give sizes between the buckets {list(BUCKETS)}")
    graph_sizes = sorted({*asked, *map(bucket_of, asked)})
    options = {
        "device": device,
        "graph_sizes": graph_sizes,
        "max_num_seqs": graph_sizes[-1],
        "graph_mode": "full_decode_only",
        "strict": True,
    }
    with model_folder(model) as folder:
        plan = resolve(Plan(Workload.DECODE, model, tokens=steps, repeats=repeats, options=options), folder)
        torch.manual_seed(0)
        llm = LLM(folder, **plan.options)
    found: list[Row] = []
    typer.echo("rows  bucket  padding  bucket, ms a step  exact, ms a step  ratio")
    for rows in asked:
        graphs = {"bucket": bucket_of(rows), "exact": rows}
        inputs = dict(zip(graphs, decode_steps(llm, rows, list(graphs.values()), steps), strict=True))
        times: dict[str, list[float]] = {mode: [] for mode in graphs}
        for _ in range(repeats + 1):
            for mode in graphs:
                times[mode].append(step_ms(llm, inputs[mode], steps))
        figures = {mode: of_runs("step_ms", each[1:]) for mode, each in times.items()}
        for mode, size in graphs.items():
            found.append(
                Row(
                    "padding",
                    shown_name(model),
                    mode,
                    rows,
                    (figures[mode],),
                    device_name(llm.engine.core.device),
                    versions(),
                    datetime.now(UTC).date().isoformat(),
                    {"graph_rows": size, "prompt_tokens": PROMPT_TOKENS, "steps": steps, "repeats": repeats},
                )
            )
        in_bucket, exact = (figures[mode].median for mode in graphs)
        padding = graphs["bucket"] - rows
        typer.echo(
            f"{rows:4}  {graphs['bucket']:6}  {padding:7}  {in_bucket:17.3f}  {exact:16.3f}  {in_bucket / exact:5.3f}"
        )
    if json_file is not None:
        json_file.write_text(as_json(found), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
