"""Embedding by a kernel is indexing."""

from __future__ import annotations

import pytest
import torch

from graphmode.ops.embedding import embed, embed_reference, embed_triton


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [1, 24, 1024, 1500])
@pytest.mark.parametrize("tokens", [(0,), (1,), (33,), (1, 5)])
def test_rows(kernel_device: str, tokens: tuple[int, ...], hidden: int, dtype: torch.dtype) -> None:
    weight = torch.randn(50, hidden).to(kernel_device, dtype)
    token_ids = torch.randint(50, tokens).to(kernel_device)
    assert torch.equal(embed_triton(token_ids, weight), embed_reference(token_ids, weight))


@pytest.mark.parametrize(
    ("token_ids", "weight", "message"),
    [
        (torch.zeros(3, dtype=torch.int32), torch.zeros(5, 4), "token_ids"),
        (torch.zeros(4, 3, dtype=torch.int64).T, torch.zeros(5, 4), "token_ids is of strides"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(4, 5).T, "weight is of strides"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(5, 4, dtype=torch.int64), "weight"),
    ],
)
def test_what_does_not_fit_is_refused(token_ids: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(token_ids, weight)
