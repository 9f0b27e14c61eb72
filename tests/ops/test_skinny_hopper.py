"""Hopper's skinny GEMMs: on a GPU against float64, elsewhere what they take and that they compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops.dispatch import H100, Case, choose, decide
from graphmode.ops.linear import skinny
from graphmode.ops.linear import skinny_hopper as hopper
from tests.ops.test_fused import close, exact_norm

ROWS = [1, 2, 3, 8, 9, 16]
DTYPES = [torch.bfloat16, torch.float16]
# The layers of Qwen3 0.6B, 1.7B and 8B (input; size of a half), Qwen2.5's odd widths, and the smallest.
GATED = [(1024, 3072), (2048, 6144), (4096, 12288), (896, 4864), (128, 8)]
LINEAR = [(1024, 4096), (2048, 4096), (4096, 6144), (896, 1152), (128, 8), (256, 48)]
ADD = [(2048, 1024), (2048, 2048), (4096, 4096), (3072, 1024), (6144, 2048), (12288, 4096), (4864, 896), (128, 24)]


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("hidden", "size", "gated"), [(*each, True) for each in GATED] + [(*each, False) for each in LINEAR]
)
def test_norm_linear(hidden: int, size: int, gated: bool, with_bias: bool, dtype: torch.dtype) -> None:
    weight = random(2 * size if gated else size, hidden, dtype=dtype, scale=hidden**-0.5)
    norm, bias = random(hidden, dtype=dtype), random(len(weight), dtype=dtype) if with_bias else None
    assert choose("skinny_norm_swiglu" if gated else "skinny_norm_linear", 1, weight) == "hopper"
    for rows in ROWS:
        # As large as a residual stream may get in float16: times the norm's weight it would overflow.
        x = random(rows, hidden, dtype=dtype, scale=1e4)
        expected = exact_norm(x, norm, 1e-6) @ weight.double().T
        if bias is not None:
            expected += bias.double()
        if gated:
            gate, up = expected.chunk(2, dim=1)
            expected = gate * gate.sigmoid() * up
        close(skinny.skinny_norm_linear(x, norm, weight, bias, 1e-6, gated=gated), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "size"), ADD)
def test_linear_add(width: int, size: int, dtype: torch.dtype) -> None:
    weight = random(size, width, dtype=dtype, scale=width**-0.5)
    assert choose("skinny_linear_add", 1, weight) == "hopper"
    for rows in ROWS:
        x, h = random(rows, size, dtype=dtype), random(rows, width, dtype=dtype)
        expected = x.double() + h.double() @ weight.double().T
        skinny.skinny_linear_add(x, h, weight)
        close(x, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper", "nan_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "size"), ADD)
def test_linear(width: int, size: int, dtype: torch.dtype) -> None:
    weight = random(size, width, dtype=dtype, scale=width**-0.5)
    for rows in ROWS:
        h = random(rows, width, dtype=dtype)
        close(skinny.skinny_linear(h, weight), h.double() @ weight.double().T)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("rows", ROWS)
def test_rows_do_not_depend_on_each_other(rows: int) -> None:
    """What a row gets does not depend on what the others hold, NaN included, nor on which row it is."""
    dtype = torch.bfloat16
    weight, norm, down = (
        random(512, 1024, dtype=dtype),
        random(1024, dtype=dtype),
        random(1024, 3072, dtype=dtype),
    )
    x, h = random(rows, 1024, dtype=dtype), random(rows, 3072, dtype=dtype)

    def run(x: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
        added = x.clone()
        skinny.skinny_linear_add(added, h, down)
        outputs = [skinny.skinny_norm_linear(x, norm, weight, None, 1e-6, gated=gated) for gated in (False, True)]
        return [*outputs, added]

    expected = run(x, h)
    for one, other in zip(expected, run(x.flip(0), h.flip(0)), strict=True):
        assert torch.equal(one, other.flip(0))
    real = rows // 2
    bad_x, bad_h = x.clone(), h.clone()
    bad_x[real + 1 :], bad_h[real + 1 :] = float("nan"), float("nan")
    for one, other in zip(expected, run(bad_x, bad_h), strict=True):
        assert torch.equal(one[: real + 1], other[: real + 1])


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("rows", [3, 9, 16])
def test_padding_is_not_read(rows: int) -> None:
    weight, norm, down = (random(*shape, dtype=torch.bfloat16) for shape in ((512, 1024), (1024,), (1024, 3072)))
    x, h = random(rows, 1024, dtype=norm.dtype), random(rows, 3072, dtype=norm.dtype)
    real = torch.arange(rows, device="cuda") % 3 > 0
    lens = real.int() * 100

    def run(x: torch.Tensor, h: torch.Tensor, lens: torch.Tensor | None) -> list[torch.Tensor]:
        added = x.clone()
        skinny.skinny_linear_add(added, h, down, lens)
        normed = [
            skinny.skinny_norm_linear(x, norm, weight, None, 1e-6, gated=gated, lens=lens) for gated in (False, True)
        ]
        return [added, skinny.skinny_linear(h, down, lens=lens), *normed]

    expected = run(x, h, None)
    h[~real] = float("nan")
    added, *others = run(x, h, lens)
    assert torch.equal(added[~real], x[~real])
    for one, other in zip(expected, [added, *others], strict=True):
        assert torch.equal(one[real], other[real])
    assert all((other[~real] == 0).all() for other in others)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_nothing_beyond_the_rows_is_written(rows: int) -> None:
    room = torch.full((16, 1024), 7.0, device="cuda", dtype=torch.bfloat16)
    skinny.skinny_linear_add(room[:rows], random(rows, 2048, dtype=room.dtype), random(1024, 2048, dtype=room.dtype))
    assert (room[rows:] == 7.0).all()


@pytest.mark.parametrize(
    ("dtype", "size", "width", "fits"),
    [
        (torch.bfloat16, 1024, 3072, True),
        (torch.float16, 8, 128, True),
        (torch.bfloat16, 4864, 896, True),
        (torch.float32, 1024, 3072, False),
        (torch.bfloat16, 1028, 3072, False),
        (torch.bfloat16, 1024, 3008, False),
        (torch.bfloat16, 0, 128, False),
        (torch.bfloat16, 1024, 0, False),
    ],
)
def test_what_fits(dtype: torch.dtype, size: int, width: int, fits: bool) -> None:
    taken = decide("skinny_linear", Case(H100, dtype, 1, ((size, width),), ((size, width),))).implementation
    assert (taken == "hopper") is fits


def test_weights_elsewhere_are_not_taken() -> None:
    assert choose("skinny_linear", 1, torch.zeros(16, 128, dtype=torch.bfloat16)) == "reference"


@given(st.integers(1, 20000), st.integers(1, 300), st.integers(1, 16), st.sampled_from(["add", "norm", "gated"]))
def test_tilings_cover_the_weights(eighths: int, width_128: int, rows: int, kind: str) -> None:
    size, width = eighths * 8, width_128 * 128
    tile = hopper.tiling(size, width, rows, normed=kind != "add", gated=kind == "gated")
    assert size % tile.block_n == 0
    assert tile.block_n >= 8
    assert tile.block_k >= 32 * tile.warps
    for number in (tile.block_n, tile.block_k, tile.warps):
        assert number & (number - 1) == 0
    assert tile.ahead >= 1


@pytest.mark.parametrize("supported", [False, True])
def test_supported_weights_take_these_kernels(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    calls = []
    asked = []

    def choose(operation: str, rows: int, weight: torch.Tensor) -> str:
        asked.append(operation)
        return "hopper" if supported else "reference"

    monkeypatch.setattr(skinny, "choose", choose)
    monkeypatch.setattr(hopper, "skinny_norm_linear_hopper", lambda *args, gated, lens: calls.append(gated))
    monkeypatch.setattr(hopper, "skinny_linear_add_hopper", lambda *args: calls.append("add"))
    monkeypatch.setattr(hopper, "skinny_linear_hopper", lambda *args: calls.append("plain"))
    x, weight = torch.ones(2, 16), torch.ones(16, 16)
    skinny.skinny_norm_linear(x, x[0], weight, None, 1e-6)
    skinny.skinny_norm_linear(x, x[0], weight, None, 1e-6, gated=True)
    skinny.skinny_linear_add(x, x.clone(), weight)
    skinny.skinny_linear(x, weight)
    assert asked == ["skinny_norm_linear", "skinny_norm_swiglu", "skinny_linear_add", "skinny_linear"]
    assert calls == ([False, True, "add", "plain"] if supported else [])


COMPILE = r"""
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from graphmode.ops.linear import skinny_hopper as hopper

