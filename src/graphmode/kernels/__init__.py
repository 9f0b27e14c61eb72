"""The kernels of a step in Triton and as loops for the CPU, beside PyTorch references; the tensors' device chooses."""

from graphmode.kernels.attention import paged_attention
from graphmode.kernels.bans import Bans, ban_tokens, no_bans, note_recent
from graphmode.kernels.decode_attention import rotate_and_attend
from graphmode.kernels.embedding import embed
from graphmode.kernels.experts import gated_experts
from graphmode.kernels.few_rows import linear, linear_add, norm_linear
from graphmode.kernels.filters import Filters
from graphmode.kernels.history import count_tokens, start_history
from graphmode.kernels.kv_cache import write_kv
from graphmode.kernels.logits import Adjustments, adjust_logits
from graphmode.kernels.logprobs import LogProbabilities, log_probabilities
from graphmode.kernels.norm import add_rms_norm, rms_norm, silu_mul
from graphmode.kernels.rotary import Rotation, rotate_and_cache
from graphmode.kernels.router import Routing, choose_experts
from graphmode.kernels.sampling import sample
from graphmode.kernels.segment_attention import segment_attention
from graphmode.kernels.selection import select_keys

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
