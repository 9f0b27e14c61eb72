"""Linear layers of a few rows: at batch 1 to 16 a step reads its weights once, and nothing else counts.

Weights are read in rows, many to a program, each once; what comes before a layer (a norm) and after it (a gated
activation, a residual) is done by the kernel that reads them. They do not depend on the kernel before, so their first
part is asked for before waiting for it.
"""

from __future__ import annotations

import torch

from graphmode.kernels._arguments import FLOATS, require, require_tensor
from graphmode.kernels._triton import (
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    runs_triton,
    tl,
)

MAX_ROWS = 16


def runs_few_rows(x: torch.Tensor) -> bool:
    """Return whether a step's rows ``[rows, hidden]`` are so few that these kernels beat matrix products."""
    return x.shape[0] <= MAX_ROWS and runs_triton(x)


def norm_linear(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """Return ``rms_norm(x) @ weight.T + bias``, or of that, as gate and up, ``silu(gate) * up``.

    Args:
        x: ``[rows, hidden]``, at most 16 rows, float32, bfloat16 or float16, contiguous.
        norm: ``[hidden]``: weight of the RMS norm, in ``x``'s dtype.
        weight: ``[out, hidden]``, contiguous, in ``x``'s dtype; with ``gated``, gate before up.
        bias: ``[out]`` in ``x``'s dtype; None for none.
        eps: of the norm.
        gated: whether the result goes through SwiGLU.

    Returns:
        ``[rows, out]``; with ``gated`` ``[rows, out / 2]``.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    _require_rows("x", x, weight)
    require_tensor("norm", norm, shape=x.shape[1:], dtypes=(x.dtype,), like=x)
    if bias is not None:
        require_tensor("bias", bias, shape=weight.shape[:1], dtypes=(x.dtype,), like=x)
    require(not gated or weight.shape[0] % 2 == 0, "weight", f"of {weight.shape[0]} rows", "gate and up, of one size")
    run = norm_linear_triton if runs_triton(x) else norm_linear_reference
    return run(x, norm, weight, bias, eps, gated=gated)


def linear_add(x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor) -> None:
    """Add ``h @ weight.T`` to ``x``, in place.

    Args:
        x: ``[rows, out]``, at most 16 rows, float32, bfloat16 or float16, contiguous.
        h: ``[rows, in]`` in ``x``'s dtype, contiguous.
        weight: ``[out, in]`` in ``x``'s dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    _require_rows("h", h, weight)
    require_tensor("x", x, shape=(h.shape[0], weight.shape[0]), dtypes=(h.dtype,), like=h)
    require(x.is_contiguous(), "x", f"of strides {x.stride()}", "a contiguous tensor")
    run = linear_add_triton if runs_triton(x) else linear_add_reference
    run(x, h, weight)


def _require_rows(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    require_tensor(name, x, shape=(None, None), dtypes=FLOATS, like=x)
    require(x.shape[0] <= MAX_ROWS, name, f"of {x.shape[0]} rows", f"at most {MAX_ROWS}")
    require_tensor("weight", weight, shape=(None, x.shape[1]), dtypes=(x.dtype,), like=x)
    for each, tensor in ((name, x), ("weight", weight)):
        require(tensor.is_contiguous(), each, f"of strides {tensor.stride()}", "a contiguous tensor")


def norm_linear_reference(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """Do as :func:`norm_linear` in PyTorch."""
    values = x.float()
    scale = values.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    result = (values * scale * norm.float()) @ weight.float().T
    if bias is not None:
        result = result + bias.float()
    if gated:
        gate, up = result.chunk(2, dim=1)
        result = torch.nn.functional.silu(gate) * up
    return result.to(x.dtype)


def linear_add_reference(x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor) -> None:
    """Do as :func:`linear_add` in PyTorch."""
    x.copy_(x.float() + h.float() @ weight.float().T)


# Elements of one weight tile: a program of 8 warps holds two of them in registers.
_TILE = 16384


def _blocks(out: int, size: int, tiles: int) -> tuple[int, int]:
    """Return the rows of weights that a program takes and how many elements of them at a time.

    Args:
        out: rows of the weights.
        size: elements of a row.
        tiles: tiles that a program holds at a time.
    """
    block_k = min(next_power_of_2(size), 1024)
    while size % block_k and block_k > 256:
        block_k //= 2
    block_n = min(max(_TILE // tiles // block_k, 1), 32)
    # As many programs as fill the device, if there are rows enough.
    while block_n > 4 and out // block_n < 128:
        block_n //= 2
    return block_n, block_k


def norm_linear_triton(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """Do as :func:`norm_linear` in Triton."""
    rows, hidden = x.shape
    size = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows:
        block_n, block_k = _blocks(size, hidden, 2 if gated else 1)
        _norm_linear_kernel[(-(-size // block_n),)](
            x,
            norm,
            weight,
            bias,
            out,
            eps,
            rows,
            size,
            hidden=hidden,
            gated=gated,
            block_m=_block_m(rows),
            block_n=block_n,
            block_k=block_k,
            num_warps=8,
            **launch_options(x.device),
        )
    return out


def linear_add_triton(x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor) -> None:
    """Do as :func:`linear_add` in Triton."""
    rows, size = x.shape
    if rows:
        block_n, block_k = _blocks(size, h.shape[1], 1)
        _linear_add_kernel[(-(-size // block_n),)](
            x,
            h,
            weight,
            rows,
            size,
            width=h.shape[1],
            block_m=_block_m(rows),
            block_n=block_n,
            block_k=block_k,
            num_warps=8,
            **launch_options(x.device),
        )


def _block_m(rows: int) -> int:
    """Return 1 for one row, which is summed up by plain arithmetic; else what a matrix product takes at least."""
    return 1 if rows == 1 else 16


@jit()
def _norm_linear_kernel(  # type: ignore[no-untyped-def]
    x,
    norm,
    weight,
    bias,
    out,
    eps,
    rows,
    size,
    hidden: constexpr,
    gated: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    early: constexpr,
):
    if early:
        gdc_launch_dependents()
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    m = tl.arange(0, block_m)
    k = tl.arange(0, block_k)
    place = weight + n.to(tl.int64)[:, None] * hidden + k[None, :]
    real = (n < size)[:, None] & (k < hidden)[None, :]
    tile = tl.load(place, mask=real, other=0.0)
    if gated:
        second = tl.load(place + size.to(tl.int64) * hidden, mask=real, other=0.0)
    scale = tl.load(norm + k, mask=k < hidden, other=0.0)
    if early:
        gdc_wait()
    squares = tl.zeros([block_m], tl.float32)
    total = tl.zeros([block_m, block_n], tl.float32)
    total_up = tl.zeros([block_m, block_n], tl.float32)
    for start in tl.static_range(0, hidden, block_k):
        at = m[:, None] * hidden + start + k[None, :]
        row = tl.load(x + at, mask=(m < rows)[:, None] & (start + k < hidden)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(row * row, 1)
        row = row * scale.to(tl.float32)[None, :]
        total = _accumulate(total, row, tile, block_m)
        if gated:
            total_up = _accumulate(total_up, row, second, block_m)
        if start + block_k < hidden:
            after = start + block_k
            real = (n < size)[:, None] & (after + k < hidden)[None, :]
            tile = tl.load(place + after, mask=real, other=0.0)
            if gated:
                second = tl.load(place + size.to(tl.int64) * hidden + after, mask=real, other=0.0)
            scale = tl.load(norm + after + k, mask=after + k < hidden, other=0.0)
    factor = (1.0 / tl.sqrt(squares / hidden + eps))[:, None]
    total *= factor
    total_up *= factor
    if bias is not None:
        total += tl.load(bias + n, mask=n < size, other=0.0).to(tl.float32)[None, :]
        if gated:
            total_up += tl.load(bias + size + n, mask=n < size, other=0.0).to(tl.float32)[None, :]
    if gated:
        total = total / (1.0 + tl.exp(-total)) * total_up
    tl.store(
        out + m[:, None] * size + n[None, :],
        total.to(out.dtype.element_ty),
        mask=(m < rows)[:, None] & (n < size)[None, :],
    )


@jit()
def _linear_add_kernel(  # type: ignore[no-untyped-def]
    x,
    h,
    weight,
    rows,
    size,
    width: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    early: constexpr,
):
    if early:
        gdc_launch_dependents()
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    m = tl.arange(0, block_m)
    k = tl.arange(0, block_k)
    place = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    tile = tl.load(place, mask=(n < size)[:, None] & (k < width)[None, :], other=0.0)
    if early:
        gdc_wait()
    target = x + m[:, None] * size + n[None, :]
    inside = (m < rows)[:, None] & (n < size)[None, :]
    total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    for start in tl.static_range(0, width, block_k):
        at = m[:, None] * width + start + k[None, :]
        row = tl.load(h + at, mask=(m < rows)[:, None] & (start + k < width)[None, :], other=0.0)
        total = _accumulate(total, row, tile, block_m)
        if start + block_k < width:
            after = start + block_k
            tile = tl.load(place + after, mask=(n < size)[:, None] & (after + k < width)[None, :], other=0.0)
    tl.store(target, total.to(x.dtype.element_ty), mask=inside)


@jit()
def _accumulate(total, row, tile, block_m: constexpr):  # type: ignore[no-untyped-def]
    """Add ``row @ tile.T`` to ``total``."""
    if block_m == 1:
        products = tile.to(tl.float32) * row.to(tl.float32)
        return total + tl.sum(products, 1)[None, :]
    return tl.dot(row.to(tile.dtype), tl.trans(tile), total, input_precision="ieee")
