"""How a request's tokens are chosen and when it ends."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from graphmode.graph.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it before sampling.
        top_k: sample from the most likely tokens, that many; 0 takes all. Those tied with the last one count too.
        top_p: sample from the most likely tokens whose probabilities reach this sum, after ``top_k``; 1 takes all.
        min_p: sample from the tokens that are at least this share as likely as the likeliest; 0 takes all.
        max_tokens: most tokens to make, at least 1.
        seed: of the request's random numbers. The same seed gives the same tokens alone and in any batch. None: the
            engine chooses, by its own seed and the request's number.
        ignore_eos: go on after the end-of-text token.
        stop: texts that end the answer, which is cut before them. Not empty.
        stop_token_ids: tokens that end the answer; they stay in it.
        n: completions of the prompt. The first has ``seed``, the others have seeds derived from it.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 16
    seed: int | None = None
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    stop_token_ids: Collection[int] = ()
    n: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (off) or a positive number of tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0, and 1 (off) at most")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}; it must be from 0 (off) to 1")
        if self.n < 1:
            raise InputError(f"n is {self.n}; it must be at least 1")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop is {self.stop!r}; it must be a list of texts that are not empty")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must fit 64 bits with sign")

    @property
    def filters(self) -> bool:
        """Whether tokens are sampled from a part of the vocabulary."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
