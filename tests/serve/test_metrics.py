"""What the server counts, and that the documentation says so."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as parse

from graphmode.errors import EngineDownError, OverloadedError
from graphmode.serve.histograms import Histogram
from graphmode.serve.metrics import FAILURES, METRICS, REJECTIONS, STEP_BOUNDS, SUCCESS, Metrics
from tests.serve.conftest import Served
from tests.serve.fakes import FakeEngine, snapshot

ROOT = Path(__file__).parents[2]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("a model", FakeEngine())


def values(metrics: Metrics) -> dict[str, float]:
    """All samples by their names and labels, except for the model's."""
    found = {}
    for family in metrics.collect():
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "a model"
            found[" ".join([sample.name, *map("=".join, sorted(sample.labels.items()))])] = sample.value
    return found


def documented() -> list[tuple[str, str, str, str]]:
    rows = re.findall(
        r"^\| `([a-z0-9:_]+)` \| (\w+) \| (.*?) \| (.*) \|$", (ROOT / "docs/serving.md").read_text(), re.MULTILINE
    )
    return [tuple(row) for row in rows]


def test_the_table_of_the_documentation_is_what_is_exposed(metrics: Metrics) -> None:
    listed = [
        (each.exposed, each.kind, ", ".join(f"`{label}`" for label in each.labels), each.help) for each in METRICS
    ]
    assert documented() == listed
    text = metrics.exposition().decode()
    assert re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE) == [(name, kind) for name, kind, *_ in listed]


def test_every_series_has_a_value_once_the_engine_has_said_all(metrics: Metrics) -> None:
    zeros = [0] * 17
    metrics.engine_snapshot(snapshot(5, replay_seconds=0.1, queue_seconds=zeros, queue_seconds_sum=0.0))
    metrics.response("GET", "/v1/models", 200)
    families = {family.name: family for family in parse(metrics.exposition().decode())}
    assert all(families[each.name].samples for each in METRICS)
    labels = {each.name: {"model_name", *each.labels} for each in METRICS}
    assert all(set(s.labels) - {"le"} == labels[name] for name, each in families.items() for s in each.samples)


def test_without_an_engine_what_it_counts_is_left_out(metrics: Metrics) -> None:
    metrics.engine.state.phase = "starting"  # type: ignore[misc]
    found = values(metrics)
    assert found["graphmode_engine_up"] == 0
    assert not {"graphmode_steps_total", "vllm:num_requests_running", "graphmode_step_seconds_count"} & set(found)
    assert found["graphmode_misses_total reason=disabled"] == 0, "a rate sees the first one"


def test_of_an_engine_that_died_what_it_counted_stays_and_what_it_held_goes(metrics: Metrics) -> None:
    metrics.engine_snapshot(snapshot(5))
    assert values(metrics)["vllm:num_requests_running"] == 2
    metrics.engine.state.phase = "dead"  # type: ignore[misc]
    found = values(metrics)
    assert found["graphmode_engine_up"] == 0
    assert found["graphmode_steps_total"] == 5
    assert not {"vllm:num_requests_running", "vllm:kv_cache_usage_perc", "graphmode_graphs"} & set(found)


def test_a_request_that_ends_is_counted_and_timed(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    timing = metrics.request(7, 2)
    assert values(metrics)["graphmode_requests_active"] == 1
    with metrics.stream():
        assert values(metrics)["graphmode_streams_open"] == 1
        now += 0.05
        timing.tokens(0, 1)
        timing.tokens(1, 1)
        now += 0.04
        timing.tokens(0, 4)  # that came together: 10 ms each
    now += 1
    timing.ended("length")
    found = values(metrics)
    assert found["graphmode_requests_active"] == found["graphmode_streams_open"] == 0
    assert found["vllm:prompt_tokens_total"] == 7
    assert found["vllm:generation_tokens_total"] == 6
    assert found["vllm:request_success_total finished_reason=length"] == 1
    assert found["vllm:time_to_first_token_seconds_sum"] == pytest.approx(0.05)
    assert found["vllm:time_to_first_token_seconds_count"] == 1
    assert found["vllm:inter_token_latency_seconds_sum"] == pytest.approx(0.04)
    assert found["vllm:inter_token_latency_seconds_count"] == 4
    assert found["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(1.09)
    assert found["vllm:request_generation_tokens_sum"] == 6
    assert found["vllm:request_params_n_sum"] == 2


def test_failures_and_rejections_are_counted_by_cause(metrics: Metrics) -> None:
    for reason in (*SUCCESS, *FAILURES):
        metrics.request(1).ended(reason)
    for status in (400, 401, 413, 429, 503):
        metrics.response("POST", "/v1/completions", status)
    metrics.response("GET", "/dashboard", 401)
    for reason in ("queue_full", "engine_down", "draining"):
        metrics.rejected(reason)
    metrics.request(1).ended("invalid")
    found = values(metrics)
    assert all(found[f"vllm:request_success_total finished_reason={reason}"] == 1 for reason in SUCCESS)
    assert all(found[f"graphmode_requests_failed_total reason={reason}"] == 1 for reason in FAILURES)
    assert all(found[f"graphmode_requests_rejected_total reason={reason}"] == 1 for reason in REJECTIONS)
    assert found["vllm:e2e_request_latency_seconds_count"] == len(SUCCESS)
    assert found["graphmode_requests_active"] == 0
    assert not [key for key in found if key.startswith("graphmode_requests_failed_total") and "invalid" in key]


def test_a_client_cannot_make_series_of_its_own(metrics: Metrics) -> None:
    for number in range(50):
        metrics.response(f"M{number}", "unmatched", 405)
    assert values(metrics)["graphmode_http_responses_total method=other route=unmatched status=405"] == 50


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=3), min_size=1, max_size=4))
def test_counters_never_go_back_when_the_engine_restarts(processes: list[list[int]]) -> None:
    """Each list is what one engine process counted; it begins at zero."""
    metrics = Metrics("a model", FakeEngine())
    seen: dict[str, float] = {}
    for restarts, steps in enumerate(processes):
        metrics.engine.state.restarts = restarts  # type: ignore[misc]
        for number in sorted(steps):
            metrics.engine_snapshot(snapshot(number))
            found = {key: value for key, value in values(metrics).items() if not key.startswith("graphmode_hit_rate")}
            assert all(found[key] >= value for key, value in seen.items())
            seen = found
    total = sum(max(steps) for steps in processes)
    assert seen["graphmode_steps_total"] == total
    assert seen["graphmode_bucket_replays_total family=decode size=8"] == total
    assert seen["graphmode_step_seconds_count"] == total
    assert seen["graphmode_captures_total"] == 3 * len(processes)
    assert seen["graphmode_graph_bytes"] == 4096


