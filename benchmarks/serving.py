"""What graphs are worth to those who are served: `graphmode serve` with and without them, in one table.

Three servers run the same model: by graphs, with `--enable-graph=false` and with `--enforce-eager`. They are loaded in
turn, and the best of the rounds counts, so that a machine that others use too disturbs all alike. Beside them stands
what a step takes without a server, by `graphmode bench decode`.

    python benchmarks/serving.py [--model bundled] [--streams 1,8,32] [--tokens 64] [--rounds 3] [--options ...]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from graphmode.observe.bench.results import Row
from graphmode.observe.bench.serve import Load, serve
from graphmode.observe.bench.traffic import Lengths

WAYS = {"graphs": [], "--enable-graph=false": ["--enable-graph=false"], "--enforce-eager": ["--enforce-eager"]}


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Run a server; yield where, and its process."""
    command = [sys.executable, "-m", "graphmode", "serve", *arguments, "--port", "0", "--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not (found := re.search(r"http://\S+?:\d+", line)):
                sys.exit(f"the server did not start: {line}")
            yield found[0], process.pid
        finally:
            process.terminate()


def best(rows: Sequence[Row], name: str) -> float:
    """Return the best of a figure's medians."""
    values = [figure.median for row in rows for figure in row.figures if figure.name == name]
    return max(values) if name.endswith("_per_s") else min(values)


def cpu(rows: Sequence[Row], engine: bool) -> float:
    """Return microseconds of CPU time a token, the least of the rounds, of the engine's process or of the others."""
    return 1e6 * min(
        sum(
            each["cpu_seconds_per_token"]
            for each in row.details["processes"]
            if ("engine_process" in each["command"]) == engine
        )
        for row in rows
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", default="", help="of the engine, for all: '--device cpu --max-model-len 512'")
    given = parser.parse_args()
    streams = [int(each) for each in given.streams.split(",")]
    options = given.options.split()
    model = [] if given.model == "bundled" else [given.model]
    rows: dict[tuple[str, int], list[Row]] = {}
    steps: dict[int, list[float]] = {}
    with ExitStack() as stack:
        servers = {way: stack.enter_context(server([*model, *options, *more])) for way, more in WAYS.items()}
        for _ in range(given.rounds):
            for count in streams:
                for way, (url, pid) in servers.items():
                    load = Load(
                        base_url=url,
                        waves=(count,),
                        requests=2 * count,
                        max_tokens=Lengths("fixed", given.tokens),
                        body={"temperature": 0},
                        server_pid=pid,
                    )
                    rows.setdefault((way, count), []).extend(serve(load))
    for _ in range(given.rounds):
        command = [
            sys.executable,
            "-m",
            "graphmode",
            "bench",
            "decode",
            "--model",
            given.model,
            *options,
            "--json",
            "-",
        ]
        command += ["--batch", given.streams, "--tokens", str(given.tokens), "--repeats", "1"]
        for row in json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["rows"]:
            steps.setdefault(row["batch"], []).append(row["step_ms"])
    example = rows["graphs", streams[0]][0]
    print(f"{example.model} on {example.device}, {example.date}, commit {example.details['commit']}")
    print(
        f"Prompts of 128 tokens, answers of {given.tokens}. Tokens/s are those of whole waves; ms a token are counted"
    )
    print("after the last first token.\n")
    titles = ["streams", "graphs, tokens/s", *list(WAYS)[1:], "graphs, ms a token", "eager, ms a token"]
    titles += ["a step alone, ms", "served / alone", "HTTP's CPU, µs a token", "the engine's"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for count in streams:
        rates = [best(rows[way, count], "tokens_per_s") for way in WAYS]
        token, eager = (best(rows[way, count], "after_last_first_token_ms") for way in ("graphs", "--enforce-eager"))
        step = min(steps[count])
        cells = [f"{count}", f"{rates[0]:.1f}", *(f"{rate:.1f} ({rates[0] / rate:.2f} x)" for rate in rates[1:])]
        cells += [f"{token:.2f}", f"{eager:.2f}", f"{step:.2f}", f"{token / step:.2f}"]
        cells += [f"{cpu(rows['graphs', count], engine):.0f}" for engine in (False, True)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
