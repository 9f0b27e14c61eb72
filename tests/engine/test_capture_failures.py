"""Graphs that cannot be captured: known from the start, with their reasons."""

import json
from pathlib import Path

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from graphmode import LLM
from graphmode.graph import CaptureError, CaptureFailure, Reason

OPTIONS = {"device": "cpu", "fuse": "none", "graph_sizes": [2, 4], "max_num_seqs": 2, "max_num_batched_tokens": 4}


@pytest.fixture
def reads_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose steps of four tokens no graph can hold."""
    forward = Qwen3MLP.forward

    def reading(self: Qwen3MLP, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = forward(self, x)
        return out + 0 * out.sum().item() if x.shape[1] == 4 else out

    monkeypatch.setattr(Qwen3MLP, "forward", reading)


@pytest.mark.usefixtures("reads_a_value")
def test_they_are_in_the_stats_before_the_first_step_and_told_to_the_callback(tiny: Path) -> None:
    told: list[CaptureFailure] = []
    llm = LLM(tiny, **OPTIONS, on_capture_failure=told.append)
    assert llm.stats.steps == 0
    assert llm.stats.capture_failures == told
    assert [(each.key.family, each.key.size, each.reason) for each in told] == [("mixed", 4, Reason.UNSUPPORTED_OP)]
    [plain] = json.loads(json.dumps(llm.stats.as_dict()))["capture_failures"]
    assert plain["reason"] == "unsupported_op"
    assert plain["key"]["size"] == 4
    assert "aten::_local_scalar_dense" in plain["message"]


@pytest.mark.usefixtures("reads_a_value")
def test_strict_ends_the_start_up_with_the_reason(tiny: Path) -> None:
    with pytest.raises(CaptureError, match="aten::_local_scalar_dense"):
        LLM(tiny, **OPTIONS, strict=True)
