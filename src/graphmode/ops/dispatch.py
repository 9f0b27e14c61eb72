"""Which kernel runs: a table, and one pure function that reads it.

Each row of :data:`TABLE` names an operation, an implementation and what that needs. The first row of an operation whose
needs are met is taken. Layers ask for operations such as ``norm_swiglu`` and get a family of kernels; the public
functions in :mod:`graphmode.ops` ask in the same way which of their own implementations runs. Numbers in the table are
measurements (H100, Qwen3-0.6B, 1.7B and 8B, in a chain of layers). ``graphmode info --kernels`` prints it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from graphmode.ops._checks import FLOATS
from graphmode.ops._triton import runs_hopper, runs_triton

ANY, CPU, TRITON, HOPPER = "any device", "a CPU", "a device that Triton compiles for", "Hopper"
_HALF = (torch.bfloat16, torch.float16)

MAX_SKINNY_ROWS = 16
# A prefill GEMM computes tiles of so many rows and outputs.
PREFILL_ROWS, PREFILL_OUTPUTS = 128, 256

Shape = tuple[int, ...]


class Device(NamedTuple):
    """What the choice of kernels depends on of a device.

    Attributes:
        abilities: of the table's third column.
        multiprocessors: how many it has; 0 where that decides nothing.
    """

    abilities: frozenset[str]
    multiprocessors: int = 0


H100 = Device(frozenset({ANY, TRITON, HOPPER}), 132)


class Heads(NamedTuple):
    """The heads that a projection's outputs are, and what becomes of them.

    Attributes:
        q_heads: of queries.
        kv_heads: of keys and of values.
        head_dim: elements of a head.
        whole: whether whole heads are rotated, by halves, and values are cached as keys are.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    whole: bool


NO_HEADS = Heads(0, 0, 0, whole=False)


class Case(NamedTuple):
    """What a choice depends on.

    Attributes:
        device: where the operation runs.
        dtype: of its weights.
        rows: of its input.
        weights: shapes of its weights, ``[outputs, inputs]``.
        layer: shapes of all weights of the layer it is in; the same as ``weights`` where it stands alone.
        heads: of a projection to queries, keys and values.
    """

    device: Device
    dtype: torch.dtype
    rows: int
    weights: tuple[Shape, ...]
    layer: tuple[Shape, ...]
    heads: Heads = NO_HEADS


