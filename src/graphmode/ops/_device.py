"""Arithmetic that several kernels share. Kernels in Triton call these functions, and so do those in Gluon."""

from __future__ import annotations

from graphmode.ops._triton import constexpr, gdc_launch_dependents, gdc_wait, jit, tl


@jit()
def overlap(early: constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel start, then wait for the one ahead, where they may overlap (``launch_options``)."""
    if early:
        gdc_launch_dependents()
        gdc_wait()


@jit()
def swiglu(gate, up):  # type: ignore[no-untyped-def]
    """Return ``silu(gate) * up`` of float32 values."""
    return gate / (1.0 + tl.exp(-gate)) * up


@jit()
def rms_factor(squares, size, eps):  # type: ignore[no-untyped-def]
    """Return what an RMS norm multiplies by, from the sum of the squares of ``size`` elements."""
    return 1.0 / tl.sqrt(squares / size + eps)


@jit()
def fast_rms_factor(squares, size, eps):  # type: ignore[no-untyped-def]
    """Return :func:`rms_factor` by the one instruction for it, which rounds less exactly."""
    return tl.rsqrt(squares / size + eps)


@jit()
def slot_in(block, position, block_size: constexpr):  # type: ignore[no-untyped-def]
    """Return the slot of a position, int64, given the number of the cache block that holds it."""
    return block.to(tl.int64) * block_size + position % block_size


@jit()
def load_slots(block_table, position, inside, block_size: constexpr):  # type: ignore[no-untyped-def]
    """Return the slots of a sequence's positions by its block table; some slot of block 0 for those not ``inside``.

    With None for ``inside`` all are.
    """
    if inside is None:
        block = tl.load(block_table + position // block_size)
    else:
        block = tl.load(block_table + position // block_size, mask=inside, other=0)
    return slot_in(block, position, block_size)


@jit()
def online_softmax(scores, top, total, axis: constexpr):  # type: ignore[no-untyped-def]
    """Take a tile of scores, in powers of 2, into a softmax that is computed tile by tile (arXiv 1805.02867).

    Args:
        scores: the keys of a query lie along ``axis``.
        top: each query's largest score so far, finite from the start: a query may see nothing of its first tiles.
        total: each query's sum of weights so far, relative to ``top``.
        axis: of the keys, the last one.

    Returns:
        The keys' weights, the factor of what was summed before, and the new ``top`` and ``total``.
    """
    new_top = tl.maximum(top, tl.max(scores, axis))
    weights = tl.exp2(scores - tl.expand_dims(new_top, axis))
    correction = tl.exp2(top - new_top)
    return weights, correction, new_top, total * correction + tl.sum(weights, axis)


@jit()
def softmax_average(weighted, total):  # type: ignore[no-untyped-def]
    """Return the average of values from their weighted sum: 0 where nothing was seen."""
    return weighted / tl.where(total == 0.0, 1.0, total)


@jit()
def add_sink(total, top, sinks, head, inside):  # type: ignore[no-untyped-def]
    """Return the sums of weights relative to ``top`` with the sinks of heads, where there are any.

    A sink far above every score overflows to infinity, and the division makes zero of the row, as it should be.
    """
    if sinks is not None:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        total = total + tl.exp2(sink - top)
    return total


@jit()
def find_token(token, tokens, cu_query_lens, kv_lens, seqs, block_seqs: constexpr):  # type: ignore[no-untyped-def]
    """Return the sequence of a token of a mixed batch and how many keys the token sees: none where it is padding."""
    index = tl.arange(0, block_seqs)
    starts = tl.load(cu_query_lens + index, mask=index <= seqs, other=tokens)
    seq = tl.sum(((starts <= token) & (index <= seqs)).to(tl.int32), 0) - 1
    query_end = tl.load(cu_query_lens + seq + 1, mask=seq < seqs, other=0)
    kv_len = tl.load(kv_lens + seq, mask=seq < seqs, other=0)
    return seq, tl.where(seq < seqs, kv_len - (query_end - token - 1), 0)


@jit()
def load_split(splits, number):  # type: ignore[no-untyped-def]
    """Return what the plan says of program ``number``; from L2, where the kernel ahead may just have put it."""
    place = splits + number * 6
    seq = tl.load(place, cache_modifier=".cg")
    first = tl.load(place + 1, cache_modifier=".cg")
    end = tl.load(place + 2, cache_modifier=".cg")
    return seq, first, end, tl.load(place + 3, cache_modifier=".cg"), tl.load(place + 4, cache_modifier=".cg")
