"""Full attention within the segments of a packed sequence: what a vision tower does with the patches of its images.

No cache and no order: every token of a segment sees all of it, and nothing else. Shapes and grid come from the number
of tokens alone; where segments begin and end is read on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from graphmode.ops._checks import FLOATS, require, require_tensor
from graphmode.ops._device import online_softmax, softmax_average
from graphmode.ops._triton import constexpr, jit, next_power_of_2, runs_triton, tl


def segment_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_lens: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Attend from every token to all tokens of its segment. Scores, softmax and sums are float32.

    Args:
        q: ``[tokens, heads, head_dim]``, float32, bfloat16 or float16, any strides.
        k: as ``q``.
        v: as ``q``.
        cu_lens: int32 ``[segments + 1]``, rising from 0: where each segment starts, and where the last one ends. Empty
            segments change nothing. Tokens behind the last one are padding and may hold anything, NaN included.
        scale: factor of the scores.

    Returns:
        ``[tokens, heads, head_dim]`` in ``q``'s dtype, contiguous; zero for padding.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    require_tensor("q", q, shape=(None, None, None), dtypes=FLOATS, like=q)
    require_tensor("k", k, shape=q.shape, dtypes=(q.dtype,), like=q)
    require_tensor("v", v, shape=q.shape, dtypes=(q.dtype,), like=q)
    require_tensor("cu_lens", cu_lens, shape=(None,), dtypes=(torch.int32,), like=q)
    require(len(cu_lens) >= 2, "len(cu_lens)", len(cu_lens), "2 or more: the bounds of at least one segment")
    attend = segment_attention_triton if runs_triton(q) else segment_attention_reference
    return attend(q, k, v, cu_lens, scale=scale)


class _Bounds(NamedTuple):
    """The segment of each token, int32 ``[tokens]`` each; empty for padding."""

    starts: torch.Tensor
    ends: torch.Tensor


def _bounds(cu_lens: torch.Tensor, tokens: int) -> _Bounds:
    token = torch.arange(tokens, device=cu_lens.device, dtype=torch.int32)
    segment = torch.searchsorted(cu_lens, token, right=True) - 1
    real = token < cu_lens[-1]
    segment = segment.clamp(max=len(cu_lens) - 2)
    return _Bounds(torch.where(real, cu_lens[segment], 0), torch.where(real, cu_lens[segment + 1], 0))


# The reference in PyTorch, which is also the attention of the CPU engine.

# What the scores held at a time may take: larger ones leave the cores' caches.
_CHUNK_BYTES = 4 << 20


def segment_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_lens: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Run :func:`segment_attention` in PyTorch with fixed shapes: every token meets all, most hidden."""
    tokens, heads, _ = q.shape
    starts, ends = _bounds(cu_lens, tokens)
    token = torch.arange(tokens, device=q.device, dtype=torch.int32)
    real = (ends > 0).view(-1, 1, 1)
    queries = (q.float() * scale).transpose(0, 1)
    keys = k.float().permute(1, 2, 0)
    values = torch.where(real, v, 0).float().transpose(0, 1)
    rows = max(_CHUNK_BYTES // (4 * tokens * heads), 1)
    outputs = []
    for row in range(0, tokens, rows):
        chunk = slice(row, row + rows)
        hidden = (token < starts[chunk, None]) | (token >= ends[chunk, None])
        scores = torch.matmul(queries[:, chunk], keys).masked_fill_(hidden, float("-inf"))
        outputs.append(torch.matmul(scores.softmax(-1), values))
    out = torch.cat(outputs, 1).transpose(0, 1)
    return torch.where(real, out, 0.0).to(q.dtype).contiguous()


# The kernel in Triton.

_BLOCK_M = 64
_BLOCK_N = 64


def segment_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_lens: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Run :func:`segment_attention` in Triton."""
    tokens, heads, head_dim = q.shape
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    starts, ends = _bounds(cu_lens, tokens)
    block_d = max(16, next_power_of_2(head_dim))
    block = _BLOCK_M if q.element_size() == 2 else 32
    _segment_kernel[(-(-tokens // block), heads)](
        q,
        *q.stride(),
        k,
        *k.stride(),
        v,
        *v.stride(),
        starts,
        ends,
        out,
        scale * math.log2(math.e),
        tokens,
        head_dim=head_dim,
        block_d=block_d,
        block_m=block,
        block_n=min(block, _BLOCK_N),
        num_warps=4,
        num_stages=2,
    )
    return out


@jit(do_not_specialize=["tokens"])
def _segment_kernel(  # type: ignore[no-untyped-def]
    q,
    q_stride_token,
    q_stride_head,
    q_stride_dim,
    k,
    k_stride_token,
    k_stride_head,
    k_stride_dim,
    v,
    v_stride_token,
    v_stride_head,
    v_stride_dim,
    starts,
    ends,
    out,
    scale_log2,
    tokens,
    head_dim: constexpr,
    block_d: constexpr,
    block_m: constexpr,
    block_n: constexpr,
):
    """Attend with ``block_m`` successive tokens, of any segments, in one head: to the keys of all these segments."""
    head = tl.program_id(1)
    row = tl.program_id(0) * block_m + tl.arange(0, block_m)
    dim = tl.arange(0, block_d)
    start = tl.load(starts + row, mask=row < tokens, other=0)
    end = tl.load(ends + row, mask=row < tokens, other=0)
    # All between is real: rows of padding, whose segments are empty, come last and widen nothing.
    first = tl.min(tl.where(end > 0, start, 2147483647), 0)
    last = tl.max(end, 0)
    token = row.to(tl.int64)
    inside = (end > 0)[:, None] & (dim < head_dim)[None, :]
    q_tile = tl.load(
        q + token[:, None] * q_stride_token + head * q_stride_head + dim[None, :] * q_stride_dim, mask=inside, other=0.0
    )
    top = tl.full([block_m], -1e38, tl.float32)
    total = tl.zeros([block_m], tl.float32)
    acc = tl.zeros([block_m, block_d], tl.float32)
    for tile in range(first, last, block_n):
        position = tile + tl.arange(0, block_n)
        key_inside = (position < last)[:, None] & (dim < head_dim)[None, :]
        key = position.to(tl.int64)
        keys = tl.load(
            k + key[:, None] * k_stride_token + head * k_stride_head + dim[None, :] * k_stride_dim,
            mask=key_inside,
            other=0.0,
        )
        scores = tl.dot(q_tile, tl.trans(keys), input_precision="ieee") * scale_log2
        seen = (position[None, :] >= start[:, None]) & (position[None, :] < end[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        weights, correction, top, total = online_softmax(scores, top, total, 1)
        values = tl.load(
            v + key[:, None] * v_stride_token + head * v_stride_head + dim[None, :] * v_stride_dim,
            mask=key_inside,
            other=0.0,
        )
        acc = tl.dot(weights.to(values.dtype), values, acc * correction[:, None], input_precision="ieee")
    acc = softmax_average(acc, total[:, None])
    out_row = token * tl.num_programs(1) + head
    tl.store(
        out + out_row[:, None] * head_dim + dim[None, :],
        acc.to(out.dtype.element_ty),
        mask=(row < tokens)[:, None] & (dim < head_dim)[None, :],
    )
