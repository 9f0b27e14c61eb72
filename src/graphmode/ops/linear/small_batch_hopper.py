"""Small-batch GEMMs on Hopper, in Gluon, of 17 to some hundred rows: nearly bound by the reading of weights.

Weights and rows come by TMA to a ring in shared memory, from where warpgroup products take them. The first weights are
loaded before waiting for the kernel ahead. Where a layer has few outputs, several programs share their inputs (split-K)
and leave sums that the kernel after them adds up (:mod:`graphmode.ops.norm.split_k_residual`).
"""

# mypy: disable-error-code="assignment, var-annotated, has-type"

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphmode.ops._device import swiglu
from graphmode.ops._triton import (
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

_PROGRAMS = 132  # a large GPU's multiprocessors
_MEMORY = 163840  # bytes of shared memory for a ring: beside it, the next kernel's programs find room
_MEMORY_OF_TALL_GATED = 196608  # for which that is worth less than another stage
_MAX_STAGES = 4
_MAX_SPLITS = 4


@dataclass(frozen=True)
class Tiling:
    """How a layer's weights are shared out.

    Attributes:
        block_m: rows of a program, 64 or 128.
        block_n: outputs of a program, a power of two; with a gate, of gate and of up each.
        block_k: elements of a row at a time.
        splits: programs that share the inputs of the same outputs (split-K).
        stages: of the ring.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    stages: int


def tiling(size: int, width: int, rows: int, *, gated: bool, splits: bool) -> Tiling:
    """Return how to share out weights ``[size, width]``, or with ``gated`` ``[2 * size, width]``, for so many rows.

    The multiprocessor with the most outputs decides how long all take, so it should have as few as possible. Of the
    tilings tried these are the fastest, or nearly, for the sizes of Qwen3-0.6B, 1.7B and 8B.
    """
    block_m = 64 if rows <= 64 or (splits and rows > 128) else 128
    row_blocks = -(-rows // block_m)
    count = 1
    if splits:
        block_n, block_k = block_m // 2, 128
        programs = size // block_n * row_blocks
        while width % (2 * count * block_k) == 0 and (
            count == 1 or (count < _MAX_SPLITS and 2 * count * programs <= _PROGRAMS)
        ):
            count *= 2
    else:
        blocks = [block for block in (64, 32) if size % block == 0]
        block_n = min(blocks, key=lambda block: -(-size // block * row_blocks // _PROGRAMS) * block)
        block_k = 64 if gated and (block_m, block_n) == (128, 64) else 128
    stage_bytes = 2 * block_k * (block_m + (2 * block_n if gated else block_n))
    memory = _MEMORY_OF_TALL_GATED if gated and block_m == 128 else _MEMORY
    stages = min(_MAX_STAGES, memory // stage_bytes, width // count // block_k)
    return Tiling(block_m, block_n, block_k, count, stages)


def small_batch_linear_hopper(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gated: bool = False
) -> torch.Tensor:
    """Compute :func:`graphmode.ops.linear.small_batch.small_batch_linear`."""
    size = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((x.shape[0], size), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, tiling(size, x.shape[1], x.shape[0], gated=gated, splits=False), gated=gated)
    return out


def split_k_linear_hopper(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute :func:`graphmode.ops.linear.small_batch.split_k_linear`."""
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
    _small_batch_kernel[(size // tile.block_n, tile.splits, -(-rows // tile.block_m))](
        describe(x, [tile.block_m, tile.block_k], layout),
        describe(weight, [tile.block_n, tile.block_k], layout),
        bias,
        out,
        rows,
        size=size,
        chunks=width // tile.splits // tile.block_k,
        gated=gated,
        block_m=tile.block_m,
        block_n=tile.block_n,
        block_k=tile.block_k,
        stages=tile.stages,
        num_warps=tile.block_m // 16,
        **launch_options(x.device),
    )


@gluon_jit(do_not_specialize=["rows"])
def _small_batch_kernel(  # type: ignore[no-untyped-def]
    x_desc,
    weight_desc,
    bias,
    out,
    rows,
    size: constexpr,
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
    wide: constexpr = 2 * block_n if gated else block_n
    products: constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, wide, 16]
    )
    first = gl.program_id(0) * block_n
    split = gl.program_id(1)
    first_row = gl.program_id(2) * block_m
    start = split * (chunks * block_k)
    if early:
        gdc_launch_dependents()
    x_ring = gl.allocate_shared_memory(dtype, [stages, block_m, block_k], x_desc.layout)
    ring = gl.allocate_shared_memory(dtype, [stages, wide, block_k], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
    for stage in gl.static_range(stages):
        at = start + stage * block_k
        _load_weights(weight_desc, x_ring, ring, full, stage, first, at, True, size, gated)
    if early:
        gdc_wait()
    for stage in gl.static_range(stages):
        async_load(x_desc, [first_row, start + stage * block_k], full.index(stage), x_ring.index(stage))
    total = gl.zeros([block_m, wide], gl.float32, layout=products)
    for chunk in range(chunks):
        current = chunk % stages
        mbarrier.wait(full.index(current), (chunk // stages) & 1)
        total = warpgroup_mma(x_ring.index(current), ring.index(current).permute((1, 0)), total, is_async=True)
        # The product before this one is done: its stage is free.
        total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
        load = chunk - 1 + stages
        more = (chunk > 0) & (load < chunks)
        free = load % stages
        at = start + load * block_k
        _load_weights(weight_desc, x_ring, ring, full, free, first, at, more, size, gated)
        async_load(x_desc, [first_row, at], full.index(free), x_ring.index(free), pred=more)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    vector: constexpr = 16 // (out.dtype.element_ty.primitive_bitwidth // 8)
    lanes_n: constexpr = min(32, block_n // vector)
    stores: constexpr = gl.BlockedLayout([1, vector], [32 // lanes_n, lanes_n], [warps, 1], [1, 0])
    m = first_row + gl.arange(0, block_m, layout=gl.SliceLayout(1, stores))[:, None]
    n = gl.arange(0, block_n, layout=gl.SliceLayout(0, stores))[None, :]
    if bias is not None:
        at = gl.arange(0, wide, layout=gl.SliceLayout(0, products))
        total = total + gl.load(bias + first + at + gl.where(at < block_n, 0, size - block_n)).to(gl.float32)[None, :]
    if gated:
        gate, up = gl.split(gl.permute(gl.reshape(total, [block_m, 2, block_n]), [0, 2, 1]))
        total = swiglu(gate, up)
    result = gl.convert_layout(total.to(out.dtype.element_ty), stores)
    place = out + (split * rows + m).to(gl.int64) * size + first + n
    gl.store(place, result, mask=m < rows)


@gluon_jit()
def _load_weights(  # type: ignore[no-untyped-def]
    weight_desc, x_ring, ring, full, stage, first, at, more, size: constexpr, gated: constexpr
):
    """Start to load the weights of a stage, and tell its barrier how much comes, rows included."""
    wide: constexpr = ring.shape[1]
    bar = full.index(stage)
    weights = ring.index(stage)
    mbarrier.expect(bar, 2 * ring.shape[2] * (x_ring.shape[1] + wide), pred=more)
    if gated:
        block_n: constexpr = wide // 2
        async_load(weight_desc, [first, at], bar, weights.slice(0, block_n), pred=more)
        async_load(weight_desc, [size + first, at], bar, weights.slice(block_n, block_n), pred=more)
    else:
        async_load(weight_desc, [first, at], bar, weights, pred=more)
