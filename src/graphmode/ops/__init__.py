"""The operations of a step. Each checks its arguments and runs in Triton, as a loop for the CPU, or in PyTorch."""

from graphmode.ops.attention.batch import PagedBatch, Scoring
from graphmode.ops.attention.decode import rotate_and_attend
from graphmode.ops.attention.paged import paged_attention
from graphmode.ops.attention.segments import segment_attention
from graphmode.ops.attention.selection import select_keys
from graphmode.ops.embedding import embed
from graphmode.ops.kv_cache import write_kv
from graphmode.ops.linear.prefill import prefill_heads, prefill_swiglu
from graphmode.ops.linear.skinny import skinny_linear, skinny_linear_add, skinny_norm_linear
from graphmode.ops.linear.small_batch import small_batch_linear, split_k_linear
from graphmode.ops.moe.experts import gated_experts
from graphmode.ops.moe.router import Routing, choose_experts
from graphmode.ops.norm.rms_norm import add_rms_norm, rms_norm, silu_mul
from graphmode.ops.norm.split_k_residual import add_split_k, add_split_k_and_norm
from graphmode.ops.rope import HeadInputs, Rotation, rotate_and_cache
from graphmode.ops.sampling.adjust_logits import Adjustments, adjust_logits
from graphmode.ops.sampling.bans import Bans, ban_tokens, no_bans, note_recent
from graphmode.ops.sampling.filters import Filters
from graphmode.ops.sampling.logprobs import LogProbabilities, log_probabilities
from graphmode.ops.sampling.sample import sample
from graphmode.ops.sampling.token_counts import count_tokens, start_history

__all__ = [
    "Adjustments",
    "Bans",
    "Filters",
    "HeadInputs",
    "LogProbabilities",
    "PagedBatch",
    "Rotation",
    "Routing",
    "Scoring",
    "add_rms_norm",
    "add_split_k",
    "add_split_k_and_norm",
    "adjust_logits",
    "ban_tokens",
    "choose_experts",
    "count_tokens",
    "embed",
    "gated_experts",
    "log_probabilities",
    "no_bans",
    "note_recent",
    "paged_attention",
    "prefill_heads",
    "prefill_swiglu",
    "rms_norm",
    "rotate_and_attend",
    "rotate_and_cache",
    "sample",
    "segment_attention",
    "select_keys",
    "silu_mul",
    "skinny_linear",
    "skinny_linear_add",
    "skinny_norm_linear",
    "small_batch_linear",
    "split_k_linear",
    "start_history",
    "write_kv",
]
