from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph import GraphRunner, Input, InputError
from graphmode.graph.axes import AxisSize, resolve_axes
from graphmode.graph.backends.cpu import CpuBackend
from graphmode.graph.buffers import STAGING_BUFFERS, InputBuffers
from graphmode.graph.inputs import DeclaredInputs

DTYPES = [torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]


@st.composite
def declared(draw: st.DrawFn) -> tuple[list[Input], dict[str, int]]:
    limits = {"rows": draw(st.integers(1, 9)), "seqs": draw(st.integers(1, 5)), "blocks": draw(st.integers(1, 4))}
    shapes = st.lists(st.sampled_from(["rows", "seqs", "blocks", 1, 3]), max_size=3).map(tuple)
    specs = [
        Input(f"x{index}", draw(st.sampled_from(DTYPES)), draw(shapes), draw(st.integers(0, 1)))
        for index in range(draw(st.integers(1, 5)))
    ]
    return specs, limits


class StagingBackend(CpuBackend):
    """The CPU as a device whose memory is not the host's: values go through the staging ring."""

    capabilities = replace(CpuBackend.capabilities, host_memory=False)


BACKENDS = [backend(torch.device("cpu")) for backend in (CpuBackend, StagingBackend)]


@given(declared(), st.data(), st.sampled_from(BACKENDS))
def test_buffers_hold_the_values_and_padding_everywhere_else(
    case: tuple, data: st.DataObject, backend: CpuBackend
) -> None:
    """Whatever a step before left there, each step's graph sees its values and, beyond them, padding alone."""
    specs, limits = case
    buffers = InputBuffers(specs, limits, backend)
    for _ in range(3 * STAGING_BUFFERS):
        sizes = {axis: data.draw(st.integers(1, limit)) for axis, limit in limits.items()}
        true = {axis: data.draw(st.integers(0, size)) for axis, size in sizes.items()}
        values = {
            spec.name: torch.randint(0, 2, [true.get(axis, axis) for axis in spec.shape]).to(spec.dtype)
            for spec in specs
            if data.draw(st.integers(0, 3))
        }
        bound = buffers.bind(sizes)
        buffers.load(bound, values)
        for spec in specs:
            seen = bound.views[spec.name].clone()
            if spec.name not in values:
                assert bool((seen == spec.padding).all())
                continue
            value = values[spec.name]
            corner = tuple(slice(size) for size in value.shape)
            assert torch.equal(seen[corner], value)
            if value.numel():
                seen[corner] = spec.padding
            assert bool((seen == spec.padding).all())


@given(declared())
def test_inputs_do_not_overlap_and_are_aligned(case: tuple) -> None:
    specs, limits = case
    buffers = InputBuffers(specs, limits, BACKENDS[0])
    bound = buffers.bind(limits)
    regions = sorted((view.data_ptr(), view.numel() * view.itemsize) for view in bound.views.values())
    assert all(start % 16 == regions[0][0] % 16 for start, _ in regions)
    assert all(start + size <= after for (start, size), (after, _) in pairwise(regions))


@pytest.fixture
def runner() -> GraphRunner:
    inputs = [Input("x", torch.float32, ("rows", 4)), Input("ids", torch.int64, ("rows", "blocks"), padding=-1)]
    return GraphRunner(lambda x, ids: x + ids.sum(1, keepdim=True), inputs, [2, 4], axes={"blocks": 3}, backend="cpu")


GOOD = {"x": torch.zeros(3, 4), "ids": torch.zeros(3, 2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, ["'x'", "float64", "float32"]),
        ({"x": torch.zeros(3)}, ["'x'", "1 dimensions", "(3,)"]),
        ({"x": torch.zeros(3, 5)}, ["'x'", "(3, 5)", "is 4"]),
        ({"x": torch.zeros(3, 4, device="meta")}, ["'x'", "meta", "cpu"]),
        ({"x": [1.0]}, ["'x'", "list"]),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, ["'ids'", "'rows'", "is 3"]),
        ({"ids": torch.zeros(3, 4, dtype=torch.int64)}, ["'blocks'", "size 4", "limit", "3"]),
        ({"y": torch.zeros(3)}, ["unknown", "y"]),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(runner: GraphRunner, change: dict, names: list[str]) -> None:
    with pytest.raises(InputError) as error:
        runner(**{**GOOD, **change})
    for name in names:
        assert name in str(error.value)
    assert runner.stats.steps == 0
    assert runner(**GOOD).shape == (3, 4)


def test_a_missing_input_is_refused_by_name(runner: GraphRunner) -> None:
    with pytest.raises(InputError, match=r"missing: \['ids'\]"):
        runner(x=GOOD["x"])


@pytest.mark.parametrize(
    ("inputs", "axes"),
    [
        ([Input("x", torch.float32, (3,))], {}),
        ([Input("x", torch.float32, ("a", "b"))], {}),
        ([Input("x", torch.float32, ("a",))], {"a": 3}),
        ([Input("x", torch.float32, ("a",)), Input("x", torch.float32, ("a",))], {}),
    ],
)
def test_exactly_one_axis_is_bucketed(inputs: list[Input], axes: dict[str, AxisSize]) -> None:
    with pytest.raises(InputError):
        resolve_axes(DeclaredInputs(inputs).axes, axes)
