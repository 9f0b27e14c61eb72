"""The command line as a user meets it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graphmode import __version__
from graphmode.cli import app
from graphmode.cli.generate import DEFAULT_PROMPT
from graphmode.engine.config import EngineOptions
from graphmode.engine.sampling_params import SamplingParams
from graphmode.observe.sweep import try_model

STATS = {
    "running",
    "waiting",
    "blocks_used",
    "blocks_total",
    "prefix_queries",
    "prefix_hits",
    "rows",
    "padded_rows",
    "buckets",
    "replay_seconds",
    "captures",
    "decode_steps",
    "decode_seconds",
    "queue_seconds",
    "queue_seconds_sum",
    "steps",
    "replays",
    "eager_steps",
    "hit_rate",
    "misses",
    "padding_ratio",
    "graphs",
    "capture_seconds",
    "graph_bytes",
    "capture_peak_bytes",
    "capture_failures",
    "vision_runs",
    "vision_misses",
    "decode_ms_per_step",
    "generated_tokens",
    "preemptions",
}
CPU = ["generate", "--device", "cpu", "--max-tokens", "8", "--graph-sizes", "2,16"]


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.output


def test_json_is_one_object_with_outputs_and_stats() -> None:
    report = json.loads(run(*CPU, "--prompt", "ROMEO.\n", "--prompt", "JULIET.\n", "--json"))
    assert report.keys() == {"outputs", "stats"}
    assert report["stats"].keys() == STATS
    assert report["stats"]["hit_rate"] == 1.0
    assert report["stats"]["graphs"] == 4
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
        "4 graphs captured",
        "MiB",
        "hit rate 1.000",
        "padding",
        "misses: none",
    ):
        assert words in last


def test_several_answers_and_log_probabilities_are_in_the_json() -> None:
    report = json.loads(
        run(*CPU, "--prompt", "ROMEO.\n", "--json", "--n", "2", "--logprobs=1", "--prompt_logprobs", "0", "--seed", "1")
    )
    assert [output["prompt"] for output in report["outputs"]] == ["ROMEO.\n"] * 2
    for output in report["outputs"]:
        assert [next(iter(each)) for each in output["logprobs"]] == [str(token) for token in output["token_ids"]]
        assert output["prompt_logprobs"][0] is None
        assert all(each["logprob"] <= 0 for known in output["prompt_logprobs"][1:] for each in known.values())


class AskedError(Exception):
    """What a command asks the engine for."""

    def __init__(self, model: object, options: dict, prompts: object, params: object) -> None:
        self.model, self.options, self.prompts, self.params = model, options, prompts, params


class Recorder:
    """In place of the engine: takes its options as it does, and tells what it is asked for."""

    def __init__(self, model: object = None, *, progress: bool = False, **options: object) -> None:
        self.model, self.options = model, vars(EngineOptions(**options))

    def get_default_sampling_params(self, **others: object) -> SamplingParams:
        return SamplingParams(**({"top_k": 7} | others))

    def generate(self, prompts: object, params: object) -> None:
        raise AskedError(self.model, self.options, prompts, params)

    def stream(self, prompt: object, params: object) -> None:
        raise AskedError(self.model, self.options, [prompt], params)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AskedError]:
    """What ``graphmode generate`` with these arguments asks the engine for."""
    monkeypatch.setattr("graphmode.engine.llm.LLM", Recorder)

    def ask(*arguments: str) -> AskedError:
        result = CliRunner().invoke(app, ["generate", *arguments])
        assert isinstance(result.exception, AskedError), result.output
        return result.exception

    return ask


def test_defaults_of_the_command_line(asked: Callable[..., AskedError]) -> None:
    found = asked()
    assert found.options == vars(EngineOptions())
    assert found.params == SamplingParams(temperature=0, max_tokens=128, top_k=7), "the model asks for top_k=7"
    assert found.prompts == [DEFAULT_PROMPT]
    assert found.model is None


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--enable_graph=true"], {"enable_graph": True}),
        (["--enable_graph=false"], {"enable_graph": False}),
        (["--enable-graph=TRUE"], {"enable_graph": True}),
        (["--enable-graph=false"], {"enable_graph": False}),
        (["--enable-graph"], {"enable_graph": True}),
        (["--enable_graph"], {"enable_graph": True}),
        (["--no-enable-graph"], {"enable_graph": False}),
        (["--no_enable_graph"], {"enable_graph": False}),
        (["--enable_aclgraph"], {"enable_graph": True}),
        (["--enable-aclgraph=0"], {"enable_graph": False}),
        (["--enforce-eager"], {"enforce_eager": True}),
        (["--enforce_eager=false"], {"enforce_eager": False}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--max_num_seqs", "4", "--max-num-batched-tokens=64"], {"max_num_seqs": 4, "max_num_batched_tokens": 64}),
        (["--graph-sizes", "1,2,4"], {"graph_sizes": (1, 2, 4)}),
        (["--cudagraph-capture-sizes=[4,2]"], {"graph_sizes": (2, 4)}),
        (["--kv-cache-memory-bytes", "1000000"], {"kv_cache_memory": 1000000}),
        (["--gpu-memory-utilization", "0.5"], {"memory_share": 0.5}),
        (["--gpu_memory_utilization=0.5"], {"memory_share": 0.5}),
        (["--compilation-config", '{"cudagraph_mode": "PIECEWISE"}'], {"graph_mode": "piecewise"}),
        (["--graph-mode", "none"], {"graph_mode": "none"}),
        (["--dtype", "half"], {"dtype": "float16"}),
        (["--load-format=dummy", "--strict", "--warmup-iterations", "2"], {"load_format": "dummy", "strict": True}),
        (["--engine-seed", "7", "--decode-steps", "2", "--max-model-len", "9"], {"seed": 7, "max_model_len": 9}),
        (["-tp", "1", "--pipeline-parallel-size=1", "--enable-chunked-prefill"], {}),
    ],
)
def test_every_engine_option_is_one_of_the_command_line(
    asked: Callable[..., AskedError], arguments: list[str], options: dict
) -> None:
    assert asked(*arguments).options.items() >= (vars(EngineOptions()) | options).items() - {
        ("warmup_iterations", 1),
        ("decode_steps", None),
    }


@pytest.mark.parametrize("command", ["generate", "bench decode"])
def test_every_field_is_an_option_that_the_help_text_shows(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for each in fields(EngineOptions):
        name = {"seed": "engine-seed" if command == "generate" else "seed"}.get(each.name, each.name)
        assert (f"--{name.replace('_', '-')}" in shown) == (each.name != "on_capture_failure")
    assert "--gpu-memory-utilization" not in shown


def test_sampling_parameters_are_options_too(asked: Callable[..., AskedError]) -> None:
    written = ["--top_k", "5", "--top-p=0.5", "--stop", "a_b", "--stop", "--", "--stop_token_ids=1,2", "--ignore_eos"]
    more = ["--seed=3", "--logit-bias", '{"5": -1}', "--max-tokens", "none", "--n=2"]
    assert asked(*written, *more).params == SamplingParams(
        temperature=0,
        top_k=5,
        top_p=0.5,
        stop=["a_b", "--"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
        seed=3,
        logit_bias={5: -1},
        max_tokens=None,
        n=2,
    )


def test_texts_are_not_taken_for_options(asked: Callable[..., AskedError]) -> None:
    assert asked("--prompt", "--enable_graph=false", "--prompt=--a_b").prompts == ["--enable_graph=false", "--a_b"]


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"ROMEO.\n\nJULIET.\n", ["ROMEO.", "JULIET."]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\nb", ["a", "b"]),
        (b"a\n\xef\xbb\xbfb\n\xef\xbb\xbf\n", ["a", "b"]),
        ("a\u2028b\u2029c\nd\x85e".encode(), ["a\u2028b\u2029c", "d\x85e"]),
        (b"a\x0bb\x0cc\x1cd\x1de\x1ef\rg\nh", ["a\x0bb\x0cc\x1cd\x1de\x1ef\rg", "h"]),
        (b"  two  \n \t \n", ["  two  "]),
    ],
)
def test_a_prompt_file_has_one_prompt_a_line(
    asked: Callable[..., AskedError], tmp_path: Path, content: bytes, prompts: list[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert asked("--prompt-file", str(file)).prompts == prompts


def test_a_byte_order_mark_before_a_prompt_is_dropped(asked: Callable[..., AskedError]) -> None:
    assert asked("--prompt", "\ufeffa\ufeffb").prompts == ["a\ufeffb"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompt"),
        (b"\n \r\n", "holds no prompt"),
        (b"\xef\xbb\xbf", "holds no prompt"),
        (b"\xff\xfea\x00", "not a text in UTF-8: byte 0 is 0xff"),
        (b"a\n\xc3\x28", "not a text in UTF-8: byte 2 is 0xc3"),
        (b"\x7fELF\x00\x00", "zero bytes"),
    ],
)
def test_a_file_without_prompts_is_an_error(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert words in without_frame(run("generate", "--prompt-file", str(file), code=2))


def test_the_empty_model_is_not_the_bundled_one() -> None:
    assert "--model is empty" in without_frame(run("generate", "--model", "", code=2))
    assert "--model is empty" in without_frame(run("bench", "decode", "--model=", code=2))


def without_frame(output: str) -> str:
    """Undo the frame and the line breaks of a usage error."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", output).split())