for size, width, gated, add, normed, rows, dtype in (
    (3072, 1024, True, False, True, 16, "bf16"), (48, 896, False, False, True, 8, "fp16"),
    (4096, 12288, False, True, False, 16, "bf16"), (1024, 3072, False, False, False, 8, "bf16"),
):
    tile = hopper.tiling(size, width, rows, normed=normed, gated=gated)
    pointers = {"x": 1, "norm": normed, "weight": 1, "bias": normed, "out": 1}
    constants = {"width": width, "gated": gated, "add": add, "block_m": 8 if rows <= 8 else 16,
                 "block_n": tile.block_n, "block_k": tile.block_k, "ahead": tile.ahead, "early": True}
    constants |= {name: None for name, given in pointers.items() if not given}
    signature = {name: "*" + dtype for name in pointers} | {"eps": "fp32", "lens": "*i32", "rows": "i32", "size": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = GluonASTSource(hopper._skinny_kernel, signature, constants, aligned)
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.warps}).asm["ptx"]
    # Weights come in loads of 16 bytes, before the wait.
    loads = re.finditer(r"ld\.global\S*\.v4", code)
    assert next(loads).start() < code.index("griddepcontrol.wait") < code.index("mma.sync"), code
"""


def test_compiles_without_a_gpu(compile_for_hopper: Callable[[str], None]) -> None:
    compile_for_hopper(COMPILE)
