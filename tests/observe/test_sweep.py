"""The sweep tells what runs from what is refused, survives its models, and its page is what it finds."""

import os
import signal
from pathlib import Path

import pytest
import transformers

from graphmode.observe.sweep import MODEL_TYPES, Finding, Status, _Worker, as_markdown, summary, sweep, try_model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_findings_come_in_order_and_as_they_are_made() -> None:
    shown: list[Finding] = []
    findings = sweep(["qwen3_moe", "mamba", "gpt2", "bert", "jetmoe"], found=shown.append)
    assert [(finding.model_type, finding.status) for finding in findings] == [
        ("qwen3_moe", Status.FULL),
        ("mamba", Status.UNSUPPORTED),
        ("gpt2", Status.FULL),
        ("bert", Status.UNSUPPORTED),
        ("jetmoe", Status.EAGER_ONLY),
    ]
    assert {finding.model_type for finding in shown} == {finding.model_type for finding in findings}
    assert findings[1].reason.startswith("it keeps a state")
    assert "modeling_jetmoe.py" in findings[4].reason
    assert summary(findings) == "2 full, 1 eager only, 2 unsupported"


def test_other_tokens_are_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphmode.observe.sweep.reference_tokens", lambda folder: [[0] * 8] * 4)
    finding = try_model("llama")
    assert finding.status is Status.WRONG
    assert "4 of 4 prompts" in finding.reason


def test_a_model_that_takes_its_process_down_ends_only_itself() -> None:
    worker = _Worker(timeout=120)
    try:
        assert worker._process.pid is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.join()
        finding = worker.run("llama")
        assert finding.status is Status.UNTESTED
        assert "exit code -9" in finding.reason
        assert worker.run("mamba").status is Status.UNSUPPORTED
    finally:
        worker.stop()


def test_a_model_that_hangs_is_given_up() -> None:
    [finding] = sweep(["llama"], timeout=0.01)
    assert finding.status is Status.UNTESTED
    assert "no result" in finding.reason


def test_the_page_has_a_row_for_each_type() -> None:
    page = as_markdown([Finding("b", "BForCausalLM", Status.FULL), Finding("a", "A", Status.UNSUPPORTED, "x | y")])
    assert page.splitlines()[-2:] == ["| a | A | unsupported | x \\| y |", "| b | BForCausalLM | full |  |"]
    assert "2 types: 1 full, 1 unsupported." in page


@pytest.mark.slow
def test_the_page_in_the_docs_is_what_a_sweep_finds() -> None:
    findings = sweep(list(MODEL_TYPES))
    assert not [finding for finding in findings if finding.status is Status.WRONG]
    assert sum(finding.status is Status.FULL for finding in findings) >= 60
    if f"transformers {transformers.__version__} " in PAGE.read_text():
        assert as_markdown(findings) == PAGE.read_text()
