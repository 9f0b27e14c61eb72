"""What the routes share: the engine, prompts to tokens, tokens to text, and the requests in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from fastapi import Request as HttpRequest

from graphmode.engine import checks
from graphmode.engine.checks import shown
from graphmode.engine.grammar import GrammarCompiler
from graphmode.engine.outputs import Delta, NewTokens, RequestOutput
from graphmode.engine.prompts import PromptParts
from graphmode.engine.requests import ActiveRequest, Request
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.structured_outputs import StructuredOutputs
from graphmode.engine.text import Detokenizer
from graphmode.errors import DeadlineExceededError, EngineDownError, InputError, OverloadedError
from graphmode.serve.errors import ApiError
from graphmode.serve.logs import CURRENT, RequestRecord
from graphmode.serve.options import ServeOptions
from graphmode.serve.parsing.dialect import dialect
from graphmode.serve.protocol import SamplingFields, Usage, check_seconds, sampling_params, usage
from graphmode.serve.threads import OneThread

if TYPE_CHECKING:
    from graphmode.engine.reading import ModelText
    from graphmode.serve.client import EngineClient, TokenStream
    from graphmode.serve.metrics import Metrics

T = TypeVar("T")

_MOST_TRIALS = 32
"""Grammars that may wait to be tried; one that is hard takes a second."""
_LONG_TEXT = 16384
"""Characters of a prompt from which on it is tokenized in a thread, so that no stream waits for it."""


class Generation:
    """A request in flight: iterate it for what is new of its answers. Closing it aborts what runs.

    Attributes:
        request: what was asked of the engine.
        active: its answers as far as they came.
        completion_tokens: of all answers so far.
    """

    def __init__(
        self, service: Service, request: Request, stream: TokenStream, detokenizer: Detokenizer | None
    ) -> None:
        self.request = request
        self.active = ActiveRequest(request, stream.request_id, detokenizer)
        self.completion_tokens = 0
        self._detokenizer = detokenizer
        self._stream = stream
        self._service = service
        self._timing = service.metrics.request(len(request.prompt_token_ids), request.params.n)
        self._record = CURRENT.get() or RequestRecord("")
        self._record.prompt_tokens += len(request.prompt_token_ids)
        self._reason = "abort"
        service.generations.add(self)

    @property
    def prompt_text(self) -> str:
        """The prompt's text, made of its tokens where it was given as such."""
        text = self.request.prompt
        return self.decode(self.request.prompt_token_ids) if text is None else text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens by themselves; empty where the model has no tokenizer."""
        return "" if self._detokenizer is None else self._detokenizer.decode(token_ids)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[Delta]:
        """Return what has come since the last call: of each answer one delta at most.

        Raises:
            InputError: the engine refuses the request.
            EngineDownError: the engine has died, or stands still.
            DeadlineExceededError: the request took longer than it may.
        """
        while not self._is_over():
            try:
                news = await anext(self._stream)
            except StopAsyncIteration:
                break
            except Exception as error:
                self._reason = _cause(error)
                self.close()
                raise
            if deltas := self._take_in(news):
                if self._is_over():
                    self.close()
                return deltas
        self.close()
        raise StopAsyncIteration

    def _is_over(self) -> bool:
        return self.active.finished

    def _take_in(self, news: Iterable[NewTokens]) -> list[Delta]:
        changed = {}
        for new in news:
            if self.active.answers[new.index].finish_reason is not None:
                continue  # its text had come to a stop text, of which the engine has heard meanwhile
            answer = changed[new.index] = self.active.take_in(new)
            if answer.finish_reason is not None and new.finish_reason is None:
                self._stream.end(new.index)
        deltas = []
        for index, answer in changed.items():
            deltas.append(delta := answer.delta())
            if count := len(delta.token_ids):
                self.completion_tokens += count
                self._timing.tokens(index, count)
            reason: str | None = delta.finish_reason
            if reason is not None:
                self._reason = reason
            if reason == "error":
                self.close()
                # The grammar is the request's own: it allows so much that reading it on would take too long.
                raise ApiError(400, f"the answer cannot go on: {delta.stop_reason}", code="grammar_too_complex")
        return deltas

    def end(self, index: int) -> None:
        """End one answer where its reader has seen enough of it. What is in flight of it still comes."""
        self._stream.end(index)

    def close(self) -> None:
        """Abort what runs of it. Closing again does nothing."""
        if self in self._service.generations:
            self._service.generations.discard(self)
            self._record.completion_tokens += self.completion_tokens
            self._timing.ended(self._reason)
            self._stream.close()

    async def aclose(self) -> None:
        """Do what :meth:`close` does, for ``contextlib.aclosing``."""
        self.close()

    def usage(self, completion_tokens: int | None = None) -> Usage:
        """Return the tokens that it took so far; ``completion_tokens`` where the client got others than it made."""
        made = self.completion_tokens if completion_tokens is None else completion_tokens
        return usage(len(self.request.prompt_token_ids), made, self.active.num_cached_tokens)


def _cause(error: Exception) -> str:
    """Return the cause of a failure, in the words of the metrics."""
    if isinstance(error, InputError):
        return "invalid"
    if isinstance(error, DeadlineExceededError):
        return "deadline"
    return "engine_down" if isinstance(error, EngineDownError) else "error"


class Service:
    """What the routes share.

    Args:
        engine: the engine process.
        text: prompts to tokens and tokens to text.
        options: the server's.
        metrics: what counts.

    Attributes:
        served: the model's names.
        chat_template: Jinja text in place of the tokenizer's own; None where none was given.
        dialect: how the model writes calls of tools, and thoughts.
        created: when the server started, in seconds since 1970.
        draining: whether the server is ending, so that it takes no more requests.
        generations: those in flight.
        grammars: tries what answers are held to, before the engine compiles it.
    """

    def __init__(self, engine: EngineClient, text: ModelText, options: ServeOptions, metrics: Metrics) -> None:
        self.engine, self.text, self.options, self.metrics = engine, text, options, metrics
        self.served: tuple[str, ...] = tuple(options.served_model_name)
        self.chat_template = options.chat_template_text()
        special = {} if text.detokenizer is None else text.detokenizer.special
        self.dialect = dialect(
            self.chat_template or getattr(text.tokenizer, "chat_template", None),
            special,
            tool_call_parser=options.tool_call_parser,
            reasoning_parser=options.reasoning_parser,
        )
        self.created = int(time.time())
        self.draining = False
        self.generations: set[Generation] = set()
        self._defaults = text.default_sampling_params()
        self.grammars = GrammarCompiler(text.tokenizer, text.vocab_size, text.eos_token_ids)
        self._reader = OneThread("reader")
        self._trials = OneThread("grammars")

    @property
    def model_name(self) -> str:
        """The model's name in answers."""
        return self.served[0]

    def check_model(self, name: str | None) -> str:
        """Return the model's name in the answer to a request for it.

        Raises:
            ApiError: another model is asked for.
        """
        if name is None:
            return self.model_name
        if name in self.served:
            return name
        known = ", ".join(self.served)
        message = f"the model {shown(name)} is not served here; there is {known}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def check_room(self, answers: int) -> None:
        """Check that a request's answers find room where there are no others.

        Raises:
            InputError: they never do.
        """
        info = self.engine.info
        if info is not None and answers > (most := info.max_num_seqs + self.options.max_queue):
            raise InputError(
                f"n times the number of prompts is {answers}; {most} at most run and wait (max_num_seqs="
                f"{info.max_num_seqs} and max_queue={self.options.max_queue}). Send several requests"
            )

    def sampling_params(self, body: SamplingFields, **others: Any) -> SamplingParams:
        """Return the sampling parameters of a request; see :func:`~graphmode.serve.protocol.sampling_params`."""
        return sampling_params(body, self._defaults, self.options, **others)

    async def submit(
        self,
        prompt: str | PromptParts,
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout: float | None = None,
        keep_special: Collection[str] = (),
    ) -> Generation:
        """Submit a request.

        Args:
            prompt: a text, tokens, or either with images.
            params: how to sample.
            priority: lower ones run first.
            timeout: seconds that it may take; the server's own limit if that is less.
            keep_special: texts of special tokens that are in the answer's text in any case.

        Raises:
            InputError: the prompt cannot be read.
            OverloadedError: too many requests wait.
            EngineDownError: the engine does not run.
        """
        limits = [check_seconds("timeout", timeout), self.options.request_seconds]
        if self.draining:
            self.metrics.rejected("draining")
            raise _shutting_down()
        try:
            if params.structured_outputs is not None:
                await self._check_grammar(params.structured_outputs)
            if (info := self.engine.info) is None:
                raise EngineDownError(f"the engine is {self.engine.state.phase}", retry_after=5)
            size = self._size(prompt, params, info.max_model_len)
            read = partial(self.text.request, prompt, params, info.max_model_len, priority=priority)
            request = await self.in_reader(size, read)
            deadline = min((each for each in limits if each is not None), default=None)
            stream = self.engine.generate(request, deadline_seconds=deadline)
        except (OverloadedError, EngineDownError) as error:
            self.metrics.rejected("queue_full" if isinstance(error, OverloadedError) else "engine_down")
            raise
        detokenizer = self.text.detokenizer
        if detokenizer is not None and keep_special:
            detokenizer = detokenizer.keeping(keep_special)
        return Generation(self, request, stream, detokenizer)

    def _size(self, prompt: str | PromptParts, params: SamplingParams, max_model_len: int) -> int:
        """Return how many characters are read for a prompt; images count as many.

        Raises:
            InputError: no text of that length fits the model, so that it need not be tokenized to know.
        """
        if not isinstance(prompt, str) and "multi_modal_data" in prompt:
            return _LONG_TEXT
        size = len(prompt if isinstance(prompt, str) else prompt.get("prompt", ""))
        self.check_characters(size, params, max_model_len)
        return size

    def check_characters(self, size: int, params: SamplingParams, max_model_len: int) -> None:
        """Check that a text of so many characters may fit the model, so that one that cannot is never tokenized.

        Raises:
            InputError: it does not.
        """
        most = max_model_len * self._longest_token
        if size > most and params.truncate_prompt_tokens is None:
            raise InputError(
                f"the prompt has {size} characters; {most} at most fit into max_model_len={max_model_len} tokens. "
                "Shorten it, or give truncate_prompt_tokens"
            )

    @cached_property
    def _longest_token(self) -> int:
        """The characters of the longest token; 1 where the model has no tokenizer."""
        tokenizer = self.text.tokenizer
        return 1 if tokenizer is None else max(map(len, tokenizer.get_vocab()))

    async def in_reader(self, size: int, function: Callable[[], T]) -> T:
        """Call what uses the tokenizer: at once for few characters, and in a thread where it takes a while.

        Args:
            size: characters that it reads.
            function: what is called.
        """
        if size < _LONG_TEXT and not self._reader.jobs:  # it would wait for the tokenizer, and every stream with it
            return function()
        return await self._reader.run(function)

    async def _check_grammar(self, structured: StructuredOutputs | Mapping[str, Any]) -> None:
        """Check what answers are held to. What was seen before does not wait for what others send.

        Raises:
            InputError: the engine could not compile it, or not in reasonable time.
            OverloadedError: too many that are new wait.
        """
        if self.grammars.knows(structured):
            self.grammars.check(structured)
            return
        if self._trials.jobs >= _MOST_TRIALS:
            raise OverloadedError(
                f"{_MOST_TRIALS} schemas and grammars wait to be tried for the first time; try again later", 1.0
            )
        await self._trials.run(partial(self.grammars.check, structured))

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text.

        Raises:
            InputError: it is no text, or longer than any prompt may be.
        """
        tokenizer = self.text.tokenizer
        if tokenizer is None:
            raise InputError("the model comes without a tokenizer; give tokens")

        checks.text("prompt", text)

        def read() -> list[int]:
            token_ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return token_ids

        return await self.in_reader(len(text), read)

    def new_name(self, kind: str) -> tuple[str, int]:
        """Return the name of a new answer of a kind, such as ``cmpl``, and the time in seconds since 1970."""
        record = CURRENT.get()
        return f"{kind}-{uuid4().hex if record is None else record.request_id}", int(time.time())

    def close(self) -> None:
        """End the threads and the process that read for requests."""
        self._reader.close()
        self._trials.close()
        self.grammars.close()

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for those that run, at most for so long."""
        self.draining = True
        end = time.monotonic() + seconds
        while self.generations and time.monotonic() < end:
            await asyncio.sleep(0.05)


def _shutting_down() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down; send the request to another, or again in a while",
        type="server_error",
        code="shutting_down",
        headers={"Retry-After": "10"},
    )


def _next(generation: Generation) -> asyncio.Task[list[Delta] | None]:
    async def taken() -> list[Delta] | None:
        return await anext(generation, None)

    return asyncio.create_task(taken())


def get_service(request: HttpRequest) -> Service:
    """Return what the routes of a request's app share."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


async def collect(generation: Generation) -> RequestOutput:
    """Return the complete answers of a request in flight. Left early, it aborts them."""
    async with aclosing(generation):
        async for _ in generation:
            pass
    return generation.active.output()


async def together(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, list[Delta]], None]:
    """Yield what is new of several requests as it comes, each with the number of its request.

    Raises:
        Exception: what one of them raises; the others are then aborted.
    """
    if len(generations) == 1:
        async with aclosing(generations[0]) as generation:
            async for deltas in generation:
                yield 0, deltas
        return
    waiting = {_next(each): number for number, each in enumerate(generations)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                if (new := task.result()) is not None:
                    yield number, new
                    waiting[_next(generations[number])] = number
    finally:
        for task in waiting:
            task.cancel()
        for generation in generations:
            generation.close()
