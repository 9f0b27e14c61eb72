"""Routers' choices: those of PyTorch, each expert once."""

from dataclasses import replace

import pytest
import torch

from graphmode.ops import Routing, choose_experts
from graphmode.ops.moe import router as kernels

ROUTINGS = {
    "softmax": (60, Routing(4)),
    "softmax of all": (5, Routing(5, normalise=True)),
    "one": (1, Routing(1, normalise=True)),
    "normalised": (128, Routing(8, normalise=True)),
    "sigmoid": (160, Routing(8, sigmoid=True, normalise=True, scale=2.5)),
    "groups": (256, Routing(8, sigmoid=True, groups=8, top_groups=4, normalise=True, scale=2.5)),
    "odd groups": (18, Routing(3, groups=3, top_groups=1)),
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUTINGS)
def test_choices(name: str, dtype: torch.dtype, biased: bool, kernel_device: str) -> None:
    experts, routing = ROUTINGS[name][0], replace(ROUTINGS[name][1], dtype=dtype)
    # No two logits of a row are alike, so that there is one right order.
    logits = torch.stack([torch.randperm(experts) - experts // 2 for _ in range(20)]).to(kernel_device, dtype) / 32
    bias = torch.rand(experts, device=kernel_device) if biased else None
    expected, index = kernels.choose_experts_reference(logits, bias, routing)
    weights, chosen = kernels.choose_experts_triton(logits, bias, routing)
    assert torch.equal(chosen, index)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, expected)
    if routing.normalise:
        sums = torch.full((20,), routing.scale, device=kernel_device)
        torch.testing.assert_close(weights.float().sum(1), sums, rtol=0.01, atol=0.01)


def test_alike_experts_are_chosen_once_each(kernel_device: str) -> None:
    weights, index = kernels.choose_experts_triton(
        torch.zeros(2, 6, device=kernel_device), None, Routing(4, normalise=True)
    )
    assert [len(set(row)) for row in index.tolist()] == [4, 4]
    assert weights.tolist() == [[0.25] * 4] * 2


@pytest.mark.parametrize(
    ("logits", "bias", "routing"),
    [
        (torch.zeros(2, 4), None, Routing(5)),
        (torch.zeros(2, 4), None, Routing(0)),
        (torch.zeros(4, 2).T, None, Routing(1)),
        (torch.zeros(2, 4), torch.zeros(3), Routing(1)),
        (torch.zeros(2, 4), None, Routing(1, groups=3)),
    ],
)
def test_choices_that_cannot_be_are_refused(logits: torch.Tensor, bias: torch.Tensor | None, routing: Routing) -> None:
    with pytest.raises(ValueError, match=r"(k|logits|bias|groups) (is|has)"):
        choose_experts(logits, bias, routing)
