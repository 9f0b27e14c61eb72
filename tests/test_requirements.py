"""Versions outside of what is tested are told in one line, before anything fails by them."""

import importlib
import logging
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import graphmode.cli
import graphmode.models
import graphmode.requirements
from graphmode.errors import VersionError
from graphmode.requirements import outside_of_tested

ROOT = Path(__file__).parents[1]
DECLARED = ["torch<2.14,>=2.11", "transformers<5.25,>=5.17", "rich>=13", 'pytest<9,>=8; extra == "test"']
REMEDY = "pip install 'transformers>=5.17,<5.25'"


@pytest.mark.parametrize(
    ("transformers", "older", "newer"),
    [
        ("5.16.4", [f"transformers 5.16.4 is older than graphmode needs; run: {REMEDY}"], []),
        ("5.17.0", [], []),
        ("5.24.9", [], []),
        (
            "5.25.0",
            [],
            [f"transformers 5.25.0 is newer than graphmode is tested with; if something fails, run: {REMEDY}"],
        ),
        (
            "5.25.0.dev0",
            [],
            [f"transformers 5.25.0.dev0 is newer than graphmode is tested with; if something fails, run: {REMEDY}"],
        ),
    ],
)
def test_a_version_outside_of_what_is_tested_is_told_in_one_line(
    transformers: str, older: list[str], newer: list[str]
) -> None:
    found = {"transformers": transformers, "torch": "2.13.0+cpu", "rich": "12", "pytest": "7"}
    assert outside_of_tested(DECLARED, found.__getitem__) == (older, newer)


def test_a_package_that_is_not_there_is_no_matter_of_versions() -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    assert outside_of_tested(DECLARED, missing) == ([], [])


def test_newer_versions_are_warned_of_and_older_ones_are_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphmode.requirements, "_problems", lambda: (["a is older"], ["b is newer"]))
    with caplog.at_level(logging.WARNING):
        graphmode.requirements.warn_of_untested_versions()
    assert [record.getMessage() for record in caplog.records] == ["b is newer"]
    with pytest.raises(VersionError, match=r"^a is older$"):
        importlib.reload(graphmode.models)


def test_the_command_line_tells_of_versions_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise VersionError("a is older")

    monkeypatch.setattr(graphmode.cli, "app", too_old)
    with pytest.raises(SystemExit, match=r"^error: a is older$"):
        graphmode.cli.main()


def test_the_locks_hold_the_newest_and_the_oldest_versions_that_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {each.name: each for each in map(Requirement, project["project"]["dependencies"])}
    newest = locked(ROOT / "requirements.lock")
    assert declared.keys() <= newest.keys()
    for name in ("torch", "transformers"):
        bounds = {each.operator: Version(each.version) for each in declared[name].specifier}
        assert bounds["<"].release[1] == newest[name].release[1] + 1
    oldest = locked(ROOT / "requirements-oldest.lock")["transformers"]
    assert {each.version for each in declared["transformers"].specifier} >= {f"{oldest.major}.{oldest.minor}"}


def locked(path: Path) -> dict[str, Version]:
    """Return the versions in a lock file; of those that differ by Python or platform the last."""
    lines = (line.split(";")[0].strip().split("==") for line in path.read_text().splitlines())
    return {name: Version(version) for name, version in lines}
