"""Skinny GEMMs: linear layers of 1 to 16 rows, where a step reads its weights once and nothing else counts.

Programs read many rows of weights, each once. What comes after a layer (SwiGLU, the sum with a residual), and for one
row what comes before it (a norm), is done by the kernel that reads the weights. Weights do not depend on the kernel
before, so for one row their first part is loaded before waiting for it. Hopper has kernels of its own for most sizes
(:mod:`graphmode.ops.linear.skinny_hopper`).
"""

from __future__ import annotations

import torch

from graphmode.ops._checks import require, require_tensor
from graphmode.ops._device import rms_factor, swiglu
from graphmode.ops._triton import (
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    tl,
)
from graphmode.ops.dispatch import MAX_SKINNY_ROWS, choose
from graphmode.ops.linear import skinny_hopper
from graphmode.ops.linear.common import linear_reference, require_linear
from graphmode.ops.norm.rms_norm import rms_norm_triton


def skinny_norm_linear(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    gated: bool = False,
    lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``rms_norm(x) @ weight.T + bias``, or SwiGLU of it.

    Args:
        x: ``[rows, hidden]``, at most 16 rows, float32, bfloat16 or float16, contiguous.
        norm: ``[hidden]``: weight of the RMS norm, in ``x``'s dtype.
        weight: ``[out, hidden]``, contiguous, in ``x``'s dtype; with ``gated``, gate before up.
        bias: ``[out]`` in ``x``'s dtype; None for none.
        eps: of the norm.
        gated: whether the result is gate and up and goes through SwiGLU.
        lens: int32 ``[rows]``: a row of 0 is padding, which kernels may leave unread and take for zeros. None: there is
            no padding.

    Returns:
        ``[rows, out]``; with ``gated`` ``[rows, out / 2]``.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    _require_rows("x", x, weight, bias, lens)
    require_tensor("norm", norm, shape=x.shape[1:], dtypes=(x.dtype,), like=x)
    require(not gated or weight.shape[0] % 2 == 0, "weight", f"of {weight.shape[0]} rows", "gate and up, of one size")
    run = {
        "hopper": skinny_hopper.skinny_norm_linear_hopper,
        "triton": skinny_norm_linear_triton,
        "reference": skinny_norm_linear_reference,
    }[choose("skinny_norm_swiglu" if gated else "skinny_norm_linear", len(x), weight)]
    return run(x, norm, weight, bias, eps, gated=gated, lens=lens)


def skinny_linear_add(x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, lens: torch.Tensor | None = None) -> None:
    """Add ``h @ weight.T`` to ``x``, in place.

    Args:
        x: ``[rows, out]``, at most 16 rows, float32, bfloat16 or float16, contiguous.
        h: ``[rows, in]`` in ``x``'s dtype, contiguous.
        weight: ``[out, in]`` in ``x``'s dtype, contiguous.
        lens: as of :func:`skinny_norm_linear`, of rows of ``h``.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    _require_rows("h", h, weight, None, lens)
    require_tensor("x", x, shape=(h.shape[0], weight.shape[0]), dtypes=(h.dtype,), like=h)
    require(x.is_contiguous(), "x", f"of strides {x.stride()}", "a contiguous tensor")
    run = {
        "hopper": skinny_hopper.skinny_linear_add_hopper,
        "triton": skinny_linear_add_triton,
        "reference": skinny_linear_add_reference,
    }[choose("skinny_linear_add", len(h), weight)]
    run(x, h, weight, lens)


def skinny_linear(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, lens: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``h @ weight.T + bias``.

    Args:
        h: ``[rows, in]``, at most 16 rows, float32, bfloat16 or float16, contiguous.
        weight: ``[out, in]`` in ``h``'s dtype, contiguous.
        bias: ``[out]`` in ``h``'s dtype; None for none.
        lens: as of :func:`skinny_norm_linear`.

    Returns:
        ``[rows, out]``.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    _require_rows("h", h, weight, bias, lens)
    on_hopper = choose("skinny_linear", len(h), weight) == "hopper"
    run = skinny_hopper.skinny_linear_hopper if on_hopper else skinny_linear_reference
    return run(h, weight, bias, lens)


def _require_rows(
    name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lens: torch.Tensor | None
) -> None:
    require_linear(name, x, weight, bias)
    require(x.shape[0] <= MAX_SKINNY_ROWS, name, f"of {x.shape[0]} rows", f"at most {MAX_SKINNY_ROWS}")
    if lens is not None:
        require_tensor("lens", lens, shape=x.shape[:1], dtypes=(torch.int32,), like=x)
        require(lens.is_contiguous(), "lens", f"of strides {lens.stride()}", "a contiguous tensor")


def skinny_norm_linear_reference(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    gated: bool = False,
    lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute :func:`skinny_norm_linear` in PyTorch."""
    values = x.float()
    scale = values.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return linear_reference(values * scale * norm.float(), weight, bias, gated=gated).to(x.dtype)


def skinny_linear_add_reference(
    x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, lens: torch.Tensor | None = None
) -> None:
    """Compute :func:`skinny_linear_add` in PyTorch."""
    x.copy_(x.float() + linear_reference(h, weight, None))


def skinny_linear_reference(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, lens: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute :func:`skinny_linear` by torch's matrix product, which no kernel for devices other than Hopper beats."""
    return torch.nn.functional.linear(h, weight, bias)


# One row: elements of weights that a program loads at once, and holds in registers.
_ROW_TILE = 16384
_MAX_ROW_WIDTH = 4096
# Several rows: rows of weights of a program (the fewest that a matrix product takes), and elements of a row at a time.
_BLOCK_N = 16
_BLOCK_K = 512
_STAGES = 3


def _row_blocks(out: int, size: int, tiles: int) -> tuple[int, int]:
    """Return, for one row, how many rows of weights a program takes and how many of their elements at a time.

    Args:
        out: rows of the weights.
        size: elements of a row.
        tiles: tiles that a program holds at a time.
    """
    block_k = min(next_power_of_2(size), _MAX_ROW_WIDTH)
    block_n = max(_ROW_TILE // tiles // block_k, 1)
    # As many programs as fill the device, if there are rows enough.
    while block_n > 4 and out // block_n < 128:
        block_n //= 2
    return block_n, block_k


def skinny_norm_linear_triton(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    gated: bool = False,
    lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute :func:`skinny_norm_linear` in Triton."""
    size = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((x.shape[0], size), dtype=x.dtype, device=x.device)
    _launch(x, norm, weight, bias, out, eps, gated=gated, add=False)
    return out


def skinny_linear_add_triton(
    x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, lens: torch.Tensor | None = None
) -> None:
    """Compute :func:`skinny_linear_add` in Triton."""
    _launch(h, None, weight, None, x, 0.0, gated=False, add=True)


def _launch(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    *,
    gated: bool,
    add: bool,
) -> None:
    (rows, width), size = x.shape, out.shape[1]
    constants = {"width": width, "gated": gated, "add": add, **launch_options(x.device)}
    if rows == 1:
        block_n, block_k = _row_blocks(size, width, 2 if gated else 1)
        _row_kernel[(-(-size // block_n),)](
            x, norm, weight, bias, out, eps, size, block_n=block_n, block_k=block_k, num_warps=8, **constants
        )
    elif rows:
        # Each program would compute the norm of all rows again: for several rows, a kernel of its own is faster.
        x = x if norm is None else rms_norm_triton(x, norm, eps)
        block_k = min(_BLOCK_K // 2 if gated else _BLOCK_K, next_power_of_2(width))
        _rows_kernel[(-(-size // _BLOCK_N),)](
            x,
            weight,
            bias,
            out,
            rows,
            size,
            block_m=MAX_SKINNY_ROWS,
            block_n=_BLOCK_N,
            block_k=block_k,
            num_warps=4,
            num_stages=_STAGES,
            **constants,
        )


@jit()
def _row_kernel(  # type: ignore[no-untyped-def]
    x,
    norm,
    weight,
    bias,
    out,
    eps,
    size,
    width: constexpr,
    gated: constexpr,
    add: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    early: constexpr,
):
    """One row. The first weights are loaded before the kernel ahead has ended: they do not depend on it."""
    if early:
        gdc_launch_dependents()
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    k = tl.arange(0, block_k)
    place = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    up_place = place + tl.cast(size, tl.int64) * width
    real = (n < size)[:, None] & (k < width)[None, :]
    tile = tl.load(place, mask=real, other=0.0)
    if gated:
        up_tile = tl.load(up_place, mask=real, other=0.0)
    if norm is not None:
        scale = tl.load(norm + k, mask=k < width, other=0.0)
    if early:
        gdc_wait()
    squares = 0.0
    total = tl.zeros([block_n], tl.float32)
    total_up = total
    if add:
        total = tl.load(out + n, mask=n < size, other=0.0).to(tl.float32)
    for start in tl.static_range(0, width, block_k):
        row = tl.load(x + start + k, mask=start + k < width, other=0.0).to(tl.float32)
        if norm is not None:
            squares += tl.sum(row * row, 0)
            row = row * scale.to(tl.float32)
        row = row[None, :]
        total += tl.sum(tile.to(tl.float32) * row, 1)
        if gated:
            total_up += tl.sum(up_tile.to(tl.float32) * row, 1)
        if start + block_k < width:
            after = start + block_k
            real = (n < size)[:, None] & (after + k < width)[None, :]
            tile = tl.load(place + after, mask=real, other=0.0)
            if gated:
                up_tile = tl.load(up_place + after, mask=real, other=0.0)
            if norm is not None:
                scale = tl.load(norm + after + k, mask=after + k < width, other=0.0)
    if norm is not None:
        factor = rms_factor(squares, width, eps)
        total, total_up = total * factor, total_up * factor
    result = _finish(total, total_up, bias, n, size, gated)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < size)


@jit(do_not_specialize=["rows"])
def _rows_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    rows,
    size,
    width: constexpr,
    gated: constexpr,
    add: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    early: constexpr,
):
    """Several rows, after their norm: a matrix product whose loads run ahead of it."""
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    m = tl.arange(0, block_m)
    k = tl.arange(0, block_k)
    place = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    up_place = place + tl.cast(size, tl.int64) * width
    source = x + m[:, None] * width + k[None, :]
    if early:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([block_m, block_n], tl.float32)
    total_up = total
    if add:
        both = (m < rows)[:, None] & (n < size)[None, :]
        total = tl.load(out + m[:, None] * size + n[None, :], mask=both, other=0.0).to(tl.float32)
    for start in range(0, width, block_k):
        inside = start + k < width
        real = (n < size)[:, None] & inside[None, :]
        row = tl.load(source + start, mask=(m < rows)[:, None] & inside[None, :], other=0.0)
        tile = tl.load(place + start, mask=real, other=0.0)
        total = tl.dot(row, tl.trans(tile), total, input_precision="ieee")
        if gated:
            up_tile = tl.load(up_place + start, mask=real, other=0.0)
            total_up = tl.dot(row, tl.trans(up_tile), total_up, input_precision="ieee")
    result = _finish(total, total_up, bias, n, size, gated)
    inside = (m < rows)[:, None] & (n < size)[None, :]
    tl.store(out + m[:, None] * size + n[None, :], result.to(out.dtype.element_ty), mask=inside)


@jit()
def _finish(total, total_up, bias, n, size, gated: constexpr):  # type: ignore[no-untyped-def]
    """Add the bias to sums of outputs ``n``, the last dimension, and apply SwiGLU where ``gated``."""
    if bias is not None:
        total += tl.load(bias + n, mask=n < size, other=0.0).to(tl.float32)
        if gated:
            total_up += tl.load(bias + size + n, mask=n < size, other=0.0).to(tl.float32)
    if gated:
        total = swiglu(total, total_up)
    return total
