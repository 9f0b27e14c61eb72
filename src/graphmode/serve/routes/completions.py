"""``POST /v1/completions``: texts continued, as OpenAI's first API has it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from graphmode.engine.checks import shown, unfit
from graphmode.engine.outputs import CompletionOutput, Delta, Logprob
from graphmode.engine.prompts import PromptParts
from graphmode.engine.sampling_params import SamplingParams
from graphmode.errors import InputError
from graphmode.serve.errors import ApiError
from graphmode.serve.protocol import (
    GENERATION_ERRORS,
    GenerationHead,
    SamplingFields,
    StreamOptions,
    Usage,
    answer,
    json_response,
    total_usage,
)
from graphmode.serve.service import Generation, Service, collect, get_service, together
from graphmode.serve.sse import DONE, event, event_stream

router = APIRouter(tags=["generation"])


class CompletionRequest(SamplingFields):
    """A request for completions."""

    model: str | None = Field(default=None, description="The served model; default: the one that there is.")
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, its tokens, or a list of either: each is continued."
    )
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = Field(
        default=None, description="The text begins with the prompt; with max_tokens=0 that is all."
    )
    stream: bool | None = Field(default=None, description="Send the answer in server-sent events as it comes.")
    stream_options: StreamOptions | None = None
    best_of: int | None = Field(default=None, description="Answers are not ranked: it may be n, and nothing else.")
    response_format: dict[str, Any] | None = Field(
        default=None, description="What the answer is held to, in OpenAI's words; structured_outputs says more."
    )
    suffix: str | None = Field(default=None, description="There is no text after the answer: it may be empty, or null.")
    add_special_tokens: bool = Field(
        default=True, description="The tokenizer adds its tokens, such as that of the begin."
    )


class CompletionLogprobs(msgspec.Struct):
    """The log-probabilities of a choice's tokens.

    Attributes:
        tokens: their texts.
        token_logprobs: of each; None of a prompt's first, which nothing predicts.
        top_logprobs: the most likely ones in its place, by their texts.
        text_offset: where each begins in the choice's text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(msgspec.Struct, omit_defaults=True, gc=False):
    """One completion, or what is new of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class Completion(GenerationHead):
    """The answer, or an event of it.

    Attributes:
        usage: of the whole request; null in events before the last where it was asked for.
    """

    choices: list[Choice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


@router.post("/v1/completions", responses=answer(Completion, stream=True) | GENERATION_ERRORS)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Continue texts."""
    service = get_service(request)
    asked = _read(service, body)
    generations = await _submit(service, asked)
    if body.stream:
        return await event_stream(_events(asked, generations))
    choices: list[Choice] = []
    try:
        for number, generation in enumerate(generations):
            output = await collect(generation)
            maker = _ChoiceMaker(asked, generation, number)
            choices += [maker.choice(each) for each in output.outputs]
    finally:
        for generation in generations:
            generation.close()
    used = total_usage(map(asked.usage, generations))
    return json_response(asked.completion(choices, used))


@dataclass(frozen=True)
class _Asked:
    """What a request asks for, checked.

    Attributes:
        body: the request.
        completion_id: the name of the answer.
        created: when, in seconds since 1970.
        model: its name in the answer.
        prompts: what is continued.
        params: how.
        prompt_alone: whether the answer has the prompt and no token more.
    """

    body: CompletionRequest
    completion_id: str
    created: int
    model: str
    prompts: Sequence[str | PromptParts]
    params: SamplingParams
    prompt_alone: bool

    def completion(self, choices: list[Choice], used: Usage | msgspec.UnsetType | None) -> Completion:
        """Return an answer, or an event of it."""
        return Completion(self.completion_id, "text_completion", self.created, self.model, choices, used)

    def usage(self, generation: Generation) -> Usage:
        """Return what was used for a prompt."""
        return generation.usage(0) if self.prompt_alone else generation.usage()


