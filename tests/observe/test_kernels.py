"""What the table of kernels says of a model's layers, in ranges of rows."""

from __future__ import annotations

from itertools import pairwise

import torch
from transformers import MixtralConfig, Qwen3Config

from graphmode.observe.bench.workloads import RANDOM_MODELS
from graphmode.observe.kernels import LayerShape, as_text, kernels_of, shape_of
from graphmode.ops.dispatch import ANY, CPU, H100, Device

SMALL = shape_of(Qwen3Config(**RANDOM_MODELS["qwen3-0.6b"]))


def test_sizes_are_those_of_the_configuration() -> None:
    assert LayerShape(1024, 16, 8, 128, 3072, 151936) == SMALL
    assert shape_of(MixtralConfig()).inner == 0


def test_ranges_of_rows_follow_each_other_and_say_why_not() -> None:
    found = kernels_of(SMALL, H100, torch.bfloat16)
    for ranges in found.values():
        assert ranges[0].first == 1
        assert ranges[-1].last is None
        assert all(before.last is not None and before.last < after.first for before, after in pairwise(ranges))
    skinny, small, *_, last = found["gate and up"]
    assert (skinny.last, skinny.kernel, skinny.others) == (16, "skinny, hopper", {})
    assert (small.first, small.last, small.kernel) == (17, 256, "small_batch")
    assert small.others == {"skinny": "takes 0 to 1 rows or takes 0 to 16 rows"}
    assert last.kernel == "prefill"
    assert [each.kernel for each in found["down"]] == ["skinny, hopper", "split_k", "torch"]
    assert [each.kernel for each in found["logits"]] == ["skinny, hopper", "torch"]


def test_a_cpu_takes_matrix_products_of_torch_and_loops() -> None:
    found = kernels_of(SMALL, Device(frozenset({ANY, CPU})), torch.float32)
    assert {each.kernel for each in found["gate and up"]} == {"torch"}
    assert [each.kernel for each in found["rms_norm"]] == ["cpu"]
    assert "runs on Hopper" in as_text(found)


def test_experts_have_no_gated_network() -> None:
    found = kernels_of(shape_of(MixtralConfig()), H100, torch.bfloat16)
    assert "down" not in found
    assert [each.kernel for each in found["output of attention"]] == ["skinny, hopper", "torch"]
