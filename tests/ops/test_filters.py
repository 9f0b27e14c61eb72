from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphmode.ops import Filters
from graphmode.ops import sample as public_sample
from graphmode.ops.sampling.filters import threshold_reference, threshold_triton
from graphmode.ops.sampling.sample import sample_reference, sample_triton
from tests.ops.distributions import check_drawn_from

NAN, INF = float("nan"), float("inf")
OFF = (0, 1.0, 0.0)


def make_filters(rows: list[tuple[int, float, float]], device: str = "cpu") -> Filters:
    top_k, top_p, min_p = zip(*rows, strict=True)
    return Filters(
        torch.tensor(top_k, dtype=torch.int32, device=device),
        torch.tensor(top_p, dtype=torch.float32, device=device),
        torch.tensor(min_p, dtype=torch.float32, device=device),
    )


def make_rows(temperature: float | list[float], count: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    return {
        "temperature": torch.tensor(temperature, device=device).expand(count).contiguous(),
        "seeds": torch.arange(count, device=device) * 7919 - 3,
        "positions": torch.arange(count, device=device) % 100 + 1,
    }


def probabilities_by_sorting(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float):
    """The documented distribution of one row, in float64, the usual way."""
    probabilities = (logits.double() / temperature).softmax(0)
    keep = probabilities >= min_p * probabilities.max()
    if 0 < top_k < len(logits):
        keep &= logits >= logits.sort(descending=True).values[top_k - 1]
    probabilities = torch.where(keep, probabilities, 0) / probabilities[keep].sum()
    if top_p < 1:
        ordered = probabilities.sort(descending=True).values
        fewest = int((ordered.cumsum(0) < top_p).sum()) + 1
        keep = probabilities >= ordered[min(fewest, len(ordered)) - 1]
        probabilities = torch.where(keep, probabilities, 0) / probabilities[keep].sum()
    return probabilities


@pytest.fixture
def threshold(implementation: str):
    return {"reference": threshold_reference, "triton": threshold_triton}[implementation]


CASES = [
    OFF,
    (1, 1.0, 0.0),
    (5, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.3, 0.0),
    (0, 1.0, 0.1),
    (20, 0.8, 0.0),
    (6, 1.0, 0.2),
    (0, 0.9, 0.05),
    (30, 0.95, 0.02),
    (0, 0.0, 0.0),
    (0, 1.0, 1.0),
    (10**9, 2.0, 0.0),
]


@pytest.mark.parametrize(("vocab", "temperature"), [(1, 1.0), (2, 0.3), (13, 1.0), (300, 2.0), (4097, 0.7)])
def test_keeps_what_sorting_keeps(threshold, kernel_device: str, vocab: int, temperature: float) -> None:
    logits = torch.randn(len(CASES), vocab) * 2
    device_logits = logits.to(kernel_device)
    warmth = torch.full((len(CASES),), temperature, device=kernel_device)
    at_least = threshold(device_logits, warmth, make_filters(CASES, kernel_device)).cpu()
    for row, case in enumerate(CASES):
        expected = probabilities_by_sorting(logits[row], temperature, *case) > 0
        assert torch.equal(logits[row] >= at_least[row], expected), case


@pytest.mark.parametrize("case", [(5, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (20, 0.8, 0.0), (30, 0.95, 0.02)])
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_draws_from_the_filtered_softmax(case: tuple[int, float, float], temperature: float) -> None:
    count = 1_500
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    filters = make_filters([case] * count)
    tokens = sample_reference(logits.expand(count, 40), **make_rows(temperature, count), filters=filters)
    check_drawn_from(probabilities_by_sorting(logits, temperature, *case), tokens)


@pytest.mark.parametrize(("vocab", "dtype"), [(7, torch.float16), (1000, torch.float32), (5003, torch.bfloat16)])
def test_same_tokens_in_both(kernel_device: str, vocab: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(len(CASES), vocab, device=kernel_device) * 3).to(dtype)
    parameters = make_rows([0.0, 0.3, 0.7, 1.0, 1.0, 1.5, 3.0, 100.0, 0.0, 1.0, 1.0, 1.0, 1.0], 13, kernel_device)
    filters = make_filters(CASES, kernel_device)
    tokens = sample_triton(logits, **parameters, filters=filters)
    assert torch.equal(tokens, sample_reference(logits, **parameters, filters=filters))


logit = st.sampled_from([-INF, -1e38, -3.0, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0, 3.0, 3.4e38, INF, NAN])
case = st.tuples(st.integers(-1, 12), st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]), st.sampled_from([0.0, 0.3, 1.0]))


