from __future__ import annotations

import pytest
import torch

from graphmode.ops import sample as public_sample
from graphmode.ops.sampling.sample import sample_cpu, sample_reference, sample_triton, uniform_reference, uniform_triton
from tests.ops.distributions import check_drawn_from

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 12345678901234567]
POSITIONS = [0, 1, 2, 2**31, 2**40, 77, 2**63 - 1]
NAN, INF = float("nan"), float("inf")


def rows(temperature: float | list[float], count: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Parameters of ``count`` rows: the temperature, and different seeds and positions."""
    return {
        "temperature": torch.tensor(temperature, device=device).expand(count).contiguous(),
        "seeds": torch.arange(count, device=device) * 7919 - 3,
        "positions": torch.arange(count, device=device) % 100 + 1,
    }


def mix64_of_integers(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def uniform_of_integers(seed: int, position: int, index: int) -> float:
    """The documented hash in Python's integers."""
    key = mix64_of_integers((mix64_of_integers(seed) + position) % 2**64)
    bits = (index * ((key >> 32) | 1) + key) % 2**32
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D % 2**32
    bits = (bits ^ (bits >> 15)) * 0x846CA68B % 2**32
    bits ^= bits >> 16
    return ((bits >> 9) + 0.5) / 2**23


def test_noise_is_the_documented_hash() -> None:
    uniform = uniform_reference(torch.tensor(SEEDS), torch.tensor(POSITIONS), 300)
    for row, (seed, position) in enumerate(zip(SEEDS, POSITIONS, strict=True)):
        assert uniform[row].tolist() == [uniform_of_integers(seed, position, index) for index in range(300)]


@pytest.mark.parametrize("vocab", [1, 1000, 2049])
def test_noise_has_the_same_bits_in_both(kernel_device: str, vocab: int) -> None:
    seeds, positions = torch.tensor(SEEDS), torch.tensor(POSITIONS)
    uniform = uniform_triton(seeds.to(kernel_device), positions.to(kernel_device), vocab)
    assert torch.equal(uniform.cpu(), uniform_reference(seeds, positions, vocab))


def test_noise_is_finite() -> None:
    """The extreme values of the hash, and all of four million drawn ones, are inside (0, 1)."""
    for bits in (0, 2**23 - 1):
        uniform = torch.tensor([bits], dtype=torch.int32).float().mul_(2.0**-23).add_(2.0**-24)
        assert 0 < uniform.item() < 1
        assert uniform.log().neg().log().isfinite()
    uniform = uniform_reference(torch.arange(128), torch.arange(128), 1 << 15)
    assert uniform.min() > 0
    assert uniform.max() < 1


def test_noise_is_uniform() -> None:
    uniform = uniform_reference(torch.zeros(100, dtype=torch.int64), torch.arange(100), 50_000)
    for numbers in (uniform, uniform[:, :500], uniform[0]):
        expected = numbers.numel() / 100
        chi_square = ((torch.histc(numbers, 100, 0, 1).double() - expected) ** 2 / expected).sum()
        assert chi_square < 99 + 4 * (2 * 99) ** 0.5
    correlation = torch.corrcoef(uniform) - torch.eye(100)
    assert correlation.abs().max() < 5.5 / 50_000**0.5


@pytest.mark.parametrize("what", ["seed", "position", "index"])
def test_every_input_bit_flips_half_of_the_noise_bits(what: str) -> None:
    rows, vocab = 200, 256
    seeds, positions = torch.arange(rows), torch.arange(rows) % 50

    def noise(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return (uniform_reference(seeds, positions, vocab).double() * 2**23).long()

    base = noise(seeds, positions)
    for bit in range(8 if what == "index" else 64):
        mask = 1 << bit if bit < 63 else -(1 << 63)
        if what == "index":
            flipped = base[:, torch.arange(vocab) ^ mask]
        else:
            flipped = noise(seeds ^ mask, positions) if what == "seed" else noise(seeds, positions ^ mask)
        change = base ^ flipped
        shares = torch.stack([(change >> i & 1).double().mean() for i in range(23)])
        assert (shares - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("vocab", [2, 13, 300])
def test_draws_from_the_softmax(temperature: float, vocab: int) -> None:
    count = 40_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    tokens = sample_reference(logits.expand(count, vocab), **rows(temperature, count))
    check_drawn_from((logits.double() / temperature).softmax(0), tokens)


@pytest.mark.parametrize("vocab", [1, 7, 1000, 1024, 1025, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_tokens_in_both(kernel_device: str, vocab: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(9, vocab, device=kernel_device) * 3).to(dtype)
    parameters = rows([0.0, 0.3, 0.7, 1.0, 1.0, 1.5, 3.0, 100.0, 0.0], 9, kernel_device)
    tokens = sample_triton(logits, **parameters)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, sample_reference(logits, **parameters))


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("temperature", [1e-4, 0.6, 1.0, 100.0])
def test_noise_that_is_left_out_could_not_matter(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, temperature: float, spread: float
) -> None:
    """A part of many tiles leaves out noise by the best of those before: rising logits, falling and mixed."""
    monkeypatch.setattr("graphmode.ops.sampling.sample._FULL_GRID", 1)
    logits = torch.randn(6, 2507).mul_(spread)
    logits[:2] = logits[:2].sort(dim=1).values
    logits[2:4] = logits[2:4].sort(dim=1, descending=True).values
    given = rows(temperature, 6)
    drawn = sample_triton(logits.to(kernel_device), **{name: value.to(kernel_device) for name, value in given.items()})
    assert torch.equal(drawn.cpu(), sample_reference(logits, **given))


@pytest.mark.parametrize("grid", [1, 3, 64])
def test_any_number_of_parts(kernel_device: str, monkeypatch: pytest.MonkeyPatch, grid: int) -> None:
    monkeypatch.setattr("graphmode.ops.sampling.sample._FULL_GRID", grid)
    logits = torch.randn(3, 7001, device=kernel_device)
    logits[2, [5 + 1024, 5 + 2 * 1024, 5 + 6 * 1024]] = 9.0
    parameters = rows([0.0, 1.0, 0.0], 3, kernel_device)
    assert sample_triton(logits, **parameters)[2] == 5 + 1024
    assert torch.equal(sample_triton(logits, **parameters), sample_reference(logits, **parameters))


def test_a_row_does_not_depend_on_its_batch(sample, kernel_device: str) -> None:
    """Alone, in any place among others, in a larger bucket: the same token."""
    logits = torch.randn(6, 1500, device=kernel_device)
    parameters = rows(0.8, 6, kernel_device)
    tokens = sample(logits, **parameters)
    for row in range(6):
        alone = {name: value[row : row + 1] for name, value in parameters.items()}
        assert torch.equal(sample(logits[row : row + 1], **alone), tokens[row : row + 1])
    order = torch.tensor([3, 0, 5, 1, 4, 2, 3, 3], device=kernel_device)
    shuffled = {name: value[order] for name, value in parameters.items()}
    assert torch.equal(sample(logits[order], **shuffled), tokens[order])


def test_parameters_by_state_index_are_those_of_the_rows(sample, kernel_device: str) -> None:
    logits = torch.randn(6, 1500, device=kernel_device)
    parameters = rows([0.0, 0.5, 1.0, 0.0, 2.0, 0.7, 1.5, 0.0], 8, kernel_device)
    positions = parameters.pop("positions")[:6]
    state_indices = torch.tensor([7, 0, 4, 4, 1, 2], device=kernel_device)
    expected = sample(logits, **{name: value[state_indices] for name, value in parameters.items()}, positions=positions)
    assert torch.equal(sample(logits, **parameters, positions=positions, state_indices=state_indices), expected)


def test_a_row_at_no_position_gets_token_0(sample, kernel_device: str) -> None:
    logits = torch.zeros(5, 3000, device=kernel_device)
    logits[:, 2500] = 9.0
    parameters = rows([0.0, 0.0, 0.5, 0.5, 0.0], 5, kernel_device)
    parameters["positions"][1:4] = torch.tensor([0, -1, -(2**63)], device=kernel_device)
    assert sample(logits, **parameters).tolist() == [2500, 0, 0, 0, 2500]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy: 0 * inf
def test_padding_rows_do_no_harm(sample, kernel_device: str) -> None:
    logits = torch.randn(12, 1100, device=kernel_device)
    parameters = rows(1.0, 12, kernel_device)
    expected = sample(logits[:4], **{name: value[:4] for name, value in parameters.items()})
    logits[4], logits[5], logits[6] = NAN, INF, -INF
    logits[7, ::2] = NAN
    logits[8, 1:] = -INF
    parameters["temperature"][7:] = torch.tensor([NAN, INF, -INF, -1.0, 1e-45], device=kernel_device)
    parameters["seeds"][9:] = -(2**63)
    parameters["positions"][11] = -(2**63)
    tokens = sample(logits, **parameters)
    assert torch.equal(tokens[:4], expected)
    assert tokens.min() >= 0
    assert tokens.max() < 1100
    assert tokens[4] == 0
    assert tokens[6] == 0


def test_greedy_takes_the_lowest_of_equals(sample, kernel_device: str) -> None:
    logits = torch.randn(4, 3000, device=kernel_device)
    logits[0, [2999, 1500, 1023]] = 9.0
    logits[1, [1024, 1025]] = INF
    logits[2] = 0.0
    logits[3, 2998] = 5.0 + 1e-6
    logits[3, 17] = 5.0
    parameters = rows([0.0, 0.0, 1e-6, 0.0], 4, kernel_device)
    assert sample(logits, **parameters).tolist() == [1023, 1024, 0, 2998]


def test_greedy_ignores_the_seed(sample, kernel_device: str) -> None:
    logits = torch.randn(200, device=kernel_device).expand(5, 200)
    assert sample(logits, **rows(0.0, 5, kernel_device)).tolist() == [logits[0].argmax().item()] * 5


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy: 0 * inf
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1000.0, INF])
def test_never_draws_what_is_ruled_out(sample, kernel_device: str, temperature: float) -> None:
    logits = torch.full((64, 40), -INF, device=kernel_device)
    allowed = torch.tensor([3, 17, 39], device=kernel_device)
    logits[:, allowed] = torch.tensor([0.0, -300.0, 2.0], device=kernel_device)
    tokens = sample(logits, **rows(temperature, 64, kernel_device))
    assert torch.isin(tokens, allowed).all()


@pytest.mark.parametrize(("name", "step"), [("seeds", 1), ("seeds", 1 << 32), ("positions", 1), ("positions", 1 << 32)])
def test_seed_and_position_change_the_token(sample, kernel_device: str, name: str, step: int) -> None:
    logits = torch.zeros(16, 3_000, device=kernel_device)
    parameters = {"seeds": torch.zeros(16, dtype=torch.int64), "positions": torch.ones(16, dtype=torch.int64)}
    parameters[name] = torch.arange(16) * step + 1
    on_device = {key: value.to(kernel_device) for key, value in parameters.items()}
    tokens = sample(logits, torch.ones(16, device=kernel_device), **on_device)
    assert tokens.unique().numel() >= 15


def test_follows_the_parameters_in_the_buffers(sample, kernel_device: str) -> None:
    """As at replay: same tensors, new contents."""
    logits = torch.randn(8, 500, device=kernel_device)
    parameters = rows(1.0, 8, kernel_device)
    first = sample(logits, **parameters)
    parameters["positions"] += 1
    second = sample(logits, **parameters)
    assert not torch.equal(first, second)
    parameters["positions"] -= 1
    assert torch.equal(sample(logits, **parameters), first)


def test_logits_may_be_strided(sample, kernel_device: str) -> None:
    logits = torch.randn(4, 1300, device=kernel_device)
    expected = sample(logits, **rows(1.0, 4, kernel_device))
    wide = torch.full((4, 1400), INF, device=kernel_device)
    wide[:, :1300] = logits
    assert torch.equal(sample(wide[:, :1300], **rows(1.0, 4, kernel_device)), expected)
    assert torch.equal(sample(logits.T.contiguous().T, **rows(1.0, 4, kernel_device)), expected)


def test_leaves_its_inputs_alone(sample, kernel_device: str) -> None:
    logits = torch.randn(3, 100, device=kernel_device)
    parameters = rows([0.0, 1.0, NAN], 3, kernel_device)
    before = [value.clone() for value in (logits, *parameters.values())]
    sample(logits, **parameters)
    for value, copy in zip((logits, *parameters.values()), before, strict=True):
        torch.testing.assert_close(value, copy, rtol=0, atol=0, equal_nan=True)


def test_reference_reads_nothing_on_the_host() -> None:
    parameters = {name: value.to("meta") for name, value in rows(1.0, 4).items()}
    assert sample_reference(torch.empty(4, 100, device="meta"), **parameters).shape == (4,)


def test_public_function_takes_the_loop_on_cpu() -> None:
    logits = torch.randn(4, 100)
    assert torch.equal(public_sample(logits, **rows(1.0, 4)), sample_cpu(logits, **rows(1.0, 4)))


@pytest.mark.gpu
def test_public_function_on_a_gpu() -> None:
    """A real vocabulary; the noise's logarithms may differ in the last place, so equal tokens are near certain."""
    logits = (torch.randn(64, 151_936, device="cuda") * 4).bfloat16()
    parameters = rows([0.0, 0.6, 1.0, 1.5] * 16, 64, "cuda")
    tokens = public_sample(logits, **parameters).cpu()
    reference = sample_reference(logits.cpu(), **{name: value.cpu() for name, value in parameters.items()})
    assert torch.equal(tokens, reference)


@pytest.mark.gpu
def test_replay_draws_anew_on_a_gpu() -> None:
    logits = torch.randn(8, 32_000, device="cuda")
    parameters = rows(1.0, 8, "cuda")
    public_sample(logits, **parameters)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = public_sample(logits, **parameters)
    for _ in range(5):
        parameters["positions"] += 1
        graph.replay()
        assert torch.equal(tokens, public_sample(logits, **parameters))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.zeros(4), r"logits has shape \[4\], expected \[any, any\]"),
        ("logits", torch.zeros(4, 9, dtype=torch.float64), "logits is torch.float64, expected torch.float32 or"),
        ("logits", torch.zeros(4, 0), r"logits has shape \[4, 0\], expected a vocabulary of at least one token"),
        ("temperature", torch.zeros(4, dtype=torch.float16), "temperature is torch.float16, expected torch.float32"),
        ("temperature", torch.zeros(3), r"temperature has shape \[3\], expected \[4\]"),
        ("seeds", torch.zeros(4, dtype=torch.int32), "seeds is torch.int32, expected torch.int64"),
        ("positions", torch.zeros(4), "positions is torch.float32, expected torch.int64"),
        ("positions", torch.zeros(4, dtype=torch.int64, device="meta"), "positions is on meta, expected cpu"),
    ],
)
def test_refuses_what_does_not_fit(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        public_sample(**{"logits": torch.zeros(4, 9), **rows(1.0, 4), name: value})
