"""Requests: what is asked of the engine, and the answers as far as they are made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from graphmode.engine.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestOutput,
    TokenLogprobs,
    VocabularyLogprobs,
)
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.sequence import Sequence
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
    """

    prompt_token_ids: SequenceOf[int]
    params: SamplingParams
    prompt: str | None = None
    vision: VisionPrompt | None = None
    request_id: str | None = None
    stream: bool = True

    @cached_property
    def token_range(self) -> tuple[int, int]:
        """The least and the greatest token id of the prompt."""
        return min(self.prompt_token_ids), max(self.prompt_token_ids)


class ActiveRequest:
    """A request that has not ended, and the answers to it.

    Args:
        request: what was asked.
        request_id: its name.
        seed: of the first answer's random numbers; those of the others follow from it.
        detokenizer: the model's; None where it has no tokenizer.

    Attributes:
        answers: ``params.n`` once the first of them may run, none before.
    """

    def __init__(self, request: Request, request_id: str, seed: int, detokenizer: Detokenizer | None) -> None:
        self.request_id = request_id
        self.answers: list[Answer] = []
        self._request = request
        self._seed = seed
        self._detokenizer = detokenizer

    def sequences(self) -> Iterator[Sequence]:
        """Give the sequences that are to run, which are made when the first is asked for."""
        self._begin()
        for answer in self.answers:
            if answer.sequence.finish_reason is None:  # it is not if the request was aborted meanwhile
                yield answer.sequence

    @property
    def finished(self) -> bool:
        """Whether all answers have ended and all their tokens are taken in."""
        return all(answer.finish_reason is not None for answer in self.answers)

    def take_in(self, index: int) -> list[RequestOutput]:
        """Take in the new tokens of one answer, and return the outputs that they give."""
        answer, outputs = self.answers[index], []
        while answer.unread:
            answer.read(1 if self._request.stream else answer.unread)
            if self._request.stream or (answer.finish_reason is not None and self.finished):
                outputs.append(self._output())
        return outputs

    def abort(self) -> RequestOutput:
        """End all answers that have not ended, and return the last output."""
        self._begin()
        for answer in self.answers:
            if answer.sequence.finish_reason is None:
                answer.sequence.finish_reason = "abort"
        return self._output()

    def _begin(self) -> None:
        if self.answers:
            return
        params, vision = self._request.params, self._request.vision
        token_ids = list(self._request.prompt_token_ids)
        # The prompt is the same for all answers: one scores it.
        others = params if params.prompt_logprobs is None else replace(params, prompt_logprobs=None)
        sequences = [Sequence(self.request_id, token_ids, params, self._seed, vision)]
        for index in range(1, params.n):
            seed = derived_seed(self._seed, index)
            sequences.append(Sequence(self.request_id, token_ids, others, seed, vision, index))
        self.answers = [Answer(sequence, self._detokenizer) for sequence in sequences]

    def _output(self) -> RequestOutput:
        """Return what there is so far."""
        first = self.answers[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._request.prompt,
            prompt_token_ids=first.sequence.prompt_token_ids,
            outputs=[answer.output() for answer in self.answers],
            finished=self.finished,
            prompt_logprobs=first.prompt_logprobs(),
            num_cached_tokens=max(0, first.sequence.num_cached),
        )


class Answer:
    """A sequence, and its text and log-probabilities as far as its tokens are taken in.

    Args:
        sequence: whose tokens they are.
        detokenizer: the model's; None where it has no tokenizer.
    """

    def __init__(self, sequence: Sequence, detokenizer: Detokenizer | None) -> None:
        params = sequence.params
        self.sequence = sequence
        self._num_read = 0
        self._detokenizer = detokenizer if params.detokenize else None
        self._text: AnswerText | None = None
        if self._detokenizer is not None:
            self._text = AnswerText(
                self._detokenizer,
                sequence.prompt_token_ids,
                stop=params.stop,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
                include_stop=params.include_stop_str_in_output,
            )
        self._logprobs: list[Mapping[int, Logprob]] = []
        self._prompt_logprobs: list[Mapping[int, Logprob] | None] = [None]

    @property
    def unread(self) -> int:
        """How many tokens are not taken in."""
        return len(self.sequence.token_ids) - len(self.sequence.prompt_token_ids) - self._num_read

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it runs or has tokens that are not taken in."""
        return None if self.unread else self.sequence.finish_reason

    def read(self, count: int) -> None:
        """Take in the next ``count`` tokens, and end the sequence where its text comes to a stop text."""
        sequence = self.sequence
        begin = len(sequence.prompt_token_ids) + self._num_read
        self._num_read += count
        if self._text is None:
            return
        reason, end = self.finish_reason, begin + count
        if reason == "stop" and not sequence.params.include_stop_str_in_output:
            end -= 1  # the token that ends an answer has no part in its text
        if stop := self._text.feed(sequence.token_ids[begin:end], last=reason is not None):
            self._num_read = self._text.num_tokens
            sequence.stop(stop, self._num_read)

    def output(self) -> CompletionOutput:
        """Return the completion so far."""
        sequence = self.sequence
        token_ids = sequence.output_token_ids[: self._num_read]
        text = "" if self._text is None else self._text.shown
        output = CompletionOutput(sequence.index, text, token_ids, self.finish_reason)
        if output.finish_reason is not None:
            output.stop_reason = sequence.stop_reason
        if sequence.params.logprobs is not None:
            known = sequence.logprobs[: self._num_read]
            self._logprobs += [self._named(each) for each in known[len(self._logprobs) :]]
            output.logprobs = list(self._logprobs)
            chosen = zip(token_ids, self._logprobs, strict=True)
            output.cumulative_logprob = sum(each[token].logprob for token, each in chosen)
        return output

    def prompt_logprobs(self) -> list[Mapping[int, Logprob] | None] | None:
        """Return those of the prompt, as far as they are computed; None where they were not asked for."""
        if self.sequence.params.prompt_logprobs is None:
            return None
        known = self.sequence.prompt_logprobs
        self._prompt_logprobs += [self._named(each) for each in known[len(self._prompt_logprobs) - 1 :]]
        return list(self._prompt_logprobs)

    def _named(self, logprobs: TokenLogprobs) -> Mapping[int, Logprob]:
        def decode(token: int) -> str | None:
            return None if self._detokenizer is None else self._detokenizer.decode([token])

        if isinstance(logprobs, np.ndarray):
            return VocabularyLogprobs(logprobs, decode)
        return {token: Logprob(log, rank, decode(token)) for token, (log, rank) in logprobs.items()}


def derived_seed(seed: int, index: int) -> int:
    """Return the seed of a request, or of a further answer, by its index: the same in each run."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
