"""The rows of an embedding that a step's tokens name, by a kernel that starts while the one ahead ends."""

from __future__ import annotations

import torch

from graphmode.ops._checks import FLOATS, require, require_tensor
from graphmode.ops._triton import (
    constexpr,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    runs_triton,
    tl,
)

_MAX_BLOCK = 1024


def embed(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the rows ``token_ids`` of ``weight``.

    Args:
        token_ids: int64 ``[...]``, each a row of ``weight``, contiguous.
        weight: ``[vocab, hidden]``, float32, bfloat16 or float16, contiguous.

    Returns:
        ``[..., hidden]`` in ``weight``'s dtype.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor("weight", weight, shape=(None, None), dtypes=FLOATS, like=weight)
    require_tensor("token_ids", token_ids, shape=(None,) * token_ids.dim(), dtypes=(torch.int64,), like=weight)
    for name, tensor in (("token_ids", token_ids), ("weight", weight)):
        require(tensor.is_contiguous(), name, f"of strides {tensor.stride()}", "a contiguous tensor")
    run = embed_triton if runs_triton(weight) else embed_reference
    return run(token_ids, weight)


def embed_reference(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Run :func:`embed` in PyTorch."""
    return torch.nn.functional.embedding(token_ids, weight)


def embed_triton(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Run :func:`embed` in Triton: programs of one token and part of its row."""
    tokens, hidden = token_ids.numel(), weight.shape[1]
    out = torch.empty((*token_ids.shape, hidden), dtype=weight.dtype, device=weight.device)
    if tokens:
        block = min(next_power_of_2(hidden), _MAX_BLOCK)
        _embed_kernel[(tokens, -(-hidden // block))](
            token_ids, weight, out, hidden, block=block, **launch_options(weight.device)
        )
    return out


@jit()
def _embed_kernel(token_ids, weight, out, hidden, block: constexpr, early: constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    # It waits before it lets others start: these may read the block tables of the kernel before it without waiting.
    if early:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.load(token_ids + token)
    tl.store(out + token * hidden + at, tl.load(weight + row * hidden + at, mask=at < hidden), mask=at < hidden)
