"""The sweep tells what runs from what is refused, survives its models, and its page is what it finds."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import transformers

from graphmode.models.hf.tiny import MODEL_TYPES, save_tiny_model
from graphmode.models.loader import load_model, read_model
from graphmode.observe.sweep import (
    _FAMILIES,
    Finding,
    Status,
    _Worker,
    as_markdown,
    prompts,
    reference_tokens,
    summary,
    sweep,
    try_model,
)

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_findings_come_in_order_and_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two workers the one with the first type is done when the other has done the rest."""
    rest_is_done = threading.Event()

    class Worker:
        def __init__(self, timeout: float) -> None:
            pass

        def run(self, model_type: str) -> Finding:
            if model_type == "a":
                assert rest_is_done.wait(60)
            elif model_type == "c":
                rest_is_done.set()
            return Finding(model_type, "", Status.FULL)

        def stop(self) -> None:
            pass

    monkeypatch.setattr("graphmode.observe.sweep._Worker", Worker)
    shown: list[str] = []
    findings = sweep(["a", "b", "c"], workers=2, found=lambda finding: shown.append(finding.model_type))
    assert [finding.model_type for finding in findings] == ["a", "b", "c"]
    assert sorted(shown) == ["a", "b", "c"]
    assert shown.index("a") > shown.index("b")


def test_what_runs_is_told_from_what_is_refused() -> None:
    shown: list[Finding] = []
    findings = sweep(["qwen3_moe", "mamba", "gpt2", "jetmoe", "llava"], workers=1, found=shown.append)
    assert [(finding.model_type, finding.status) for finding in findings] == [
        ("qwen3_moe", Status.FULL),
        ("mamba", Status.UNSUPPORTED),
        ("gpt2", Status.FULL),
        ("jetmoe", Status.EAGER_ONLY),
        ("llava", Status.UNSUPPORTED),
    ]
    assert shown == findings
    assert findings[1].reason.startswith("it keeps a state")
    assert "modeling_jetmoe.py" in findings[3].reason
    assert findings[4].reason.startswith("it is a model of images and text")
    assert [finding.fused_layers for finding in findings] == [4, 0, 0, 0, 0]
    assert summary(findings) == "2 full, 1 eager only, 2 unsupported"
    if f"transformers {transformers.__version__} " in PAGE.read_text():
        rows = [row for row in as_markdown(findings).split("## Causal")[1].splitlines() if row.startswith("| ")]
        assert set(rows) <= set(PAGE.read_text().splitlines())


def test_images_are_compared_where_a_model_takes_them(tmp_path: Path) -> None:
    finding = try_model("qwen2_5_vl")
    assert (finding.status, finding.reason) == (Status.FULL, "")
    save_tiny_model("qwen2_5_vl", tmp_path)
    requests = prompts(load_model(read_model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)))
    expected = reference_tokens(tmp_path, requests)
    for request in requests:
        if "pixel_values" in request:
            request["pixel_values"] = -request["pixel_values"]
    same = [mine == theirs for mine, theirs in zip(reference_tokens(tmp_path, requests), expected, strict=True)]
    assert same == ["pixel_values" not in request for request in requests] == [True, False, True, False]


def test_other_tokens_are_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphmode.observe.sweep.reference_tokens", lambda folder, requests: [[0] * 8] * 4)
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
    findings = [
        Finding("qwen3_vl", "Qwen3VL", Status.FULL),
        Finding("llama", "LlamaForCausalLM", Status.FULL, fused_layers=4),
        Finding("a", "A", Status.UNSUPPORTED, "x | y"),
    ]
    tables = {section.split("\n")[0]: section for section in as_markdown(findings).split("\n## ")}
    assert "3 types: 2 full, 1 unsupported. 1 of them run with fused layers." in tables["# Models"]
    assert tables["Often asked for"].splitlines()[-2:] == [
        "| Qwen3-VL | qwen3_vl | full |  | text and images |",
        "| Llama 2, 3 | llama | full | 4 | text |",
    ]
    assert tables["Causal language models"].splitlines()[-2:] == [
        "| a | A | unsupported |  | x \\| y |",
        "| llama | LlamaForCausalLM | full | 4 |  |",
    ]
    assert tables["Images and text"].splitlines()[-1] == "| qwen3_vl | Qwen3VL | full |  |  |"
    assert "Often" not in as_markdown(findings[2:])


def test_families_are_types_that_are_swept() -> None:
    page = as_markdown([Finding(model_type, "", Status.FULL) for model_type in MODEL_TYPES])
    families = page.split("\n## ")[1].splitlines()[4:]
    assert len([row for row in families if row]) == len(_FAMILIES)


@pytest.mark.slow
def test_what_the_page_says_of_the_families_often_asked_for_is_what_a_sweep_finds() -> None:
    def often_asked_for(page: str) -> list[str]:
        return page.split("\n## ")[1].splitlines()

    found = often_asked_for(as_markdown(sweep(sorted(_FAMILIES.values()))))
    assert found[0] == "Often asked for"
    assert often_asked_for(PAGE.read_text()) == found


@pytest.mark.slow
def test_the_page_in_the_docs_is_what_a_sweep_finds() -> None:
    findings = sweep(list(MODEL_TYPES))
    assert not [finding for finding in findings if finding.status is Status.WRONG]
    assert sum(finding.status is Status.FULL for finding in findings) >= 60
    if f"transformers {transformers.__version__} " in PAGE.read_text():
        assert as_markdown(findings) == PAGE.read_text()
