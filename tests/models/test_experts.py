"""Experts: right for every routing, deaf to padding, the same in a graph; whole models as transformers runs them."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

from graphmode import LLM, SamplingParams
from graphmode.engine.config import EngineOptions
from graphmode.engine.core import EngineCore
from graphmode.engine.sequence import Sequence
from graphmode.engine.types import Batch, ScheduledSequence
from graphmode.errors import ModelError
from graphmode.graph import GraphRunner, Input
from graphmode.layers import moe
from graphmode.layers.moe import Router, grouped_product
from graphmode.models.hf.experts import compute_experts, share_real_rows
from graphmode.models.hf.routers import fuse_routers
from tests import steps

pytestmark = pytest.mark.versions

NAN = float("nan")


def make_experts(
    kind: str, count: int = 4, hidden: int = 16, inner: int = 8, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """Random experts: ``plain`` (gate, no bias) or ``gpt_oss`` (bias, transposed, interleaved, clamped)."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_local_experts": count}
    module: Any
    if kind == "plain":
        module = MixtralExperts(MixtralConfig(**sizes, num_hidden_layers=1))
    else:
        module = GptOssExperts(GptOssConfig(**sizes, num_hidden_layers=1))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.to(device, dtype).requires_grad_(False)


def routed_experts(module: Any, *arguments: torch.Tensor) -> torch.Tensor:
    return moe.routed_experts(partial(compute_experts, module), module.num_experts, *arguments)


