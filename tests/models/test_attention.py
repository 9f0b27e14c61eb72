"""The attention hook refuses, by name, what it would otherwise leave out in silence."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphmode.cache.specs import LayerCache
from graphmode.errors import ModelError
from graphmode.layers.attention import AttentionBatch
from graphmode.models.hf.attention import attention_hook

pytestmark = pytest.mark.versions

KV_HEADS, HEAD_DIM, TOKENS = 2, 16, 3


def attend(config: Any = None, key_heads: int = KV_HEADS, value_dim: int = HEAD_DIM, **asked: Any) -> torch.Tensor:
    """Call the hook as a layer does, three tokens of one sequence; ``asked`` are the model's keywords."""
    cache = LayerCache(*torch.zeros(2, 1, 16, KV_HEADS, HEAD_DIM))
    batch = AttentionBatch(
        slot_mapping=(torch.arange(TOKENS),),
        block_tables=(torch.zeros(1, 1, dtype=torch.int32),),
        cu_query_lens=torch.tensor([0, TOKENS], dtype=torch.int32),
        kv_lens=torch.tensor([TOKENS], dtype=torch.int32),
        max_query_len=TOKENS,
        caches=[cache, cache],
    )
    torch.manual_seed(0)
    module: Any = SimpleNamespace(layer_idx=1, config=config or SimpleNamespace())
    query = torch.randn(1, 2 * KV_HEADS, TOKENS, HEAD_DIM)
    key = torch.randn(1, key_heads, TOKENS, HEAD_DIM)
    value = torch.randn(1, KV_HEADS, TOKENS, value_dim)
    return attention_hook(module, query, key, value, asked.pop("attention_mask", None), attention_batch=batch, **asked)[
        0
    ]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"position_bias": 1}, "SimpleNamespace of layer 1 uses position_bias=1"),
        ({"is_causal": False}, "is_causal=False"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "brings a mask of its own"),
        ({"value_dim": 8}, "values of 2 heads of 8, where the cache is made for 2 of 16"),
        ({"key_heads": 4}, "keys of 4 heads of 16, where the cache is made for 2 of 16"),
        ({"config": SimpleNamespace(layer_types=["full_attention", "chunked_attention"])}, "type 'chunked_attention'"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused_by_name(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        attend(**asked)


def test_what_has_no_effect_is_let_by() -> None:
    plain = attend()
    assert torch.equal(
        attend(dropout=0.0, position_ids=torch.arange(3), output_attentions=False, is_causal=True), plain
    )
    assert torch.equal(attend(sliding_window=None, softcap=None, s_aux=None, cu_seq_lens_q=None), plain)


def test_a_window_that_is_not_passed_is_the_configurations() -> None:
    windowed = attend(sliding_window=2)
    assert not torch.equal(windowed, attend())
    mixed = ["full_attention", "sliding_attention"]
    assert torch.equal(attend(config=SimpleNamespace(sliding_window=2)), windowed)
    assert torch.equal(attend(config=SimpleNamespace(sliding_window=2, layer_types=mixed)), windowed)
    assert torch.equal(attend(config=SimpleNamespace(sliding_window=2, layer_types=mixed[::-1])), attend())
    assert torch.equal(attend(config=SimpleNamespace(sliding_window=2), sliding_window=None), attend())
