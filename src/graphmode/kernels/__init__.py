"""The kernels of a step, each in Triton beside its PyTorch reference; the tensors' device chooses."""

from graphmode.kernels.attention import paged_attention
from graphmode.kernels.filters import Filters
from graphmode.kernels.kv_cache import write_kv
from graphmode.kernels.sampling import sample

__all__ = ["Filters", "paged_attention", "sample", "write_kv"]
