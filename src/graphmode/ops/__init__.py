"""The kernels of a step in Triton and as loops for the CPU, beside PyTorch references; the tensors' device chooses."""

from graphmode.ops.attention.decode import rotate_and_attend
from graphmode.ops.attention.paged import paged_attention
from graphmode.ops.attention.segments import segment_attention
from graphmode.ops.attention.selection import select_keys
from graphmode.ops.embedding import embed
from graphmode.ops.kv_cache import write_kv
from graphmode.ops.linear.skinny import linear, linear_add, norm_linear
from graphmode.ops.moe.experts import gated_experts
from graphmode.ops.moe.router import Routing, choose_experts
from graphmode.ops.norm.rms_norm import add_rms_norm, rms_norm, silu_mul
from graphmode.ops.rope import Rotation, rotate_and_cache
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
    "LogProbabilities",
    "Rotation",
    "Routing",
    "add_rms_norm",
    "adjust_logits",
    "ban_tokens",
    "choose_experts",
    "count_tokens",
    "embed",
    "gated_experts",
    "linear",
    "linear_add",
    "log_probabilities",
    "no_bans",
    "norm_linear",
    "note_recent",
    "paged_attention",
    "rms_norm",
    "rotate_and_attend",
    "rotate_and_cache",
    "sample",
    "segment_attention",
    "select_keys",
    "silu_mul",
    "start_history",
    "write_kv",
]
