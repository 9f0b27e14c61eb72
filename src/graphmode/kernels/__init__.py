"""The kernels of a step, each in Triton beside its PyTorch reference; the tensors' device chooses."""

from graphmode.kernels.attention import paged_attention
from graphmode.kernels.filters import Filters
from graphmode.kernels.history import count_tokens, start_history
from graphmode.kernels.kv_cache import write_kv
from graphmode.kernels.logits import Adjustments, adjust_logits
from graphmode.kernels.logprobs import LogProbabilities, log_probabilities
from graphmode.kernels.sampling import sample
from graphmode.kernels.segment_attention import segment_attention

__all__ = [
    "Adjustments",
    "Filters",
    "LogProbabilities",
    "adjust_logits",
    "count_tokens",
    "log_probabilities",
    "paged_attention",
    "sample",
    "segment_attention",
    "start_history",
    "write_kv",
]
