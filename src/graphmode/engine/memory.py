"""Memory is counted before it is taken: the engine's buffers, and what is left for the KV cache. Pure, but for logs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from graphmode.cache.allocate import longest_that_fits, needed_bytes, share_out
from graphmode.cache.specs import CacheGroup
from graphmode.engine.block_tables import room_for_blocks, table_bytes
from graphmode.engine.sampler import REPORT_BYTES, STATE_BYTES
from graphmode.engine.step_inputs import StepInputs
from graphmode.engine.types import Limits
from graphmode.errors import InputError
from graphmode.graph.buffers import STAGING_BUFFERS
from graphmode.graph.inputs import shape_at
from graphmode.graph.memory import in_words

log = logging.getLogger(__name__)

# The share of the memory there that weights, KV cache and graphs take where the user says nothing. On a host the rest
# of the machine lives in it too.
MEMORY_SHARE = 0.9
MEMORY_SHARE_ON_CPU = 0.7
# Of it, what is left to graphs, activations and libraries.
_ROOM = 0.05
_RESULT_SLOTS = 3


@dataclass(frozen=True)
class Needed:
    """Bytes that the engine's buffers take.

    Attributes:
        device: by what they are for.
        host: the same on the host: what is staged for the device, and read back.
    """

    device: Mapping[str, int]
    host: Mapping[str, int]

    def total(self, *, on_host: bool) -> tuple[int, int]:
        """Return the bytes on the device and on the host.

        Where the two are one, all count as the device's, and a step's inputs are written where graphs read them.
        """
        device, host = sum(self.device.values()), sum(self.host.values())
        return (device + host - self.host["staged inputs"], 0) if on_host else (device, host)


def buffers_needed(
    limits: Limits, *, block_sizes: Sequence[int], vocab_size: int = 0, hidden_size: int = 0, itemsize: int = 2
) -> Needed:
    """Return what buffers take whose size follows from the limits; without the model's sizes, the least that it can be.

    Args:
        limits: what a step may hold.
        block_sizes: tokens in a block of each cache group.
        vocab_size: of the model, for logits.
        hidden_size: of the model, for the hidden states of the largest step.
        itemsize: bytes of an activation.
    """
    tokens, seqs = limits.max_num_batched_tokens, limits.max_num_seqs
    axes = {
        "tokens": tokens,
        "seqs": seqs,
        "logits": limits.max_logits,
        "scored": seqs,
        "new_blocks": room_for_blocks(limits, block_sizes, tokens),
    }
    declared = vars(StepInputs.declared(len(block_sizes))).values()
    inputs = sum(prod(shape_at(spec, axes)) * spec.dtype.itemsize for spec in declared)
    parameters = (seqs + 1) * STATE_BYTES
    results = 8 * limits.decode_steps * limits.max_logits
    tables = table_bytes(limits, block_sizes)
    device = {
        "a step's inputs": inputs,
        "block tables": tables,
        "sampling parameters": parameters,
        "sampled tokens": results,
        "hidden states": 2 * tokens * hidden_size * itemsize,  # a layer's input and its result
        "logits": 4 * limits.max_logits * vocab_size,
    }
    host = {
        "staged inputs": STAGING_BUFFERS * inputs,
        "staged sampling parameters": (1 + STAGING_BUFFERS) * parameters,
        "results": _RESULT_SLOTS * (results + (limits.max_logits + seqs) * REPORT_BYTES),
    }
    return Needed(device, host)


def check_buffers(
    limits: Limits, device: torch.device, free: int, host_free: int, *, block_sizes: Sequence[int], **model: int
) -> int:
    """Check that the engine's buffers fit, and return the bytes that they take on the device.

    Args:
        limits: what a step may hold.
        device: where it runs.
        free: bytes that are free there.
        host_free: bytes that are free on the host.
        block_sizes: tokens in a block of each cache group.
        **model: its sizes, as of :func:`buffers_needed`.

    Raises:
        InputError: they do not fit: with the bytes needed, those there, and which option to lower.
    """
    on_host = device.type == "cpu"

    def needed(limits: Limits) -> Needed:
        return buffers_needed(limits, block_sizes=block_sizes, **model)

    taken = needed(limits).total(on_host=on_host)
    for place, bytes_taken, there in (("device", taken[0], free), ("host", taken[1], host_free)):
        if bytes_taken <= there:
            continue

        def without(name: str) -> int:
            return sum(needed(replace(limits, **{name: 1})).total(on_host=True))

        options = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "decode_steps")
        largest = min(options, key=without)
        parts = needed(limits)
        kinds = {**parts.device, **parts.host} if on_host else getattr(parts, place)
        most = sorted(kinds, key=lambda kind: -kinds[kind])[:3]
        raise InputError(
            f"{largest} is {getattr(limits, largest)}: with "
            + ", ".join(f"{name}={getattr(limits, name)}" for name in options if name != largest)
            + f" the engine's buffers need {in_words(bytes_taken)} on {device if place == 'device' else 'the host'} ("
            + ", ".join(f"{kind} {in_words(kinds[kind])}" for kind in most)
            + f"), where {in_words(there)} are free. Lower {largest}"
        )
    return taken[0]


@dataclass(frozen=True)
class CacheMemory:
    """Bytes that the KV cache may take, and in words how that came about."""

    nbytes: int
    reason: str


def cache_memory(
    device: torch.device, free: int, weights: int, buffers: int, share: float | None, given: int | None
) -> CacheMemory:
    """Return what the KV cache may take: the share of what was free before the weights, less these and room to work in.

    Args:
        device: where it lies.
        free: bytes that are free there, the weights being loaded.
        weights: bytes of the weights.
        buffers: bytes of the engine's buffers.
        share: of the memory that the engine may take; None for the default.
        given: bytes that the user gave; None for none.

    Raises:
        InputError: the user gave more than is free, or the share leaves nothing.
    """
    if given is not None:
        if given > free:
            raise InputError(
                f"kv_cache_memory is {given} ({in_words(given)}); {in_words(free)} are free on {device}. Lower it to "
                f"{free} or less"
            )
        return CacheMemory(given, f"kv_cache_memory={given}")
    if share is None:
        share = MEMORY_SHARE_ON_CPU if device.type == "cpu" else MEMORY_SHARE
    there = free + weights
    room = max(int(_ROOM * there), buffers)
    nbytes = int(share * there) - weights - room
    reason = (
        f"memory_share={share} of {in_words(there)} on {device}, less {in_words(weights)} of weights and "
        f"{in_words(room)} for graphs and buffers"
    )
    if nbytes <= 0:
        raise InputError(
            f"no memory is left for the KV cache: {reason}. Raise memory_share, give kv_cache_memory, or use a smaller "
            "model or dtype"
        )
    return CacheMemory(nbytes, reason)


def fit_cache(
    limits: Limits, memory: CacheMemory, groups: Sequence[CacheGroup], *, lower: bool
) -> tuple[Limits, tuple[int, ...]]:
    """Return the limits and the blocks of each group: enough for every row at full length, or what the memory allows.

    Args:
        limits: what a step may hold.
        memory: what the cache may take.
        groups: the cache's.
        lower: whether ``max_model_len`` is lowered to what fits, with a warning, because the user did not give it.

    Raises:
        InputError: one sequence of ``max_model_len`` does not fit.
    """
    length, steps = limits.max_model_len, (limits.max_num_batched_tokens, limits.decode_steps)
    fitting = longest_that_fits(groups, memory.nbytes, length, *steps)
    if fitting < length:
        numbers = (
            f"a sequence of {length} tokens needs {in_words(needed_bytes(groups, length, *steps))} of KV cache, which "
            f"may take {in_words(memory.nbytes)} ({memory.reason})"
        )
        if not lower or fitting == 0:
            remedy = f"max_model_len={fitting} would fit. Lower it" if fitting else "not even one block fits"
            raise InputError(
                f"max_model_len is {length}: {numbers}; {remedy}, or raise kv_cache_memory or memory_share"
            )
        log.warning(
            "max_model_len is lowered to %d: %s. To choose, give max_model_len, kv_cache_memory or memory_share",
            fitting,
            numbers,
        )
        limits = replace(limits, max_model_len=fitting)
    return limits, share_out(
        groups,
        memory.nbytes,
        length=limits.max_model_len,
        step_tokens=limits.max_num_batched_tokens,
        decode_steps=limits.decode_steps,
        sequences=limits.max_num_seqs,
    )
