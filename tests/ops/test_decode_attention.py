"""The kernel of a whole decode attention does what rotation, cache writes and paged attention do one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops import PagedBatch, Scoring, rotate_and_attend
from graphmode.ops.attention.decode import rotate_and_attend_reference, rotate_and_attend_triton
from graphmode.ops.attention.split_kv import plan_split_kv
from graphmode.ops.rope import HeadInputs, Rotation

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def make_inputs(
    kv_lens: list[int],
    *,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 4,
    normed: bool = True,
    padding: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, object]:
    """Sequences in blocks of their own, in no order; NaN wherever no key is, and in padding rows."""
    generator = torch.Generator().manual_seed(seed)
    rows, places = len(kv_lens) + padding, max(kv_lens, default=1)
    max_blocks = -(-places // block_size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    qkv = random(rows, (q_heads + 2 * kv_heads) * head_dim)
    qkv[len(kv_lens) :] = float("nan")
    pool = torch.randperm(len(kv_lens) * max_blocks + 1, generator=generator)
    tables = torch.full((rows, max_blocks), 0x7FEDCBA9, dtype=torch.int32)
    caches = torch.full((2, len(pool), block_size, kv_heads, head_dim), float("nan"), dtype=dtype, device=device)
    slots = [-1] * rows
    for seq, length in enumerate(kv_lens):
        blocks = pool[seq * max_blocks : seq * max_blocks + -(-length // block_size)]
        tables[seq, : len(blocks)] = blocks.int()
        place = torch.arange(length)
        of_place = blocks[place // block_size] * block_size + place % block_size
        old = of_place[:-1].to(device)
        for cache in caches:
            cache.flatten(0, 1)[old] = random(length - 1, kv_heads, head_dim)
        slots[seq] = int(of_place[-1])
    angles = torch.rand(places, head_dim // 2, generator=generator) * 6
    norms = [random(head_dim), random(head_dim)] if normed else [None, None]
    return {
        "qkv": qkv,
        "inputs": HeadInputs(
            *norms,
            1e-6,
            Rotation(angles.cos().to(device), angles.sin().to(device)),
            torch.tensor([length - 1 for length in kv_lens] + [0] * padding, device=device),
            *caches,
            torch.tensor(slots, device=device),
        ),
        "batch": PagedBatch(
            tables.to(device),
            torch.arange(rows + 1, dtype=torch.int32, device=device),
            torch.tensor(kv_lens + [0] * padding, dtype=torch.int32, device=device),
            1,
        ),
    }


def with_caches_apart(inputs: dict) -> dict:
    """The same with a cache of its own."""
    heads = inputs["inputs"]
    return {**inputs, "inputs": heads._replace(k_cache=heads.k_cache.clone(), v_cache=heads.v_cache.clone())}


def check(
    inputs: dict,
    *,
    window: int | None = None,
    spare: int | None = None,
    run: Callable[..., torch.Tensor] = rotate_and_attend_triton,
) -> None:
    apart = with_caches_apart(inputs)
    scoring = Scoring(0.3, window)
    expected = rotate_and_attend_reference(**apart, scoring=scoring)
    kv_lens = inputs["batch"].kv_lens
    plan = plan_split_kv(kv_lens, inputs["inputs"].k_cache.shape[2], window=window, spare=spare)
    output = run(**inputs, scoring=scoring, plan=plan)
    tolerance = TOLERANCE[output.dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    assert not output[kv_lens == 0].any()
    for name in ("k_cache", "v_cache"):
        ours, theirs = (getattr(each["inputs"], name) for each in (inputs, apart))
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("spare", [1, 2, 8, None])
@pytest.mark.parametrize("window", [None, 1, 5, 70])
def test_splits_and_windows(kernel_device: str, spare: int | None, window: int | None) -> None:
    check(make_inputs([1, 2, 17, 300, 64, 65], device=kernel_device), spare=spare, window=window)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("heads", [(3, 1, 16), (8, 8, 20), (14, 2, 64), (2, 2, 128), (36, 2, 32)])
def test_heads(kernel_device: str, heads: tuple[int, int, int], normed: bool) -> None:
    q_heads, kv_heads, head_dim = heads
    sizes = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, "normed": normed}
    check(make_inputs([40, 1, 9], device=kernel_device, **sizes))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision(kernel_device: str, dtype: torch.dtype) -> None:
    check(make_inputs([200, 3, 77], dtype=dtype, head_dim=64, device=kernel_device))


@given(
    kv_lens=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    padding=st.integers(0, 2),
    window=st.sampled_from([None, 3]),
    spare=st.sampled_from([1, 3]),
    block_size=st.sampled_from([1, 3, 16]),
)
def test_any_lengths(kv_lens: list[int], padding: int, window: int | None, spare: int, block_size: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(
        make_inputs(kv_lens, padding=padding, block_size=block_size, head_dim=16, device=device),
        window=window,
        spare=spare,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [8, 5])
def test_rotations_that_the_kernel_does_not_take_go_through_two(device: str, interleaved: bool, half: int) -> None:
    inputs = make_inputs([12, 3], head_dim=16, device=device)
    cos, sin, _ = inputs["inputs"].rotation
    rotation = Rotation(cos[:, :half].contiguous(), sin[:, :half].contiguous(), interleaved)
    inputs["inputs"] = inputs["inputs"]._replace(rotation=rotation)
    apart = with_caches_apart(inputs)
    expected = rotate_and_attend_reference(**apart, scoring=Scoring(0.25))
    output = rotate_and_attend(**inputs, scoring=Scoring(0.25))
    torch.testing.assert_close(output[:2], expected[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scoring", [Scoring(0.25, soft_cap=1.0), Scoring(0.25, sinks=torch.ones(4))])
def test_scores_that_the_kernel_does_not_take_go_through_two(scoring: Scoring) -> None:
    inputs = make_inputs([12, 3], q_heads=4)
    apart = with_caches_apart(inputs)
    expected = rotate_and_attend_reference(**apart, scoring=scoring)
    torch.testing.assert_close(rotate_and_attend(**inputs, scoring=scoring)[:2], expected[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qkv", torch.zeros(4, 40), r"the size of queries, keys and values is 40, expected whole heads of 32"),
        ("positions", torch.zeros(2, dtype=torch.int64), r"positions has shape \[2\], expected \[4\]"),
        ("batch", 3, "max_query_len is 3, expected 1"),
    ],
)
def test_refuses_what_does_not_fit(name: str, value: object, message: str) -> None:
    inputs = make_inputs([12, 3])
    if name == "qkv":
        inputs[name] = value
    elif name == "batch":
        inputs[name] = inputs[name]._replace(max_query_len=value)
    else:
        inputs["inputs"] = inputs["inputs"]._replace(**{name: value})
    with pytest.raises(ValueError, match=message):
        rotate_and_attend(**inputs, scoring=Scoring(1.0))
