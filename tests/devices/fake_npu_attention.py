"""The fused attention operator of torch_npu, on the CPU: the published schema, and what the operator refuses."""

from __future__ import annotations

from typing import Any

import torch

from tests.devices.fake import NPU_INTERFACE, DeviceError

NAME = "npu_fused_infer_attention_score"
UPDATABLE = frozenset({f"{NAME}.default"})

_library = torch.library.Library("npu", "FRAGMENT")
_library.define(NPU_INTERFACE["attention"])


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise DeviceError(f"{NAME}: {what}")


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **asked: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend sequence by sequence. A query without keys gets NaN: what the operator leaves there is not published."""
    asked = {**_DEFAULTS, **asked}
    queries, lengths = asked["actual_seq_lengths"], asked["actual_seq_lengths_kv"]
    tables, block_size, mask = asked["block_table"], asked["block_size"], asked["atten_mask"]
    tokens, heads, head_dim = query.shape
    kv_heads = asked["num_key_value_heads"]
    _require(asked["input_layout"] == "TND", "this fake knows packed tokens only")
    _require(
        query.dtype in (torch.float16, torch.bfloat16), f"query is {query.dtype}; float16 and bfloat16 are supported"
    )
    _require(query.is_contiguous() and key.is_contiguous() and value.is_contiguous(), "not contiguous")
    _require(head_dim % 16 == 0 and head_dim <= 512, f"heads of {head_dim}")
    _require(asked["num_heads"] == heads and heads % kv_heads == 0 and heads // kv_heads <= 64, "numbers of heads")
    _require(block_size % 128 == 0 and 128 <= block_size <= 512, f"block_size is {block_size}")
    _require(key.shape == value.shape == (key.shape[0], block_size, kv_heads * head_dim), f"keys of shape {key.shape}")
    _require(all(type(each) is int for each in [*queries, *lengths]), "lengths are not integers on the host")
    _require(queries == sorted(queries) and queries[0] >= 0 and queries[-1] == tokens, f"query lengths {queries}")
    _require(len(lengths) == len(queries) and min(lengths) >= 0, f"key lengths {lengths}")
    _require(tables.dtype == torch.int32 and tables.shape[0] == len(queries), f"block_table of shape {tables.shape}")
    _require(tables.shape[1] * block_size >= max(lengths), "a sequence has more keys than its blocks hold")
    _require(asked["sparse_mode"] == 3 and mask.shape == (2048, 2048), "sparse_mode 3 needs a mask of 2048 by 2048")
    _require(torch.equal(mask, torch.ones_like(mask).triu(1)), "the mask is not that of sparse_mode 3")
    output = torch.full_like(query, float("nan"))
    start = 0
    for row, (end, length) in enumerate(zip(queries, lengths, strict=True)):
        blocks = tables[row, : -(-length // block_size)].long()
        if end > start and length:
            keys, values = (
                cache[blocks].view(-1, kv_heads, head_dim)[:length].repeat_interleave(heads // kv_heads, 1).float()
                for cache in (key, value)
            )
            scores = torch.einsum("qhd,khd->hqk", query[start:end].float(), keys) * asked["scale"]
            allowed = torch.ones(end - start, length, dtype=torch.bool).tril(length - (end - start))
            weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
            output[start:end] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
        start = end
    return output, torch.empty(0)


_DEFAULTS = {
    each.name: each.default_value for each in torch.ops.npu.npu_fused_infer_attention_score.default._schema.arguments
}
_library.impl(NAME, _attention, "CPU")
