"""The command line as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graphmode import __version__
from graphmode.cli import app

STATS = {
    "steps",
    "replays",
    "eager_steps",
    "hit_rate",
    "misses",
    "padding_ratio",
    "graphs",
    "capture_seconds",
    "graph_bytes",
    "capture_failures",
    "vision_runs",
    "vision_misses",
    "decode_ms_per_step",
    "generated_tokens",
    "preemptions",
}
CPU = ["generate", "--device", "cpu", "--max-tokens", "8", "--graph-sizes", "1,2,4,16"]


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.output


def test_json_is_one_object_with_outputs_and_stats() -> None:
    report = json.loads(run(*CPU, "--prompt", "ROMEO.\n", "--prompt", "JULIET.\n", "--json"))
    assert report.keys() == {"outputs", "stats"}
    assert report["stats"].keys() == STATS
    assert report["stats"]["hit_rate"] == 1.0
    assert report["stats"]["graphs"] == 8
    for output, prompt in zip(report["outputs"], ["ROMEO.\n", "JULIET.\n"], strict=True):
        assert output.keys() == {"prompt", "text", "token_ids", "finish_reason"}
        assert output["prompt"] == prompt
        assert len(output["token_ids"]) == 8
        assert output["finish_reason"] == "length"
        assert output["text"]


def test_one_prompt_streams_and_ends_with_a_line_for_people() -> None:
    text = json.loads(run(*CPU, "--prompt", "HAMLET.\nTo be", "--json"))["outputs"][0]["text"]
    printed = run(*CPU, "--prompt", "HAMLET.\nTo be")
    assert printed.startswith("HAMLET.\nTo be" + text)
    last = printed.rstrip().splitlines()[-1]
    for words in (
        "8 tokens in",
        "tokens/s",
        "8 graphs captured",
        "MiB",
        "hit rate 1.000",
        "padding",
        "misses: none",
    ):
        assert words in last


def test_a_prompt_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("ROMEO.\n\nJULIET.\n")
    report = json.loads(run(*CPU, "--prompt-file", str(file), "--json"))
    assert [output["prompt"] for output in report["outputs"]] == ["ROMEO.", "JULIET."]


@pytest.mark.parametrize("off", ["--enforce-eager", "--no-enable-graph"])
def test_eager_gives_the_same_tokens_and_says_that_graphs_are_off(off: str) -> None:
    graph = json.loads(run(*CPU, "--prompt", "ROMEO.\n", "--json"))
    eager = json.loads(run(*CPU[:5], off, "--prompt", "ROMEO.\n", "--json"))
    assert eager["outputs"] == graph["outputs"]
    assert eager["stats"]["misses"] == {"disabled": eager["stats"]["steps"]}


def test_a_seed_repeats_a_sample() -> None:
    sample = [*CPU, "--prompt", "ROMEO.\n", "--temperature", "1", "--json", "--seed"]
    first, again, other = (json.loads(run(*sample, seed))["outputs"] for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "./nowhere", "--prompt", "x"], "no such folder"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--max-padding-ratio", "2"], "max_padding_ratio is 2"),
        (["--dtype", "int4"], "int4"),
        (["--fuse", "all"], "fuse is 'all'"),
        (["--device", "cuda:99"], "cuda"),
        (["--device", "toaster"], "toaster"),
        (["--enforce-eager", "--graph-sizes", "1"], "graphs are off"),
    ],
)
def test_bad_input_is_an_error_of_one_line(arguments: list[str], words: str) -> None:
    output = run("generate", *arguments, code=1)
    assert output.startswith("error: ")
    assert words in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "arguments",
    [["--graph-sizes", "a,b"], ["--enforce-eager", "--enable-graph"], ["--model", "x"], ["--prompt-file", "no"]],
)
def test_bad_usage_exits_with_2(arguments: list[str]) -> None:
    run("generate", *arguments, code=2)


def test_info_and_version() -> None:
    assert run("--version").strip() == f"graphmode {__version__}"
    found = json.loads(run("info", "--json"))
    assert found["versions"]["graphmode"] == __version__
    assert found["devices"][0]["device"] == "cpu"
    assert {"cpu", "cuda", "mlu", "npu", "xpu"} <= set(found["backends"])
    assert {"cpu", "cuda", "mlu", "npu", "other", "xpu"} == set(found["support"])
    text = run("info")
    assert "torch" in text
    for support in found["support"].values():
        assert all(words in text for words in support.values())


def test_the_runtime_loads_neither_the_engine_nor_transformers() -> None:
    code = (
        "import sys, graphmode.graph; "
        "print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'typer', 'rich', 'tokenizers') "
        "or m.startswith(('graphmode.engine', 'graphmode.models', 'graphmode.kernels'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_sweep_prints_json_and_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    output = run("sweep", "--json", "--model-type", "llama", "--model-type", "mamba", "--markdown", str(page))
    found = {model["model_type"]: model["status"] for model in json.loads(output)["models"]}
    assert found == {"llama": "full", "mamba": "unsupported"}
    assert "| llama | LlamaForCausalLM | full |" in page.read_text()


def test_sweep_refuses_types_that_are_not_there() -> None:
    assert "nonesuch" in run("sweep", "--model-type", "nonesuch", code=2)