def test_capture_failures_are_counted_and_the_hit_rate_is_their_consequence(metrics: Metrics) -> None:
    failed = [{"message": "no room"}, {"message": "no room"}]
    metrics.engine_snapshot(snapshot(10, capture_failures=failed))
    found = values(metrics)
    assert found["graphmode_capture_failures_total"] == 2
    assert found["graphmode_hit_rate"] == 0.5
    assert found["vllm:kv_cache_usage_perc"] == 0.25


@given(st.lists(st.floats(0, 20), min_size=1), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_bucket_of_the_observation(observed: list[float], share: float) -> None:
    histogram = Histogram(STEP_BOUNDS)
    for each in observed:
        histogram.observe(each)
    assert histogram.total == pytest.approx(sum(observed))
    exact = sorted(observed)[max(0, -int(-share * len(observed) // 1) - 1)]
    found = histogram.buckets.quantile(share)
    assert found is not None
    upper = next((bound for bound in STEP_BOUNDS if bound >= exact), STEP_BOUNDS[-1])
    lower = max((bound for bound in STEP_BOUNDS if bound < upper), default=0.0)
    assert min(lower, STEP_BOUNDS[-1]) <= found <= upper


def test_no_observation_has_no_quantile() -> None:
    assert Histogram(STEP_BOUNDS).buckets.quantile(0.5) is None


def test_what_passes_through_the_server_is_counted(served: Served) -> None:
    def read() -> dict[str, float]:
        families = parse(served.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name[-7:] != "_bucket"]
        return {
            " ".join([each.name, *(value for name, value in each.labels.items() if name != "model_name")]): each.value
            for each in samples
        }

    before = read()
    body = {"prompt": "ROMEO.", "max_tokens": 4, "ignore_eos": True}
    served.engine.burst = 2
    assert served.post("/v1/completions", body).status_code == 200
    assert "[DONE]" in served.post("/v1/completions", body | {"stream": True}).text
    assert served.post("/v1/completions", body | {"max_tokens": -1}).status_code == 400
    assert served.post("/v1/completions", body | {"prompt": "x" * 70000}).status_code == 413
    served.engine.refusal = OverloadedError("too many wait", 3)
    assert served.post("/v1/completions", body).status_code == 429
    served.engine.refusal = None
    served.engine.failure, served.engine.fails_after = EngineDownError("it died"), 2
    assert served.post("/v1/completions", body).status_code == 503
    after = read()
    changed = {key: value - before.get(key, 0.0) for key, value in after.items() if value != before.get(key, 0.0)}
    prompt = changed.pop("vllm:prompt_tokens_total")
    assert prompt % 3 == 0
    assert {key: value for key, value in changed.items() if not key.endswith("_sum")} == {
        "vllm:generation_tokens_total": 4 + 4 + 2,
        "vllm:request_success_total length": 2,
        "vllm:time_to_first_token_seconds_count": 3,
        "vllm:inter_token_latency_seconds_count": 2 + 2,
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:request_prompt_tokens_count": 2,
        "vllm:request_generation_tokens_count": 2,
        "vllm:request_params_n_count": 3,
        "graphmode_requests_failed_total engine_down": 1,
        "graphmode_requests_rejected_total invalid": 1,
        "graphmode_requests_rejected_total too_large": 1,
        "graphmode_requests_rejected_total queue_full": 1,
        "graphmode_http_responses_total POST /v1/completions 200": 2,
        "graphmode_http_responses_total POST /v1/completions 400": 1,
        "graphmode_http_responses_total POST unmatched 413": 1,
        "graphmode_http_responses_total POST /v1/completions 429": 1,
        "graphmode_http_responses_total POST /v1/completions 503": 1,
        "graphmode_http_responses_total GET /metrics 200": 1,
    }
