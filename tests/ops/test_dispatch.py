"""The table of kernels: what it gives, why not what comes before, and that it gives something for every case."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops import dispatch
from graphmode.ops._checks import FLOATS
from graphmode.ops.dispatch import ANY, CPU, H100, TABLE, TRITON, Case, Device, Heads, choose, decide, wave_efficiency

OPERATIONS = sorted({row.operation for row in TABLE})
DEVICES = [Device(frozenset({ANY, CPU})), Device(frozenset({ANY, TRITON})), H100, Device(frozenset({ANY}))]
SHAPES = st.tuples(st.integers(1, 40000), st.integers(1, 20000))


def case(rows: int, *weights: tuple[int, int], dtype: torch.dtype = torch.bfloat16, device: Device = H100) -> Case:
    return Case(device, dtype, rows, weights, weights)


@given(
    st.sampled_from(OPERATIONS),
    st.sampled_from(DEVICES),
    st.sampled_from(FLOATS),
    st.integers(0, 20000),
    st.lists(SHAPES, min_size=1, max_size=2),
    st.builds(Heads, st.integers(1, 64), st.integers(1, 16), st.sampled_from([64, 80, 128, 256]), st.booleans()),
)
def test_the_first_row_that_holds_is_taken_and_those_before_say_why_not(
    operation: str,
    device: Device,
    dtype: torch.dtype,
    rows: int,
    weights: list[tuple[int, int]],
    heads: Heads,
) -> None:
    given = Case(device, dtype, rows, tuple(weights), tuple(weights), heads)
    choice = decide(operation, given)
    taken = len(choice.others)
    table = dispatch.rows_of(operation)
    assert table[taken].implementation == choice.implementation
    assert table[taken].on in device.abilities
    assert [row.implementation for row in table[:taken]] == [name for name, _ in choice.others]
    assert all(reason for _, reason in choice.others)


def test_what_is_missing_is_named() -> None:
    assert decide("norm_swiglu", case(8, (6144, 1024))) == ("skinny", (("skinny", "takes 0 to 1 rows"),))
    _, others = decide("norm_swiglu", case(300, (6144, 1024), dtype=torch.float32))
    assert dict(others)["prefill"] == "takes bfloat16 or float16"
    _, others = decide("norm_swiglu", case(300, (6144, 1000)))
    assert dict(others)["prefill"] == "needs outputs in 256s and inputs in 128s"
    _, others = decide("norm_swiglu", case(300, (6144, 1024), device=DEVICES[0]))
    assert dict(others)["prefill"] == "runs on Hopper"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_runs_everywhere(operation: str) -> None:
    *_, last = dispatch.rows_of(operation)
    assert (last.on, last.dtypes, last.rows, last.needs) == (ANY, FLOATS, (0, None), ())


def test_skinny_gemms_are_taken_for_all_weights_of_a_layer_or_for_none() -> None:
    fits, does_not = (1024, 1024), (1024, 1000)
    for layer, expected in (((fits, fits), "skinny"), ((fits, does_not), "torch")):
        assert decide("linear", Case(H100, torch.bfloat16, 16, (fits,), layer)).implementation == expected


def test_choices_for_tensors_are_those_of_their_device() -> None:
    weight = torch.zeros(64, 128)
    assert choose("linear", 8, weight) == "torch"
    assert choose("rms_norm", 8, weight[0]) == "cpu"
    assert choose("rms_norm", 8, weight[0].bfloat16()) == "reference"


@given(st.integers(1, 20000), st.integers(1, 100), st.integers(1, 200))
def test_wave_efficiency_is_a_share(rows: int, columns: int, multiprocessors: int) -> None:
    efficiency = wave_efficiency(rows, 256 * columns, multiprocessors)
    assert 0 < efficiency <= 1
    assert efficiency > 0.5 or rows <= 128 * multiprocessors
    assert wave_efficiency(128 * multiprocessors, 256 * columns, multiprocessors) == 1
