"""Write what ``benchmarks/results`` holds into ``docs/performance.md``, beside the peers, and plot the decode steps.

Run ``python benchmarks/render.py`` after results have changed; ``--check`` only says whether the page is up to date.
"""

import re
import sys
from pathlib import Path

from graphmode.observe.bench.plot import step_plot
from graphmode.observe.bench.results import comparable, read_rows, tables

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PAGE = DOCS / "performance.md"
BEGIN, END = "<!-- begin: benchmarks/render.py -->\n", "<!-- end: benchmarks/render.py -->\n"


def rendered() -> dict[Path, str]:
    """Return the files that follow from the results, by path."""
    rows = [row for file in sorted((HERE / "results").glob("*.json")) for row in read_rows(file)]
    peers = read_rows(HERE / "peers.json")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    files: dict[Path, str] = {}
    parts = [tables(rows, peers)] if rows else []
    decode = [row for row in rows if row.workload == "decode"]
    for device, model in dict.fromkeys((row.device, row.model) for row in decode):
        here = [row for row in decode if (row.device, row.model) == (device, model)]
        plot = DOCS / f"decode-{model}-{_slug(device)}.svg"
        files[plot] = step_plot([*here, *comparable(peers, here)])
        parts.append(f"![A decode step of {model} against batch, {device}]({plot.name})\n")
    files[PAGE] = "\n".join([before + BEGIN, *parts, END + after])
    return files


def _slug(device: str) -> str:
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def main() -> None:
    """Write the files, or with ``--check`` end with 1 where they are not up to date."""
    files = rendered()
    if "--check" in sys.argv[1:]:
        stale = [path.name for path, text in files.items() if not path.exists() or path.read_text("utf-8") != text]
        sys.exit(f"run python benchmarks/render.py: {', '.join(stale)} is not up to date" if stale else 0)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
