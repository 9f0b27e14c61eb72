"""Prefill GEMMs with an epilogue on Hopper, in Gluon: linear layers of many tokens, and what follows them.

In kernels of their own SwiGLU, or norms and rotation of heads, read and write what a matrix product has just had in
registers, and take half as long as the product. Here what belongs together lies in one tile, in registers of the same
threads: gate and up of the same outputs, or whole heads. A program goes from tile to tile, by TMA and warpgroup
products; the first loads of the next tile are in flight while it finishes the one before.
"""

# mypy: disable-error-code="assignment, var-annotated, has-type"

from __future__ import annotations

from typing import Any

import torch

from graphmode.ops._device import fast_rms_factor, swiglu
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
from graphmode.ops.dispatch import PREFILL_OUTPUTS, PREFILL_ROWS, device_of
from graphmode.ops.rope import HeadInputs

_BLOCK_M = PREFILL_ROWS
_BLOCK_N = PREFILL_OUTPUTS // 2  # a tile has two blocks of outputs: of gate and of up, or two heads
_BLOCK_K = 64
_STAGES = 4
_HEAD_DIM = 128


def prefill_swiglu_hopper(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute :func:`graphmode.ops.linear.prefill.prefill_swiglu`."""
    size = weight.shape[0] // 2
    out = torch.empty((x.shape[0], size), dtype=x.dtype, device=x.device)
    _launch(_swiglu_kernel, x, weight, size // _BLOCK_N, (out,), size=size)
    return out


def prefill_heads_hopper(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    inputs: HeadInputs,
) -> torch.Tensor:
    """Compute :func:`graphmode.ops.linear.prefill.prefill_heads`."""
    q_heads, kv_heads, _ = inputs.sizes(weight.shape[0])
    queries = torch.empty((x.shape[0], q_heads, _HEAD_DIM), dtype=x.dtype, device=x.device)
    q_norm, k_norm, eps, *rest = inputs.pointers
    tensors = (bias, q_norm, k_norm, *rest, queries, eps)
    _launch(_heads_kernel, x, weight, (q_heads + 2 * kv_heads) // 2, tensors, q_heads=q_heads, kv_heads=kv_heads)
    return queries


def _launch(
    kernel: Any, x: torch.Tensor, weight: torch.Tensor, columns: int, arguments: tuple[Any, ...], **constants: int
) -> None:
    """Launch a program for each multiprocessor; they share tiles of 128 rows and of ``columns`` blocks of outputs."""
    layout = gl.NVMMASharedLayout(128, 16, rank=2)
    describe = hopper.TensorDescriptor.from_tensor
    tiles = -(-x.shape[0] // _BLOCK_M) * columns
    kernel[(min(tiles, device_of(x.device).multiprocessors),)](
        describe(x, [_BLOCK_M, _BLOCK_K], layout),
        describe(weight, [_BLOCK_N, _BLOCK_K], layout),
        *arguments,
        x.shape[0],
        tiles,
        chunks=x.shape[1] // _BLOCK_K,
        block_m=_BLOCK_M,
        block_n=_BLOCK_N,
        block_k=_BLOCK_K,
        stages=_STAGES,
        num_warps=8,
        **constants,
        **launch_options(x.device),
    )


@gluon_jit(do_not_specialize=["rows", "tiles"])
def _swiglu_kernel(  # type: ignore[no-untyped-def]
    x_desc,
    weight_desc,
    out,
    rows,
    tiles,
    size: constexpr,
    chunks: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    stages: constexpr,
    early: constexpr,
):
    columns: constexpr = size // block_n
    lanes: constexpr = block_n // 8
    stores: constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [gl.num_warps(), 1], [1, 0])
    m = gl.arange(0, block_m, layout=gl.SliceLayout(1, stores))[:, None]
    n = gl.arange(0, block_n, layout=gl.SliceLayout(0, stores))[None, :]
    rings, mine = _start(
        x_desc, weight_desc, tiles, columns, block_n, size, chunks, block_m, block_n, block_k, stages, early
    )
    for turn in range(mine):
        total, row_block, column = _multiply(rings, turn, mine, tiles, columns, block_n, size, chunks)
        gate, up = gl.split(gl.permute(gl.reshape(total, [block_m, 2, block_n]), [0, 2, 1]))
        result = gl.convert_layout(swiglu(gate, up).to(out.dtype.element_ty), stores)
        row = row_block * block_m + m
        gl.store(out + row.to(gl.int64) * size + column * block_n + n, result, mask=row < rows)


@gluon_jit(do_not_specialize=["rows", "tiles"])
def _heads_kernel(  # type: ignore[no-untyped-def]
    x_desc,
    weight_desc,
    bias,
    q_norm,
    k_norm,
    cos,
    sin,
    positions,
    k_cache,
    v_cache,
    slot_mapping,
    queries,
    eps,
    rows,
    tiles,
    q_heads: constexpr,
    kv_heads: constexpr,
    chunks: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    stages: constexpr,
    early: constexpr,
):
    """A tile is two heads: of queries, of keys or of values."""
    columns: constexpr = q_heads // 2 + kv_heads
    half: constexpr = block_n // 2
    kind: constexpr = queries.dtype.element_ty
    step: constexpr = kv_heads * block_n
    stores: constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    m = gl.arange(0, block_m, layout=gl.SliceLayout(1, stores))
    n = gl.arange(0, 2 * block_n, layout=gl.SliceLayout(0, stores))[None, :]
    rings, mine = _start(
        x_desc, weight_desc, tiles, columns, 2 * block_n, block_n, chunks, block_m, block_n, block_k, stages, early
    )
    for turn in range(mine):
        total, row_block, column = _multiply(rings, turn, mine, tiles, columns, 2 * block_n, block_n, chunks)
        head = column * 2
        first_row = row_block * block_m
        if bias is not None:
            at = gl.arange(0, 2 * block_n, layout=gl.SliceLayout(0, total.type.layout))
            total = total + gl.load(bias + head * block_n + at).to(gl.float32)[None, :]
        if head < q_heads + kv_heads:
            finished = _finish_heads(
                total, q_norm, k_norm, head < q_heads, eps, cos, sin, positions, first_row, rows, block_m, half
            )
            total = gl.convert_layout(finished, total.type.layout)
        result = gl.convert_layout(total.to(kind), stores)
        row = first_row + m
        inside = row < rows
        if head < q_heads:
            place = queries + (row.to(gl.int64) * q_heads + head)[:, None] * block_n + n
            gl.store(place, result, mask=inside[:, None])
        else:
            slot = gl.load(slot_mapping + row, mask=inside, other=-1)
            of_keys = head < q_heads + kv_heads
            cache = k_cache if of_keys else v_cache
            kv_head = head - q_heads - gl.where(of_keys, 0, kv_heads)
            gl.store(cache + (slot * step + kv_head * block_n)[:, None] + n, result, mask=(slot >= 0)[:, None])


@gluon_jit()
def _finish_heads(  # type: ignore[no-untyped-def]
    total, q_norm, k_norm, of_queries, eps, cos, sin, positions, first_row, rows, block_m: constexpr, half: constexpr
):
    """Normalise and rotate the two heads of a tile, whose halves are in the registers of the same threads."""
    a, b = gl.split(gl.permute(gl.reshape(total, [block_m, 2, 2, half]), [0, 1, 3, 2]))
    layout: constexpr = a.type.layout
    dim = gl.arange(0, half, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    row = first_row + gl.arange(0, block_m, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None]
    if q_norm is not None:
        factor = fast_rms_factor(gl.expand_dims(gl.sum(a * a, 2) + gl.sum(b * b, 2), 2), 2 * half, eps)
        norm = gl.where(of_queries, q_norm, k_norm)
        a = a * factor * gl.load(norm + dim).to(gl.float32)
        b = b * factor * gl.load(norm + half + dim).to(gl.float32)
    place = gl.expand_dims(gl.load(positions + row, mask=row < rows, other=0), 2) * half + dim
    cosine = gl.load(cos + place)
    sine = gl.load(sin + place)
    turned = gl.join(a * cosine - b * sine, b * cosine + a * sine)
    return gl.reshape(gl.permute(turned, [0, 1, 3, 2]), [block_m, 4 * half])


@gluon_jit()
def _start(  # type: ignore[no-untyped-def]
    x_desc,
    weight_desc,
    tiles,
    columns: constexpr,
    stride: constexpr,
    second: constexpr,
    chunks: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    stages: constexpr,
    early: constexpr,
):
    """Start to load what the program multiplies first; return where it comes, and how many tiles the program has."""
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [stages, block_m, block_k], x_desc.layout)
    ring = gl.allocate_shared_memory(x_desc.dtype, [stages, 2 * block_n, block_k], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    rings = x_desc, weight_desc, x_ring, ring, full
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
    if early:
        gdc_launch_dependents()
        gdc_wait()
    mine = (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    for load in gl.static_range(stages - 1):
        _load(rings, load, mine, tiles, columns, stride, second, chunks)
    return rings, mine


@gluon_jit()
def _multiply(  # type: ignore[no-untyped-def]
    rings,
    turn,
    mine,
    tiles,
    columns: constexpr,
    stride: constexpr,
    second: constexpr,
    chunks: constexpr,
):
    """Return the products of the program's tile number ``turn``, ``[block_m, 2 * block_n]``, and where it is."""
    _, _, x_ring, ring, full = rings
    stages: constexpr = ring.shape[0]
    block_m: constexpr = x_ring.shape[1]
    wide: constexpr = ring.shape[1]
    products: constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, wide, 16]
    )
    total = gl.zeros([block_m, wide], gl.float32, layout=products)
    for chunk in range(chunks):
        at = turn * chunks + chunk
        stage = at % stages
        mbarrier.wait(full.index(stage), (at // stages) & 1)
        total = warpgroup_mma(x_ring.index(stage), ring.index(stage).permute((1, 0)), total, is_async=True)
        # The product before this one is done: its stage is free.
        total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
        _load(rings, at + stages - 1, mine, tiles, columns, stride, second, chunks)
    row_block, column = _place(turn, tiles, columns)
    return warpgroup_mma_wait(num_outstanding=0, deps=(total,)), row_block, column


@gluon_jit()
def _place(turn, tiles, columns: constexpr):  # type: ignore[no-untyped-def]
    """Return which rows and outputs the program's tile number ``turn`` has, in blocks.

    Tiles that are multiplied at the same time are near each other in both, so what they share comes from the cache.
    """
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    group: constexpr = 8
    first = tile // (group * columns) * group
    height = gl.maximum(gl.minimum(tiles // columns - first, group), 1)
    within = tile % (group * columns)
    return first + within % height, within // height


@gluon_jit()
def _load(  # type: ignore[no-untyped-def]
    rings, load, mine, tiles, columns: constexpr, stride: constexpr, second: constexpr, chunks: constexpr
):
    """Start to load what the program multiplies as its number ``load``, if it has so many.

    A tile's weights are a block at ``stride`` times its column, and a block ``second`` rows further.
    """
    x_desc, weight_desc, x_ring, ring, full = rings
    stages: constexpr = ring.shape[0]
    block_m: constexpr = x_ring.shape[1]
    block_n: constexpr = ring.shape[1] // 2
    block_k: constexpr = ring.shape[2]
    more = load < mine * chunks
    row_block, column = _place(load // chunks, tiles, columns)
    k = load % chunks * block_k
    stage = load % stages
    bar = full.index(stage)
    weights = ring.index(stage)
    mbarrier.expect(bar, 2 * block_k * (block_m + 2 * block_n), pred=more)
    async_load(x_desc, [row_block * block_m, k], bar, x_ring.index(stage), pred=more)
    n = column * stride
    async_load(weight_desc, [n, k], bar, weights.slice(0, block_n), pred=more)
    async_load(weight_desc, [n + second, k], bar, weights.slice(block_n, block_n), pred=more)
