"""The loops of the CPU kernels, compiled by Numba for the processor that runs them.

Importing this module compiles them, or loads what an earlier process left in Numba's cache; so it is imported when the
first of them is called (:func:`graphmode.ops._cpu.loops`). Numbers are float32, and each row's result is computed in
the same order whatever other rows there are. Sums may be reordered to fit vector registers; NaN and infinity keep their
meaning.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

# Everything of "fast" arithmetic that leaves NaN and infinity alone.
_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}


def _compile(signature: str) -> Any:
    return numba.njit(signature, cache=True, nogil=True, error_model="numpy", fastmath=_FASTMATH)


def _bit_cast(typing_context: Any, bits: Any) -> Any:
    """Give the float32 whose bits an int32 holds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


_float_of_bits: Any = intrinsic(_bit_cast)


@numba.njit("f4(f4)", cache=True, inline="always", error_model="numpy", fastmath=_FASTMATH)
def _exp(x):  # type: ignore[no-untyped-def]
    """Return ``exp(x)`` for ``-87 <= x <= 88``, to a few units in the last place, in a form that compilers vectorise.

    ``exp(x) = 2 ** n * exp(r)`` with ``|r| <= ln(2) / 2``, and the series of ``exp(r)`` (Cody and Waite, "Software
    Manual for the Elementary Functions", 1980).
    """
    n = math.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    series = np.float32(1.0 / 5040)
    series = series * r + np.float32(1.0 / 720)
    series = series * r + np.float32(1.0 / 120)
    series = series * r + np.float32(1.0 / 24)
    series = series * r + np.float32(1.0 / 6)
    series = series * r + np.float32(0.5)
    series = series * r * r + r + np.float32(1.0)
    return series * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@numba.njit("f4(f4[::1], f4)", cache=True, inline="always", error_model="numpy", fastmath=_FASTMATH)
def _rms_factor(row, eps):  # type: ignore[no-untyped-def]
    """Return what an RMS norm multiplies the elements of a row by."""
    squares = np.float32(0.0)
    for i in range(row.shape[0]):
        squares += row[i] * row[i]
    return np.float32(1.0) / np.sqrt(squares / np.float32(row.shape[0]) + eps)


@_compile("void(f4[:,::1], f4[::1], f4, f4[:,::1], b1)")
def rms_norm(x, weight, eps, out, add):  # type: ignore[no-untyped-def]
    """Write the norm of each row of ``x`` to ``out``, or add it to what is there."""
    rows, size = x.shape
    for row in range(rows):
        scale = _rms_factor(x[row], eps)
        if add:
            for i in range(size):
                out[row, i] += x[row, i] * scale * weight[i]
        else:
            for i in range(size):
                out[row, i] = x[row, i] * scale * weight[i]


@_compile("void(f4[:,::1], f4[:,::1])")
def silu_mul(gate_up, out):  # type: ignore[no-untyped-def]
    """Write ``silu(gate) * up`` of rows that hold gate before up."""
    rows, size = out.shape
    for row in range(rows):
        for i in range(size):
            gate = gate_up[row, i]
            # Beyond these bounds the exponential changes nothing that float32 can tell, and NaN passes them.
            exponent = min(max(-gate, np.float32(-87.0)), np.float32(88.0))
            out[row, i] = gate / (np.float32(1.0) + _exp(exponent)) * gate_up[row, size + i]


@_compile(
    "void(f4[:,:,::1], f4[::1], f4[::1], f4, f4[:,::1], f4[:,::1], b1, i8[:], f4[:,:,:], f4[:,:,:], i8[:], f4[:,:,::1])"
)
def rotate_and_cache(  # type: ignore[no-untyped-def]
    qkv, q_norm, k_norm, eps, cos, sin, interleaved, positions, k_cache, v_cache, slot_mapping, out
):
    """Normalise and rotate heads ``qkv [tokens, q_heads + 2 * kv_heads, dim]``; caches are ``[slots, kv_heads, dim]``.

    Norms of no elements are none.
    """
    tokens, q_heads, dim = out.shape
    kv_heads = k_cache.shape[1]
    half = cos.shape[1]
    head = np.empty(dim, np.float32)
    for token in range(tokens):
        slot = slot_mapping[token]
        position = positions[token]
        for h in range(q_heads + kv_heads):
            is_key = h >= q_heads
            if is_key and slot < 0:
                break
            norm = k_norm if is_key else q_norm
            for i in range(dim):
                head[i] = qkv[token, h, i]
            if norm.shape[0]:
                scale = _rms_factor(head, eps)
                for i in range(dim):
                    head[i] = head[i] * scale * norm[i]
            target = k_cache[slot, h - q_heads] if is_key else out[token, h]
            if interleaved:
                for i in range(half):
                    a, b = head[2 * i], head[2 * i + 1]
                    target[2 * i] = a * cos[position, i] - b * sin[position, i]
                    target[2 * i + 1] = b * cos[position, i] + a * sin[position, i]
            else:
                for i in range(half):
                    a, b = head[i], head[half + i]
                    target[i] = a * cos[position, i] - b * sin[position, i]
                    target[half + i] = b * cos[position, i] + a * sin[position, i]
            for i in range(2 * half, dim):
                target[i] = head[i]
        if slot >= 0:
            for h in range(kv_heads):
                for i in range(dim):
                    v_cache[slot, h, i] = qkv[token, q_heads + kv_heads + h, i]


