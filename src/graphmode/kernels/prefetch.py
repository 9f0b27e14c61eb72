"""Weights on their way to the L2 cache while a small kernel leaves memory idle: the matrix product after it finds them.

A norm or an activation between two large matrix products moves little itself, but takes its microseconds.
"""

from __future__ import annotations

import torch

from graphmode.kernels._triton import constexpr, jit, tl

# What memory moves in the two or three microseconds of such a kernel; more would only wait in line with what it reads.
_BYTES = 8 << 20
_CHUNK = 2048


def prefetch_chunks(weight: torch.Tensor | None) -> int:
    """Return of how many chunks of 2048 bytes :func:`prefetch` asks for, from where a weight begins."""
    if weight is None or not weight.is_contiguous() or weight.data_ptr() % 16:
        return 0
    return min(weight.numel() * weight.element_size(), _BYTES) // _CHUNK


@jit()
def prefetch(weight, chunks, program, programs, lanes: constexpr):  # type: ignore[no-untyped-def]
    """Ask for this program's share of a weight's first ``chunks``, one a lane at a time (PTX, cp.async.bulk.prefetch).

    Only where kernels can launch early: both came with the same devices.
    """
    for first in range(program * lanes, chunks, programs * lanes):
        chunk = tl.minimum(first + tl.arange(0, lanes), chunks - 1)
        address = weight.to(tl.int64) + chunk.to(tl.int64) * 2048
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 2048; mov.b32 $0, 0;",
            "=r,l",
            [address],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
