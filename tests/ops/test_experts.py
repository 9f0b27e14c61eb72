"""Experts' products: each pair by itself, whatever the routing; nothing is read or computed of padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops import gated_experts
from graphmode.ops.moe import experts as kernels
from tests.ops.test_fused import close


def make(
    rows: int, k: int, experts: int, hidden: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Random arguments; a tenth of the pairs have no expert, and every seventh row is padding."""
    index = torch.randint(0, experts, (rows, k), device=device)
    index[torch.rand(rows, k, device=device) < 0.1] = experts
    return {
        "x": torch.randn(rows, hidden, device=device).to(dtype),
        "top_k_index": index,
        "top_k_weights": torch.rand(rows, k, device=device),
        "real": torch.arange(rows, device=device) % 7 != 5,
        "gate_up": (torch.randn(experts, 2 * size, hidden, device=device) * hidden**-0.5).to(dtype),
        "down": (torch.randn(experts, hidden, size, device=device) * size**-0.5).to(dtype),
    }


def one_by_one(a: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every pair by itself, in float64."""
    result = torch.zeros(a["x"].shape, dtype=torch.float64)
    host = {name: tensor.cpu() for name, tensor in a.items()}
    for row in range(len(result)):
        for expert, weight in zip(host["top_k_index"][row].tolist(), host["top_k_weights"][row].tolist(), strict=True):
            if host["real"][row] and 0 <= expert < len(host["down"]):
                gate, up = (host["gate_up"][expert].double() @ host["x"][row].double()).chunk(2)
                result[row] += weight * (host["down"][expert].double() @ (gate * gate.sigmoid() * up))
    return result.to(a["x"].device)


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, list[list[int]], list[bool]]:
    """How many experts, those of each row, some of them none, and which rows are real."""
    experts, rows, k = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.integers(1, 5))
    choice = st.integers(-1, experts) if draw(st.booleans()) else st.just(draw(st.integers(0, experts - 1)))
    index = draw(st.lists(st.lists(choice, min_size=k, max_size=k), min_size=rows, max_size=rows))
    return experts, index, draw(st.lists(st.booleans(), min_size=rows, max_size=rows))


@given(routings(), st.sampled_from([(16, 16), (40, 24), (17, 9)]))
def test_every_routing(routing: tuple[int, list[list[int]], list[bool]], sizes: tuple[int, int]) -> None:
    experts, index, real = routing
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = make(len(index), len(index[0]), experts, *sizes, torch.float32, device)
    arguments |= {"top_k_index": torch.tensor(index, device=device), "real": torch.tensor(real, device=device)}
    expected = one_by_one(arguments)
    for run in (kernels.gated_experts_reference, kernels.gated_experts_triton):
        result = run(**arguments)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
        assert not result[~arguments["real"]].any()


# The interpreter multiplies bfloat16 matrices wrongly.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("rows", "k", "experts"), [(1, 8, 128), (3, 2, 8), (70, 8, 16), (300, 4, 8), (600, 2, 5)])
@pytest.mark.usefixtures("nan_memory")
def test_many_sizes(rows: int, k: int, experts: int, dtype: torch.dtype, kernel_device: str) -> None:
    arguments = make(rows, k, experts, 80, 48, dtype, kernel_device)
    close(kernels.gated_experts_triton(**arguments), one_by_one(arguments))


@pytest.mark.parametrize("padding", [float("nan"), float("inf")])
def test_padding_is_not_seen(padding: float, kernel_device: str) -> None:
    arguments = make(30, 2, 4, 32, 16, torch.float32, kernel_device)
    clean = kernels.gated_experts_triton(**arguments)
    unreal = ~arguments["real"]
    arguments["x"][unreal] = padding
    arguments["top_k_weights"][unreal] = padding
    arguments["top_k_index"][unreal] = 0
    assert torch.equal(kernels.gated_experts_triton(**arguments), clean)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("real", torch.zeros(4, dtype=torch.bool)),
        ("top_k_index", torch.zeros(3, 2)),
        ("down", torch.zeros(4, 32, 15)),
        ("gate_up", torch.zeros(4, 32, 31)),
        ("gate_up", torch.zeros(4, 32, 32).transpose(1, 2)),
    ],
)
def test_what_does_not_fit_is_refused(name: str, tensor: torch.Tensor) -> None:
    arguments = make(3, 2, 4, 32, 16, torch.float32)
    arguments[name] = tensor
    with pytest.raises(ValueError, match=name):
        gated_experts(**arguments)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 16, 64, 256, 1000])
def test_sizes_of_real_models(rows: int, dtype: torch.dtype) -> None:
    arguments = make(rows, 8, 64, 2048, 768, dtype, "cuda")
    expected = kernels.gated_experts_reference(
        **{name: each.double() for name, each in arguments.items()}
        | {name: arguments[name] for name in ("top_k_index", "real")}
    )
    close(kernels.gated_experts_triton(**arguments), expected)


@pytest.mark.gpu
def test_a_captured_call_follows_its_routing() -> None:
    arguments = make(40, 2, 8, 64, 48, torch.bfloat16, "cuda")
    gated_experts(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gated_experts(**arguments)
    for _ in range(5):
        arguments["top_k_index"].random_(-1, 9)
        arguments["x"].normal_()
        graph.replay()
        assert torch.equal(out, gated_experts(**arguments))
