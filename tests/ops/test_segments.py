"""Attention within segments: right whatever padding holds, and the same in any company."""

import pytest
import torch

from graphmode.ops import segment_attention
from graphmode.ops.attention.segments import segment_attention_reference, segment_attention_triton

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
IMPLEMENTATIONS = {"reference": segment_attention_reference, "triton": segment_attention_triton}
CASES = {  # lengths of segments, empty ones among them, and padding tokens
    "one": ([7], 0),
    "windows": ([16, 16, 8, 16, 16, 8], 0),
    "longer than a tile": ([150, 3], 12),
    "empty segments": ([5, 0, 0, 9, 0], 3),
    "much padding": ([33], 100),
    "all padding": ([0, 0], 6),
}


def packed(tokens: int, head_dim: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Queries, keys and values as views of one product, as models make them."""
    return list(torch.randn(tokens, 3, 3, head_dim, device=device).to(dtype).unbind(1))


@pytest.mark.parametrize("head_dim", [16, 72])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_each_segment_is_as_if_alone_and_padding_is_zero(
    implementation: str, kernel_device: str, case: tuple[list[int], int], head_dim: int, dtype: torch.dtype
) -> None:
    lengths, padding = case
    real = sum(lengths)
    q, k, v = packed(real + padding, head_dim, dtype, kernel_device)
    for tensor in (q, k, v):
        tensor[real:] = float("nan")
    cu_lens = torch.tensor([0, *lengths], device=kernel_device).cumsum(0).to(torch.int32)
    out = IMPLEMENTATIONS[implementation](q, k, v, cu_lens, scale=0.3)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert not out[real:].any()
    at = 0
    for length in lengths:
        alone = slice(at, at + length)
        scores = torch.einsum("qhd,khd->hqk", q[alone].double(), k[alone].double()) * 0.3
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[alone].double())
        torch.testing.assert_close(out[alone].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        at += length


def test_what_padding_holds_changes_no_bit(implementation: str, kernel_device: str) -> None:
    attend = IMPLEMENTATIONS[implementation]
    q, k, v = packed(90, 16, torch.float32, kernel_device)
    cu_lens = torch.tensor([0, 20, 61, 61], device=kernel_device, dtype=torch.int32)
    before = attend(q, k, v, cu_lens, scale=0.25)
    for tensor in (q, k, v):
        tensor[61:] = float("inf")
    assert torch.equal(attend(q, k, v, cu_lens, scale=0.25), before)


def test_what_does_not_fit_is_refused() -> None:
    q = torch.zeros(4, 2, 16)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="k has shape"):
        segment_attention(q, q[:3], q, bounds, scale=1.0)
    with pytest.raises(ValueError, match=r"cu_lens is torch\.int64"):
        segment_attention(q, q, q, bounds.long(), scale=1.0)
    with pytest.raises(ValueError, match=r"len\(cu_lens\) is 1"):
        segment_attention(q, q, q, bounds[:1], scale=1.0)
