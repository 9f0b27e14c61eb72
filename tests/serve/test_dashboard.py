"""What the dashboard is told, and what it makes of it in a browser."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from graphmode.graph import Reason
from graphmode.serve.history import SECONDS, WINDOW
from graphmode.serve.metrics import FAILURES, REJECTIONS, SUCCESS, Metrics
from graphmode.serve.routes import dashboard
from graphmode.serve.routes import metrics as metrics_route
from tests.serve.fakes import FakeEngine, snapshot

FOLDER = Path(dashboard.__file__).parents[1] / "dashboard"


@dataclass
class Clock:
    """A clock that tests set."""

    now: float = 1_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("graphmode.serve.metrics.time", clock)
    monkeypatch.setattr("graphmode.serve.history.time", clock)
    return clock


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics("a model", FakeEngine())


@pytest.fixture
def client(metrics: Metrics) -> TestClient:
    app = FastAPI()
    info = SimpleNamespace(device="cpu", dtype="float32", max_model_len=64, buckets={"decode": [1, 8]})
    app.state.service = SimpleNamespace(metrics=metrics, engine=SimpleNamespace(info=info))
    app.include_router(dashboard.router)
    app.include_router(metrics_route.router)
    return TestClient(app)


def run(metrics: Metrics, clock: Clock, seconds: int, steps: int = 10) -> None:
    """Let an engine make ``steps`` steps and twice as many tokens a second."""
    done = metrics.counted("steps") or 0
    for second in range(1, seconds + 1):
        for quarter in range(4):
            clock.now += 0.25
            metrics.engine_snapshot(snapshot(done + steps * second - steps * (3 - quarter) // 4))
        metrics.requests.generation_tokens += 2 * steps


def test_points_are_rates_by_the_second(metrics: Metrics, clock: Clock) -> None:
    run(metrics, clock, 5)
    points = metrics.history.points(0)
    assert len(points) == 4
    assert [point["time"] for point in points] == pytest.approx([clock.now - 0.75 - before for before in (3, 2, 1, 0)])
    assert all(point["output"] == 20 and point["running"] == 2 for point in points)
    assert all(point["kv"] == 0.25 for point in points)
    assert metrics.history.points(metrics.history.number) == []
    assert metrics.history.points(metrics.history.number - 2) == points[-2:]


def test_the_history_ends(metrics: Metrics, clock: Clock) -> None:
    run(metrics, clock, SECONDS + 20)
    assert len(metrics.history.points(0)) == SECONDS
    assert metrics.history.number == SECONDS + 20


def test_the_window_is_the_last_minute(metrics: Metrics, clock: Clock) -> None:
    run(metrics, clock, 90)
    window = metrics.history.window()
    assert window["seconds"] == pytest.approx(WINDOW)
    assert window["steps"] == 10 * WINDOW
    assert window["hit_rate"] == 0.5
    assert window["padding"] == 0.25
    assert window["misses"]["disabled"] == 5 * WINDOW
    assert window["replays"] == {"decode:8": 10 * WINDOW}
    run(metrics, clock, 90, steps=0)
    idle = metrics.history.window()
    assert idle["hit_rate"] is idle["padding"] is idle["step_ms"]["p50"] is None
    assert metrics.history.points(0)[-1]["step_p50"] is None


def test_a_page_that_has_points_gets_the_new_ones_alone(client: TestClient, metrics: Metrics, clock: Clock) -> None:
    run(metrics, clock, 10)
    first = client.get("/dashboard/data").json()
    assert len(first["points"]) == 9
    assert first["model"] == {
        "name": "a model",
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 64,
        "buckets": {"decode": [1, 8]},
    }
    run(metrics, clock, 2)
    known = {"after": first["number"], "started": first["started"]}
    assert len(client.get("/dashboard/data", params=known).json()["points"]) == 2
    of_another = known | {"started": first["started"] - 1}
    assert len(client.get("/dashboard/data", params=of_another).json()["points"]) == 11


def test_before_the_engine_says_anything_nothing_is_made_up(client: TestClient, metrics: Metrics) -> None:
    metrics.engine.state.phase, metrics.engine.state.captured = "starting", 1
    told = client.get("/dashboard/data").json()
    assert told["engine"]["phase"] == "starting"
    assert (told["engine"]["captured"], told["engine"]["to_capture"]) == (1, 3)
    assert told["window"] == {}
    assert told["points"] == []
    assert all(told["now"][name] is None for name in ("running", "waiting", "kv", "graphs"))


def test_the_page_brings_all_it_needs_and_may_load_nothing_else(client: TestClient) -> None:
    page = client.get("/dashboard")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*src)|style=|\son\w+=", page.text), "nothing is inline"
    parts = re.findall(r'(?:src|href)="(/dashboard/[^"]+)"', page.text)
    assert parts
    for part in parts:
        answer = client.get(part)
        assert answer.status_code == 200, part
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert client.get("/dashboard/nothing.js").status_code == 404
    assert client.get("/dashboard/../metrics.py").status_code == 404


def test_scripts_never_make_html_of_texts() -> None:
    for script in FOLDER.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", script.read_text())


def test_every_reason_has_words_of_its_own() -> None:
    script = (FOLDER / "app.js").read_text()
    for name, words in (("REASONS", Reason), ("ENDS", SUCCESS), ("FAILED", FAILURES), ("REJECTED", REJECTIONS)):
        table = re.search(rf"const {name} = \{{(.*?)\}};", script, re.DOTALL)
        assert table is not None
        assert set(re.findall(r"(\w+): \"", table[1])) == set(map(str, words))


def test_metrics_are_text_for_prometheus(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'graphmode_engine_up{model_name="a model"} 1.0' in answer.text
