"""What attention over the paged KV cache reads beside queries, keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphmode.ops._checks import require, require_tensor


class PagedBatch(NamedTuple):
    """The sequences of a batch: how many tokens each has, how many of these are new, and which blocks hold them.

    Attributes:
        block_tables: int32 ``[seqs, max_blocks]``: the cache blocks of each sequence, in order. Entries beyond a
            sequence's length are not used and may hold anything.
        cu_query_lens: int32 ``[seqs + 1]``: where each sequence's new tokens start among those of the batch, and after
            the last one their number. A padding sequence has none, so the tail repeats the number. Not read where
            ``max_query_len`` is 1.
        kv_lens: int32 ``[seqs]``: each sequence's length with its new tokens; 0 for padding.
        max_query_len: the most new tokens that a sequence can have. 1 is decode: token ``i`` is of sequence ``i``.
    """

    block_tables: torch.Tensor
    cu_query_lens: torch.Tensor
    kv_lens: torch.Tensor
    max_query_len: int

    def require(self, tokens: int, like: torch.Tensor) -> None:
        """Check the batch of so many ``tokens``.

        Raises:
            ValueError: a shape, dtype, layout or device does not fit, or a number is out of range.
        """
        tables, seqs, ints = self.block_tables, len(self.block_tables), (torch.int32,)
        require_tensor("block_tables", tables, shape=(None, None), dtypes=ints, like=like)
        require(tables.stride(1) == 1, "block_tables.stride(1)", tables.stride(1), "1")
        require_tensor("cu_query_lens", self.cu_query_lens, shape=(seqs + 1,), dtypes=ints, like=like)
        require_tensor("kv_lens", self.kv_lens, shape=(seqs,), dtypes=ints, like=like)
        require(self.max_query_len >= 1, "max_query_len", self.max_query_len, "1 or more")
        fits = self.max_query_len > 1 or tokens == seqs
        require(fits, "tokens", tokens, f"{seqs}, one for each sequence of a decode batch")

    def find_tokens(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sequence and the position of each token, int64 ``[tokens]``; position -1 for padding.

        The sequence of padding is some valid one.
        """
        lens = self.kv_lens.long()
        token = torch.arange(tokens, device=lens.device)
        if self.max_query_len == 1:
            return token, lens - 1
        starts = self.cu_query_lens.long()
        seq = (torch.searchsorted(starts, token, right=True) - 1).clamp(max=len(lens) - 1)
        position = lens[seq] - (starts[seq + 1] - token)
        return seq, torch.where(token < starts[-1], position, -1)


class Scoring(NamedTuple):
    """How the scores of keys become weights.

    Attributes:
        scale: factor of the scores.
        window: of sliding-window attention: the keys that a query sees at most, its own among them. What no query of a
            sequence sees is not read: neither its slots nor its table entries.
        soft_cap: bounds the scaled scores: ``soft_cap * tanh(scores / soft_cap)``.
        sinks: ``[q_heads]``, float32, bfloat16 or float16, contiguous: a logit of each head that joins the softmax's
            denominator and has no value, neither scaled nor capped.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None
