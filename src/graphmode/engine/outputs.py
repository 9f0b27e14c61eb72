"""What a request returns, in the shape that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
TokenLogprobs = dict[int, tuple[float, int]]
"""Log-probability and rank of a token and of the most likely ones in its place, by token id."""


@dataclass(frozen=True)
class Logprob:
    """How likely a token was.

    Attributes:
        logprob: the natural logarithm of its probability, by the model's own logits.
        rank: its place among all tokens, from 1.
        decoded_token: its text alone; None where the model has no tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: its number among the completions of its request.
        text: the text that the token ids stand for; empty where the model has no tokenizer.
        token_ids: the generated tokens, with the end-of-text token where there is one.
        finish_reason: ``stop`` (end of text), ``length`` (``max_tokens`` or the model's limit); None while it runs.
        logprobs: for each token, itself and the most likely ones by token id; None where they were not asked for.
        cumulative_logprob: the sum of the tokens' log-probabilities; None where they were not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None


@dataclass
class RequestOutput:
    """A request and its completions.

    Attributes:
        request_id: its number, in the order of submission.
        prompt: the prompt's text; None where it was given as token ids.
        prompt_token_ids: the prompt's tokens.
        outputs: its completions.
        finished: whether all of them are complete.
        prompt_logprobs: for each token of the prompt, as for completions; None for the first, which nothing predicts,
            and None altogether where they were not asked for. Complete with the first token of an answer.
        num_cached_tokens: tokens of the prompt whose keys and values were cached when it began.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
