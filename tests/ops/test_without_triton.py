import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from graphmode.ops import PagedBatch, Scoring, paged_attention, sample, write_kv
from graphmode.ops.kv_cache import write_kv_triton

k = v = torch.ones(2, 1, 16)
caches = torch.zeros(2, 1, 4, 1, 16)
slots = torch.tensor([1, -1])
write_kv(k, v, *caches, slots)
assert caches.sum() == 32
lens = torch.tensor([0, 1], dtype=torch.int32)
batch = PagedBatch(lens[:1, None], lens, lens[1:] * 2, 1)
out = paged_attention(k[:1], *caches, batch, Scoring(1.0))
assert out.shape == (1, 1, 16)
assert sample(k[:, 0], torch.zeros(2), slots, slots).tolist() == [0, 0]
try:
    write_kv_triton(k, v, *caches, slots)
except RuntimeError as error:
    print(error)
"""


def test_only_a_kernel_needs_triton() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout == "_write_kv_kernel is a Triton kernel and Triton is not installed: pip install triton\n"
