"""Skinny GEMMs on Hopper, in Gluon, where layouts are chosen by hand.

Weights go from memory straight into the registers that matrix products take them from, in loads of 16 bytes. Each warp
of a program has a part of every row to itself, so nothing is loaded twice; the warps' sums are added at the end. The
first weights, and the norm's, are loaded before waiting for the kernel ahead: they do not depend on it.

The norm's factor is multiplied into the result, so that no product waits for it.
"""

# mypy: disable-error-code="assignment, var-annotated, has-type"
# In a kernel, loops are unrolled and tuples grow.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from graphmode.ops._device import fast_rms_factor, swiglu
from graphmode.ops._triton import (
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon_jit,
    launch_options,
    mma_v2,
    next_power_of_2,
)

# A warp takes at least this many elements of a row at a time: two products' worth, as 16 bytes of each of its lanes.
_MIN_WARP_K = 32
_LARGE = 2048 * 4096  # elements of weights from which programs of 16 rows are enough


@dataclass(frozen=True)
class Tiling:
    """How a layer's weights are shared out.

    Attributes:
        block_n: rows of weights of a program; with a gate, of gate and of up each. A power of two, at least 8.
        block_k: elements of them at a time, a power of two.
        ahead: how many times ``block_k`` is loaded ahead of what is multiplied.
        warps: of a program; ``block_k`` has at least 32 elements for each.
    """

    block_n: int
    block_k: int
    ahead: int
    warps: int


def tiling(size: int, width: int, rows: int, *, normed: bool, gated: bool) -> Tiling:
    """Return how to share out weights ``[size, width]``, or with ``gated`` ``[2 * size, width]``, for so many rows.

    Weights in flight are registers in use, and registers bound how many programs a multiprocessor runs at a time. Where
    rows are long, many programs have a few small parts in flight; where rows are short, each has a whole row in flight
    before it waits. Of the tilings tried these are the fastest, or nearly, for the sizes of Qwen3-0.6B, 1.7B and 8B.
    """
    if not normed:
        block_n = 16 if size * width >= _LARGE else 8
        chosen = Tiling(block_n, 1024 if block_n == 8 and width > 2048 else 512, 3, 8)
    elif width > 2048:
        chosen = Tiling(8, 512, 2, 4)
    elif not gated or (width <= 1024 and rows <= 8):
        chosen = Tiling(16, 1024, 1, 8)
    elif width > 1024:
        chosen = Tiling(8, 1024, 1, 8 if rows <= 8 else 4)
    else:
        chosen = Tiling(16, 256, 3, 8)
    block_k = min(chosen.block_k, max(next_power_of_2(width), chosen.warps * _MIN_WARP_K))
    return replace(chosen, block_n=8 if size % 16 else chosen.block_n, block_k=block_k)


