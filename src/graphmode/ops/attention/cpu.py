"""Paged attention on a CPU, where the host is the device.

The operator reads lengths when it runs, so that time and memory follow the tokens that are there and not the longest
sequence that there may be. A sequence's result depends on its own lengths alone, so it is the same in every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise

import numpy as np
import torch

from graphmode.ops._cpu import cpu_operator, loops, runs_on_host
from graphmode.ops.attention.batch import PagedBatch, Scoring
from graphmode.ops.attention.paged_reference import paged_attention_reference

# Sequences with more new tokens than this are computed by matrix products, others by a loop over the cache.
_LOOP_TOKENS = 4
# New tokens whose scores are held at a time.
_QUERY_BLOCK = 64
# Multiplications of a loop from which more than one thread gains: about a quarter of a millisecond.
_THREAD_WORK = 1 << 21


def paged_attention_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scoring: Scoring,
    selection: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run :func:`~graphmode.ops.paged_attention` on a CPU, by an operator that reads the lengths when it runs."""
    out = torch.empty((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype)
    _attend_on_cpu(q, k_cache, v_cache, *batch, *scoring, selection, out)
    return out


@cpu_operator(
    "attend_on_cpu(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor cu_query_lens, "
    "Tensor kv_lens, int max_query_len, float scale, int? window, float? soft_cap, Tensor? sinks, Tensor? selection, "
    "Tensor(a!) out)"
)
def _attend_on_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    kv_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    selection: torch.Tensor | None,
    out: torch.Tensor,
) -> Callable[[], None]:
    """Write to ``out`` what :func:`~graphmode.ops.paged_attention` returns; its arguments."""
    scoring = Scoring(scale, window, soft_cap, sinks)
    lens = kv_lens.numpy()
    starts = np.arange(len(lens) + 1, dtype=np.int32) if max_query_len == 1 else cu_query_lens.numpy()
    loop, longest = None, 0
    if runs_on_host(q) and selection is None:
        loop, longest = _bind_loop(q, k_cache, v_cache, block_tables, starts, lens, scoring, out)

    def attend() -> None:
        if max_query_len > 1:
            out[starts[-1] :] = 0
        if loop is not None:
            loop()
        for seq in np.flatnonzero(np.diff(starts) > longest) if max_query_len > longest else ():
            _attend_by_products(
                q,
                k_cache,
                v_cache,
                block_tables[seq : seq + 1],
                range(int(starts[seq]), int(starts[seq + 1])),
                int(lens[seq]),
                scoring,
                selection,
                out,
            )

    return attend


def _attend_by_products(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    tokens: range,
    length: int,
    scoring: Scoring,
    selection: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Attend with one sequence's new ``tokens`` to the keys that they see, some of them at a time."""
    if length == 0:
        out[tokens.start : tokens.stop] = 0
        return
    for first in range(tokens.start, tokens.stop, _QUERY_BLOCK):
        last = min(first + _QUERY_BLOCK, tokens.stop)
        visible = length - (tokens.stop - last)
        batch = PagedBatch(
            block_table[:, : -(-visible // k_cache.shape[1])],
            torch.tensor([0, last - first], dtype=torch.int32),
            torch.tensor([visible], dtype=torch.int32),
            last - first,
        )
        chosen = None if selection is None else selection[first:last, :visible]
        out[first:last] = paged_attention_reference(q[first:last], k_cache, v_cache, batch, scoring, chosen)


def _bind_loop(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    starts: np.ndarray,
    lens: np.ndarray,
    scoring: Scoring,
    out: torch.Tensor,
) -> tuple[Callable[[], None], int]:
    """Return what attends with the sequences of few new tokens, in as many threads as the work is worth, and how many.

    Its results are those of one thread: a thread takes whole heads of whole sequences.
    """
    _, block_size, kv_heads, value_dim = v_cache.shape
    attend = partial(
        loops().attend,
        q.numpy(),
        _rows(k_cache),
        _rows(v_cache),
        kv_heads,
        value_dim,
        block_tables.numpy(),
        block_size,
        starts,
        lens,
        np.empty(0, np.float32) if scoring.sinks is None else scoring.sinks.float().numpy(),
        scoring.scale,
        scoring.window or 0,
        scoring.soft_cap or 0.0,
        _LOOP_TOKENS,
    )
    output, items = out.numpy(), len(lens) * kv_heads
    work_of_key = q.shape[1] // kv_heads * (q.shape[2] + value_dim)

    def run() -> None:
        if int(lens.sum()) * kv_heads * work_of_key < _THREAD_WORK or torch.get_num_threads() == 1:
            attend(0, items, output)
            return
        work = np.repeat(np.where(np.diff(starts) <= _LOOP_TOKENS, lens, 0), kv_heads).cumsum()
        shares = work[-1] * np.arange(1, torch.get_num_threads()) / torch.get_num_threads()
        bounds = [0, *np.searchsorted(work, shares).tolist(), items]
        others = [_pool().submit(attend, *part, output) for part in pairwise(bounds[1:])]
        attend(*bounds[:2], output)
        for other in others:
            other.result()

    return run, _LOOP_TOKENS


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="graphmode-attention")


def _rows(cache: torch.Tensor) -> np.ndarray:
    """Return the memory of a cache with a row a slot; of the view of another's first elements, all of the other's."""
    slots, width = cache.shape[0] * cache.shape[1], cache.stride(1)
    # The last row of a view ends before the row of what it is a view of does.
    room = (cache.untyped_storage().nbytes() // cache.element_size() - cache.storage_offset()) // width
    return cache.as_strided((min(slots, room), width), (width, 1)).numpy()
