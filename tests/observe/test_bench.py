"""The benchmark: workloads are those that others ran, floors what must be read, and rows say what ran."""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from graphmode.cache.specs import CacheShape
from graphmode.cli import app
from graphmode.errors import InputError, ModelError
from graphmode.models.bundled_model import bundled_model
from graphmode.observe.bench.plot import step_plot
from graphmode.observe.bench.results import Figure, Row, as_json, comparable, of_many, of_runs, read_rows, tables
from graphmode.observe.bench.roofline import ModelCost, Roofline, Work, model_cost
from graphmode.observe.bench.run import Plan, bench, decode_ms, latency_ms, resolve
from graphmode.observe.bench.workloads import (
    PROMPT_TOKENS,
    Request,
    Workload,
    offline_requests,
    random_requests,
    write_config,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = ["--device", "cpu", "--repeats", "1", "--option", "graph_sizes=[1,2,128,256]", "--option", "max_num_seqs=2"]


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def cost_of(folder: Path, caches: Sequence[CacheShape]) -> ModelCost | None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    return model_cost(model, caches)


# Workloads


def test_offline_requests_are_those_of_nano_vllm() -> None:
    requests = offline_requests(256, 1024, 151936)
    assert len(requests) == 256
    assert sum(request.max_tokens for request in requests) == 133_966
    assert sum(len(request.prompt) for request in requests) == 142_827
    assert all(100 <= size <= 1024 for request in requests for size in (len(request.prompt), request.max_tokens))
    assert {request.temperature for request in requests} == {0.6}


@given(count=st.integers(1, 20), longest=st.integers(1, 300), vocab_size=st.integers(1, 20000))
def test_requests_repeat_and_fit_the_vocabulary(count: int, longest: int, vocab_size: int) -> None:
    for make in (offline_requests, random_requests):
        requests = make(count, longest, vocab_size)
        assert requests == make(count, longest, vocab_size)
        assert len(requests) == count
        assert all(0 <= token < vocab_size for request in requests for token in request.prompt)
        assert all(1 <= request.max_tokens <= longest for request in requests)
    # Lengths do not depend on the vocabulary.
    sizes = [[len(request.prompt) for request in offline_requests(count, longest, each)] for each in (vocab_size, 7)]
    assert sizes[0] == sizes[1]


def test_prompts_of_a_batch_have_128_tokens_and_differ() -> None:
    prompts = [request.prompt for request in random_requests(64, 5, 151936)]
    assert {len(prompt) for prompt in prompts} == {PROMPT_TOKENS}
    assert len(set(map(tuple, prompts))) == 64


# Floors


@pytest.mark.parametrize(
    ("name", "layers", "decoder", "head"),
    [
        # A layer: query, key and value; output; the gated network; four norms. Then the last norm.
        (
            "qwen3-0.6b",
            28,
            28 * (1024 * 4096 + 2048 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128) + 1024,
            155_582_464,
        ),
        (
            "qwen3-1.7b",
            28,
            28 * (2048 * 4096 + 2048 * 2048 + 3 * 2048 * 6144 + 2 * 2048 + 2 * 128) + 2048,
            311_164_928,
        ),
        (
            "qwen3-8b",
            36,
            36 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128) + 4096,
            622_329_856,
        ),
    ],
)
def test_a_step_reads_all_weights_but_the_embedding(
    tmp_path: Path, name: str, layers: int, decoder: int, head: int
) -> None:
    write_config(name, tmp_path)
    cost = cost_of(tmp_path, [CacheShape(8, 128, 128)] * layers)
    assert cost == ModelCost(2 * decoder, 2 * head, layers * 2 * 8 * 128 * 2, 2)
    read = {"qwen3-0.6b": 1_192_099_840, "qwen3-1.7b": 3_441_149_952, "qwen3-8b": 15_136_811_008}
    assert cost.step_bytes == read[name]
    assert cost.kv_bytes == {"qwen3-0.6b": 112, "qwen3-1.7b": 112, "qwen3-8b": 144}[name] * 1024


def test_work_by_hand() -> None:
    cost = ModelCost(decoder_bytes=200, head_bytes=100, kv_bytes=10, itemsize=2)
    # Two prompts of 5, 4 tokens each: steps 2, 3 and 4 read 5, 6 and 7 tokens before.
    assert cost.decode_step(2, 4, 5) == Work(300 + 2 * 6 * 10, 2 * 2 * (100 + 50))
    assert cost.prefill(2, 5) == Work(300, 2 * (10 * 100 + 2 * 50))
    requests = [Request([0] * 5, 4), Request([0] * 3, 2)]
    assert cost.requests(requests) == Work(4 * 300 + (5 + 6 + 7 + 3) * 10, 2 * ((5 + 3 + 3 + 1) * 100 + 6 * 50))
    assert Roofline(read_bandwidth=10, flop_rate=100).seconds(Work(20, 100)) == 2
    assert Roofline(read_bandwidth=10, flop_rate=100).seconds(Work(20, 300)) == 3