def _read(service: Service, body: CompletionRequest) -> _Asked:
    """Check a request.

    Raises:
        ApiError: a parameter contradicts another, or cannot be honoured.
        InputError: one is out of range.
    """
    model = service.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise _refused("stream_options", "stream_options is for streams; set stream to true, or leave it out")
    if body.suffix:
        raise _refused("suffix", f"suffix is {shown(body.suffix)}; answers end where they end, so leave it out")
    answers = 1 if body.n is None else body.n
    if body.best_of not in (None, answers):
        raise _refused(
            "best_of",
            f"best_of is {body.best_of} and n is {answers}; answers are not ranked: leave best_of out, or ask for n "
            "with logprobs and choose",
        )
    prompt_alone = bool(body.echo) and body.max_tokens == 0
    params = service.sampling_params(
        body,
        max_tokens=1 if prompt_alone else body.max_tokens,
        response_format=body.response_format,
        prompt_logprobs=body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs,
    )
    prompts = _prompts(body.prompt)
    if len(prompts) > service.options.max_prompts:
        raise _refused(
            "prompt",
            f"there are {len(prompts)} prompts; there may be {service.options.max_prompts}. Send several requests",
        )
    service.check_room(len(prompts) * answers)
    name, created = service.new_name("cmpl")
    return _Asked(body, name, created, model, prompts, params, prompt_alone)


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | PromptParts]:
    """Return prompts one by one."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise unfit("prompt", given, "a text, tokens, or a list of either, and not empty")
    if isinstance(given[0], int):
        return [PromptParts(prompt_token_ids=given)]
    return [each if isinstance(each, str) else PromptParts(prompt_token_ids=each) for each in given]


async def _submit(service: Service, asked: _Asked) -> list[Generation]:
    """Submit all prompts, or none."""
    generations: list[Generation] = []
    body = asked.body
    try:
        for index, prompt in enumerate(asked.prompts):
            try:
                if isinstance(prompt, str) and not body.add_special_tokens:
                    tokens = await service.tokenize(prompt, add_special_tokens=False)
                    prompt = PromptParts(prompt=prompt, prompt_token_ids=tokens)
                generations.append(
                    await service.submit(prompt, asked.params, priority=body.priority, timeout=body.timeout)
                )
            except InputError as error:
                raise error if len(asked.prompts) == 1 else InputError(f"prompt[{index}]: {error}") from error
    except BaseException:
        for generation in generations:
            generation.close()
        raise
    return generations


async def _events(asked: _Asked, generations: Sequence[Generation]) -> AsyncIterator[bytes]:
    """Yield the events of a stream."""
    options = asked.body.stream_options or StreamOptions()
    makers = [_ChoiceMaker(asked, generation, number) for number, generation in enumerate(generations)]
    nothing = None if options.include_usage else msgspec.UNSET
    async with aclosing(together(generations)) as news:
        async for number, deltas in news:
            if choices := makers[number].new_choices(deltas):
                used = total_usage(map(asked.usage, generations)) if options.continuous_usage_stats else nothing
                yield event(asked.completion(choices, used))
    if options.include_usage:
        yield event(asked.completion([], total_usage(map(asked.usage, generations))))
    yield DONE


class _ChoiceMaker:
    """Makes the choices of one prompt from what is new of its answers.

    Args:
        asked: what the request asks for.
        generation: the prompt's.
        number: of the prompt.
    """

    def __init__(self, asked: _Asked, generation: Generation, number: int) -> None:
        self._asked = asked
        self._body = asked.body
        self._generation = generation
        self._first_index = number * asked.params.n
        self._begun: set[int] = set()
        self._offsets = dict.fromkeys(range(asked.params.n), 0)
        self._waiting: list[Delta] = []
        self._tells_tokens = (
            self._body.return_token_ids
            or self._body.logprobs is not None
            or (self._body.stream_options is not None and self._body.stream_options.continuous_usage_stats)
        )

    def new_choices(self, deltas: Sequence[Delta]) -> list[Choice]:
        """Return those of what is new that tell a client anything."""
        if self._waiting:
            deltas, self._waiting = [*self._waiting, *deltas], []
        if self._asked.params.prompt_logprobs is not None and not self._generation.active.answers[0].token_ids:
            self._waiting = list(deltas)  # those of the prompt come with the first answer's tokens
            return []
        return [
            self.choice(each)
            for each in deltas
            if each.text
            or each.finish_reason
            or self._tells_tokens
            or (self._body.echo and each.index not in self._begun)
        ]

    def choice(self, delta: Delta | CompletionOutput) -> Choice:
        """Return a choice: what is new of one, or all of it."""
        begins = delta.index not in self._begun
        self._begun.add(delta.index)
        text, token_ids, logprobs = delta.text, delta.token_ids, delta.logprobs
        if self._asked.prompt_alone:
            text, token_ids, logprobs = "", [], None if logprobs is None else []
        told: list[tuple[int, Mapping[int, Logprob] | None]] = []
        generation, body = self._generation, self._body
        prompt, scored = generation.request.prompt_token_ids, self._prompt_logprobs() if begins else None
        if begins and body.echo:
            text = generation.prompt_text + text
            told += zip(prompt, scored or (), strict=False)
        told += zip(token_ids, logprobs or (), strict=False)
        choice = Choice(
            self._first_index + delta.index,
            text,
            None if body.logprobs is None else self._logprobs(delta.index, told, body.logprobs),
            delta.finish_reason,
            delta.stop_reason,
        )
        if body.return_token_ids:
            choice.token_ids = token_ids
            choice.prompt_token_ids = list(prompt) if begins else None
        if begins and body.prompt_logprobs is not None and delta.index == 0:
            choice.prompt_logprobs = scored  # type: ignore[assignment]  # any mapping does
        return choice

    def _prompt_logprobs(self) -> list[Mapping[int, Logprob] | None] | None:
        asked = self._asked.params.prompt_logprobs is not None
        return self._generation.active.output().prompt_logprobs if asked else None

    def _logprobs(
        self, index: int, told: Sequence[tuple[int, Mapping[int, Logprob] | None]], count: int
    ) -> CompletionLogprobs:
        made = CompletionLogprobs([], [], [], [])
        for token, known in told:
            text = _text_of(token, known[token]) if known is not None else self._generation.decode([token])
            made.tokens.append(text)
            made.token_logprobs.append(None if known is None else _finite(known[token].logprob))
            made.top_logprobs.append(None if known is None else _most_likely(known, token, count))
            made.text_offset.append(self._offsets[index])
            self._offsets[index] += len(text)
        return made


def _most_likely(known: Mapping[int, Logprob], token: int, count: int) -> dict[str, float]:
    """Return the most likely tokens, and the one that was drawn, by their texts."""
    ranked = sorted(known.items(), key=lambda each: each[1].rank)
    shown = [(each, found) for each, found in ranked if found.rank <= count or each == token]
    return {_text_of(each, found): _finite(found.logprob) for each, found in shown}


def _text_of(token: int, known: Logprob) -> str:
    return f"token_id:{token}" if known.decoded_token is None else known.decoded_token


def _finite(logprob: float) -> float:
    """Return what JSON has a number for: a token that cannot be drawn has -inf."""
    return max(logprob, -9999.0)
