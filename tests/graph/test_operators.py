"""Torch's operator database: each operator is captured and its replays are bitwise eager ones, or it is refused.

Every entry: ``make test-operators``.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphmode.graph import CaptureError, GraphRunner, Input, UnsupportedOpError

DTYPES = (torch.float32, torch.complex64, torch.int64, torch.bool)
# What these return is, in part at least, memory as it was: eager runs differ from each other.
UNINITIALISED = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "torch.ops.aten._flash_attention_forward",
}

# What is refused on a CPU, by entry of the database, and why.
REFUSED: dict[str, str] = {
    "argwhere": "as many rows as there are values other than zero",
    "bincount": "as many results as the largest value says",
    "combinations": "built on masked_select",
    "corrcoef": "looks whether its weights are negative",
    "cov": "looks whether its weights are negative",
    "istft": "looks whether its window is zero anywhere",
    "linalg.lstsq": "residuals only where the rank is full",
    "linalg.lstsq.grad_oriented": "residuals only where the rank is full",
    "masked_select": "as many results as are selected",
    "narrow": "a start given as a tensor is read by Python",
    "nn.functional.ctc_loss": "lengths are read by Python, and its shapes follow from targets",
    "nn.functional.gaussian_nll_loss": "looks whether a variance is negative",
    "nn.functional.one_hot": "without a number of classes it looks for the largest",
    "nonzero": "as many rows as there are values other than zero",
    "nanquantile": "looks whether given quantiles are in range",
    "quantile": "looks whether given quantiles are in range",
    "repeat_interleave": "as many results as repeats given as a tensor say",
    "resize_": "exchanges memory",
    "sparse.mm.reduce": "a sparse tensor",
    "sparse.sampled_addmm": "a sparse tensor",
    "tensor_split": "places given as a tensor are read by Python",
    "to_sparse": "a sparse tensor",
    "unique": "as many results as there are different values",
    "unique_consecutive": "as many results as there are different values",
}
BY_VERSION = {"quantile", "nanquantile"}  # torch 2.13 does not look
# In-place forms that take a smaller tensor and give it the result's shape.
RESIZED = {"addbmm"}

# In the ordinary suite: operators of each kind, and those that were wrong once.
# fmt: off
CHOSEN = [
    "addbmm", "bernoulli", "cholesky", "cumsum", "einsum", "fft.fft", "index_put",
    "linalg.cond", "linalg.eigvalsh", "linalg.qr", "linalg.svdvals", "masked_select", "matmul", "multinomial",
    "narrow", "nn.functional.batch_norm", "nn.functional.binary_cross_entropy", "nn.functional.conv_transpose2d",
    "nn.functional.dropout3d", "nn.functional.embedding_bag", "nn.functional.fractional_max_pool3d",
    "nn.functional.layer_norm", "nn.functional.rrelu", "nn.functional.scaled_dot_product_attention", "norm.nuc",
    "put", "scatter_reduce.amax", "sort", "stft", "svd_lowrank", "tensor_split", "to_sparse", "topk",
    "view_as_complex", "where",
]
# fmt: on


@cache
def database() -> dict[str, Any]:
    """Return the entries by name. Those of random operators do not seed: a replay would not do it again."""
    from torch.testing._internal import common_methods_invocations as database

    database.wrapper_set_seed = lambda operator, *args, **kwargs: operator(*args, **kwargs)  # type: ignore[assignment]
    return {entry.name + f".{entry.variant_test_name}".rstrip("."): entry for entry in database.op_db}


def samples(entry: Any, device: str, count: int) -> Iterator[tuple[list[Any], list[Any], Any]]:
    """Yield arguments, flat, others of the same shapes where there are any, and their structure."""
    supported = entry.supported_dtypes(device)
    if not supported:
        return
    dtype = next((dtype for dtype in DTYPES if dtype in supported), min(supported, key=str))
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        arguments = islice(entry.sample_inputs(device, dtype, requires_grad=False), count)
        made.append([tree_flatten((sample.input, sample.args, sample.kwargs)) for sample in arguments])
    for (one, spec), (other, _) in zip(*made, strict=False):
        alike = len(one) == len(other) and all(map(_alike, one, other))
        yield one, other if alike else one, spec


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (one.shape, one.dtype) == (other.shape, other.dtype)
    return type(one) is type(other)


def _changes(value: Any) -> bool:
    dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested
    return dense and value.dtype.itemsize * 8 > 1 and "float8" not in str(value.dtype)


def replayed(
    operator: Callable[..., Any], first: list[Any], second: list[Any], spec: Any, device: str
) -> tuple[str, str]:
    """Capture an operator with its first arguments, replay it with both, and say how that compares with eager runs."""
    names = {f"x{index}": index for index, value in enumerate(first) if _changes(value)}
    constants = [value.clone() if isinstance(value, torch.Tensor) else value for value in first]

    def fn(rows: torch.Tensor, **inputs: torch.Tensor) -> Any:
        leaves = list(constants)
        for name, index in names.items():  # what a padded input, of zeros, makes of it are the first arguments
            change = inputs[name]
            leaves[index] = leaves[index] ^ change if change.dtype == torch.bool else leaves[index] + change
        subject, args, kwargs = tree_unflatten(leaves, spec)
        return operator(subject, *args, **kwargs)

    def change(index: int) -> torch.Tensor:
        one, other = first[index], second[index]
        return (one ^ other if one.dtype == torch.bool else other - one).cpu()

    changed = {name: change(index) for name, index in names.items()} | {"rows": torch.zeros(1)}
    unchanged = {name: torch.zeros_like(value) for name, value in changed.items()}
    try:
        with torch.inference_mode():
            results, _ = tree_flatten(fn(**{name: value.to(device) for name, value in changed.items()}))
    except Exception as error:
        return "raises", str(error)
    if not results or not all(isinstance(result, torch.Tensor) for result in results):
        return "no tensors", ""
    inputs = [Input("rows", torch.float32, ("rows",))]
    inputs += [Input(name, changed[name].dtype, tuple(changed[name].shape)) for name in names]
    runner = GraphRunner(fn, inputs, [1], backend=device, strict=True, output_axes=[()] * len(results))
    try:
        runner(**unchanged)
    except UnsupportedOpError as error:
        return "refused", str(error)
    except CaptureError as error:
        return "refused" if device == "cuda" else "failed", str(error)
    key = runner.keys[0]
    for values in (changed, unchanged, changed):
        runs = []
        for run in (runner, lambda **values: runner.run_eagerly(key, **values)) + (
            (lambda **values: runner.run_eagerly(key, **values),) if device == "cuda" else ()
        ):
            torch.manual_seed(3)
            runs.append([result.clone() for result in tree_flatten(run(**values))[0]])
        if not all(map(same_bits, runs[0], runs[1])):
            differs_itself = device == "cuda" and not all(map(same_bits, runs[1], runs[2]))
            return ("nondeterministic", "") if differs_itself else ("WRONG", f"{runs[0]} beside {runs[1]}"[:300])
    return "equal", ""


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether tensors are the same to the bit, NaN being equal to NaN."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    one, other = one.resolve_conj().resolve_neg(), other.resolve_conj().resolve_neg()
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    if one.is_floating_point():
        one, other = one.double(), other.double()
        signs = torch.equal(one.signbit() & ~one.isnan(), other.signbit() & ~other.isnan())
        return (
            signs
            and torch.equal(one.nan_to_num(0.5), other.nan_to_num(0.5))
            and torch.equal(one.isnan(), other.isnan())
        )
    return torch.equal(one, other)


def outcomes(names: list[str], device: str, count: int) -> dict[str, list[tuple[str, str]]]:
    """Return for each entry, and each in-place form as ``NAME_``, what became of its samples."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        entry = database()[name]
        for label, operator in ((name, entry.op), (f"{name} in place", entry.inplace_variant)):
            if operator is None:
                continue
            results = found[label] = []
            try:
                results += (replayed(operator, *arguments, device) for arguments in samples(entry, device, count))
            except torch.linalg.LinAlgError as error:  # some samples are made with cuSOLVER
                results.append(("raises", str(error)))
    return found