def naive(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Every token by itself, in float64."""
    result = torch.zeros(hidden.shape, dtype=torch.float64)
    for token in range(len(hidden)):
        for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
            if not 0 <= expert < module.num_experts:
                continue
            row = hidden[token].double()
            for name in ("gate_up_proj", "down_proj"):
                matrix = getattr(module, name)[expert].double()
                row = row @ (matrix if module.is_transposed else matrix.T)
                if module.has_bias:
                    row = row + getattr(module, f"{name}_bias")[expert].double()
                if name == "gate_up_proj":
                    row = module._apply_gate(row)
            result[token] += weight * row
    return result


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, int, int, list[list[int]], list[bool]]:
    """Experts, hidden and inner sizes, each token's experts, and which tokens are real."""
    count = draw(st.integers(1, 6))
    k = draw(st.integers(1, count))
    tokens = draw(st.integers(1, 12))
    popular = draw(st.booleans())
    choices = st.lists(st.integers(0, count), min_size=k, max_size=k)  # `count` itself is no expert
    index = [list(range(k)) if popular else draw(choices) for _ in range(tokens)]
    real = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    return count, draw(st.sampled_from([8, 12, 17])), draw(st.sampled_from([4, 8, 9])), index, real


@given(routings(), st.sampled_from(["plain", "gpt_oss"]), st.integers(0, 2**31))
def test_experts_are_those_of_each_token_by_itself(
    routing: tuple[int, int, int, list[list[int]], list[bool]], kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    count, hidden, inner, index, real = routing
    module = make_experts(kind, count, hidden, inner)
    states = torch.randn(len(index), hidden)
    experts, weights, mask = torch.tensor(index), torch.rand(len(index), len(index[0])), torch.tensor(real)
    expected = naive(module, states, experts, weights)
    result = routed_experts(module, states, experts, weights, mask)
    assert result.dtype == states.dtype
    torch.testing.assert_close(result[mask].double(), expected[mask], rtol=1e-4, atol=1e-4)
    assert not result[~mask].any()

    states[~mask] = NAN
    weights[~mask] = NAN
    experts[~mask] = 0
    assert torch.equal(routed_experts(module, states, experts, weights, mask), result)


@pytest.mark.parametrize("width", [8, 9])
def test_a_grouped_product_is_right_with_and_without_a_kernel(width: int) -> None:
    """Rows of 9 floats are not aligned to 16 bytes, which the kernel demands."""
    torch.manual_seed(0)
    rows, weights = torch.randn(10, width), torch.randn(4, 5, width).transpose(1, 2)
    ends = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    result = grouped_product(rows, weights, ends)
    assert result.shape == (10, 5)
    for group, (start, end) in enumerate([(0, 0), (0, 3), (3, 3), (3, 7)]):
        torch.testing.assert_close(result[start:end], rows[start:end] @ weights[group])


def graph_of(module: Any, device: str, dtype: torch.dtype) -> GraphRunner:
    def layer(states: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return routed_experts(module, states, experts, weights, slots >= 0)

    return GraphRunner(
        layer,
        [
            Input("states", dtype, ("tokens", 16), padding=NAN),
            Input("weights", dtype, ("tokens", 2), padding=NAN),
            Input("experts", torch.int64, ("tokens", 2), padding=0),
            Input("slots", torch.int64, ("tokens",), padding=-1),
        ],
        [1, 4, 16],
        output_axes=[("tokens", None)],
        backend=device,
        strict=True,
    )


@pytest.mark.parametrize("kind", ["plain", "gpt_oss"])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    ],
)
def test_replays_are_bitwise_eager_whatever_the_routing(kind: str, device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = make_experts(kind, dtype=dtype, device=device)
    on_host = deepcopy(module).to("cpu")
    graphs = graph_of(module, device, dtype)
    graphs.capture()
    for step in range(60):
        tokens = [1, 3, 4, 13, 16][step % 5]
        experts = torch.rand(tokens, 4).argsort(1)[:, :2] if step % 3 else torch.full((tokens, 2), step % 4)
        values = {
            "states": torch.randn(tokens, 16, dtype=dtype),
            "weights": torch.rand(tokens, 2, dtype=dtype),
            "experts": experts,
            "slots": torch.arange(tokens),
        }
        replayed = graphs(own=True, **values)
        key = graphs.decide(tokens).key
        assert key is not None
        assert isinstance(replayed, torch.Tensor)
        eager = graphs.run_eagerly(key, **values)
        assert isinstance(eager, torch.Tensor)
        assert torch.equal(replayed, eager)
        expected = naive(on_host, values["states"], experts, values["weights"])
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(replayed.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    assert graphs.stats.hit_rate == 1.0


def test_experts_outside_of_a_step_are_refused() -> None:
    config = MixtralConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="graphmode")
    share_real_rows(model)
    layer = next(module for module in model.modules() if isinstance(module, MixtralExperts))
    with pytest.raises(ModelError, match="not the tokens of a step"):
        layer(torch.randn(3, 16), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))


COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "num_experts_per_tok": 2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**COMMON, num_experts=8),
    "glm4_moe": Glm4MoeConfig(**COMMON, n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=8),
}
PROMPTS = [[5], [1, 2, 3, 4], list(range(40, 57)), [7] * 9, [100, 3, 120]]


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32).save_pretrained(path)
    return path


def test_routers_of_fused_models_are_fused(folder: Path) -> None:
    engine = EngineCore(folder, EngineOptions(device="cpu", dtype="float32", graph_mode="none"))
    routers = [each for each in engine.loaded.model.modules() if type(each).__name__.lower().endswith("topkrouter")]
    assert routers
    assert all(isinstance(each.forward, Router) for each in routers)


class InFloat32(MixtralTopKRouter):
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = hidden_states.float() @ self.weight.float().T
        weights, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, weights, index


ROUTERS = (MixtralTopKRouter, InFloat32, Glm4MoeTopkRouter)


