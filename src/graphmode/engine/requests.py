"""Requests: what is asked of the engine, and the answers as far as they are made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from graphmode.engine.outputs import (
    CompletionOutput,
    Delta,
    FinishReason,
    Logprob,
    NewTokens,
    RequestOutput,
    TokenLogprobs,
    VocabularyLogprobs,
)
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.text import AnswerText, Detokenizer

if TYPE_CHECKING:
    from graphmode.engine.multimodal import VisionPrompt


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked of the engine.

    Attributes:
        prompt_token_ids: the prompt, at least one token.
        params: how to sample.
        prompt: the prompt's text, for the outputs alone.
        vision: the prompt's images and videos.
        request_id: a name that no other request has that has not ended; None: the engine gives it a number.
        stream: whether each new token gives an output, which holds all so far; where not, the last one alone does.
        priority: lower ones run first; among equals, those that came first.
    """

    prompt_token_ids: SequenceOf[int]
    params: SamplingParams
    prompt: str | None = None
    vision: VisionPrompt | None = None
    request_id: str | None = None
    stream: bool = True
    priority: int = 0

    @cached_property
    def token_range(self) -> tuple[int, int]:
        """The least and the greatest token id of the prompt."""
        return min(self.prompt_token_ids), max(self.prompt_token_ids)


class ActiveRequest:
    """A request that has not ended, and the answers to it as far as their tokens came.

    Args:
        request: what was asked.
        request_id: its name.
        detokenizer: the model's; None where it has no tokenizer.
    """

    def __init__(self, request: Request, request_id: str, detokenizer: Detokenizer | None) -> None:
        self.request = request
        self.request_id = request_id
        self.num_cached_tokens = 0
        self._detokenizer = detokenizer
        self._answers: list[Answer] = []
        self._prompt_token_ids: list[int] = []
        self._unfinished = request.params.n
        self._prompt_logprobs: list[Mapping[int, Logprob] | None] = [None]

    @property
    def answers(self) -> list[Answer]:
        """The ``params.n`` answers. They are made when tokens come, so that no first step waits for them."""
        if not self._answers:
            params, prompt = self.request.params, self.request.prompt_token_ids
            self._answers = [Answer(index, prompt, params, self._detokenizer) for index in range(params.n)]
        return self._answers

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt, in the list that all outputs share."""
        if not self._prompt_token_ids:
            self._prompt_token_ids = list(self.request.prompt_token_ids)
        return self._prompt_token_ids

    @property
    def finished(self) -> bool:
        """Whether all answers have ended."""
        return self._unfinished == 0

    def take_in(self, new: NewTokens) -> Answer:
        """Take in the new tokens of one answer, and return that answer.

        What comes after its text has come to a stop text is dropped. Its ``finish_reason`` then says more than that of
        the tokens: it is for the caller to abort the answer where it is made.
        """
        answer = self.answers[new.index]
        if answer.finish_reason is not None:
            return answer
        if new.index == 0:
            self.num_cached_tokens = new.num_cached_tokens
            self._prompt_logprobs += [_named(each, self._detokenizer) for each in new.prompt_logprobs or ()]
        answer.take_in(new)
        self._unfinished -= answer.finish_reason is not None
        return answer

    def outputs(self, new: NewTokens) -> list[RequestOutput]:
        """Take in the new tokens of one answer, and return the outputs that they give, as ``Request.stream`` says."""
        stream, outputs = self.request.stream, []
        for each in new.one_by_one() if stream else (new,):
            if self.answers[new.index].finish_reason is None:
                self.take_in(each)
                if self.finished or (stream and each.token_ids):
                    outputs.append(self.output())
        return outputs

    def output(self) -> RequestOutput:
        """Return what there is so far."""
        asked = self.request.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[answer.output() for answer in self.answers],
            finished=self.finished,
            prompt_logprobs=list(self._prompt_logprobs) if asked else None,
            num_cached_tokens=self.num_cached_tokens,
        )


class Answer:
    """The tokens, text and log-probabilities of one answer, as far as they came.

    Args:
        index: its number among the answers of its request.
        prompt_token_ids: what is answered.
        params: how it is sampled.
        detokenizer: the model's; None where it has no tokenizer.

    Attributes:
        token_ids: its tokens.
        finish_reason: why it ended; None while it runs.
        stop_reason: the stop text, or the token of ``stop_token_ids``, that ended it; None for any other end.
    """

    def __init__(
        self, index: int, prompt_token_ids: SequenceOf[int], params: SamplingParams, detokenizer: Detokenizer | None
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._detokenizer = detokenizer if params.detokenize else None
        self._text: AnswerText | None = None
        if self._detokenizer is not None:
            self._text = AnswerText(
                self._detokenizer,
                prompt_token_ids,
                stop=params.stop,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
                include_stop=params.include_stop_str_in_output,
            )
        self._logprobs: list[TokenLogprobs] = []
        self._named: list[Mapping[int, Logprob]] = []  # the same, as far as somebody looked at them
        self._told = (0, 0)  # how much text and how many tokens deltas have told

    def take_in(self, new: NewTokens) -> None:
        """Take in new tokens, and end the answer where its text comes to a stop text."""
        token_ids, reason = new.token_ids, new.finish_reason
        self.token_ids += token_ids
        self._logprobs += new.logprobs or ()
        self.finish_reason, self.stop_reason = reason, new.stop_reason
        if self._text is None:
            return
        if reason == "stop" and not self._params.include_stop_str_in_output:
            token_ids = token_ids[:-1]  # the token that ends an answer has no part in its text
        if stop := self._text.feed(token_ids, last=reason is not None):
            self.finish_reason, self.stop_reason = "stop", stop
            del self.token_ids[self._text.num_tokens :]
            del self._logprobs[self._text.num_tokens :]

    def output(self) -> CompletionOutput:
        """Return the completion so far."""
        text = "" if self._text is None else self._text.shown
        output = CompletionOutput(self.index, text, list(self.token_ids), self.finish_reason)
        output.stop_reason = self.stop_reason
        if self._params.logprobs is not None:
            output.logprobs = list(self._named_logprobs())
            chosen = zip(self.token_ids, output.logprobs, strict=True)
            output.cumulative_logprob = sum(each[token].logprob for token, each in chosen)
        return output

    def delta(self) -> Delta:
        """Return what is new since the last call. It costs what is new, not what there is."""
        text = "" if self._text is None else self._text.shown
        (begin, first), self._told = self._told, (len(text), len(self.token_ids))
        return Delta(
            index=self.index,
            text=text[begin:],
            token_ids=self.token_ids[first:],
            logprobs=None if self._params.logprobs is None else self._named_logprobs()[first:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _named_logprobs(self) -> list[Mapping[int, Logprob]]:
        new = self._logprobs[len(self._named) :]
        self._named += [_named(each, self._detokenizer) for each in new]
        return self._named


def _named(logprobs: TokenLogprobs, detokenizer: Detokenizer | None) -> Mapping[int, Logprob]:
    def decode(token: int) -> str | None:
        return None if detokenizer is None else detokenizer.decode([token])

    if isinstance(logprobs, bytes):
        return VocabularyLogprobs(logprobs, decode)
    return {token: Logprob(log, rank, decode(token)) for token, (log, rank) in logprobs.items()}


def derived_seed(seed: int, index: int) -> int:
    """Return the seed of a request, or of a further answer, by its index: the same in each run."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