class Need(NamedTuple):
    """A condition on shapes: in words, and as a function."""

    text: str
    holds: Callable[[Case], bool]


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        operation: what is asked for.
        implementation: what this row gives.
        on: where it runs.
        dtypes: of weights that it takes.
        rows: the least and the most rows of input; None for any number.
        needs: what shapes must be.
    """

    operation: str
    implementation: str
    on: str = ANY
    dtypes: tuple[torch.dtype, ...] = FLOATS
    rows: tuple[int, int | None] = (0, None)
    needs: tuple[Need, ...] = ()

    def why_not(self, case: Case) -> str:
        """Return which need is not met; empty if all are."""
        least, most = self.rows
        if self.on not in case.device.abilities:
            return f"runs on {self.on}"
        if case.dtype not in self.dtypes:
            return f"takes {' or '.join(str(dtype).removeprefix('torch.') for dtype in self.dtypes)}"
        if case.rows < least or (most is not None and case.rows > most):
            return f"takes {least} rows or more" if most is None else f"takes {least} to {most} rows"
        return next((f"needs {need.text}" for need in self.needs if not need.holds(case)), "")


class Choice(NamedTuple):
    """What runs, and of each implementation that comes before it in the table why it does not."""

    implementation: str
    others: tuple[tuple[str, str], ...]


def _in_blocks(shapes: Iterable[Shape], outputs: int, inputs: int) -> bool:
    return all(out > 0 and width > 0 and out % outputs == width % inputs == 0 for out, width in shapes)


def wave_efficiency(rows: int, size: int, multiprocessors: int) -> float:
    """Return the share of waves that the tiles of a prefill GEMM with ``size`` outputs fill."""
    tiles = -(-rows // PREFILL_ROWS) * (size // PREFILL_OUTPUTS)
    return tiles / (-(-tiles // multiprocessors) * multiprocessors)


_SKINNY = Need("outputs in eights and inputs in 128s", lambda case: _in_blocks(case.weights, 8, 128))
_SKINNY_HALVES = Need("gate and up in eights, inputs in 128s", lambda case: _in_blocks(case.weights, 16, 128))
_SKINNY_LAYER = Need(f"{_SKINNY.text} in all weights of the layer", lambda case: _in_blocks(case.layer, 8, 128))
_SMALL_BATCH = Need("outputs in 64s and inputs in 128s", lambda case: _in_blocks(case.weights, 64, 128))
_NOT_LARGE = Need("at most 8 Mi elements", lambda case: all(out * width <= 1 << 23 for out, width in case.weights))
_FEW_OUTPUTS = Need("at most 2048 outputs", lambda case: all(out <= 2048 for out, _ in case.weights))
_PREFILL = Need("outputs in 256s and inputs in 128s", lambda case: _in_blocks(case.weights, PREFILL_OUTPUTS, 128))
_FULL_WAVES = Need(
    f"tiles of {PREFILL_ROWS} rows and {PREFILL_OUTPUTS} outputs that keep 80% of the multiprocessors busy",
    lambda case: wave_efficiency(case.rows, case.weights[0][0], case.device.multiprocessors) >= 0.8,
)
_WHOLE_HEADS = Need("whole heads rotated by halves, and values like keys", lambda case: case.heads.whole)
_PAIRS_OF_128 = Need(
    "heads of 128 elements, an even number of keys'",
    lambda case: case.heads.head_dim == 128 and case.heads.kv_heads % 2 == 0,
)
_ATTENTION = Need(
    "heads of 64, 128 or 256 elements, at most 16 of queries to one of keys",
    lambda case: case.heads.head_dim in (64, 128, 256) and case.heads.q_heads <= 16 * case.heads.kv_heads,
)


def _skinny(operation: str) -> tuple[Row, ...]:
    """Return where a layer takes skinny GEMMs: for all of its weights or for none."""
    return (
        # Us a layer of Qwen3-0.6B: 15 beside 28 of cuBLAS with one row, 32 beside 31 with two.
        Row(operation, "skinny", TRITON, FLOATS, (0, 1)),
        # 14 to 19 beside 31.
        Row(operation, "skinny", HOPPER, _HALF, (0, MAX_SKINNY_ROWS), (_SKINNY_LAYER,)),
    )


def _small_batch(operation: str) -> tuple[Row, ...]:
    """Return where small-batch GEMMs are faster than cuBLAS."""
    return (
        Row(operation, "small_batch", HOPPER, _HALF, (1, 256), (_SMALL_BATCH, _NOT_LARGE)),
        Row(operation, "small_batch", HOPPER, _HALF, (33, 128), (_SMALL_BATCH,)),
    )


def _by_device(operation: str, *, loop: bool = False) -> tuple[Row, ...]:
    """Return the rows of an operation in Triton, with ``loop`` also as a loop for the CPU, and else in PyTorch."""
    loops = (Row(operation, "cpu", CPU, (torch.float32,)),) if loop else ()
    return (Row(operation, "triton", TRITON), *loops, Row(operation, "reference"))


_PREFILL_HEADS = (_WHOLE_HEADS, _PAIRS_OF_128, _PREFILL)

TABLE: tuple[Row, ...] = (
    # What layers ask for. Where it says "torch", torch's matrix product (cuBLAS on NVIDIA) and an operation beside it.
    # A projection of what a norm gives.
    *_skinny("norm_linear"),
    *_small_batch("norm_linear"),
    Row("norm_linear", "torch"),
    # The same with SwiGLU after it.
    *_skinny("norm_swiglu"),
    *_small_batch("norm_swiglu"),
    Row("norm_swiglu", "prefill", HOPPER, _HALF, (1, None), (_PREFILL, _FULL_WAVES)),
    Row("norm_swiglu", "torch"),
    # The same with norms, rotation and cache write of heads after it, except in decode steps.
    *_skinny("norm_heads"),
    Row("norm_heads", "prefill", HOPPER, _HALF, (1, None), (*_PREFILL_HEADS, _FULL_WAVES)),
    Row("norm_heads", "norm_linear"),
    # A projection alone, and one that is added to the residual stream.
    *_skinny("linear"),
    Row("linear", "torch"),
    *_skinny("linear_add"),
    Row("linear_add", "torch"),
    # How both projections of a layer reach the residual stream: in split-K parts, which the norm after them adds up.
    *_skinny("residual"),
    Row("residual", "split_k", HOPPER, _HALF, (1, 256), (_SMALL_BATCH, _NOT_LARGE, _FEW_OUTPUTS)),
    Row("residual", "split_k", HOPPER, _HALF, (33, 128), (_SMALL_BATCH, _FEW_OUTPUTS)),
    Row("residual", "split_k", HOPPER, _HALF, (1, 64), (_SMALL_BATCH, _NOT_LARGE)),
    Row("residual", "split_k", HOPPER, _HALF, (33, 64), (_SMALL_BATCH,)),
    Row("residual", "torch"),
    # The head, on what the final norm gives.
    Row("logits", "skinny", TRITON, FLOATS, (1, 1)),
    Row("logits", "torch"),
    # The implementations of operations.
    Row("skinny_norm_linear", "hopper", HOPPER, _HALF, needs=(_SKINNY,)),
    Row("skinny_norm_linear", "triton", TRITON),
    Row("skinny_norm_linear", "reference"),
    Row("skinny_norm_swiglu", "hopper", HOPPER, _HALF, needs=(_SKINNY_HALVES,)),
    Row("skinny_norm_swiglu", "triton", TRITON),
    Row("skinny_norm_swiglu", "reference"),
    Row("skinny_linear_add", "hopper", HOPPER, _HALF, needs=(_SKINNY,)),
    Row("skinny_linear_add", "triton", TRITON),
    Row("skinny_linear_add", "reference"),
    Row("skinny_linear", "hopper", HOPPER, _HALF, needs=(_SKINNY,)),
    Row("skinny_linear", "reference"),
    Row("small_batch_linear", "hopper", HOPPER, _HALF, (1, None), (_SMALL_BATCH,)),
    Row("small_batch_linear", "reference"),
    Row("split_k_linear", "hopper", HOPPER, _HALF, (1, None), (_SMALL_BATCH,)),
    Row("split_k_linear", "reference"),
    Row("prefill_swiglu", "hopper", HOPPER, _HALF, (1, None), (_PREFILL,)),
    Row("prefill_swiglu", "reference"),
    Row("prefill_heads", "hopper", HOPPER, _HALF, (1, None), _PREFILL_HEADS),
    Row("prefill_heads", "reference"),
    Row("rotate_and_attend", "hopper", HOPPER, _HALF, needs=(_WHOLE_HEADS, _ATTENTION)),
    # Us a step of Qwen3-0.6B: 730 beside 780 in two kernels with one sequence, but 2060 beside 1830 with 64.
    Row("rotate_and_attend", "triton", TRITON, FLOATS, (0, 16), (_WHOLE_HEADS,)),
    Row("rotate_and_attend", "in two"),
    *_by_device("rms_norm", loop=True),
    *_by_device("add_rms_norm", loop=True),
    *_by_device("silu_mul", loop=True),
    *_by_device("add_split_k"),
    *_by_device("add_split_k_and_norm"),
)


@functools.cache
def rows_of(operation: str) -> tuple[Row, ...]:
    """Return the rows of an operation, in order."""
    return tuple(row for row in TABLE if row.operation == operation)


def decide(operation: str, case: Case) -> Choice:
    """Return which implementation of an operation runs, and why those before it do not."""
    others: list[tuple[str, str]] = []
    for row in rows_of(operation):
        reason = row.why_not(case)
        if not reason:
            return Choice(row.implementation, tuple(others))
        others.append((row.implementation, reason))
    raise KeyError(operation)


@functools.cache
def device_of(device: torch.device) -> Device:
    """Return what the choice of kernels depends on of a device."""
    like = torch.empty(0, device=device)
    abilities = {ANY: True, CPU: device.type == "cpu", TRITON: runs_triton(like), HOPPER: runs_hopper(like)}
    count = torch.cuda.get_device_properties(device).multi_processor_count if abilities[HOPPER] else 0
    return Device(frozenset(name for name, able in abilities.items() if able), count)


def choose(
    operation: str,
    rows: int,
    *weights: torch.Tensor,
    layer: tuple[Shape, ...] = (),
    heads: Heads = NO_HEADS,
) -> str:
    """Return which implementation of an operation runs for ``rows`` of input; arguments else as of :class:`Case`."""
    first = weights[0]
    return _chosen(operation, first.device, first.dtype, rows, tuple(each.shape for each in weights), layer, heads)


@functools.lru_cache(maxsize=1 << 16)
def _chosen(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    weights: tuple[Shape, ...],
    layer: tuple[Shape, ...],
    heads: Heads,
) -> str:
    return decide(operation, Case(device_of(device), dtype, rows, weights, layer or weights, heads)).implementation
