"""What is measured: four workloads, and models with random weights by the names of their configurations."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from transformers import Qwen3Config

PROMPT_TOKENS = 128
OFFLINE_REQUESTS = 256
OFFLINE_LONGEST = 1024
_OFFLINE_SHORTEST = 100


class Workload(StrEnum):
    """What a run measures.

    DECODE: a decode step, (time for n tokens - time for 1 token) / (n - 1), all prompts submitted together.
    PREFILL: the time of ``generate`` for one token a prompt, all prompts submitted together.
    OFFLINE: generated tokens a second for requests of many lengths (nano-vllm's ``bench.py``).
    LATENCY: one request at a time: its first token, its tokens, the pauses between them as they come, and CPU time.
    """

    DECODE = "decode"
    PREFILL = "prefill"
    OFFLINE = "offline"
    LATENCY = "latency"


@dataclass(frozen=True)
class Request:
    """A prompt and how it is continued.

    Attributes:
        prompt: its tokens.
        max_tokens: tokens to generate; the end-of-text token is ignored.
        temperature: 0 is greedy.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0


def random_requests(count: int, max_tokens: int, vocab_size: int) -> list[Request]:
    """Return ``count`` greedy requests with prompts of 128 random tokens, the same at each call."""
    rng = random.Random(0)
    return [Request([rng.randrange(vocab_size) for _ in range(PROMPT_TOKENS)], max_tokens) for _ in range(count)]


def offline_requests(count: int, longest: int, vocab_size: int) -> list[Request]:
    """Return the requests of nano-vllm's ``bench.py``, drawn in its order from its seed.

    Lengths of prompts and answers are uniform from 100 to ``longest``; 256 requests to 1024 are 142,827 tokens of
    prompts and 133,966 of answers.
    """
    rng = random.Random(0)
    shortest = min(_OFFLINE_SHORTEST, longest)
    # Tokens are drawn below 10,001 whatever the vocabulary, for the lengths that follow depend on the draws.
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]
    return [
        Request([token % vocab_size for token in prompt], rng.randint(shortest, longest), temperature=0.6)
        for prompt in prompts
    ]


_QWEN3: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "eos_token_id": 151645,
    "architectures": ["Qwen3ForCausalLM"],
    "dtype": "bfloat16",
}


def _qwen3(hidden: int, layers: int, heads: int, intermediate: int, *, tied: bool) -> Mapping[str, Any]:
    return {
        **_QWEN3,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "tie_word_embeddings": tied,
    }


RANDOM_MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
}
"""Configurations, as of transformers' Qwen3Config, of models that are measured with random weights."""


def write_config(name: str, folder: Path) -> None:
    """Write the configuration of one of :data:`RANDOM_MODELS` to a folder."""
    Qwen3Config(**RANDOM_MODELS[name]).save_pretrained(folder)