def test_eager_gives_the_same_tokens_and_says_that_graphs_are_off() -> None:
    graph = json.loads(run(*CPU, "--prompt", "ROMEO.\n", "--json"))
    for off in ("--enforce-eager", "--no-enable-graph"):
        eager = json.loads(run(*CPU[:5], off, "--prompt", "ROMEO.\n", "--json"))
        assert eager["outputs"] == graph["outputs"]
        assert eager["stats"]["misses"] == {"disabled": eager["stats"]["steps"]}


def test_a_seed_repeats_a_sample() -> None:
    sample = [*CPU[:5], "--enforce-eager", "--prompt", "ROMEO.\n", "--temperature", "1", "--json", "--seed"]
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
        (["--graph-sizes", "a,b"], "graph_sizes is 'a,b'; it must be a list of sizes"),
        (["--enforce-eager", "--enable-graph"], "contradict"),
        (["--gpu-memory-utilization=nan"], "memory_share is nan; it must be a finite number"),
        (["--max-num-seqs", "many"], "max_num_seqs is 'many'; it must be an integer of at least 1"),
        (["--max-tokens=2.5"], "max_tokens is '2.5'; it must be an integer"),
        (["--seed", ""], "seed is ''"),
        (["--quantization", "awq"], "quantization='awq' cannot be honoured: quantised weights"),
        (["-q", "fp8"], "quantization='fp8' cannot be honoured"),
        (["--tensor_parallel_size=2"], "tensor_parallel_size=2 cannot be honoured"),
        (["-tp", "2"], "tensor_parallel_size=2 cannot be honoured"),
        (["--enable-lora"], "enable_lora=True cannot be honoured"),
        (["--no-enable-chunked-prefill"], "enable_chunked_prefill=False cannot be honoured"),
        (["-O3"], "optimization_level=3 cannot be honoured"),
        (["--compilation-config", "3"], "compilation_config is 3; it must be a dict"),
        (["--compilation-config", "{"], "compilation_config is '{'; it must be a dict"),
        (["--use-beam-search"], "use_beam_search=True cannot be honoured"),
        (["--prompt", "\udcff"], "half of a surrogate pair"),
        (["--stop", ""], "stop is"),
        (["--structured-outputs", '{"rgex": "a"}'], "StructuredOutputs has no rgex; did you mean regex?"),
        (["--guided-json", "{"], "structured_outputs.json is no JSON"),
    ],
)
def test_bad_input_is_an_error_of_one_line(arguments: list[str], words: str) -> None:
    output = run("generate", *arguments, code=1)
    assert output.startswith("error: ")
    assert words in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "x"],
        ["--prompt-file", "no"],
        ["--prompt-file", ""],
        ["--prompt-file", "."],
        ["--enable-graph=maybe"],
        ["--max-num-seq", "2"],
        ["--max-tokens"],
        ["--logprobs", "1"],
    ],
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