@given(batch=st.integers(1, 300), tokens=st.integers(2, 100))
def test_a_batch_of_equal_requests_is_its_steps(batch: int, tokens: int) -> None:
    cost = ModelCost(decoder_bytes=200, head_bytes=100, kv_bytes=10, itemsize=2)
    whole = cost.requests([Request([0] * 128, tokens)] * batch)
    step, first = cost.decode_step(batch, tokens, 128), cost.prefill(batch, 128)
    assert whole.bytes == pytest.approx((tokens - 1) * step.bytes + first.bytes)
    assert whole.flops == pytest.approx((tokens - 1) * step.flops + first.flops)


@pytest.mark.parametrize("changes", [{"num_experts": 4}, {"layer_types": ["sliding_attention"] * 6}])
def test_what_need_not_be_read_has_no_floor(changes: dict[str, object]) -> None:
    config = AutoConfig.from_pretrained(bundled_model())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    caches = [CacheShape(2, 64, 64)] * 6
    assert model_cost(model, caches) is not None
    assert model_cost(model, [CacheShape(2, 64, 64, index_dim=8)] * 6) is None
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert model_cost(model, caches) is None


# How times become figures


class Clocked:
    """A contestant that takes 7 seconds for the first tokens and 2 for each step after; its clock is simulated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, 0
        monkeypatch.setattr("graphmode.observe.bench.run.time.perf_counter", lambda: self.now)
        monkeypatch.setattr("graphmode.observe.bench.run.time.process_time", lambda: 3 * self.now)

    def generate(self, requests: Sequence[Request]) -> None:
        self.calls += 1
        self.now += 7 + 2 * (max(request.max_tokens for request in requests) - 1)

    def arrivals(self, request: Request) -> list[float]:
        start, self.calls = self.now, self.calls + 1
        self.now += 7 + 2 * (request.max_tokens - 1)
        return [start + 7 + 2 * index for index in range(request.max_tokens)]


def test_a_decode_step_leaves_out_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_ms(Clocked(monkeypatch), random_requests(4, 17, 10), 3) == pytest.approx([2000] * 3)


def test_latency_tells_first_token_and_pauses_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch)
    figures = latency_ms(clocked, random_requests(1, 5, 10)[0], 4, 1000, 3500)
    assert clocked.calls == 5
    medians = {figure.name: (figure.median, figure.of_floor) for figure in figures}
    assert medians == {
        "step_ms": (2000, 0.5),
        "first_token_ms": (7000, 0.5),
        "gap_ms": (2000, None),
        "cpu_seconds_per_token": (3 * (7 + 4 * 2) / 5, None),
    }


@given(st.lists(st.floats(0.001, 1e6), min_size=1))
def test_medians_lie_within_their_spread(samples: list[float]) -> None:
    few, many = of_runs("step_ms", samples), of_many("step_ms", samples)
    assert few.spread["least"] == min(samples) <= few.median <= max(samples) == few.spread["most"]
    assert many.median <= many.spread["p90"] <= many.spread["p99"] <= max(samples)
    assert sum(sample <= many.spread["p90"] for sample in samples) >= 0.9 * len(samples)
    assert min(samples) <= many.spread["mean"] * (1 + 1e-9)
    assert many.spread["mean"] <= max(samples) * (1 + 1e-9)


def test_many_samples_tell_mean_percentiles_and_jitter() -> None:
    figure = of_many("gap_ms", [1, 1, 1, 9])
    assert figure == Figure("gap_ms", 1, {"mean": 3, "p90": 9, "p99": 9, "std": pytest.approx(12**0.5)})
    assert of_many("gap_ms", [5]).spread["std"] == 0


# Rows and tables


def row(mode: str, batch: int, step: float, floor: float | None = None, device: str = "Card") -> Row:
    figure = Figure("step_ms", step, {"least": step, "most": step} if floor else {}, floor)
    return Row("decode", "m", mode, batch, (figure,), device, {"torch": "2"}, "2026-01-31", {"tokens": 129})


def test_rows_survive_json(tmp_path: Path) -> None:
    rows = [row("graph", 1, 0.5, 0.4), row("vllm", 8, 1.6)]
    path = tmp_path / "rows.json"
    path.write_text(as_json(rows))
    assert read_rows(path) == rows
    first = json.loads(path.read_text())["rows"][0]
    assert first["step_ms_of_floor"] == pytest.approx(0.8)
    assert {"model", "batch", "mode", "step_ms", "device", "versions", "date", "tokens"} <= first.keys()


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"model": "m"}]}', '{"rows": 3}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(InputError, match="does not hold results"):
        read_rows(path)


def test_a_table_has_floor_share_and_factor_beside_each_figure() -> None:
    rows = [row("graph", 1, 0.5, 0.4), row("eager", 1, 20, 0.4), row("graph", 8, 1, 0.5)]
    lines = tables(rows, [row("vllm", 1, 1.6), row("vllm", 64, 3), row("other", 1, 1, device="Another")]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["", "floor", "graph", "eager", "vllm"]
    assert cells[2] == [
        "ms a step, batch 1",
        "0.400",
        "0.500 (least 0.500, most 0.500), 80%",
        "20.000 (least 20.000, most 20.000), 2%, graph 40.00 x",
        "1.600, 25%, graph 3.20 x",
    ]
    assert cells[3][3:] == ["", ""]
    assert len(cells) == 4


def test_rates_compare_the_other_way_round() -> None:
    assert Figure("tokens_per_s", 50, floor=100).of_floor == 0.5
    assert Figure("step_ms", 50, floor=25).of_floor == 0.5
    assert Figure("tokens_per_s", 50).speed_against(25) == 2


def test_peers_are_those_of_the_device() -> None:
    peers = read_rows(BENCHMARKS / "peers.json")
    assert comparable(peers, [row("graph", 1, 1)]) == []
    ours = Row("decode", "qwen3-8b", "graph", 64, (), "NVIDIA H100 80GB HBM3", {}, "")
    [vllm] = comparable(peers, [ours])
    assert vllm.figures[0].median == 7.939


def test_a_plot_has_a_line_a_mode() -> None:
    rows = [row("graph", batch, batch / 9, batch / 10) for batch in (1, 8, 64)] + [row("<vllm>", 1, 2), row("x", 1, -1)]
    texts = [each.text for each in ElementTree.fromstring(step_plot(rows)).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[-3:] == ["graph", "<vllm>", "floor"]
    assert {"1", "8", "64"} <= set(texts)
    step_plot([row("graph", 1, 1.0)])


def test_the_docs_show_the_committed_results() -> None:
    subprocess.run([sys.executable, str(BENCHMARKS / "render.py"), "--check"], check=True)


@pytest.fixture
def padding(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The script that measures padding."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    app = typer.Typer()
    app.command()(import_module("padding").main)
    return app


def test_padding_is_measured(tmp_path: Path, padding: typer.Typer) -> None:
    file = tmp_path / "rows.json"
    options = ["--device=cpu", "--steps=2", "--repeats=1", "--sizes=3"]
    result = CliRunner().invoke(padding, [*options, f"--json={file}"])
    assert result.exit_code == 0, result.output
    rows = read_rows(file)
    assert [(row.mode, row.batch, row.details["graph_rows"]) for row in rows] == [("bucket", 3, 4), ("exact", 3, 3)]
    assert all(figure.median > 0 for row in rows for figure in row.figures)


def test_sizes_without_padding_are_refused(padding: typer.Typer) -> None:
    result = CliRunner().invoke(padding, ["--sizes=9,16"])
    assert result.exit_code == 2
    assert "sizes [16] are not padded" in result.output


# What is refused, before any work


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"batches": (1, 33)}, "batch 33 is more than max_num_seqs=32"),
        ({"batches": (0,)}, "at least 1"),
        ({"tokens": 1}, "at least 2"),
        ({"tokens": 1000}, "1128 tokens, more than max_model_len=1024"),
        ({"workload": Workload.OFFLINE}, "2048 tokens, more than max_model_len=1024"),
        ({"workload": Workload.OFFLINE, "tokens": 200, "compare": ("transformers",)}, "different lengths"),
        ({"workload": Workload.PREFILL, "tokens": 5}, "one token a request"),
        ({"workload": Workload.LATENCY, "batches": (2,)}, "one request at a time"),
        ({"repeats": 0}, "repeats is 0"),
        ({"compare": ("vllm",)}, "cannot compare with ['vllm']"),
        ({"options": {"device": "cpu", "max_seqs": 3}}, "has no max_seqs; did you mean max_num_seqs?"),
        ({"options": {"device": "cpu", "enforce_eager": True}}, "--compare eager"),
    ],
)
def test_plans_that_cannot_run(plan: dict[str, object], words: str) -> None:
    asked = Plan(**{"workload": Workload.DECODE, "options": {"device": "cpu"}} | plan)
    with pytest.raises(InputError) as error:
        resolve(asked, bundled_model())
    assert words in str(error.value)


def test_defaults_are_those_that_others_ran(tmp_path: Path) -> None:
    write_config("qwen3-0.6b", tmp_path)
    decode = resolve(Plan(Workload.DECODE, "qwen3-0.6b", options={"device": "cpu", "max_num_seqs": 256}), tmp_path)
    assert (decode.batches, decode.tokens, decode.repeats) == ((1, 8, 64, 256), 129, 3)
    assert decode.options == {
        "device": "cpu",
        "max_num_seqs": 256,
        "max_model_len": 2048,
        "enable_prefix_caching": False,
        "load_format": "dummy",
    }
    offline = resolve(Plan(Workload.OFFLINE, "qwen3-0.6b", options={"device": "cpu"}), tmp_path)
    assert (offline.batches, offline.tokens) == ((256,), 1024)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ModelError, match=r"qwen3-7b.*qwen3-8b"):
        bench(Plan(Workload.DECODE, "qwen3-7b"))


# The command


def test_decode_beside_all_it_compares_with(tmp_path: Path) -> None:
    file, plot = tmp_path / "rows.json", tmp_path / "plot.svg"
    compare = ["--compare", "eager,transformers", "--json", str(file), "--plot", str(plot)]
    printed = run("decode", *QUICK, "--batch", "1,2", "--tokens", "3", *compare)
    assert "ms a step, batch 2" in printed
    rows = json.loads(file.read_text())["rows"]
    assert [(each["mode"], each["batch"]) for each in rows] == [
        (mode, batch) for mode in ("graph", "eager", "transformers") for batch in (1, 2)
    ]
    for each in rows:
        assert {"model", "step_ms", "step_ms_spread", "device", "versions", "date", "dtype", "repeats"} <= each.keys()
        assert (each["workload"], each["model"], each["tokens"]) == ("decode", "bundled", 3)
    assert [each.get("hit_rate") for each in rows] == [1.0, 1.0, 0.0, 0.0, None, None]
    ElementTree.parse(plot)
    # Results are peers of later ones.
    again = run("prefill", *QUICK, "--batch", "2", "--json", "-", "--peers", str(file))
    [one] = json.loads(again)["rows"]
    assert one["first_token_ms"] > 0


def test_offline_and_latency() -> None:
    [offline] = json.loads(run("offline", *QUICK, "--batch", "3", "--tokens", "9", "--json", "-"))["rows"]
    assert offline["tokens_per_s"] > 0
    assert offline["generated_tokens"] == sum(request.max_tokens for request in offline_requests(3, 9, 4096))
    latency = json.loads(run("latency", *QUICK, "--tokens", "4", "--json", "-"))["rows"]
    assert [each["mode"] for each in latency] == ["graph", "eager"]
    for each in latency:
        assert {"step_ms", "first_token_ms", "gap_ms", "cpu_seconds_per_token"} <= each.keys()
        assert each["gap_ms_spread"].keys() == {"mean", "p90", "p99", "std"}
        assert each["cpu_seconds_per_token"] > 0


@pytest.mark.parametrize(
    ("workload", "asked", "compared"),
    [
        (Workload.LATENCY, None, ("eager",)),
        (Workload.LATENCY, (), ()),
        (Workload.LATENCY, ("transformers",), ("transformers",)),
        (Workload.DECODE, None, ()),
    ],
)
def test_latency_is_measured_beside_eager_unless_asked_otherwise(
    workload: Workload, asked: tuple[str, ...] | None, compared: tuple[str, ...]
) -> None:
    plan = Plan(workload, compare=asked, options={"device": "cpu"})
    assert resolve(plan, bundled_model()).compare == compared


def test_small_figures_keep_their_digits() -> None:
    [line] = [line for line in tables([row("graph", 1, 0.00123)]).splitlines() if "batch 1" in line]
    assert "0.00123" in line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["decode", "--model", "qwen3-7b"], 1, "there is no model 'qwen3-7b'"),
        (["decode", "--model", "./nowhere"], 1, "there is no model './nowhere'"),
        (["decode", "--device", "cpu", "--batch", "1,64"], 1, "batch 64 is more than max_num_seqs=32"),
        (["decode", "--option", "fuse"], 1, "has no value"),
        (["decode", "--option", "max_num_seqs=many"], 1, "max_num_seqs is 'many'; it must be an integer"),
        (["decode", "--max-num-seqs", "many"], 1, "max_num_seqs is 'many'; it must be an integer"),
        (["decode", "--option", "quantization=awq"], 1, "quantization='awq' cannot be honoured"),
        (["decode", "--option", "max-seqs=2"], 1, "did you mean max_num_seqs?"),
        (["decode", "--enable_graph=false"], 1, "--compare eager"),
        (["encode"], 2, "encode"),
        (["decode", "--batch", "a"], 2, "--batch"),
        (["prefill", "--plot", "x.svg"], 2, "--plot"),
        (["decode", "--json", "nowhere/x.json"], 2, "nowhere"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], code: int, words: str) -> None:
    output = run(*arguments, code=code)
    assert words in output
    assert "Traceback" not in output
