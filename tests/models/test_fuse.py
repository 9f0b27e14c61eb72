"""Layers are fused only where that changes nothing: what they have, give, and ask of attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graphmode.cache.specs import LayerCache
from graphmode.layers.attention import AttentionBatch
from graphmode.layers.mlp import MLP
from graphmode.models.hf.attention import ATTENTION_NAME
from graphmode.models.hf.fuse import fuse, keeps_rows

pytestmark = pytest.mark.versions

CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}


def make(model_type: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CONFIG, pad_token_id=None, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    return model.eval().requires_grad_(False)


@pytest.fixture
def model() -> Any:
    return make("qwen3")


def test_recognised_layers_are_fused_over_views_of_merged_weights(model: Any) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert fuse(model, 64) == 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    attention = model.model.layers[1].self_attn
    storages = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(storages) == 1


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("glm", {}),
        ("glm4", {"attention_bias": True}),
        ("phi3", {"sliding_window": 8}),
        ("smollm3", {"no_rope_layers": [1, 0]}),
    ],
)
def test_all_of_a_dense_layer_is_fused(model_type: str, options: dict[str, Any]) -> None:
    """Also where gate and up, or the projections, are merged already, and where what is added has norms of its own."""
    model = make(model_type, **options)
    assert fuse(model, 64) == 2
    for layer in model.model.layers:
        fused = layer.forward
        assert isinstance(fused.mlp, MLP)
        sandwiched = model_type == "glm4"
        assert [part.output_norm is not None for part in (fused.attention, fused.mlp)] == [sandwiched] * 2


def test_layers_that_do_not_rotate_are_told_from_those_that_do() -> None:
    model = make("smollm3", no_rope_layers=[1, 0])
    assert fuse(model, 64) == 2
    rotated, unrotated = (layer.forward.attention.rotation for layer in model.model.layers)
    assert (rotated.sin != 0).any()
    assert (unrotated.sin == 0).all()
    assert (unrotated.cos == 1).all()


def add_one_to_the_weight(model: Any) -> None:
    norm = model.model.norm
    norm.forward = lambda x: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon) * (1 + norm.weight)
    )


def cap_scores(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, softcap=1e4, **kwargs)


def narrow_the_window(model: Any) -> None:
    """A window that five tokens do not feel, passed to attention and not said by the module."""
    attention = model.model.layers[0].self_attn
    own = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        said, attention.sliding_window = attention.sliding_window, 40
        try:
            return own(*args, **kwargs)
        finally:
            attention.sliding_window = said

    attention.forward = forward


def scale_the_residual(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) * 0.5


def halve_the_stream(model: Any) -> None:
    """What the layer adds is the same; what it adds to is not."""
    layer = model.model.layers[1]
    own = layer.forward
    layer.forward = lambda hidden_states, **kwargs: own(hidden_states, **kwargs) - hidden_states * 0.5


@pytest.mark.parametrize(
    "change", [add_one_to_the_weight, cap_scores, narrow_the_window, scale_the_residual, halve_the_stream]
)
def test_what_gives_or_asks_something_else_is_left_as_it_is(model: Any, change: Any, tmp_path: Path) -> None:
    change(model)
    assert fuse(model, 64) == 0
    assert "forward" not in vars(model.model.layers[0])
    assert "forward" not in vars(model.lm_head)


def norm_the_stream(model: Any) -> None:
    """The norm after what the network adds comes after the sum, which is small beside it."""
    layer = model.model.layers[1]
    mlp, norm = layer.mlp, layer.post_mlp_layernorm
    mlp.down_proj.weight.mul_(1e5)
    seen: list[torch.Tensor] = []
    before, own = layer.post_attention_layernorm, layer.post_attention_layernorm.forward
    after = norm.forward

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return own(x)

    before.forward = note
    norm.forward = lambda h: after(seen[-1] + h) - seen[-1]


def leave_out_an_output_norm(model: Any) -> None:
    model.model.layers[0].post_self_attn_layernorm.forward = lambda x: x


def swap_gate_and_up(model: Any) -> None:
    mlp = model.model.layers[0].mlp

    def forward(x: torch.Tensor) -> torch.Tensor:
        up, gate = mlp.gate_up_proj(x).chunk(2, dim=-1)
        return mlp.down_proj(up * mlp.activation_fn(gate))

    mlp.forward = forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [norm_the_stream, halve_the_stream, leave_out_an_output_norm, swap_gate_and_up])
def test_a_layer_with_other_output_norms_or_another_gate_is_left_as_it_is(change: Any, dtype: torch.dtype) -> None:
    model = make("glm4", dtype)
    change(model)
    assert fuse(model, 64) == 0
    assert "forward" not in vars(model.model.layers[0])


def test_the_last_layer_leaves_out_tokens_that_are_not_kept(model: Any) -> None:
    assert not keeps_rows(model)
    fuse(model, 64)
    assert keeps_rows(model)
    tokens, kept = torch.randint(60, (1, 20)), torch.tensor([3, 19, 0])

    def run(rows: torch.Tensor | None, logits_to_keep: Any) -> tuple[torch.Tensor, list[LayerCache]]:
        caches = [LayerCache(*torch.zeros(2, 2, 16, 2, 16)) for _ in range(2)]
        batch = AttentionBatch(
            slot_mapping=(torch.arange(20),),
            block_tables=(torch.tensor([[0, 1]], dtype=torch.int32),),
            cu_query_lens=torch.tensor([0, 20], dtype=torch.int32),
            kv_lens=torch.tensor([20], dtype=torch.int32),
            max_query_len=20,
            caches=caches,
            kept=rows,
        )
        positions = torch.arange(20).unsqueeze(0)
        options = {"use_cache": False, "logits_to_keep": logits_to_keep, "attention_batch": batch}
        return model(input_ids=tokens, position_ids=positions, **options).logits, caches

    (narrowed, caches), (whole, expected) = run(kept, 0), run(None, kept)
    torch.testing.assert_close(narrowed, whole)
    assert narrowed.shape == (1, 3, 60)
    for cache, other in zip(caches, expected, strict=True):
        assert torch.equal(cache.keys, other.keys)
        assert torch.equal(cache.values, other.values)


def test_a_last_layer_with_experts_keeps_all_tokens() -> None:
    model = make("qwen3_moe", num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
    assert fuse(model, 64) == 2
    assert not keeps_rows(model)
