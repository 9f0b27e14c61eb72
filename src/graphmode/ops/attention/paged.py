"""Causal attention of packed, ragged queries over the paged KV cache.

Every shape, grid and loop count comes from shapes alone, so that a captured call serves every batch of its number of
tokens; lengths and block tables are read on the device. A CPU reads them when it runs.
"""

from __future__ import annotations

import torch

from graphmode.ops._checks import FLOATS, require, require_cache, require_tensor
from graphmode.ops._triton import runs_triton
from graphmode.ops.attention.batch import PagedBatch, Scoring
from graphmode.ops.attention.cpu import paged_attention_cpu
from graphmode.ops.attention.paged_reference import paged_attention_reference
from graphmode.ops.attention.paged_triton import paged_attention_triton
from graphmode.ops.attention.split_kv import SplitKVPlan


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scoring: Scoring,
    selection: torch.Tensor | None = None,
    plan: SplitKVPlan | None = None,
) -> torch.Tensor:
    """Attend from every new token to its sequence's tokens up to and with itself.

    The new tokens' keys and values must be in the cache already. Query ``i`` of a sequence's ``n`` new ones stands at
    position ``p = kv_len - n + i`` and sees keys ``0 .. p``, or the last ``window`` of these. Scores, softmax and sums
    are float32.

    Args:
        q: ``[tokens, q_heads, key_dim]``, packed: one sequence's new tokens after the other's; float32, bfloat16 or
            float16, any strides.
        k_cache: ``[num_blocks, block_size, kv_heads, key_dim]`` in ``q``'s dtype, contiguous. ``q_heads`` is a
            multiple of ``kv_heads``: query head ``h`` uses key/value head ``h // (q_heads // kv_heads)``.
        v_cache: ``[num_blocks, block_size, kv_heads, value_dim]``, as ``k_cache``; or, of one key/value head, the view
            ``k_cache[..., :value_dim]``.
        batch: the sequences.
        scoring: how scores become weights.
        selection: int32 ``[tokens, top_k]``, rows contiguous: the positions of the keys that each token sees, as
            :func:`~graphmode.ops.select_keys` gives them: distinct, none after the token, the first
            ``min(p + 1, top_k)`` of a row used. Without a window.
        plan: how decode is split among programs, from :func:`~graphmode.ops.attention.split_kv.plan_split_kv` of these
            ``kv_lens``, with this window or ``top_k``; None has it computed. Triton alone reads it.

    Returns:
        ``[tokens, q_heads, value_dim]`` in ``q``'s dtype, contiguous; zero for padding tokens.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit, or a number is out of range.
    """
    require_tensor("q", q, shape=(None, None, None), dtypes=FLOATS, like=q)
    tokens, q_heads, key_dim = q.shape
    require_cache("k_cache", k_cache, shape=(None, None, None, key_dim), like=q)
    require_cache("v_cache", v_cache, shape=(*k_cache.shape[:3], None), like=q)
    kv_heads = k_cache.shape[2]
    require(q_heads % kv_heads == 0, "q_heads", q_heads, f"a multiple of kv_heads, {kv_heads}")
    batch.require(tokens, like=q)
    window, soft_cap, sinks = scoring.window, scoring.soft_cap, scoring.sinks
    require(window is None or window >= 1, "window", window, "1 or more")
    require(soft_cap is None or soft_cap > 0, "soft_cap", soft_cap, "more than 0")
    if sinks is not None:
        require_tensor("sinks", sinks, shape=(q_heads,), dtypes=FLOATS, like=q)
        require(sinks.is_contiguous(), "sinks.stride(0)", sinks.stride(0), "1")
    if selection is not None:
        require_tensor("selection", selection, shape=(tokens, None), dtypes=(torch.int32,), like=q)
        require(selection.stride(1) == 1, "selection.stride(1)", selection.stride(1), "1")
        require(window is None, "window", window, "None with a selection")
    if runs_triton(q):
        return paged_attention_triton(q, k_cache, v_cache, batch, scoring, selection, plan)
    attend = paged_attention_cpu if q.device.type == "cpu" else paged_attention_reference
    return attend(q, k_cache, v_cache, batch, scoring, selection)
