"""Who is measured: our engine, by graphs or eagerly, and transformers' own ``generate``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graphmode.engine.llm import LLM
from graphmode.engine.sampling_params import SamplingParams
from graphmode.models.checkpoint import Checkpoint
from graphmode.models.loader import load_weights
from graphmode.observe.bench.workloads import Request


class Contestant(Protocol):
    """What is measured. Every call ends when all its tokens are on the host."""

    def generate(self, requests: Sequence[Request]) -> None:
        """Generate for all requests together."""

    def arrivals(self, request: Request) -> list[float]:
        """Generate for one request; return when each of its tokens came, in seconds of ``time.perf_counter``."""


class Ours:
    """Our engine."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def generate(self, requests: Sequence[Request]) -> None:  # noqa: D102
        outputs = self._llm.generate(
            [request.prompt for request in requests],
            [_params(request.max_tokens, request.temperature) for request in requests],
        )
        assert all(
            len(output.outputs[0].token_ids) == request.max_tokens
            for output, request in zip(outputs, requests, strict=True)
        )

    def arrivals(self, request: Request) -> list[float]:  # noqa: D102
        stream = self._llm.stream(request.prompt, _params(request.max_tokens, request.temperature))
        return [time.perf_counter() for _ in stream]


@cache  # made in the run that is not timed
def _params(max_tokens: int, temperature: float) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)


class Transformers:
    """transformers' ``generate`` with its default cache and attention; greedy, prompts of one length.

    Args:
        checkpoint: the model's files.
        load_format: as of :class:`~graphmode.engine.config.EngineOptions`.
        device: where it runs.
        dtype: of its weights.
    """

    def __init__(self, checkpoint: Checkpoint, load_format: str, device: torch.device, dtype: torch.dtype) -> None:
        config = checkpoint.read(AutoConfig, "config.json")
        if load_format == "dummy":
            with device:
                self._model: Any = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code
                )
        else:
            self._model = load_weights(checkpoint, AutoModelForCausalLM, config, device, {"dtype": dtype})
        self._model.eval()
        self._model.generation_config.eos_token_id = None  # nothing ends an answer early

    def generate(self, requests: Sequence[Request]) -> None:  # noqa: D102
        self._generate(requests, None)

    def arrivals(self, request: Request) -> list[float]:  # noqa: D102
        times = _Arrivals()
        self._generate([request], times)
        return times.tokens

    def _generate(self, requests: Sequence[Request], streamer: _Arrivals | None) -> None:
        prompts = torch.tensor([request.prompt for request in requests], device=self._model.device)
        tokens = self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=requests[0].max_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
        ).cpu()
        assert tokens.shape[1] == prompts.shape[1] + requests[0].max_tokens


class _Arrivals:
    """A streamer of transformers that notes when tokens come; the prompt comes first."""

    def __init__(self) -> None:
        self._seen: list[float] = []

    @property
    def tokens(self) -> list[float]:
        return self._seen[1:]

    def put(self, value: torch.Tensor) -> None:
        self._seen.append(time.perf_counter())

    def end(self) -> None:
        pass


def graph_free(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return engine options for the same run without graphs."""
    of_graphs = {"enable_graph", "enforce_eager", "graph_mode", "graph_sizes", "max_graph_tokens", "max_padding_ratio"}
    return {name: value for name, value in options.items() if name not in of_graphs} | {"enforce_eager": True}
