"""Linear layers of some dozen rows on Hopper, in Gluon: still bound by the reading of weights, but for matrix products.

Weights and rows come by TMA to a ring in shared memory, from where warpgroup products take them. The first of the
weights are asked for before waiting for the kernel ahead. Where a layer has few outputs, several programs share their
inputs and leave sums for the kernel after them to add up (:mod:`graphmode.kernels.residual`).
"""

# mypy: disable-error-code="assignment, var-annotated, has-type"

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphmode.kernels._triton import (
    async_load,
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon_jit,
    hopper,
    launch_options,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from graphmode.kernels.few_rows_hopper import supports

# Where these kernels beat cuBLAS in a chain of layers (H100, Qwen3-0.6B, 1.7B and 8B): up to so many rows; of more than
# so many weights from so many rows on; of parts and their sum with a norm, of few outputs, up to more rows.
_MAX_ROWS = 64
_LARGE = 1 << 23
_MIN_ROWS_OF_LARGE = 33
_MAX_ROWS_OF_FEW_OUTPUTS = 128
_FEW_OUTPUTS = 2048
_BLOCK_M = 64  # rows of a program
_BLOCK_K = 128  # elements of a row at a time
_PROGRAMS = 128


@dataclass(frozen=True)
class Tiling:
    """How a layer's weights are shared out.

    Attributes:
        block_n: outputs of a program, a power of two; with a gate, of gate and of up each.
        splits: programs that share the inputs of the same outputs.
        stages: of the ring.
    """

    block_n: int
    splits: int
    stages: int


def tiling(size: int, width: int, rows: int, *, gated: bool, splits: bool) -> Tiling:
    """Return how to share out weights ``[size, width]``, or with ``gated`` ``[2 * size, width]``, for so many rows.

    There should be a program or two for each multiprocessor, and not many more, for each reads all rows. Of the tilings
    tried these are the fastest, or nearly, for the sizes of Qwen3-0.6B, 1.7B and 8B.
    """
    block_n = 16 if gated and size // 32 < _PROGRAMS else 32
    stages = 2 if gated and block_n == 32 else 4
    count = 1
    if splits:
        programs = size // block_n * -(-rows // _BLOCK_M)
        while width % (2 * count * _BLOCK_K) == 0 and (count == 1 or 2 * count * programs <= _PROGRAMS):
            count *= 2
    return Tiling(block_n, count, min(stages, width // count // _BLOCK_K))


def runs_products(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether :func:`many_rows` takes a weight, and beats cuBLAS for a step's rows ``[rows, hidden]``."""
    return _takes(weight, x.shape[0], _MAX_ROWS)


def runs_parts(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Return the same of :func:`many_rows_parts` and what adds parts up, of the layers of a step."""
    few_outputs = all(len(weight) <= _FEW_OUTPUTS for weight in weights)
    limit = _MAX_ROWS_OF_FEW_OUTPUTS if few_outputs else _MAX_ROWS
    return all(_takes(weight, x.shape[0], limit) for weight in weights)


def _takes(weight: torch.Tensor, rows: int, limit: int) -> bool:
    fits = weight.shape[0] % 64 == 0 and weight.shape[1] % _BLOCK_K == 0 and supports(weight)
    return fits and (_MIN_ROWS_OF_LARGE if weight.numel() > _LARGE else 1) <= rows <= limit


def many_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gated: bool = False
) -> torch.Tensor:
    """Return ``x @ weight.T + bias``, or of that, as gate and up, ``silu(gate) * up``.

    Args:
        x: ``[rows, width]``, bfloat16 or float16, contiguous.
        weight: ``[size, width]``; with ``gated`` ``[2 * size, width]``, gate before up.
        bias: of that size; None for none.
        gated: whether the result goes through SwiGLU.
    """
    size = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((x.shape[0], size), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, tiling(size, x.shape[1], x.shape[0], gated=gated, splits=False), gated=gated)
    return out


def many_rows_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what adds up to ``x @ weight.T``: float32 ``[splits, rows, size]``. Arguments as of :func:`many_rows`."""
    (rows, width), size = x.shape, weight.shape[0]
    tile = tiling(size, width, rows, gated=False, splits=True)
    parts = torch.empty((tile.splits, rows, size), dtype=torch.float32, device=x.device)
    _launch(x, weight, None, parts, tile, gated=False)
    return parts


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, tile: Tiling, *, gated: bool
) -> None:
    (rows, width), size = x.shape, out.shape[-1]
    layout = gl.NVMMASharedLayout(128, 16, rank=2)
    describe = hopper.TensorDescriptor.from_tensor
    _many_rows_kernel[(size // tile.block_n, tile.splits, -(-rows // _BLOCK_M))](
        describe(x, [_BLOCK_M, _BLOCK_K], layout),
        describe(weight, [tile.block_n, _BLOCK_K], layout),
        bias,
        out,
        rows,
        size,
        chunks=width // tile.splits // _BLOCK_K,
        gated=gated,
        block_m=_BLOCK_M,
        block_n=tile.block_n,
        block_k=_BLOCK_K,
        stages=tile.stages,
        num_warps=4,
        **launch_options(x.device),
    )


@gluon_jit(do_not_specialize=["rows", "size"])
def _many_rows_kernel(  # type: ignore[no-untyped-def]
    x_desc,
    weight_desc,
    bias,
    out,
    rows,
    size,
    chunks: constexpr,
    gated: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    stages: constexpr,
    early: constexpr,
):
    warps: constexpr = gl.num_warps()
    dtype: constexpr = x_desc.dtype
    products: constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, block_n, 16]
    )
    first = gl.program_id(0) * block_n
    split = gl.program_id(1)
    first_row = gl.program_id(2) * block_m
    start = split * (chunks * block_k)
    if early:
        gdc_launch_dependents()
    x_ring = gl.allocate_shared_memory(dtype, [stages, block_m, block_k], x_desc.layout)
    ring = gl.allocate_shared_memory(dtype, [stages, block_n, block_k], weight_desc.layout)
    up_ring = ring
    stage_bytes: constexpr = 2 * block_k * (block_m + block_n * (2 if gated else 1))
    if gated:
        up_ring = gl.allocate_shared_memory(dtype, [stages, block_n, block_k], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
    for stage in gl.static_range(stages):
        mbarrier.expect(full.index(stage), stage_bytes)
        async_load(weight_desc, [first, start + stage * block_k], full.index(stage), ring.index(stage))
        if gated:
            async_load(weight_desc, [size + first, start + stage * block_k], full.index(stage), up_ring.index(stage))
    if early:
        gdc_wait()
    for stage in gl.static_range(stages):
        async_load(x_desc, [first_row, start + stage * block_k], full.index(stage), x_ring.index(stage))
    total = gl.zeros([block_m, block_n], gl.float32, layout=products)
    total_up = total
    for chunk in range(chunks):
        slot = chunk % stages
        mbarrier.wait(full.index(slot), (chunk // stages) & 1)
        rows_here = x_ring.index(slot)
        total = warpgroup_mma(rows_here, ring.index(slot).permute((1, 0)), total, is_async=True)
        if gated:
            total_up = warpgroup_mma(rows_here, up_ring.index(slot).permute((1, 0)), total_up, is_async=True)
            total, total_up = warpgroup_mma_wait(num_outstanding=0, deps=(total, total_up))
        else:
            total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        # What has been multiplied makes room.
        more = chunk + stages < chunks
        at = start + (chunk + stages) * block_k
        mbarrier.expect(full.index(slot), stage_bytes, pred=more)
        async_load(weight_desc, [first, at], full.index(slot), ring.index(slot), pred=more)
        if gated:
            async_load(weight_desc, [size + first, at], full.index(slot), up_ring.index(slot), pred=more)
        async_load(x_desc, [first_row, at], full.index(slot), x_ring.index(slot), pred=more)
    vector: constexpr = 16 // (out.dtype.element_ty.primitive_bitwidth // 8)
    lanes_n: constexpr = min(32, block_n // vector)
    stores: constexpr = gl.BlockedLayout([1, vector], [32 // lanes_n, lanes_n], [warps, 1], [1, 0])
    m = first_row + gl.arange(0, block_m, layout=gl.SliceLayout(1, stores))[:, None]
    n = gl.arange(0, block_n, layout=gl.SliceLayout(0, stores))[None, :]
    result = gl.convert_layout(total, stores)
    if bias is not None:
        result = result + gl.load(bias + first + n).to(gl.float32)
    if gated:
        up = gl.convert_layout(total_up, stores)
        if bias is not None:
            up = up + gl.load(bias + size + first + n).to(gl.float32)
        result = result / (1.0 + gl.exp(-result)) * up
    place = out + (split * rows + m).to(gl.int64) * size + first + n
    gl.store(place, result.to(out.dtype.element_ty), mask=m < rows)