@_compile(
    "void(f4[:,:,:], f4[:,::1], f4[:,::1], i8, i8, i4[:,:], i8, i4[:], i4[:], f4[::1], f4, i8, f4, i8, i8, i8, "
    "f4[:,:,::1])"
)
def attend(  # type: ignore[no-untyped-def]
    q, k_rows, v_rows, kv_heads, value_dim, block_tables, block_size, cu_query_lens, kv_lens, sinks, scale, window,
    soft_cap, longest, first, last, out,
):  # fmt: skip
    """Attend with the sequences that have up to ``longest`` new tokens.

    Work is counted in pairs of a sequence and a key/value head, of which this takes ``first`` to ``last``. A row of
    ``k_rows`` and ``v_rows`` begins with the heads of a slot. No window is 0, no cap 0, and no sinks are none. Padding
    sequences get zeros.
    """
    key_dim = q.shape[2]
    group = q.shape[1] // kv_heads
    query = np.empty((group, key_dim), np.float32)
    total = np.empty((group, value_dim), np.float32)
    for item in range(first, last):
        seq, kv_head = item // kv_heads, item % kv_heads
        # Unsigned indices spare the check for negative ones, with which loops would not use vector registers.
        k_start, v_start = np.uintp(kv_head * key_dim), np.uintp(kv_head * value_dim)
        start, end, length = cu_query_lens[seq], cu_query_lens[seq + 1], kv_lens[seq]
        if end - start > longest:
            continue
        scores = np.empty((group, length), np.float32)
        for token in range(start, end):
            visible = length - (end - 1 - token)
            begin = max(visible - window, 0) if window else 0
            if length == 0:
                for g in range(group):
                    for i in range(value_dim):
                        out[token, kv_head * group + g, i] = np.float32(0.0)
                continue
            for g in range(group):
                for i in range(key_dim):
                    query[g, i] = q[token, kv_head * group + g, i] * scale
                for i in range(value_dim):
                    total[g, i] = np.float32(0.0)
            for page in range(begin // block_size, (visible + block_size - 1) // block_size):
                first_at = page * block_size
                first_slot = block_tables[seq, page] * block_size
                for at in range(max(first_at, begin), min(first_at + block_size, visible)):
                    row = np.uintp(first_slot + at - first_at)
                    for g in range(group):
                        score = np.float32(0.0)
                        for i in range(key_dim):
                            score += query[g, i] * k_rows[row, k_start + np.uintp(i)]
                        scores[g, at] = score
            for g in range(group):
                if soft_cap > 0:
                    for at in range(begin, visible):
                        scores[g, at] = soft_cap * np.tanh(scores[g, at] / soft_cap)
                top = scores[g, begin]
                for at in range(begin + 1, visible):
                    top = max(top, scores[g, at])
                denominator = np.float32(0.0)
                if sinks.shape[0]:
                    top = max(top, sinks[kv_head * group + g])
                    denominator += _exp(max(sinks[kv_head * group + g] - top, np.float32(-87.0)))
                for at in range(begin, visible):
                    weight = _exp(max(scores[g, at] - top, np.float32(-87.0)))
                    scores[g, at] = weight
                    denominator += weight
                inverse = np.float32(1.0) / denominator
                for at in range(begin, visible):
                    scores[g, at] *= inverse
            for page in range(begin // block_size, (visible + block_size - 1) // block_size):
                first_at = page * block_size
                first_slot = block_tables[seq, page] * block_size
                for at in range(max(first_at, begin), min(first_at + block_size, visible)):
                    row = np.uintp(first_slot + at - first_at)
                    for g in range(group):
                        weight = scores[g, at]
                        for i in range(value_dim):
                            total[g, i] += weight * v_rows[row, v_start + np.uintp(i)]
            for g in range(group):
                for i in range(value_dim):
                    out[token, kv_head * group + g, i] = total[g, i]


_MASK64 = np.uint64(0xFFFFFFFFFFFFFFFF)


@numba.njit("u8(u8)", cache=True, inline="always")
def _mix64(x):  # type: ignore[no-untyped-def]
    """Mix the bits of an integer: splitmix64."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)) & _MASK64
    x = ((x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)) & _MASK64
    x = ((x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)) & _MASK64
    return x ^ (x >> np.uint64(31))


# Logits that are looked at together, and more than the largest noise that there is.
_SAMPLE_BLOCK = 64
_MOST_NOISE = np.float32(17.5)


@_compile("void(f4[:,::1], f4[:], i8[:], i8[:], i8[:], f4, i8[:])")
def sample(logits, temperature, seeds, positions, state_indices, min_temperature, out):  # type: ignore[no-untyped-def]
    """Draw a token of each row, as :func:`graphmode.ops.sampling.sample.sample` without filters.

    The noise of a token takes two logarithms, so it is computed only where the token may win: noise ``-log(-log(u))``
    is more than ``d`` only where ``1 - u < exp(-d)``.
    """
    rows, vocab = logits.shape
    scores = np.empty(_SAMPLE_BLOCK, np.float32)
    uniform = np.empty(_SAMPLE_BLOCK, np.float32)
    may_win = np.empty(_SAMPLE_BLOCK, np.bool_)
    for row in range(rows):
        out[row] = 0
        if positions[row] <= 0:
            continue
        state = state_indices[row]
        random = temperature[state] >= min_temperature
        inverse = np.float32(1.0) / temperature[state] if random else np.float32(1.0)
        most_noise = _MOST_NOISE if random else np.float32(0.0)
        key = _mix64((_mix64(np.uint64(seeds[state])) + np.uint64(positions[row])) & _MASK64)
        factor = np.uint32((key >> np.uint64(32)) | np.uint64(1))
        offset = np.uint32(key & np.uint64(0xFFFFFFFF))
        best = np.float32(-np.inf)
        for begin in range(0, vocab, _SAMPLE_BLOCK):
            count = min(_SAMPLE_BLOCK, vocab - begin)
            top = np.float32(-np.inf)
            for i in range(count):
                scores[i] = logits[row, begin + i] * inverse
                top = max(top, scores[i])  # NaN is never larger
            if not top + most_noise > best:
                continue
            if not random:
                for i in range(count):
                    if scores[i] > best:
                        best = scores[i]
                        out[row] = begin + i
                continue
            for i in range(count):
                bits = np.uint32(np.uint32(begin + i) * factor + offset)
                bits ^= bits >> np.uint32(16)
                bits = np.uint32(bits * np.uint32(0x7FEB352D))
                bits ^= bits >> np.uint32(15)
                bits = np.uint32(bits * np.uint32(0x846CA68B))
                bits ^= bits >> np.uint32(16)
                uniform[i] = np.float32(bits >> np.uint32(9)) * np.float32(2.0**-23) + np.float32(2.0**-24)
                ahead = _exp(min(max(scores[i] - best, np.float32(-87.0)), np.float32(1.0)))
                may_win[i] = np.float32(1.0) - uniform[i] < ahead * np.float32(1.001)
            for i in range(count):
                if may_win[i]:
                    score = scores[i] - np.log(-np.log(uniform[i]))
                    if score > best:
                        best = score
                        out[row] = begin + i


@_compile("void(i8[:], i8[:], i8[:], i4[:,:,::1], i4[:,:,:], i8[:], i4[:,:,::1], i4[:], i8[:])")
def begin_step(  # type: ignore[no-untyped-def]
    token_ids, token_sources, last_tokens, tables, step_tables, state_indices, changes, new_blocks, out
):
    """Write the tokens of a step to ``out``, extend its block tables and copy them to its rows."""
    for token in range(token_ids.shape[0]):
        source = token_sources[token]
        out[token] = last_tokens[source] if source > 0 else token_ids[token]
    for seq in range(state_indices.shape[0]):
        for group in range(tables.shape[0]):
            known, new, first = changes[seq, group]
            table = tables[group, state_indices[seq]]
            for entry in range(new):
                table[known + entry] = new_blocks[first + entry]
            for entry in range(known + new):
                step_tables[group, seq, entry] = table[entry]
