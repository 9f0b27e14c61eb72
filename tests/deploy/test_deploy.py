"""The files of deploy/: alerts fire when they should, and whatever they ask for is there."""

import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from graphmode.cli import app
from graphmode.serve.metrics import METRICS

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]
EXPOSED = {
    f"{series.exposed}{suffix}"
    for series in METRICS
    for suffix in (("_bucket", "_sum", "_count") if series.kind == "histogram" else ("",))
}
LABELS = {"instance", "job", "le", "model_name"} | {label for series in METRICS for label in series.labels}


def promtool(*arguments: str) -> str:
    """What Prometheus' own tool prints of its files. `make test` installs it where it can, and CI fails without."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    result = subprocess.run(
        [tool, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_prometheus_takes_the_rules_and_its_configuration() -> None:
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", "alerts.yml")
    assert "SUCCESS" in promtool("check", "config", "--syntax-only", "prometheus.yml")


def test_each_alert_fires_on_its_series_and_on_no_other() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")
    outcomes = defaultdict(set)
    for case in yaml.safe_load((DEPLOY / "prometheus/alerts_test.yml").read_text())["tests"]:
        for check in case["alert_rule_test"]:
            outcomes[check["alertname"]].add(bool(check["exp_alerts"]))
    assert outcomes == {alert["alert"]: {False, True} for alert in ALERTS}


def test_the_documentation_lists_every_alert() -> None:
    page = (DEPLOY.parent / "docs/serving.md").read_text()
    assert re.findall(r"^\| `(Graphmode\w+)` \|", page, re.MULTILINE) == [alert["alert"] for alert in ALERTS]


def test_the_server_has_the_options_that_it_is_started_with() -> None:
    known = {option for parameter in COMMANDS["serve"].params for option in parameter.opts}
    service = re.search(
        r"^ExecStart=.*/graphmode serve (.*)$", (DEPLOY / "graphmode.service").read_text(), re.MULTILINE
    )
    image = re.search(r"^CMD (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert service is not None
    assert image is not None
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]["graphmode"]["command"]
    for command in (service[1].split(), json.loads(image[1]), compose):
        assert {each for each in command if each.startswith("--")} <= known


def names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:vllm:|graphmode_)\w+", expression))


def labels(expression: str) -> set[str]:
    inside = " ".join(re.findall(r"\{(.*?)\}", expression))
    grouped = ",".join(re.findall(r"\bby \((.*?)\)", expression))
    return set(re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\"", inside)) | set(re.findall(r"\w+", grouped))


def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana/graphmode.json").read_text())  # type: ignore[no-any-return]


def expressions() -> list[str]:
    """All that the alerts and the dashboard ask Prometheus for."""
    board = dashboard()
    return [
        *(alert["expr"] for alert in ALERTS),
        *(target["expr"] for panel in board["panels"] for target in panel.get("targets", [])),
        *(each["expr"] for each in board["annotations"]["list"]),
        *(each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"),
    ]


def test_what_alerts_and_dashboard_ask_for_is_exposed() -> None:
    asked = expressions()
    assert len(asked) > 40
    assert set().union(*map(names, asked)) <= EXPOSED
    assert set().union(*map(labels, asked)) <= LABELS
    assert all(names(each) or each.startswith("up{") for each in asked)


def test_the_dashboard_shows_every_metric_of_graphs() -> None:
    shown = set().union(*map(names, expressions()))
    missing = {
        series.name
        for series in METRICS
        if series.name.startswith("graphmode_") and not any(name.startswith(series.name) for name in shown)
    }
    # A rate of their own is in no panel: the hit rate is shown over time, the others are for questions that few ask.
    assert missing == {
        *("graphmode_hit_rate", "graphmode_info", "graphmode_requests_active", "graphmode_failed_steps"),
        *("graphmode_replay_seconds", "graphmode_capture_seconds"),
    }


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_what_the_files_of_compose_mount_is_there() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    added = yaml.safe_load((DEPLOY / "compose.cuda.yml").read_text())["services"]
    assert set(added) <= set(services)
    variants = re.findall(r"^FROM build AS build-(\w+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert added["graphmode"]["build"]["args"]["VARIANT"] in variants
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert all((DEPLOY.parent / name).exists() for names in copied for name in names.split())
    sent = re.findall(r"^!(.*)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert set(" ".join(copied).split()) == set(sent)