@given(
    st.lists(logit | st.floats(-20, 20, width=32), min_size=1, max_size=10), case, st.sampled_from([0.1, 1.0, 100.0])
)
@example([NAN], (1, 0.5, 0.5), 1.0)
@example([-INF, -INF, NAN], (2, 0.5, 0.5), 1.0)
@example([0.0, -0.0, -0.0], (1, 0.1, 1.0), 100.0)
def test_what_is_kept(row: list[float], case: tuple[int, float, float], temperature: float) -> None:
    """Enough tokens, the likeliest ones, ties together; and the token drawn is one of them."""
    logits = torch.tensor([row])
    filters = make_filters([case])
    warmth = torch.tensor([temperature])
    kept = (logits >= threshold_reference(logits, warmth, filters))[0]
    token = sample_reference(logits, warmth, torch.tensor([5]), torch.tensor([6]), filters)
    possible = logits[0] > -INF
    if not possible.any():
        assert token.item() == 0
        return
    kept &= possible
    assert kept[token]
    least = logits[0][kept].min()
    assert torch.equal(kept, possible & (logits[0] >= least))
    assert (logits[0][kept].max() >= logits[0][possible]).all()
    top_k, top_p, min_p = case
    by_count = 0 < top_k < len(row)
    if by_count:
        assert (logits[0] > least).sum() < top_k
    if not (by_count or top_p < 1 or min_p > 0):
        assert torch.equal(kept, possible)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's numpy
@settings(max_examples=10)
@given(st.lists(logit | st.floats(-20, 20, width=32), min_size=1, max_size=10), st.lists(case, min_size=4, max_size=4))
def test_triton_keeps_the_same_of_odd_logits(row: list[float], cases: list[tuple[int, float, float]]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.tensor([row] * 4, device=device)
    warmth = torch.tensor([0.1, 1.0, 1.0, 2.0], device=device)
    filters = make_filters(cases, device)
    expected = sample_reference(logits, warmth, torch.arange(4, device=device), torch.arange(4, device=device), filters)
    tokens = sample_triton(logits, warmth, torch.arange(4, device=device), torch.arange(4, device=device), filters)
    assert torch.equal(tokens, expected)


def test_ties_stay_together(threshold, kernel_device: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]] * 4, device=kernel_device)
    filters = make_filters([(2, 1.0, 0.0), (4, 1.0, 0.0), (0, 0.5, 0.0), (1, 1.0, 0.0)], kernel_device)
    at_least = threshold(logits, torch.ones(4, device=kernel_device), filters)
    kept = (logits >= at_least.unsqueeze(1)).sum(1)
    assert kept.tolist() == [4, 4, 4, 1]


def test_top_p_counts_what_top_k_and_min_p_keep(threshold, kernel_device: str) -> None:
    """Of four equal tokens and a tail, half of the probability is two of the four, or more if the tail counted."""
    logits = torch.tensor([0.9, 0.8, 0.7, 0.6] + [0.0] * 20, device=kernel_device).expand(3, -1)
    filters = make_filters([(4, 0.5, 0.0), (0, 0.5, 0.5), (0, 0.5, 0.0)], kernel_device)
    at_least = threshold(logits, torch.ones(3, device=kernel_device), filters)
    assert (logits >= at_least.unsqueeze(1)).sum(1).tolist() == [2, 2, 24]


def test_filters_off_are_plain_sampling(sample, kernel_device: str) -> None:
    logits = torch.randn(8, 1500, device=kernel_device)
    logits[:, ::5] = -INF
    parameters = make_rows([0.0, 0.5, 1.0, 9.0] * 2, 8, kernel_device)
    filters = make_filters(
        [OFF, OFF, OFF, OFF, (1500, 1.5, -1.0), (-5, 1.0, 0.0), (9999, 1.0, 0.0), OFF], kernel_device
    )
    assert torch.equal(sample(logits, **parameters, filters=filters), sample(logits, **parameters))


def test_greedy_ignores_filters(sample, kernel_device: str) -> None:
    logits = torch.randn(len(CASES), 1500, device=kernel_device)
    logits[0, [7, 9]] = 50.0
    tokens = sample(logits, **make_rows(0.0, len(CASES), kernel_device), filters=make_filters(CASES, kernel_device))
    assert torch.equal(tokens, logits.argmax(1))


def test_a_row_does_not_depend_on_its_batch(sample, kernel_device: str) -> None:
    logits = torch.randn(len(CASES), 1500, device=kernel_device)
    parameters = make_rows(1.2, len(CASES), kernel_device)
    filters = make_filters(CASES, kernel_device)
    tokens = sample(logits, **parameters, filters=filters)
    for row in range(len(CASES)):
        alone = {name: value[row : row + 1] for name, value in parameters.items()}
        one = Filters(*(value[row : row + 1] for value in filters))
        assert torch.equal(sample(logits[row : row + 1], **alone, filters=one), tokens[row : row + 1])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy: 0 * inf