@pytest.mark.parametrize(
    ("kind", "dtype", "weight_dtype"),
    [
        *[(kind, dtype, dtype) for kind in ROUTERS for dtype in (torch.float32, torch.bfloat16)],
        (InFloat32, torch.bfloat16, torch.float32),
        (Glm4MoeTopkRouter, torch.bfloat16, torch.float32),
    ],
)
def test_fused_routers_choose_as_their_own_code_does(
    kind: type[torch.nn.Module], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """A router's weight may be float32 in a model of another dtype."""
    config = CONFIGS["glm4_moe" if kind is Glm4MoeTopkRouter else "mixtral"]
    router: Any = kind(config).requires_grad_(False)
    router.weight.normal_(std=0.1)
    router.weight.data = router.weight.data.to(weight_dtype)
    if kind is Glm4MoeTopkRouter:
        router.e_score_correction_bias.uniform_()
    x = torch.randn(50, 64, dtype=dtype)
    logits, weights, index = router(x)
    fuse_routers(router, dtype)
    assert isinstance(router.forward, Router)
    fused_logits, fused_weights, fused_index = router(x)
    torch.testing.assert_close(fused_logits, logits)
    none = torch.zeros(logits.shape, dtype=weights.dtype)
    torch.testing.assert_close(none.scatter(1, fused_index, fused_weights), none.scatter(1, index, weights))


class ByNoise(MixtralTopKRouter):
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, index = super().forward(hidden_states)
        return logits, weights * 1.01, index


class OfImages(MixtralTopKRouter):
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, _, _ = hidden_states.shape
        return super().forward(hidden_states.view(batch, -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [ByNoise, OfImages])
def test_other_routers_keep_their_own_code(kind: type[torch.nn.Module]) -> None:
    router = kind(MixtralConfig(hidden_size=16, num_local_experts=8))
    torch.nn.init.normal_(router.weight)  # type: ignore[arg-type]
    fuse_routers(router, torch.float32)
    assert router.forward.__func__ is kind.forward


def test_the_operator_of_experts_can_be_traced() -> None:
    arguments = (
        torch.randn(5, 16),
        torch.randint(0, 4, (5, 2)),
        torch.rand(5, 2),
        torch.tensor([True] * 4 + [False]),
        torch.randn(4, 16, 16),
        torch.randn(4, 16, 8),
    )
    torch.library.opcheck(
        torch.ops.graphmode.gated_experts.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("kind", ["plain", "gpt_oss"])
def test_swiglu_is_told_from_gates_of_another_kind(kind: str) -> None:
    config = MixtralConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="graphmode")
    model.model.layers[0].mlp.experts = make_experts(kind)
    share_real_rows(model)
    assert model.model.layers[0].mlp.experts.is_swiglu == (kind == "plain")


def test_whole_models_give_the_tokens_of_transformers(folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    expected = []
    for prompt in PROMPTS:
        output = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        expected.append(output[0, len(prompt) :].tolist())
    graphs = {"strict": True, "graph_sizes": [16]}
    for options in ({"enforce_eager": True}, graphs, {**graphs, "graph_mode": "piecewise"}):
        llm = LLM(folder, device="cpu", max_num_seqs=4, max_num_batched_tokens=16, **options)
        requests = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=12))  # type: ignore[arg-type]
        assert [output.outputs[0].token_ids for output in outputs] == expected, options
        assert llm.stats.hit_rate == (0 if "enforce_eager" in options else 1)


def engine_logits(folder: Path, device: str, dtype: str, prompt: list[int]) -> torch.Tensor:
    """Logits of every position of a prompt, in a step that holds padding too."""
    options = EngineOptions(device=device, dtype=dtype, max_num_seqs=2)  # type: ignore[arg-type]
    engine, length = EngineCore(folder, options), len(prompt)
    sequence = Sequence("0", prompt, SamplingParams(), 0, state_index=1, block_tables=[list(range(8))])
    batch = Batch("mixed", (ScheduledSequence(sequence, 0, length, samples=length),), length, (sequence,))
    sizes = {"tokens": length + 3, "seqs": 2, "logits": length, "new_blocks": 8}
    return steps.logits(engine.runner, batch, sizes).cpu()


def reference_logits(folder: Path, dtype: torch.dtype, prompt: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    return logits


def test_whole_models_give_the_logits_of_transformers(folder: Path) -> None:
    result = engine_logits(folder, "cpu", "float32", PROMPTS[2])
    torch.testing.assert_close(result, reference_logits(folder, torch.float32, PROMPTS[2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_whole_models_in_bf16_stay_near_float32(folder: Path, device: str) -> None:
    """At most positions: bf16 moves near-ties of the routing to another expert."""
    expected = reference_logits(folder, torch.float32, PROMPTS[2])
    result = engine_logits(folder, device, "bfloat16", PROMPTS[2]).float()
    apart = (result - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert apart.median() < 0.15
