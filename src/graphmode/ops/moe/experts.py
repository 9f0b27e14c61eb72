"""Mixtures of experts: pairs of a token and an expert are sorted by expert, and each expert multiplies its own.

How many pairs an expert has is known on the device alone. So a first kernel lists the pairs by expert and cuts each
expert's into blocks, of which there are at most as many as a graph launches programs for; the others end at once. A
program then multiplies a block of rows, wherever they lie, by a tile of its expert's weights (as the fused kernel of
vLLM does, https://github.com/vllm-project/vllm, and MegaBlocks before it, https://arxiv.org/abs/2211.15841).
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from graphmode.ops._checks import FLOATS, require_contiguous, require_tensor
from graphmode.ops._device import overlap, swiglu
from graphmode.ops._triton import constexpr, jit, launch_options, next_power_of_2, runs_triton, tl

_CHUNK = 128  # pairs that a program of the first kernel puts in their places, at most
_COUNTED = (128, 1024)  # pairs that it counts at a time, at least and at most


@dataclass(frozen=True)
class Tiling:
    """What a program of a product computes.

    Attributes:
        block_m: pairs of one expert.
        block_n: outputs; of gate and of up each.
        block_k: inputs at a time.
        warps: that share the work.
        stages: of the pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def tiling(pairs: int, experts: int, element_size: int, *, gated: bool) -> Tiling:
    """Return how programs divide the products of ``pairs`` over ``experts``: more rows each, the more an expert has.

    By measurements on an H100 (docs/performance.md), of tilings whose pipeline takes at most 96 KiB.
    """
    rows, shorter = pairs / experts, element_size // 2
    if rows <= 16:
        return Tiling(16, 32 if gated else 64, 128 // shorter, 4, 3)
    if rows <= 64:
        return Tiling(64, 64 if gated else 128, 64 // shorter, 4, 4)
    return Tiling(128, 64 if gated else 128, 64 // shorter, 8, 3)


def gated_experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    real: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Return the weighted sum of what its experts make of each row, ``[rows, hidden]``; 0 of a row that is not real.

    An expert computes ``(silu(x @ gate.T) * (x @ up.T)) @ down.T``.

    Args:
        x: ``[rows, hidden]``, float32, bfloat16 or float16.
        top_k_index: int32 or int64 ``[rows, k]``: the experts of each row; one outside ``[0, experts)`` is none.
        top_k_weights: ``[rows, k]``, of them.
        real: bool ``[rows]``, False for padding, whose experts are not computed.
        gate_up: ``[experts, 2 * size, hidden]``, in ``x``'s dtype, contiguous, gate before up.
        down: ``[experts, hidden, size]``, in ``x``'s dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor("x", x, shape=(None, None), dtypes=FLOATS, like=x)
    rows, hidden = x.shape
    require_tensor("top_k_index", top_k_index, shape=(rows, None), dtypes=(torch.int32, torch.int64), like=x)
    require_tensor("top_k_weights", top_k_weights, shape=tuple(top_k_index.shape), dtypes=FLOATS, like=x)
    require_tensor("real", real, shape=(rows,), dtypes=(torch.bool,), like=x)
    require_tensor("gate_up", gate_up, shape=(None, None, hidden), dtypes=(x.dtype,), like=x)
    require_tensor("down", down, shape=(len(gate_up), hidden, gate_up.shape[1] // 2), dtypes=(x.dtype,), like=x)
    require_contiguous(gate_up=gate_up, down=down)
    run = gated_experts_triton if runs_triton(x) else gated_experts_reference
    return run(x, top_k_index, top_k_weights, real, gate_up, down)


def gated_experts_reference(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    real: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Run :func:`gated_experts` in PyTorch, every expert on every row."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, (gate_up_of, down_of) in enumerate(zip(gate_up, down, strict=True)):
        gate, up = (x.float() @ gate_up_of.float().T).chunk(2, dim=1)
        result = (torch.nn.functional.silu(gate) * up).to(x.dtype).float() @ down_of.float().T
        chosen = (top_k_index == expert) & real.unsqueeze(1)
        weight = torch.where(chosen, top_k_weights.float(), 0.0).sum(1, keepdim=True)
        out += torch.where(chosen.any(1, keepdim=True), weight * result, 0.0)
    return out.to(x.dtype)


def gated_experts_triton(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    real: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Run :func:`gated_experts` in Triton, in four kernels."""
    x, top_k_index, top_k_weights, real = (
        each.contiguous() for each in (x, top_k_index, top_k_weights, real.view(torch.uint8))
    )
    (rows, k), (experts, hidden, size) = top_k_index.shape, down.shape
    pairs = rows * k
    out = torch.empty_like(x)
    if not rows:
        return out
    first, second = (tiling(pairs, experts, x.element_size(), gated=gated) for gated in (True, False))
    blocks = min(pairs, experts) + pairs // first.block_m
    options: dict[str, Any] = launch_options(x.device)
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    table = torch.empty(1 + 3 * blocks, dtype=torch.int32, device=x.device)
    chunk = min(max(next_power_of_2(pairs), 16), _CHUNK)
    _plan_kernel[(-(-pairs // chunk),)](
        top_k_index,
        real,
        order,
        table,
        pairs,
        k=k,
        experts=experts,
        bins=next_power_of_2(experts + 1),
        block_m=first.block_m,
        chunk=chunk,
        block=min(max(next_power_of_2(pairs), _COUNTED[0]), _COUNTED[1]),
        **options,
    )
    inner = x.new_empty(pairs, size)
    results = x.new_empty(pairs, hidden)
    for gated, tile, source, weights, into in ((True, first, x, gate_up, inner), (False, second, inner, down, results)):
        outputs = into.shape[1]
        _product_kernel[(-(-outputs // tile.block_n), blocks)](
            source,
            weights,
            top_k_weights,
            order,
            table,
            into,
            k=k,
            width=source.shape[1],
            size=outputs,
            gated=gated,
            block_m=tile.block_m,
            block_n=tile.block_n,
            block_k=tile.block_k,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **options,
        )
    block = min(next_power_of_2(hidden), 1024)
    _sum_kernel[(rows, -(-hidden // block))](
        results, top_k_index, real, out, k=k, experts=experts, hidden=hidden, block=block, **options
    )
    return out


@jit()
def _load_experts(top_k_index, real, pair, inside, k: constexpr, experts: constexpr):  # type: ignore[no-untyped-def]
    """Return the experts of pairs, and ``experts`` for those that have none."""
    expert = tl.load(top_k_index + pair, mask=inside, other=-1)
    routed = tl.load(real + pair // k, mask=inside, other=0) != 0
    return tl.where(routed & (expert >= 0) & (expert < experts), expert, experts).to(tl.int32)


@jit()
def _count(  # type: ignore[no-untyped-def]
    top_k_index, real, begin, end, k: constexpr, experts: constexpr, bins: constexpr, block: constexpr
):
    """Return how many of the pairs ``begin .. end - 1`` each expert has."""
    counts = tl.zeros([bins], tl.int32)
    for start in range(begin, end, block):
        pair = start + tl.arange(0, block)
        inside = pair < end
        expert = _load_experts(top_k_index, real, pair, inside, k, experts)
        counts += tl.histogram(tl.where(inside, expert, experts), bins)
    return tl.where(tl.arange(0, bins) < experts, counts, 0)


@jit(do_not_specialize=["pairs"])
def _plan_kernel(  # type: ignore[no-untyped-def]
    top_k_index,
    real,
    order,
    table,
    pairs,
    k: constexpr,
    experts: constexpr,
    bins: constexpr,
    block_m: constexpr,
    chunk: constexpr,
    block: constexpr,
    early: constexpr,
):
    """Fill ``order`` with the pairs by expert, and ``table``: the number of blocks, and each one's expert and bounds.

    Every program counts all pairs, so that none waits for another.
    """
    overlap(early)
    begin = tl.program_id(0) * chunk
    before = _count(top_k_index, real, 0, begin, k, experts, bins, block)
    counts = before + _count(top_k_index, real, begin, pairs, k, experts, bins, block)
    start = tl.cumsum(counts, 0) - counts

    index = tl.arange(0, chunk)
    pair = begin + index
    inside = pair < pairs
    expert = _load_experts(top_k_index, real, pair, inside, k, experts)
    rank = tl.sum(((expert[None, :] == expert[:, None]) & (index[None, :] < index[:, None])).to(tl.int32), 1)
    place = tl.gather(start + before, expert, 0) + rank
    tl.store(order + place, pair, mask=inside & (expert < experts))

    if tl.program_id(0) == 0:
        blocks = (counts + block_m - 1) // block_m
        first = tl.cumsum(blocks, 0) - blocks
        tl.store(table, tl.sum(blocks, 0))
        number = tl.arange(0, bins)
        for turn in range(tl.max(blocks, 0)):
            entry = table + 1 + 3 * (first + turn)
            more = turn < blocks
            tl.store(entry, number, mask=more)
            tl.store(entry + 1, start + turn * block_m, mask=more)
            tl.store(entry + 2, start + counts, mask=more)


@jit()
def _product_kernel(  # type: ignore[no-untyped-def]
    source,
    weights,
    top_k_weights,
    order,
    table,
    out,
    k: constexpr,
    width: constexpr,
    size: constexpr,
    gated: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    early: constexpr,
):
    """Multiply a block of one expert's pairs by a tile of its weights.

    Where ``gated``, the rows are tokens', and the results go through SwiGLU to where ``order`` has the pair. Else the
    rows are those, and the results, times the pair's weight, go to the pair's own place.
    """
    overlap(early)
    block = tl.program_id(1)
    if block >= tl.load(table):
        return
    expert = tl.load(table + 1 + 3 * block).to(tl.int64)
    start = tl.load(table + 2 + 3 * block)
    end = tl.load(table + 3 + 3 * block)
    place = start + tl.arange(0, block_m)
    mine = place < end
    pair = tl.load(order + place, mask=mine, other=0)
    row = source + (pair // k if gated else place).to(tl.int64) * width
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    tile = weights + expert * ((2 * size if gated else size) * width) + n[None, :] * width
    here = (n < size)[None, :]
    total = tl.zeros([block_m, block_n], tl.float32)
    up = tl.zeros([block_m, block_n], tl.float32)
    for at in range(0, width, block_k):
        i = at + tl.arange(0, block_k)
        rows = tl.load(row[:, None] + i[None, :], mask=mine[:, None] & (i < width)[None, :], other=0.0)
        inside = (i < width)[:, None] & here
        columns = tl.load(tile + i[:, None], mask=inside, other=0.0)
        total = tl.dot(rows, columns, total, input_precision="ieee")
        if gated:
            columns = tl.load(tile + (size * width + i)[:, None], mask=inside, other=0.0)
            up = tl.dot(rows, columns, up, input_precision="ieee")
    if gated:
        total = swiglu(total, up)
        target = place
    else:
        total *= tl.load(top_k_weights + pair, mask=mine, other=0.0).to(tl.float32)[:, None]
        target = pair
    at = target.to(tl.int64)[:, None] * size + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mine[:, None] & here)


@jit()
def _sum_kernel(  # type: ignore[no-untyped-def]
    results,
    top_k_index,
    real,
    out,
    k: constexpr,
    experts: constexpr,
    hidden: constexpr,
    block: constexpr,
    early: constexpr,
):
    overlap(early)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for choice in tl.static_range(k):
        pair = row * k + choice
        expert = _load_experts(top_k_index, real, pair, True, k, experts)
        computed = at < tl.where(expert < experts, hidden, 0)
        total += tl.load(results + pair * hidden + at, mask=computed, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + at, total.to(out.dtype.element_ty), mask=at < hidden)
