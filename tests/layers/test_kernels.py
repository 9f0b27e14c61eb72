"""Which kernels a layer takes, in order, is written down for devices, dtypes, shapes and numbers of rows.

``kernels.json`` was first written by code without a table. A change of the table that is meant changes it too:
``python -m tests.layers.test_kernels`` writes it again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from graphmode.cache.specs import LayerCache
from graphmode.layers import attention, linear, residual
from graphmode.layers.attention import Attention, AttentionBatch
from graphmode.layers.decoder import DecoderLayer, Head, decoder_layer
from graphmode.layers.linear import Linear
from graphmode.layers.mlp import MLP
from graphmode.layers.moe import MoE
from graphmode.layers.residual import Norm
from graphmode.ops import Rotation, dispatch
from graphmode.ops.attention import decode
from graphmode.ops.dispatch import ANY, CPU, H100, TRITON, Device
from graphmode.ops.linear import skinny, skinny_hopper

FILE = Path(__file__).with_name("kernels.json")
DEVICES = {"cpu": Device(frozenset({ANY, CPU})), "triton": Device(frozenset({ANY, TRITON})), "hopper": H100}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Of a decode step, of a longer one, and of a longer one whose last layer keeps few tokens.
STEPS = ("decode", "mixed", "kept")
HEADS = [(151936, 1024), (151669, 4096), (32000, 960)]
ROUTERS = [(128, 2048), (60, 2048), (64, 960)]
GOLDEN: dict[str, Any] = json.loads(FILE.read_text())


def rows_like(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    return x.new_empty(len(x), *sizes)


def heads_like(x: torch.Tensor, size: int, cache: torch.Tensor) -> torch.Tensor:
    kv_heads, head_dim = cache.shape[2:]
    return rows_like(x, size // head_dim - 2 * kv_heads, head_dim)


def outputs(x: torch.Tensor, weight: torch.Tensor, gated: bool = False) -> torch.Tensor:
    return rows_like(x, len(weight) // 2 if gated else len(weight))


@contextmanager
def recorded(device: Device) -> Iterator[list[str]]:
    """Kernels only leave their names, and choices are those of ``device``; tensors are without memory."""
    names: list[str] = []

    def put(owner: Any, name: str, called: str | Callable[..., str], result: Callable[..., Any]) -> None:
        def record(*args: Any, **kwargs: Any) -> Any:
            names.append(called if isinstance(called, str) else called(**kwargs))
            return result(*args, **kwargs)

        stack.enter_context(mock.patch.object(owner, name, record))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "device_of", return_value=device))
        stack.enter_context(mock.patch.object(AttentionBatch, "split_kv_plan", return_value=None))
        for kind, owner in (("hopper", skinny_hopper), ("triton", skinny), ("reference", skinny)):
            put(
                owner,
                f"skinny_norm_linear_{kind}",
                lambda kind=kind, gated=False, **_: f"skinny_norm_{'swiglu' if gated else 'linear'}.{kind}",
                lambda x, norm, weight, bias, eps, gated=False, lens=None: outputs(x, weight, gated),
            )
            put(owner, f"skinny_linear_add_{kind}", f"skinny_linear_add.{kind}", lambda *args: None)
        put(
            skinny_hopper,
            "skinny_linear_hopper",
            "skinny_linear.hopper",
            lambda h, weight, *rest: outputs(h, weight),
        )
        put(torch.nn.functional, "linear", "linear", lambda h, weight, bias=None: outputs(h, weight))
        put(linear, "linear", "linear", lambda h, weight, bias=None: outputs(h, weight))
        put(torch.Tensor, "addmm_", "linear_add", lambda x, *args: x)
        put(torch.Tensor, "__iadd__", "add", lambda x, *args: x)
        put(
            linear,
            "small_batch_linear",
            lambda gated=False: "small_batch_swiglu" if gated else "small_batch_linear",
            lambda x, weight, bias, gated=False: outputs(x, weight, gated),
        )
        put(linear, "split_k_linear", "split_k_linear", lambda x, weight: x.new_empty(2, len(x), len(weight)))
        put(linear, "prefill_swiglu", "prefill_swiglu", lambda x, weight: outputs(x, weight, True))
        put(linear, "prefill_heads", "prefill_heads", lambda x, weight, *a: heads_like(x, len(weight), a[1].k_cache))
        put(linear, "silu_mul", "silu_mul", lambda x: rows_like(x, x.shape[1] // 2))
        for owner in (linear, decode):
            put(owner, "rotate_and_cache", "rotate_and_cache", lambda q, *a: heads_like(q, q.shape[1], a[0].k_cache))
        put(
            decode,
            "rotate_and_attend_triton",
            lambda hopper, **_: "rotate_and_attend." + ("hopper" if hopper else "triton"),
            lambda q, *a, **_: heads_like(q, q.shape[1], a[0].k_cache),
        )
        put(decode, "paged_attention", "paged_attention", lambda q, *args, **_: q)
        put(attention, "attend", "paged_attention", lambda q, *args: q)
        put(residual, "rms_norm", "rms_norm", lambda x, *args: x)
        put(residual, "add_rms_norm", "add_rms_norm", lambda *args: None)
        put(residual, "add_split_k", "add_split_k", lambda *args: None)
        put(residual, "add_split_k_and_norm", "add_split_k_and_norm", lambda x, *args: x)
        dispatch._chosen.cache_clear()
        yield names
    dispatch._chosen.cache_clear()


def make_layer(shape: dict[str, Any], dtype: torch.dtype, names: list[str]) -> DecoderLayer:
    hidden, q_heads, kv_heads, head_dim, inter = (
        shape[name] for name in ("hidden", "q_heads", "kv_heads", "head_dim", "inter")
    )

    def tensor(*sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    norm, size = Norm(tensor(hidden), 1e-6), (q_heads + 2 * kv_heads) * head_dim
    output_norm = norm if shape.get("sandwich") else None
    angles = torch.empty(64, shape.get("rotated", head_dim) // 2, device="meta")
    qkv = Linear(tensor(size, hidden), tensor(size) if shape.get("bias") else None)
    of_heads = Attention(
        norm,
        qkv,
        None,
        Rotation(angles, angles, shape.get("interleaved", False)),
        1.0,
        None,
        Linear(tensor(hidden, q_heads * head_dim)),
        output_norm,
    )

    def experts(x: torch.Tensor) -> torch.Tensor:
        names.append("experts")
        return x

    if not inter:
        return decoder_layer(0, of_heads, MoE(norm, experts, output_norm))
    mlp = MLP(norm, Linear(tensor(2 * inter, hidden)), Linear(tensor(hidden, inter)), output_norm)
    return decoder_layer(0, of_heads, mlp)


def run(layer: DecoderLayer, shape: dict[str, Any], rows: int, dtype: torch.dtype, step: str) -> None:
    def tensor(*sizes: int, kind: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(*sizes, dtype=kind, device="meta")

    caches = (tensor(4, 16, shape["kv_heads"], shape["head_dim"], kind=dtype) for _ in range(2))
    batch = AttentionBatch(
        slot_mapping=(tensor(rows),),
        block_tables=(tensor(rows, 4, kind=torch.int32),),
        cu_query_lens=tensor(rows + 1, kind=torch.int32),
        kv_lens=tensor(rows, kind=torch.int32),
        max_query_len=1 if step == "decode" else max(rows, 2),
        caches=[LayerCache(*caches)],
        kept=tensor(min(rows, 4)) if step == "kept" else None,
    )
    layer(tensor(1, rows, shape["hidden"], kind=dtype), position_ids=tensor(1, rows), attention_batch=batch)


def kernels(device: str, dtype: torch.dtype, rows: list[int], run_of: Callable[[list[str]], Callable[[int], object]]):
    """The kernels of numbers of rows: ``[first row, kernels]`` wherever they change."""
    found: list[list[Any]] = []
    with recorded(DEVICES[device]) as names:
        run_rows = run_of(names)
        for each in rows:
            names.clear()
            run_rows(each)
            if not found or found[-1][1] != " ".join(names):
                found.append([each, " ".join(names)])
    return found


def of_layer(device: str, dtype: torch.dtype, shape: dict[str, Any], step: str, rows: list[int]) -> list[list[Any]]:
    def run_of(names: list[str]) -> Callable[[int], object]:
        layer = make_layer(shape, dtype, names)
        return lambda count: run(layer, shape, count, dtype, step)

    return kernels(device, dtype, rows, run_of)


def of_weight(kind: str, device: str, dtype: torch.dtype, size: int, width: int, rows: list[int]) -> list[list[Any]]:
    weight = Linear(torch.empty(size, width, dtype=dtype, device="meta"))
    head = Head(Norm(torch.empty(width, dtype=dtype, device="meta"), 1e-6), weight)

    def run_of(names: list[str]) -> Callable[[int], object]:
        def run_rows(count: int) -> None:
            x = torch.empty(count, width, dtype=dtype, device="meta")
            if kind == "head":
                head(x.unsqueeze(0))
            else:
                weight(x)

        return run_rows

    return kernels(device, dtype, rows, run_of)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_takes_the_kernels_that_are_written_down(device: str, dtype: str, step: str) -> None:
    sequences, rows = GOLDEN["sequences"], GOLDEN["rows"]
    for name, shape in GOLDEN["shapes"].items():
        expected = [[row, sequences[number]] for row, number in GOLDEN["layers"][f"{device} {dtype} {name} {step}"]]
        assert of_layer(device, DTYPES[dtype], shape, step, rows) == expected, name


@pytest.mark.parametrize("kind", ["head", "router"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_head_and_a_router_take_the_kernels_that_are_written_down(device: str, dtype: str, kind: str) -> None:
    sequences, rows = GOLDEN["sequences"], GOLDEN["rows"]
    for size, width in HEADS if kind == "head" else ROUTERS:
        written = GOLDEN[f"{kind}s"][f"{device} {dtype} {size} {width}"]
        expected = [[row, sequences[number]] for row, number in written]
        assert of_weight(kind, device, DTYPES[dtype], size, width, rows) == expected


def write() -> None:
    """Write what the table gives now for the shapes and rows in the file."""
    shapes, rows, sequences = GOLDEN["shapes"], GOLDEN["rows"], []

    def numbered(found: list[list[Any]]) -> list[list[int]]:
        sequences.extend(names for _, names in found if names not in sequences)
        return [[row, sequences.index(names)] for row, names in found]

    tables: dict[str, dict[str, Any]] = {"layers": {}, "heads": {}, "routers": {}}
    for device, dtype in itertools.product(DEVICES, DTYPES):
        for (name, shape), step in itertools.product(shapes.items(), STEPS):
            found = of_layer(device, DTYPES[dtype], shape, step, rows)
            tables["layers"][f"{device} {dtype} {name} {step}"] = numbered(found)
        for kind, weights in (("head", HEADS), ("router", ROUTERS)):
            for size, width in weights:
                found = of_weight(kind, device, DTYPES[dtype], size, width, rows)
                tables[f"{kind}s"][f"{device} {dtype} {size} {width}"] = numbered(found)
    parts = {name: json.dumps(value) for name, value in (("rows", rows), ("sequences", sequences))}
    parts["sequences"] = parts["sequences"].replace('", "', '",\n"')
    for name, table in (("shapes", shapes), *tables.items()):
        parts[name] = (
            "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items()) + "}"
        )
    FILE.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in parts.items()) + "\n}\n")


if __name__ == "__main__":
    write()