def test_info_says_which_kernels_a_model_takes() -> None:
    found = json.loads(run("info", "--kernels", "--on", "h100", "--json"))
    assert (found["model"], found["on"], found["dtype"]) == ("qwen3-0.6b", "h100", "bfloat16")
    assert found["kernels"]["gate and up"][0]["kernel"] == "skinny, hopper"
    text = run("info", "--kernels", "--on", "h100", "--model", "qwen3-8b")
    assert "17-32" in text
    assert "needs at most 8 Mi elements or takes 33 to 128 rows" in text
    assert "float32 on cpu" in run("info", "--kernels", "--on", "cpu")
    run("info", "--kernels", "--on", "a toaster", code=2)
    run("info", "--kernels", "--dtype", "int3", code=2)
    assert run("info", "--kernels", "--model", "./nowhere", code=1).startswith("error: ")


def test_the_runtime_loads_neither_the_engine_nor_transformers_and_help_waits_for_neither() -> None:
    code = (
        "import sys, graphmode.graph; "
        "print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'typer', 'rich', 'tokenizers') "
        "or m.startswith(('graphmode.engine', 'graphmode.models', 'graphmode.ops'))]); "
        "import graphmode.cli; print({'transformers', 'triton', 'numba'} & sys.modules.keys())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\nset()\n"


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    """As in ``graphmode info | head -1``: the other end of standard output is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "graphmode", "info"]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
    assert result.returncode == 1


def test_without_standard_output_there_is_no_traceback() -> None:
    command = f"exec {sys.executable} -m graphmode info >&-"
    result = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_an_error_of_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "graphmode", "info"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_an_interrupt_ends_the_command_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __init__(self, *_: object, **__: object) -> None:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("graphmode.engine.llm.LLM", Interrupted)
    result = CliRunner().invoke(app, ["generate"])
    assert result.exit_code == 130
    assert result.output == ""


def test_an_interrupt_while_the_command_loads_is_quiet_too() -> None:
    code = "import sys, signal; sys.modules['typer'] = None; sys.argv = ['graphmode', 'info']"
    interrupted = "import builtins; real = builtins.__import__\n" + (
        "def interrupt(name, *rest):\n    if name == 'graphmode.cli':\n        raise KeyboardInterrupt\n"
        "    return real(name, *rest)\nbuiltins.__import__ = interrupt\nfrom graphmode.__main__ import main\nmain()"
    )
    result = subprocess.run([sys.executable, "-c", f"{code}\n{interrupted}"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "")
    assert "Traceback" not in result.stderr


def test_results_that_cannot_be_written_are_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphmode.observe.sweep.sweep", lambda *_, **__: [])
    output = run("sweep", "--model-type", "llama", "--markdown", "nowhere/page.md", code=1)
    assert "error: nowhere/page.md cannot be written" in output


def test_sweep_prints_json_and_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class InThisProcess:
        def __init__(self, timeout: float) -> None:
            self.run = try_model

        def stop(self) -> None:
            pass

    monkeypatch.setattr("graphmode.observe.sweep._Worker", InThisProcess)
    page = tmp_path / "models.md"
    output = run(
        "sweep", "--json", "--workers", "1", "--model-type", "llama", "--model-type", "mamba", "--markdown", str(page)
    )
    found = {model["model_type"]: model["status"] for model in json.loads(output)["models"]}
    assert found == {"llama": "full", "mamba": "unsupported"}
    assert "| llama | LlamaForCausalLM | full |" in page.read_text()


def test_sweep_refuses_types_that_are_not_there() -> None:
    assert "nonesuch" in run("sweep", "--model-type", "nonesuch", code=2)
