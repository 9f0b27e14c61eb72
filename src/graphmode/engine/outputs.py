"""What a request returns, in the shape that vLLM's users know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from graphmode.engine.checks import is_integer

FinishReason = Literal["stop", "length", "abort", "error"]
TokenLogprobs = dict[int, tuple[float, int]] | bytes
"""Log-probability and rank of a token and of the most likely ones in its place, by token id; or the logits of all,
float32 in the host's byte order."""


class NewTokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one answer got in a step, or why it ended. It is what the engine's process sends to others.

    Attributes:
        request_id: the request's name.
        index: the answer's number.
        token_ids: the new tokens; none where it was aborted.
        logprobs: for each of them, where they were asked for.
        prompt_logprobs: of the prompt's tokens from the second on, with the first tokens of answer 0, where they were
            asked for.
        num_cached_tokens: tokens of the prompt whose keys and values were cached when it began.
        finish_reason: why it ended; None while it runs.
        stop_reason: the token of ``stop_token_ids`` that ended it; the cause of an error; None for any other end.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def one_by_one(self) -> Iterator[NewTokens]:
        """Give the tokens one at a time; only the last says why the answer ended."""
        if len(self.token_ids) < 2:
            yield self
            return
        last = len(self.token_ids) - 1
        for at, token in enumerate(self.token_ids):
            yield NewTokens(
                self.request_id,
                self.index,
                [token],
                None if self.logprobs is None else self.logprobs[at : at + 1],
                None if at else self.prompt_logprobs,
                self.num_cached_tokens,
                self.finish_reason if at == last else None,
                self.stop_reason if at == last else None,
            )


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was.

    Attributes:
        logprob: the natural logarithm of its probability, by the model's own logits.
        rank: its place among all tokens, from 1.
        decoded_token: its text alone; None where the model has no tokenizer or no text was asked for.
    """

    logprob: float
    rank: int
    decoded_token: str | None


class VocabularyLogprobs(Mapping[int, Logprob]):
    """How likely each token of the vocabulary was, from the most likely on. It is computed when it is first looked at.

    Args:
        logits: float32 ``[vocab]``, or its bytes. NaN counts as -inf; among equals, lower ids come first.
        decode: gives the text of a token.
    """

    bytes_per_token = 4 + 8 + 4 + 4  # logits, log-probabilities, order and ranks

    def __init__(self, logits: npt.NDArray[np.float32] | bytes, decode: Callable[[int], str | None]) -> None:
        self._logits: npt.NDArray[np.float32] = np.frombuffer(logits, np.float32)
        self._decode = decode

    def __getitem__(self, token: int) -> Logprob:
        if not (is_integer(token) and 0 <= token < len(self._logits)):
            raise KeyError(token)
        return Logprob(float(self._logs[token]), int(self._ranks[token]), self._decode(token))

    def __iter__(self) -> Iterator[int]:
        return iter(self._order.tolist())

    def __len__(self) -> int:
        return len(self._logits)

    @cached_property
    def _logs(self) -> npt.NDArray[np.float64]:
        bound = float(np.finfo(np.float32).max)
        values = np.minimum(self._logits.astype(np.float64), bound)
        values[np.isnan(values)] = -np.inf
        peak = values.max(initial=-bound)
        return np.asarray(values - (np.log(np.exp(values - peak).sum()) + peak), dtype=np.float64)

    @cached_property
    def _order(self) -> npt.NDArray[np.int32]:
        return np.argsort(-self._logs, kind="stable").astype(np.int32)

    @cached_property
    def _ranks(self) -> npt.NDArray[np.int32]:
        ranks = np.empty(len(self._order), dtype=np.int32)
        ranks[self._order] = np.arange(1, len(ranks) + 1, dtype=np.int32)
        return ranks


@dataclass
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: its number among the completions of its request.
        text: what the answer adds to the prompt's text; empty where the model has no tokenizer or none was asked for.
        token_ids: the generated tokens, with the token that ended them where there is one.
        finish_reason: ``stop`` (end of text, stop token or stop text), ``length`` (``max_tokens`` or the model's
            limit), ``abort`` (the request was aborted) or ``error`` (its grammar has become too complex to be
            followed); None while it runs.
        logprobs: for each token, itself and the most likely ones by token id; None where they were not asked for.
        cumulative_logprob: the sum of the tokens' log-probabilities; None where they were not asked for.
        stop_reason: the stop text, or the token of ``stop_token_ids``, that ended it; the cause of an error; None for
            any other end.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[Mapping[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Delta:
    """What is new of one answer.

    Attributes:
        index: its number among the answers of its request.
        text: what follows the text so far. It is never taken back: an end that may become a stop text is held.
        token_ids: the tokens that follow those so far; not all of them are in ``text`` yet while it runs.
        logprobs: for each of the tokens; None where they were not asked for.
        finish_reason: as of :class:`CompletionOutput`.
        stop_reason: as of :class:`CompletionOutput`.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Mapping[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass
class RequestOutput:
    """A request and its completions.

    Attributes:
        request_id: its name; where the caller gave none, its number in the order of submission.
        prompt: the prompt's text; None where it was given as token ids.
        prompt_token_ids: the prompt's tokens.
        outputs: its completions.
        finished: whether all of them are complete.
        prompt_logprobs: for each token of the prompt, as for completions; None for the first, which nothing predicts,
            and None altogether where they were not asked for. Complete with the first token of an answer.
        num_cached_tokens: tokens of the prompt whose keys and values were cached when it began.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[Mapping[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