def skinny_norm_linear_hopper(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    gated: bool = False,
    lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute :func:`graphmode.ops.linear.skinny.skinny_norm_linear`."""
    size = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((x.shape[0], size), dtype=x.dtype, device=x.device)
    _launch(x, norm, weight, bias, out, eps, lens, gated=gated, add=False)
    return out


def skinny_linear_add_hopper(
    x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, lens: torch.Tensor | None = None
) -> None:
    """Compute :func:`graphmode.ops.linear.skinny.skinny_linear_add`."""
    _launch(h, None, weight, None, x, 0.0, lens, gated=False, add=True)


def skinny_linear_hopper(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, lens: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute :func:`graphmode.ops.linear.skinny.skinny_linear`."""
    out = torch.empty((h.shape[0], weight.shape[0]), dtype=h.dtype, device=h.device)
    _launch(h, None, weight, bias, out, 0.0, lens, gated=False, add=False)
    return out


def _launch(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    lens: torch.Tensor | None,
    *,
    gated: bool,
    add: bool,
) -> None:
    (rows, width), size = x.shape, out.shape[1]
    if rows == 0:
        return
    tile = tiling(size, width, rows, normed=norm is not None, gated=gated)
    _skinny_kernel[(size // tile.block_n,)](
        x,
        norm,
        weight,
        bias,
        out,
        eps,
        lens,
        rows,
        size,
        width=width,
        gated=gated,
        add=add,
        block_m=8 if rows <= 8 else 16,
        block_n=tile.block_n,
        block_k=tile.block_k,
        ahead=tile.ahead,
        num_warps=tile.warps,
        **launch_options(x.device),
    )


@gluon_jit(do_not_specialize=["rows", "size"])
def _skinny_kernel(  # type: ignore[no-untyped-def]
    x,
    norm,
    weight,
    bias,
    out,
    eps,
    lens,
    rows,
    size,
    width: constexpr,
    gated: constexpr,
    add: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    ahead: constexpr,
    early: constexpr,
):
    warps: constexpr = gl.num_warps()
    # Products are batched, a batch a warp. A lane has 8 elements of a row in a row: 16 bytes.
    products: constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])
    # A thread has the sums of all warps for its outputs, and adds them up.
    warps_n: constexpr = min(warps, block_n // 8)
    sums: constexpr = gl.BlockedLayout([warps, 1, 1], [1, 4, 8], [1, warps // warps_n, warps_n], [2, 1, 0])
    chunks: constexpr = (width + block_k - 1) // block_k
    # A row that is not normalised yet, times the norm's weight, might not fit float16.
    scale_weights: constexpr = x.dtype.element_ty == gl.float16
    first = gl.program_id(0) * block_n
    place = weight + first.to(gl.int64) * width
    up_place = place + size.to(gl.int64) * width
    if early:
        gdc_launch_dependents()
    tiles = ()
    for chunk in gl.static_range(min(ahead, chunks)):
        tiles += (_load_weights(place, up_place, norm, chunk, width, gated, block_n, block_k, products),)
    m = gl.arange(0, block_m, layout=gl.SliceLayout(1, gl.SliceLayout(0, sums)))[:, None]
    n = gl.arange(0, block_n, layout=gl.SliceLayout(0, gl.SliceLayout(0, sums)))[None, :]
    target = out + m * size + first + n
    inside = (m < rows) & (n < block_n)
    if bias is not None:
        bias_value = gl.load(bias + first + n).to(gl.float32)
        if gated:
            up_bias_value = gl.load(bias + size + first + n).to(gl.float32)
    real = _row_numbers(block_m, products) < rows
    if lens is not None:
        real = real & (gl.load(lens + _row_numbers(block_m, products), mask=real, other=0) > 0)
    if early:
        gdc_wait()
    parts = ()
    for chunk in gl.static_range(min(ahead, chunks)):
        parts += (_load(x, chunk, real, width, block_m, block_k, products, ""),)
    if add:
        before = gl.load(target, mask=inside, other=0.0).to(gl.float32)
    total = gl.zeros([warps, block_m, block_n], gl.float32, layout=products) + _zero_after_loads()
    total_up = total
    for chunk in gl.static_range(chunks):
        if chunk + ahead < chunks:
            parts += (_load(x, chunk + ahead, real, width, block_m, block_k, products, ""),)
            tiles += (_load_weights(place, up_place, norm, chunk + ahead, width, gated, block_n, block_k, products),)
        part = parts[chunk]
        tile, up_tile, scale = tiles[chunk]
        if norm is not None:
            values = gl.permute(part, [0, 2, 1]).to(gl.float32)
            more = gl.sum(values * values, axis=2)
            squares = more if chunk == 0 else squares + more  # noqa: F821
            if scale_weights:
                tile = tile * scale
                if gated:
                    up_tile = up_tile * scale
            else:
                part = part * scale
        # The same elements lie in the same lanes for either operand: nothing moves.
        part = gl.convert_layout(gl.permute(part, [0, 2, 1]), gl.DotOperandLayout(0, products, 8))
        total = mma_v2(part, tile, total)
        if gated:
            total_up = mma_v2(part, up_tile, total_up)
    result = _across_warps(total, sums)
    if gated:
        up = _across_warps(total_up, sums)
    if norm is not None:
        factor = fast_rms_factor(_across_warps(gl.expand_dims(squares, 2), sums), width, eps)
        result = result * factor
        if gated:
            up = up * factor
    if bias is not None:
        result = result + bias_value
        if gated:
            up = up + up_bias_value
    if gated:
        result = swiglu(result, up)
    if add:
        result = result + before
    gl.store(target, result.to(out.dtype.element_ty), mask=inside)


@gluon_jit()
def _load_weights(  # type: ignore[no-untyped-def]
    place,
    up_place,
    norm,
    chunk: constexpr,
    width: constexpr,
    gated: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    products: constexpr,
):
    """Load a chunk of gate, up and norm; what there is none of is the first again."""
    rows = _row_numbers(block_n, products) < block_n
    tile = _load(place, chunk, rows, width, block_n, block_k, products, "evict_first")
    up_tile = tile
    scale = tile
    if gated:
        up_tile = _load(up_place, chunk, rows, width, block_n, block_k, products, "evict_first")
    if norm is not None:
        scale = _load(norm, chunk, _row_numbers(1, products) < 1, width, 1, block_k, products, "")
    return tile, up_tile, scale


@gluon_jit()
def _row_numbers(block: constexpr, products: constexpr):  # type: ignore[no-untyped-def]
    layout: constexpr = gl.DotOperandLayout(1, products, 8)
    return gl.arange(0, block, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]


@gluon_jit()
def _load(  # type: ignore[no-untyped-def]
    place,
    chunk: constexpr,
    real,
    width: constexpr,
    block: constexpr,
    block_k: constexpr,
    products: constexpr,
    eviction: constexpr,
):
    """Load ``[warps, block_k / warps, block]``: of ``real`` rows from ``place`` on, to each warp its own elements."""
    layout: constexpr = gl.DotOperandLayout(1, products, 8)
    warps: constexpr = gl.num_warps()
    warp_k: constexpr = block_k // warps
    warp = gl.arange(0, warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    k = gl.arange(0, warp_k, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    k = chunk * block_k + warp * warp_k + k
    place = place + _row_numbers(block, products) * width + k
    return gl.load(place, mask=real & (k < width), other=0.0, eviction_policy=eviction)


@gluon_jit()
def _zero_after_loads():  # type: ignore[no-untyped-def]
    """Return a zero that the assembler does not know before all loads above are in flight.

    Otherwise it moves them down to where they are used, to save registers, and each is waited for alone.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, 0, 0; barrier.cta.red.or.pred p, 0, p; selp.b32 $0, 1, 0, p; }",
        "=f",
        [],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon_jit()
def _across_warps(parts, sums: constexpr):  # type: ignore[no-untyped-def]
    return gl.sum(gl.convert_layout(parts, sums), axis=0)
