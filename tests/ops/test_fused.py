"""The kernels of fused layers against float64, in Triton and in PyTorch, on odd sizes."""

from __future__ import annotations

import pytest
import torch

from graphmode.ops import rope
from graphmode.ops.linear import skinny
from graphmode.ops.norm import rms_norm as norm
from graphmode.ops.norm import split_k_residual
from graphmode.ops.rope import Rotation

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SIZES = [(1, 64, 48), (1, 1536, 10), (2, 768, 130), (16, 80, 70), (7, 2048, 6)]


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare by the norm of the difference, so that a few elements near zero do not decide."""
    error = (got.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[got.dtype], float(error)
    assert torch.isfinite(got).all()


def exact_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.double() * (x.double().pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


# The interpreter multiplies bfloat16 matrices wrongly.
@pytest.fixture(params=[torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def random(kernel_device: str, dtype: torch.dtype):
    return lambda *shape: torch.randn(*shape, device=kernel_device).to(dtype)


@pytest.fixture
def float_implementation(implementation_or_cpu: str, dtype: torch.dtype) -> str:
    if implementation_or_cpu == "cpu" and dtype != torch.float32:
        pytest.skip("the CPU's loops are float32")
    return implementation_or_cpu


@pytest.mark.parametrize(("rows", "hidden"), [(1, 16), (3, 1000), (5, 128)])
def test_rms_norm(float_implementation: str, random, rows: int, hidden: int, nan_memory: None) -> None:
    x, weight = random(rows, hidden) * 3, random(hidden)
    close(getattr(norm, f"rms_norm_{float_implementation}")(x, weight, 1e-3), exact_norm(x, weight, 1e-3))


@pytest.mark.parametrize(("rows", "hidden"), [(1, 16), (3, 1000), (5, 128)])
def test_add_rms_norm(float_implementation: str, random, rows: int, hidden: int) -> None:
    x, h, weight = random(rows, hidden), random(rows, hidden) * 3, random(hidden)
    expected = x.double() + exact_norm(h, weight, 1e-3)
    getattr(norm, f"add_rms_norm_{float_implementation}")(x, h, weight, 1e-3)
    close(x, expected)


@pytest.mark.parametrize(("splits", "rows", "hidden"), [(1, 1, 16), (3, 4, 1000), (8, 2, 128)])
def test_add_split_k(implementation: str, random, splits: int, rows: int, hidden: int, nan_memory: None) -> None:
    x, weight = random(rows, hidden) * 3, random(hidden)
    parts = random(splits, rows, hidden).float()
    expected, alone = x.double() + parts.double().sum(0), x.clone()
    normed = getattr(split_k_residual, f"add_split_k_and_norm_{implementation}")(x, parts, weight, 1e-3)
    close(x, expected)
    close(normed, exact_norm(x, weight, 1e-3))
    getattr(split_k_residual, f"add_split_k_{implementation}")(alone, parts)
    assert torch.equal(alone, x)


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 1500)])
def test_silu_mul(float_implementation: str, random, rows: int, size: int, nan_memory: None) -> None:
    gate_up = random(rows, 2 * size) * 3
    gate, up = gate_up.double().chunk(2, dim=1)
    close(getattr(norm, f"silu_mul_{float_implementation}")(gate_up), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "hidden", "out"), SIZES)
def test_norm_linear(
    implementation: str, random, rows: int, hidden: int, out: int, gated: bool, nan_memory: None
) -> None:
    x, weight, scale = random(rows, hidden), random(out, hidden), random(hidden)
    bias = random(out) if out > 50 else None
    expected = exact_norm(x, scale, 1e-6) @ weight.double().T
    if bias is not None:
        expected += bias.double()
    if gated:
        gate, up = expected.chunk(2, dim=1)
        expected = gate * gate.sigmoid() * up
    close(getattr(skinny, f"skinny_norm_linear_{implementation}")(x, scale, weight, bias, 1e-6, gated=gated), expected)


@pytest.mark.parametrize(("rows", "width", "out"), SIZES)
def test_linear_add(implementation: str, random, rows: int, width: int, out: int) -> None:
    x, h, weight = random(rows, out), random(rows, width), random(out, width)
    expected = x.double() + h.double() @ weight.double().T
    getattr(skinny, f"skinny_linear_add_{implementation}")(x, h, weight)
    close(x, expected)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_rows_do_not_depend_on_each_other(implementation: str, random, rows: int) -> None:
    """What a row gets does not depend on what the others hold, NaN included: padding is harmless."""
    x, weight, scale, h, down = random(rows, 256), random(64, 256), random(256), random(rows, 64), random(256, 64)

    def run(x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = getattr(skinny, f"skinny_norm_linear_{implementation}")(x, scale, weight, None, 1e-6)
        x = x.clone()
        getattr(skinny, f"skinny_linear_add_{implementation}")(x, h, down)
        return result[0], x[0]

    clean = run(x, h)
    x[1:], h[1:] = float("nan"), float("nan")
    for one, other in zip(clean, run(x, h), strict=True):
        assert torch.equal(one, other)


def exact_heads(heads: torch.Tensor, weight: torch.Tensor | None, rotation: Rotation, positions) -> torch.Tensor:
    """Each pair as a complex number, turned by its angle."""
    values = heads.double() if weight is None else exact_norm(heads, weight, 1e-6)
    half = rotation.cos.shape[1]
    angles = torch.complex(rotation.cos[positions].double(), rotation.sin[positions].double()).unsqueeze(1)
    if rotation.interleaved:
        pairs = torch.complex(values[..., : 2 * half : 2].contiguous(), values[..., 1 : 2 * half : 2].contiguous())
        turned = torch.view_as_real(pairs * angles).flatten(-2)
    else:
        pairs = torch.complex(values[..., :half].contiguous(), values[..., half : 2 * half].contiguous())
        turned = torch.cat([(pairs * angles).real, (pairs * angles).imag], dim=-1)
    return torch.cat([turned, values[..., 2 * half :]], dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (24, 12), (32, 8), (20, 6)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_rotate_and_cache(
    float_implementation: str,
    random,
    dtype: torch.dtype,
    kernel_device: str,
    interleaved: bool,
    head_dim: int,
    half: int,
    normed: bool,
    q_heads: int,
    kv_heads: int,
    nan_memory: None,
) -> None:
    tokens, places = 5, 11
    qkv = random(tokens, (q_heads + 2 * kv_heads) * head_dim)
    angles = torch.rand(places, half, device=kernel_device) * 6
    rotation = Rotation(angles.cos(), angles.sin(), interleaved)
    positions = torch.tensor([10, 0, 3, 3, 7], device=kernel_device)
    slots = torch.tensor([5, -1, 0, 11, -1], device=kernel_device)
    q_norm, k_norm = (random(head_dim), random(head_dim)) if normed else (None, None)
    caches = [random(3, 4, kv_heads, head_dim) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    queries = getattr(rope, f"rotate_and_cache_{float_implementation}")(
        qkv, rope.HeadInputs(q_norm, k_norm, 1e-6, rotation, positions, *caches, slots)
    )
    heads = qkv.view(tokens, -1, head_dim)
    close(queries, exact_heads(heads[:, :q_heads], q_norm, rotation, positions))
    keys = exact_heads(heads[:, q_heads : q_heads + kv_heads], k_norm, rotation, positions)
    values = heads[:, q_heads + kv_heads :]
    real = slots >= 0
    close(caches[0].flatten(0, 1)[slots[real]], keys[real])
    assert torch.equal(caches[1].flatten(0, 1)[slots[real]], values[real])
    others = torch.ones(12, dtype=torch.bool, device=kernel_device)
    others[slots[real]] = False
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache.flatten(0, 1)[others], old.flatten(0, 1)[others])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 8, 16])
def test_sizes_of_a_real_model_on_a_gpu(rows: int) -> None:
    """Qwen3-0.6B's and 8B's, compiled, with kernels that start early one after the other."""
    for hidden, inter in ((1024, 3072), (4096, 12288)):
        x = torch.randn(rows, hidden, device="cuda").bfloat16()
        scale = torch.randn(hidden, device="cuda").bfloat16()
        up = (torch.randn(2 * inter, hidden, device="cuda") / hidden**0.5).bfloat16()
        down = (torch.randn(hidden, inter, device="cuda") / inter**0.5).bfloat16()
        expected_h = exact_norm(x, scale, 1e-6) @ up.double().T
        gate, rest = expected_h.chunk(2, dim=1)
        expected_h = gate * gate.sigmoid() * rest
        expected = x.double() + expected_h @ down.double().T
        for _ in range(20):
            result = x.clone()
            h = skinny.skinny_norm_linear(result, scale, up, None, 1e-6, gated=True)
            skinny.skinny_linear_add(result, h, down)
            close(h, expected_h)
            close(result, expected)
