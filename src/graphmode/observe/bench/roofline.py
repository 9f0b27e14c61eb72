"""The floor: the least time that a workload takes on a device whose memory and arithmetic are as fast as measured.

The roofline model (Williams, Waterman and Patterson, 2009): reading and arithmetic overlap at best, so the floor is the
longer of the two. What counts is what cannot be left out: every step reads all decoder weights and the head once, and
the keys and values of the tokens before; each token is multiplied by the decoder weights, and each that is sampled from
by the head. Activations, writes, attention's own arithmetic and the host are left out, so no run can be below it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from graphmode.cache.specs import CacheShape
from graphmode.observe.bench.workloads import Request

_READ_BYTES = 2 << 30
_MATRIX = 8192


@dataclass(frozen=True)
class Work:
    """What a device must do at least.

    Attributes:
        bytes: read from memory.
        flops: arithmetic operations of matrix products; a multiplication and an addition are two.
    """

    bytes: float
    flops: float


@dataclass(frozen=True)
class Roofline:
    """What a device can do at most, as measured.

    Attributes:
        read_bandwidth: bytes a second of a large read.
        flop_rate: operations a second of a large matrix product.
    """

    read_bandwidth: float
    flop_rate: float

    def seconds(self, work: Work) -> float:
        """Return the least time that the work takes."""
        return max(work.bytes / self.read_bandwidth, work.flops / self.flop_rate)


@dataclass(frozen=True)
class ModelCost:
    """What a model's tokens and steps take.

    Attributes:
        decoder_bytes: of all weights but embedding and head.
        head_bytes: of the head's weights, the embedding's where they are tied.
        kv_bytes: of the keys and values of a token in all layers.
        itemsize: bytes of a weight.
    """

    decoder_bytes: int
    head_bytes: int
    kv_bytes: int
    itemsize: int

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return self.decoder_bytes + self.head_bytes

    def decode_step(self, batch: int, tokens: int, prompt_tokens: int) -> Work:
        """Return the mean work of the decode steps that continue ``batch`` prompts from 1 to ``tokens`` tokens each."""
        context = prompt_tokens + (tokens - 2) / 2
        return Work(self.step_bytes + batch * context * self.kv_bytes, self._flops(batch, batch))

    def prefill(self, batch: int, prompt_tokens: int) -> Work:
        """Return the work of the first tokens of ``batch`` prompts."""
        return Work(self.step_bytes, self._flops(batch * prompt_tokens, batch))

    def requests(self, requests: Sequence[Request]) -> Work:
        """Return the work of requests that run together: as many steps as the longest answer has tokens."""
        steps = max(request.max_tokens for request in requests)
        context = sum(
            (request.max_tokens - 1) * len(request.prompt) + (request.max_tokens - 1) * (request.max_tokens - 2) // 2
            for request in requests
        )
        sampled = sum(request.max_tokens for request in requests)
        computed = sum(len(request.prompt) + request.max_tokens - 1 for request in requests)
        return Work(steps * self.step_bytes + context * self.kv_bytes, self._flops(computed, sampled))

    def _flops(self, tokens: int, sampled: int) -> float:
        return 2 * (tokens * self.decoder_bytes + sampled * self.head_bytes) / self.itemsize


def model_cost(model: PreTrainedModel, caches: Sequence[CacheShape]) -> ModelCost | None:
    """Return what a model's tokens and steps take; it may lie on the meta device.

    None where a step need not read all weights (experts) or all keys and values (windows, sparse attention).
    """
    if not _dense(model.config.get_text_config(), caches):
        return None
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    decoder = sum(each.nbytes for each in model.parameters() if each is not embedding and each is not head)
    itemsize = model.dtype.itemsize
    return ModelCost(decoder, head.nbytes, sum(cache.elements for cache in caches) * itemsize, itemsize)


def _dense(config: PretrainedConfig, caches: Sequence[CacheShape]) -> bool:
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    layers = getattr(config, "layer_types", None) or (["window"] if getattr(config, "sliding_window", None) else [])
    return not experts and set(layers) <= {"full_attention"} and not any(cache.index_dim for cache in caches)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure a device: the sum of 2 GiB, and a product of matrices of 8192 by 8192, each the fastest of five tries.

    Equal elements draw the least power, so that what is measured is the most that the device gives.
    """
    values = torch.zeros(_READ_BYTES // 4, dtype=torch.float32, device=device)
    bandwidth = values.nbytes / _seconds(values.sum, device)
    del values
    left, right = (torch.ones((_MATRIX, _MATRIX), dtype=dtype, device=device) for _ in range(2))
    result = torch.empty_like(left)
    rate = 2 * _MATRIX**3 / _seconds(lambda: torch.mm(left, right, out=result), device)
    return Roofline(bandwidth, rate)


def _seconds(call: Callable[[], object], device: torch.device, launches: int = 10) -> float:
    """Return the least time of a call, of five tries, each of several calls so that the launch does not count."""
    times = []
    for _ in range(6):
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        for _ in range(launches):
            call()
        torch.accelerator.synchronize(device)
        times.append((time.perf_counter() - start) / launches)
    return min(times[1:])
