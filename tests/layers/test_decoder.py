"""A layer gives the same by whichever kernels: here by their references, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphmode.cache.specs import LayerCache
from graphmode.layers import linear
from graphmode.layers.attention import Attention, AttentionBatch
from graphmode.layers.decoder import Head, decoder_layer
from graphmode.layers.linear import Linear
from graphmode.layers.mlp import MLP
from graphmode.layers.residual import Norm
from graphmode.ops import Rotation

HIDDEN, Q_HEADS, KV_HEADS, HEAD_DIM, INNER, TOKENS = 32, 4, 2, 16, 48, 5
TORCH = {"norm_heads": "norm_linear"}
# Operations that take another family of kernels; all others take torch's products.
FAMILIES: dict[str, dict[str, str]] = {
    "skinny": dict.fromkeys(("norm_linear", "norm_swiglu", "linear", "linear_add", "logits"), "skinny"),
    "small_batch": {"norm_linear": "small_batch", "norm_swiglu": "small_batch", "residual": "split_k"},
    "prefill": {"norm_heads": "prefill", "norm_swiglu": "prefill"},
}


def run(*, sandwich: bool, decode: bool, kept: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)

    def tensor(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes) * sizes[-1] ** -0.5

    norms = [Norm(tensor(HIDDEN), 1e-6) for _ in range(4)]
    output_norm, down_norm = norms[2:] if sandwich else (None, None)
    size, angles = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, torch.rand(TOKENS, HEAD_DIM // 2)
    attention = Attention(
        norms[0],
        Linear(tensor(size, HIDDEN), tensor(size)),
        (Norm(tensor(HEAD_DIM), 1e-6), Norm(tensor(HEAD_DIM), 1e-6)),
        Rotation(angles.cos(), angles.sin()),
        0.25,
        None,
        Linear(tensor(HIDDEN, Q_HEADS * HEAD_DIM)),
        output_norm,
    )
    layer = decoder_layer(
        0, attention, MLP(norms[1], Linear(tensor(2 * INNER, HIDDEN)), Linear(tensor(HIDDEN, INNER)), down_norm)
    )
    cache = LayerCache(*torch.zeros(2, TOKENS, 16, KV_HEADS, HEAD_DIM))
    seqs = TOKENS if decode else 1
    batch = AttentionBatch(
        slot_mapping=(torch.arange(TOKENS) * (16 if decode else 1),),
        block_tables=(torch.arange(seqs, dtype=torch.int32).unsqueeze(1),),
        cu_query_lens=torch.arange(seqs + 1, dtype=torch.int32) * (TOKENS // seqs),
        kv_lens=torch.full((seqs,), TOKENS // seqs, dtype=torch.int32),
        max_query_len=TOKENS // seqs,
        caches=[cache],
        kept=torch.tensor([3, 1]) if kept else None,
    )
    hidden = layer(tensor(1, TOKENS, HIDDEN), position_ids=torch.arange(TOKENS).unsqueeze(0), attention_batch=batch)
    logits = Head(norms[0], Linear(tensor(60, HIDDEN)))(hidden[:, :1])
    return [hidden, logits, cache.keys, cache.values]


@pytest.mark.parametrize("sandwich", [False, True])
@pytest.mark.parametrize(("decode", "kept"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_kernels_computes_the_layer(
    family: str, decode: bool, kept: bool, sandwich: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = TORCH

    def choose(operation: str, *args: Any, **kwargs: Any) -> str:
        return taken.get(operation, "torch")

    monkeypatch.setattr(linear, "choose", choose)
    expected = run(sandwich=sandwich, decode=decode, kept=kept)
    taken = TORCH | FAMILIES[family]
    for one, other in zip(run(sandwich=sandwich, decode=decode, kept=kept), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