def check(found: dict[str, list[tuple[str, str]]], device: str) -> Counter[str]:
    """Check that nothing is wrong, that no more is refused than is known, and count."""
    wrong = {}
    for label, results in found.items():
        name = label.removesuffix(" in place")
        for kind, message in results:
            known = name in REFUSED or device == "cuda" or (name in RESIZED and label != name)
            if (kind in ("WRONG", "failed") and name not in UNINITIALISED) or (kind == "refused" and not known):
                wrong[label] = f"{kind}: {message}"
    assert not wrong, "\n".join(f"{label}: {message}" for label, message in wrong.items())
    return Counter(kind for results in found.values() for kind, _ in results)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


@pytest.mark.filterwarnings("ignore")
def test_operators_of_each_kind_replay_as_they_run(device: str) -> None:
    names = [name for name in CHOSEN if name in database()]
    counts = check(outcomes(names, device, 2), device)
    assert counts["equal"] > (60 if device == "cpu" else 40)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_operator_of_the_database_replays_as_it_runs_or_is_refused(device: str) -> None:
    found = outcomes(list(database()), device, 4)
    counts = check(found, device)
    print(counts)
    if device == "cpu":
        refused = {label.removesuffix(" in place") for label, results in found.items() if "refused" in dict(results)}
        assert refused <= REFUSED.keys() | RESIZED
        assert (REFUSED.keys() | RESIZED) - refused <= BY_VERSION
    assert counts["equal"] > 2000
