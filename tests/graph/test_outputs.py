"""Outputs are cut to what the function gives without padding: their axes are found, or must be declared."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph import CaptureError, GraphRunner, Input, InputError
from graphmode.graph.axes import resolve_axes
from graphmode.graph.outputs import Length, OutputAxes, Sample, find_output_axes, infer_output_axes

AXES = ["rows", "cols"]
lengths = st.one_of(st.builds(Length, st.integers(0, 9)), st.builds(Length, st.integers(-3, 0), st.sampled_from(AXES)))


@given(st.lists(st.lists(lengths, max_size=3).map(tuple), max_size=3).map(tuple), st.integers(1, 9), st.integers(1, 9))
def test_lengths_that_follow_an_axis_are_found(outputs: tuple[tuple[Length, ...], ...], rows: int, cols: int) -> None:
    def run(sizes: dict[str, int]) -> tuple[tuple[int, ...], ...]:
        if min(sizes.values()) < 4:
            raise ValueError("too short")
        return tuple(tuple(length.at(sizes) for length in output) for output in outputs)

    rows, cols = rows + 4, cols + 4
    axes, full, limits = resolve_axes(AXES, {"cols": cols}), {"rows": rows, "cols": cols}, {"rows": 14, "cols": cols}
    found = find_output_axes([Sample(full, run(full))], axes, AXES, limits, (), run)
    if isinstance(found, str):
        assert "ValueError: too short" in found
        return
    for sizes in ({"rows": a, "cols": b} for a, b in product(range(4, 14), range(4, cols + 1))):
        assert found.problem(run(sizes), sizes) is None


@pytest.mark.parametrize(
    "length",
    [lambda n: -(-n // 2), lambda n: min(n, 4), lambda n: 9 - n, lambda n: n * n, lambda n: 2 * n, lambda n: n + 1],
)
def test_other_lengths_are_never_guessed(length: Callable[[int], int]) -> None:
    def run(sizes: dict[str, int]) -> tuple[tuple[int, ...], ...]:
        return ((length(sizes["n"]),),)

    for bucket in range(3, 9):
        axes, full = resolve_axes(["n"], {}), {"n": bucket}
        found = find_output_axes([Sample(full, run(full))], axes, ["n"], full, (), run)
        right = isinstance(found, OutputAxes) and all(
            found.lengths[0][0].at({"n": n}) == length(n) for n in range(1, bucket + 1)
        )
        assert right or isinstance(found, str)


def test_outputs_of_other_ranks_cannot_be_told() -> None:
    samples = [Sample({"n": 4}, ((4,),)), Sample({"n": 1}, ((),))]
    assert "numbers of dimensions" in str(infer_output_axes(samples, ["n"]))


X = Input("x", torch.float32, ("n", 8))
FUNCTIONS: dict[str, Callable[[torch.Tensor], object]] = {
    "mean over the rows, as wide as the bucket": lambda x: x.sum(0),
    "transposed": lambda x: x.T,
    "a number": lambda x: x.sum(),
    "rows twice": lambda x: x @ x.T,
    "rows between": lambda x: torch.stack([x, x], 1),
    "shorter by a kernel": lambda x: torch.nn.functional.conv1d(x.T, torch.ones(1, 8, 3, device=x.device)),
    "several": lambda x: {"a": x[:, 0], "b": (x.T, x.sum(0)), "none": None},
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("buckets", [[8], [4, 8]])
def test_outputs_have_the_shapes_of_the_unpadded_call(device: str, name: str, buckets: list[int]) -> None:
    fn = FUNCTIONS[name]
    runner = GraphRunner(fn, [X], buckets, backend=device, strict=True)
    for rows in (5, 3, 8, 7, 4):
        x = torch.randint(5, (rows, 8)).float()
        torch.testing.assert_close(runner(x=x, own=True), fn(x.to(device)))
    assert runner.stats.eager_steps == 0


def test_axes_of_other_inputs_are_found_too(device: str) -> None:
    runner = GraphRunner(
        lambda x, y: (x @ y.T, y),
        [X, Input("y", torch.float32, ("m", 8))],
        [4],
        axes={"m": 6},
        backend=device,
        strict=True,
    )
    x, y = torch.randn(3, 8), torch.randn(5, 8)
    torch.testing.assert_close([each.cpu() for each in runner(x=x, y=y)], [x @ y.T, y])


@pytest.mark.parametrize("patches_first", [True, False])
def test_sizes_that_must_agree_are_tried_together(device: str, patches_first: bool) -> None:
    """The number of patches is four times that of units, and the function takes nothing else."""
    inputs = [Input("patches", torch.float32, ("p", 2)), Input("units", torch.float32, ("u", 2))]
    runner = GraphRunner(
        lambda patches, units: patches.view(len(units), 4, 2).sum(1) + units,
        inputs if patches_first else inputs[::-1],
        [8],
        axes={"p": lambda u: 4 * u},
        backend=device,
        strict=True,
    )
    assert runner(patches=torch.ones(12, 2), units=torch.ones(3, 2)).tolist() == [[5.0, 5.0]] * 3


UNTOLD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "every second row": lambda x: x[::2],
    "rows twice": lambda x: torch.cat([x, x]),
    "a row behind": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 1)),
    "the first four": lambda x: x[:4],
    "flat": lambda x: x.T.flatten(),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_what_shapes_do_not_tell_must_be_declared(device: str, name: str) -> None:
    runner = GraphRunner(UNTOLD[name], [X], [8], backend=device)
    runner.capture()
    x = torch.randn(8, 8)
    assert torch.equal(runner(x=x).cpu(), UNTOLD[name](x))
    with pytest.raises(InputError, match="Declare them with output_axes"):
        runner(x=x[:5])


def test_a_length_in_steps_may_be_declared(device: str) -> None:
    halves = GraphRunner(
        lambda x: x[::2], [X], [8], axes={"half": lambda n: -(-n // 2)}, output_axes=[("half",)], backend=device
    )
    for rows in (5, 8, 1):
        assert halves(x=torch.ones(rows, 8)).shape == (-(-rows // 2), 8)


def test_an_axis_that_only_an_output_has_is_computed_from_the_true_size(device: str) -> None:
    runner = GraphRunner(
        lambda frames: frames.repeat_interleave(4, 0).flatten(),
        [Input("frames", torch.float32, ("frames", 2))],
        [8],
        axes={"samples": lambda frames: 8 * frames},
        output_axes=[("samples",)],
        backend=device,
    )
    assert runner(frames=torch.ones(3, 2)).shape == (24,)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"output_axes": [("rows",)]}, ["output_axes", "'rows'", "'n'"]),
        ({"axes": {"m": 3}}, ["'m'", "no input and no output"]),
        ({"axes": {"m": lambda k: 3}, "output_axes": [("m",)]}, ["'m'", "'k'"]),
    ],
)
def test_an_axis_that_is_not_there_is_refused_when_the_runner_is_made(options: dict, names: list[str]) -> None:
    inputs = [X] if "'k'" not in names else [X, Input("y", torch.float32, ("o",))]
    buckets: object = 8 if "'k'" not in names else {"n": 8, "o": 4}
    with pytest.raises(InputError) as error:
        GraphRunner(lambda **inputs: inputs["x"], inputs, buckets, backend="cpu", **options)
    for name in names:
        assert name in str(error.value)


def test_declared_axes_that_do_not_fit_fail_the_capture(device: str) -> None:
    runner = GraphRunner(lambda x: (x, x.T), [X], [4], output_axes=[("n",), ("n",)], backend=device, strict=True)
    with pytest.raises(CaptureError, match=r"output 1 has shape \(8, 4\)"):
        runner.capture()
    few = GraphRunner(lambda x: (x, x.T), [X], [4], output_axes=[("n",)], backend=device, strict=True)
    with pytest.raises(CaptureError, match="returned 2 tensors; output_axes declares 1"):
        few.capture()