def test_padding_rows_do_no_harm(sample, kernel_device: str) -> None:
    logits = torch.randn(9, 1100, device=kernel_device)
    parameters = make_rows(1.0, 9, kernel_device)
    filters = make_filters([(5, 0.9, 0.1), (0, 0.5, 0.0), (3, 1.0, 0.0)] * 3, kernel_device)
    first = Filters(*(value[:3] for value in filters))
    expected = sample(logits[:3], **{name: value[:3] for name, value in parameters.items()}, filters=first)
    logits[3], logits[4], logits[5] = NAN, INF, -INF
    parameters["temperature"][3:] = torch.tensor([1.0, 1.0, 1.0, NAN, INF, 1e-5], device=kernel_device)
    filters.top_k[6:] = torch.tensor([-(2**31), 2**31 - 1, 1], device=kernel_device)
    filters.top_p[3:] = torch.tensor([0.5, 0.5, 0.5, NAN, -INF, NAN], device=kernel_device)
    filters.min_p[3:] = torch.tensor([0.5, 0.5, 0.5, NAN, INF, -INF], device=kernel_device)
    tokens = sample(logits, **parameters, filters=filters)
    assert torch.equal(tokens[:3], expected)
    assert tokens.min() >= 0
    assert tokens.max() < 1100
    assert tokens[3] == 0
    assert tokens[5] == 0


def test_logits_may_be_strided(sample, kernel_device: str) -> None:
    logits = torch.randn(len(CASES), 1300, device=kernel_device)
    parameters = make_rows(1.0, len(CASES), kernel_device) | {"filters": make_filters(CASES, kernel_device)}
    expected = sample(logits, **parameters)
    wide = torch.full((len(CASES), 1400), INF, device=kernel_device)
    wide[:, :1300] = logits
    assert torch.equal(sample(wide[:, :1300], **parameters), expected)
    assert torch.equal(sample(logits.T.contiguous().T, **parameters), expected)


def test_reference_reads_nothing_on_the_host() -> None:
    filters = Filters(*(value.to("meta") for value in make_filters([(3, 0.5, 0.1)] * 4)))
    parameters = {name: value.to("meta") for name, value in make_rows(1.0, 4).items()}
    assert sample_reference(torch.empty(4, 100, device="meta"), **parameters, filters=filters).shape == (4,)


@pytest.mark.gpu
def test_public_function_on_a_gpu() -> None:
    """A real vocabulary; exp and the noise's logarithms may differ in the last place: equal tokens are near certain."""
    count = len(CASES) * 5
    logits = (torch.randn(count, 151_936, device="cuda") * 4).bfloat16()
    parameters = make_rows(0.8, count, "cuda") | {"filters": make_filters(CASES * 5, "cuda")}
    tokens = public_sample(logits, **parameters).cpu()
    on_cpu = make_rows(0.8, count) | {"filters": make_filters(CASES * 5)}
    assert torch.equal(tokens, sample_reference(logits.cpu(), **on_cpu))


@pytest.mark.gpu
def test_one_graph_serves_any_filters_on_a_gpu() -> None:
    logits = torch.randn(8, 32_000, device="cuda")
    parameters = make_rows(1.0, 8, "cuda")
    filters = make_filters([OFF] * 8, "cuda")
    public_sample(logits, **parameters, filters=filters)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = public_sample(logits, **parameters, filters=filters)
    for case in CASES:
        for buffer, value in zip(filters, make_filters([OFF, case] * 4, "cuda"), strict=True):
            buffer.copy_(value)
        graph.replay()
        assert torch.equal(tokens, public_sample(logits, **parameters, filters=filters))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_k", torch.zeros(4, dtype=torch.int64), "top_k is torch.int64, expected torch.int32"),
        ("top_k", torch.zeros(3, dtype=torch.int32), r"top_k has shape \[3\], expected \[4\]"),
        ("top_p", torch.zeros(4, dtype=torch.float16), "top_p is torch.float16, expected torch.float32"),
        ("min_p", torch.zeros(4, device="meta"), "min_p is on meta, expected cpu"),
    ],
)
def test_refuses_what_does_not_fit(name: str, value: torch.Tensor, message: str) -> None:
    filters = make_filters([OFF] * 4)._replace(**{name: value})
    with pytest.raises(ValueError, match=message):
        public_sample(torch.zeros(4, 9), **make_rows(1.0, 4), filters=filters)
