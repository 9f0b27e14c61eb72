"""Attention on Ascend NPUs, by the fused operator of torch_npu, which takes lengths on the host.

``npu_fused_infer_attention_score`` serves packed tokens (layout TND) over a paged cache: queries by their cumulative
numbers, keys by each sequence's length, both lists of integers, and the block tables. Every query must belong to a
sequence: the padding of a mixed step is one more, which has no keys; in a decode step each padding token is its own.

Written to the operator of torch_npu 2.14.0, called as vLLM-Ascend calls it; not run on hardware. Layers that ask for
what it is not known to do (windows, soft caps, sinks, latents, chosen keys, float32, heads that are no multiple of 16)
take the PyTorch reference, which reads lengths on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import accumulate

import torch

from graphmode.cache.specs import LayerCache
from graphmode.layers.attention import AttentionBatch, DeviceAttention, cached_attention
from graphmode.ops import Scoring, write_kv

# Of the cache: the operator takes multiples of 128 up to 512.
_BLOCK_SIZE = 128
_MAX_HEAD_DIM = 512
# Of the causal mask that sparse_mode 3 asks for, whatever the lengths are; it is aligned to the last query and key.
_MASK_SIZE = 2048
_CAUSAL = 3


def npu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    scoring: Scoring,
    selection: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the same as :func:`~graphmode.layers.attention.cached_attention`; padding rows are undefined."""
    tokens, heads, head_dim = query.shape
    alike = key.shape == value.shape and cache.keys.shape == cache.values.shape
    plain = alike and scoring == Scoring(scoring.scale) and selection is None
    if not plain or query.dtype not in (torch.float16, torch.bfloat16) or head_dim % 16 or head_dim > _MAX_HEAD_DIM:
        return cached_attention(query, key, value, cache, batch, scoring, selection)
    write_kv(key, value, cache.keys, cache.values, batch.slot_mapping[cache.group])
    lengths = batch.host_arguments
    tables = batch.block_tables[cache.group]
    if len(lengths["actual_seq_lengths"]) > len(tables):
        tables = torch.nn.functional.pad(tables, (0, 0, 0, 1))  # the padding's, which has no keys
    output, _ = torch.ops.npu.npu_fused_infer_attention_score(
        query.contiguous(),
        cache.keys.flatten(2),
        cache.values.flatten(2),
        atten_mask=_causal_mask(query.device),
        actual_seq_lengths=lengths["actual_seq_lengths"],
        actual_seq_lengths_kv=lengths["actual_seq_lengths_kv"],
        block_table=tables,
        num_heads=heads,
        scale=scoring.scale,
        input_layout="TND",
        num_key_value_heads=cache.keys.shape[2],
        sparse_mode=_CAUSAL,
        block_size=_BLOCK_SIZE,
    )
    attended: torch.Tensor = output
    return attended.view(tokens, heads, head_dim)


@cache
def _causal_mask(device: torch.device) -> torch.Tensor:
    """Return bool ``[2048, 2048]``, True where a query must not see a key."""
    return torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.bool, device=device).triu(1)


def host_lengths(
    max_model_len: int,
    decode_query_len: int,
    family: str,
    sizes: Mapping[str, int],
    values: Mapping[str, torch.Tensor],
) -> dict[str, list[int]]:
    """Return the lengths that the operator takes on the host.

    A graph holds one kernel path and the workspace of its capture. So it is captured (without ``values``) with keys as
    long as they can be, and a mixed one with queries as long as they can be.

    Args:
        max_model_len: tokens of a sequence at most.
        decode_query_len: queries of each sequence in a step of the family ``decode``.
        family: ``decode``, or another.
        sizes: of the axes ``tokens`` and ``seqs``.
        values: ``query_lens`` and ``kv_lens``, int32 ``[seqs]`` at their true sizes, on the host; or nothing.

    Returns:
        ``actual_seq_lengths``: the cumulative numbers of queries, up to ``tokens``; ``actual_seq_lengths_kv``: the
        length of each sequence. One for each sequence and, outside of ``decode``, one for the padding.
    """
    tokens = sizes["tokens"]
    seqs = tokens // decode_query_len if family == "decode" else sizes["seqs"]
    if values:
        query_lens, kv_lens = values["query_lens"].tolist(), values["kv_lens"].tolist()
    else:
        full, rest = divmod(tokens, max_model_len)
        query_lens, kv_lens = ([max_model_len] * full + [rest])[:seqs], [max_model_len] * seqs
    kv_lens += [0] * (seqs - len(kv_lens))
    if family == "decode":
        ends = list(range(decode_query_len, tokens + 1, decode_query_len))
        return {"actual_seq_lengths": ends, "actual_seq_lengths_kv": kv_lens}
    ends = list(accumulate(query_lens))
    ends += ends[-1:] * (seqs - len(ends))
    return {"actual_seq_lengths": [*ends, tokens], "actual_seq_lengths_kv": [*kv_lens, 0]}


NPU_ATTENTION = DeviceAttention(npu_attention, _BLOCK_SIZE, host_lengths)
