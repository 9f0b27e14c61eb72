"""How a request's tokens are chosen and when it ends."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from graphmode.graph.errors import InputError

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Logits are first biased, then penalised, then divided by the temperature; the filters follow, and the draw.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it before sampling.
        top_k: sample from the most likely tokens, that many; 0 takes all. Those tied with the last one count too.
        top_p: sample from the most likely tokens whose probabilities reach this sum, after ``top_k``; 1 takes all.
        min_p: sample from the tokens that are at least this share as likely as the likeliest; 0 takes all.
        repetition_penalty: logits of the tokens that prompt or answer hold are divided by it where positive, else
            multiplied; 1 is off (CTRL, arXiv 1909.05858).
        presence_penalty: taken from the logits of the tokens that the answer holds; 0 is off. From -2 to 2.
        frequency_penalty: the same for each time that the answer holds them; 0 is off. From -2 to 2.
        logit_bias: what is added to the logits of tokens, by token id, at most 300 of them; from -100 to 100.
        max_tokens: most tokens to make, at least 1.
        min_tokens: tokens to make before the end-of-text token, ``stop_token_ids`` and ``stop`` count; the tokens
            are not drawn before.
        seed: of the request's random numbers. The same seed gives the same tokens alone and in any batch. None: the
            engine chooses, by its own seed and the request's number.
        ignore_eos: go on after the end-of-text token.
        stop: texts that end the answer, which is cut before them. Not empty.
        stop_token_ids: tokens that end the answer; they stay in it.
        n: completions of the prompt. The first has ``seed``, the others have seeds derived from it.
        logprobs: return the log-probability of each token and of that many most likely ones, from 0 to 20, by the
            model's own logits; None returns none.
        prompt_logprobs: the same for the tokens of the prompt. Its prefix is then not taken from the cache.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 16
    min_tokens: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    stop_token_ids: Collection[int] = ()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (off) or a positive number of tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0, and 1 (off) at most")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}; it must be from 0 (off) to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; it must be a positive number, 1 is off")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from -2 to 2, 0 is off")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InputError(f"logit_bias names {len(self.logit_bias)} tokens; it may name {MAX_LOGIT_BIAS}")
        for token, bias in self.logit_bias.items():
            if not (isinstance(token, int) and -100 <= bias <= 100):
                raise InputError(
                    f"logit_bias has {token!r}: {bias}; a token id and a number from -100 to 100 are needed"
                )
        if self.n < 1:
            raise InputError(f"n is {self.n}; it must be at least 1")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop is {self.stop!r}; it must be a list of texts that are not empty")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise InputError(f"min_tokens is {self.min_tokens}; it must be from 0 to max_tokens={self.max_tokens}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must fit 64 bits with sign")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise InputError(f"{name} is {count}; it must be from 0 to {MAX_LOGPROBS}, or None")

    @property
    def filters(self) -> bool:
        """Whether tokens are sampled from a part of the vocabulary."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
