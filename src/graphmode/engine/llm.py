"""LLM: generation for a list of prompts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from graphmode.engine import aliases, checks
from graphmode.engine.chat import ChatTemplate, Conversation, conversations
from graphmode.engine.config import EngineOptions
from graphmode.engine.engine import Engine
from graphmode.engine.media import MediaLimits
from graphmode.engine.multimodal import VisionPrompt
from graphmode.engine.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestOutput,
    TokenLogprobs,
    VocabularyLogprobs,
)
from graphmode.engine.prompts import Prompt, PromptParts, PromptReader, as_prompts
from graphmode.engine.sampling_params import MAX_LOGPROBS, SamplingParams, checkpoint_parameters
from graphmode.engine.sequence import Sequence as TokenSequence
from graphmode.engine.stats import EngineStats
from graphmode.engine.text import AnswerText, Detokenizer
from graphmode.errors import InputError
from graphmode.graph.memory import free_memory, in_words
from graphmode.models.bundled_model import bundled_model


class LLM:
    """A model and its engine, for generation offline.

    Example::

        llm = LLM()
        for output in llm.generate(["ROMEO:", "JULIET:"], SamplingParams(temperature=0, max_tokens=40)):
            print(output.outputs[0].text)

    Args:
        model: a local folder, a GGUF file or a hub name; default: the bundled model.
        progress: whether to show progress bars.
        **options: see :class:`~graphmode.engine.config.EngineOptions`.

    Raises:
        ModelError: the model cannot be loaded or run.
        InputError: an option out of range.
        BackendError: the device is not there.
    """

    def __init__(self, model: str | Path | None = None, *, progress: bool = False, **options: Any) -> None:
        self._progress = progress
        if model is not None and not isinstance(model, (str, Path)):
            raise checks.unfit("model", model, "a folder, a file or a hub name, or None for the bundled model")
        checks.flag("progress", progress)
        self.engine = Engine(bundled_model() if model is None else model, EngineOptions(**options), progress)
        loaded, own = self.engine.loaded, self.engine.options
        self._checkpoint = checkpoint_parameters(loaded.generation if own.generation_config != "vllm" else {})
        self._tokenizer = loaded.tokenizer
        limits = MediaLimits(
            images=own.max_images_per_prompt,
            videos=own.max_videos_per_prompt,
            pixels=own.max_image_pixels,
            tokens=self.engine.limits.max_model_len - 1,
        )
        self._reader = PromptReader(loaded, limits)

    @property
    def stats(self) -> EngineStats:
        """What the steps did and cost."""
        return self.engine.stats

    def get_default_sampling_params(self, **others: Any) -> SamplingParams:
        """Return the parameters of requests that bring none: what the model's generation_config.json asks for.

        Args:
            **others: parameters where that file names none, by name; default: those of ``SamplingParams``.
        """
        return SamplingParams(**(others | self._checkpoint))

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer.

        Raises:
            InputError: it comes without one.
        """
        if self._tokenizer is None:
            raise InputError("the model comes without a tokenizer; give prompts as tokens")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Generate for all prompts together.

        Args:
            prompts: texts, lists of token ids, ``{"prompt_token_ids": [...]}``, or with images or videos
                :class:`~graphmode.engine.prompts.PromptParts`; one or a list.
            sampling_params: for all prompts, or one for each. None: :meth:`get_default_sampling_params`.
            progress: whether to show a progress bar; None: as the engine was made.
            **others: other names, as :mod:`graphmode.engine.aliases` has them.

        Returns:
            One output for each prompt, in their order.

        Raises:
            InputError: a prompt that does not fit; none is run then.
        """
        progress = self._shows_progress("generate", progress, others)
        return self._generate(as_prompts(prompts), sampling_params, progress)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Generate the next message of conversations, by the chat template of the model's tokenizer.

        Args:
            messages: a conversation, a list of ``{"role": "user", "content": "a text"}``, or a list of conversations.
                A content may be a list of parts: ``{"type": "text", "text": ...}`` and, where the model takes them,
                ``{"type": "image", "image": ...}`` and ``{"type": "video", "video": ...}`` as in prompts.
            sampling_params: for all conversations, or one for each.
            chat_template: Jinja text instead of the tokenizer's template.
            add_generation_prompt: whether the prompt ends with the beginning of an answer.
            continue_final_message: whether the answer continues the last message; ``add_generation_prompt`` is then
                False.
            tools: JSON schemas or functions, for the template.
            chat_template_kwargs: what else the template reads, such as ``{"enable_thinking": False}``.
            mm_processor_kwargs: as in prompts.
            progress: as of :meth:`generate`.
            **others: as of :meth:`generate`.

        Returns:
            One output for each conversation, in their order.

        Raises:
            InputError: a message that is malformed, a template that is missing or refuses the conversation, or what
                :meth:`generate` refuses.
        """
        progress = self._shows_progress("chat", progress, others)
        template = ChatTemplate(
            tokenizer=self._tokenizer,
            takes_images=self.engine.loaded.vision is not None,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            options={} if chat_template_kwargs is None else chat_template_kwargs,
        )
        prompts = [template.prompt(conversation) for conversation in conversations(messages)]
        if mm_processor_kwargs is not None:
            prompts = [{**prompt, "mm_processor_kwargs": mm_processor_kwargs} for prompt in prompts]
        return self._generate(prompts, sampling_params, progress)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **others: Any
    ) -> Iterator[RequestOutput]:
        """Generate for one prompt, yielding its output after every token.

        Each output's texts and token ids hold all that is generated so far. A text waits for whole characters, and
        where its end may be the beginning of a stop text, for what follows.

        Raises:
            InputError: the prompt does not fit; before the first output is asked for.
        """
        self._shows_progress("stream", None, others)
        given = as_prompts(prompt)
        if len(given) != 1:
            raise InputError(f"stream takes one prompt, not {len(given)}; generate takes many")
        (request,) = self._requests(given, sampling_params)
        request.streamed = True
        return self._stream(request)

    def _stream(self, request: _Request) -> Iterator[RequestOutput]:
        answers = self._answers(request)
        # Closed by us: some versions of Python keep what a closed generator iterates until that is collected.
        with closing(self._steps(iter(answers), len(answers))) as steps:
            for changed in steps:
                while unread := [answer for answer in changed if answer.unread]:
                    for answer in unread:
                        self._read(answer)
                    yield request.output

    def _shows_progress(self, call: str, progress: Any, others: Mapping[str, Any]) -> bool:
        """Return whether a call shows a progress bar; ``others`` are what it was given beside its own arguments."""
        given = {} if progress is None else {"progress": progress}
        progress = aliases.named(call, {**given, **others}, ["progress"], aliases.CALL).get("progress")
        return self._progress if progress is None else checks.flag("progress", progress, also=", or None")

    def _requests(
        self,
        prompts: Sequence[str | PromptParts],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[_Request]:
        """Return prompts that can run, each with its parameters.

        Raises:
            InputError: one cannot, or parameters are none.
        """
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or self.get_default_sampling_params()] * len(prompts)
        elif isinstance(sampling_params, (list, tuple)):
            params = list(sampling_params)
            for each in params:
                if not isinstance(each, SamplingParams):
                    raise checks.unfit("sampling_params", each, "SamplingParams, or a list with one for each prompt")
            if len(params) != len(prompts):
                raise InputError(
                    f"{len(prompts)} prompts, but {len(params)} sampling parameters; give one, or one each"
                )
        else:
            raise checks.unfit("sampling_params", sampling_params, "SamplingParams, or a list with one for each prompt")
        requests = []
        for index, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            try:
                requests.append(_Request(prompt, each, *self._checked(prompt, each)))
            except InputError as error:
                raise error if len(prompts) == 1 else InputError(f"prompts[{index}]: {error}") from error
        self._check_room_for_logprobs(requests)
        return requests

    def _check_room_for_logprobs(self, requests: Sequence[_Request]) -> None:
        """Refuse log-probabilities of all tokens that would fill the host's memory."""
        wanted = 0
        for request in requests:
            prompt, params = len(request.token_ids), request.params
            if params.logprobs == -1:
                longest = self.engine.limits.max_model_len - prompt
                wanted += params.n * (longest if params.max_tokens is None else min(params.max_tokens, longest))
            if params.prompt_logprobs == -1:
                wanted += prompt - 1
        vocab = self.engine.loaded.shape.vocab_size
        needed = wanted * vocab * VocabularyLogprobs.bytes_per_token
        if wanted and needed > (free := free_memory(torch.device("cpu"))):
            raise InputError(
                f"log-probabilities of all {vocab} tokens at up to {wanted} places need {in_words(needed)}; there are "
                f"{in_words(free)} free. Ask for {MAX_LOGPROBS} at most, for fewer tokens, or in several calls"
            )

    def _generate(
        self,
        prompts: Sequence[str | PromptParts],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        requests = self._requests(prompts, sampling_params)
        count = sum(request.params.n for request in requests)
        outputs: dict[_Request, RequestOutput] = {}
        answers = (answer for request in requests for answer in self._answers(request))
        with _progress(count, progress) as advance, closing(self._steps(answers, count)) as steps:
            for changed in steps:
                for answer in changed:
                    while answer.unread:
                        self._read(answer)
                    if answer.finish_reason is not None:
                        advance()
                        answer.request.unfinished -= 1
                        if answer.request.unfinished == 0:
                            outputs[answer.request] = answer.request.output
        return [outputs[request] for request in requests]

    def _answers(self, request: _Request) -> list[_Answer]:
        """Return the answers to come, with sequences that are not queued."""
        sequences = self.engine.make(request.token_ids, request.params, request.vision)
        request.answers = [_Answer(request, sequence, self.engine.detokenizer) for sequence in sequences]
        return request.answers

    def _steps(self, answers: Iterator[_Answer], count: int) -> Generator[list[_Answer], None, None]:
        """Step until ``count`` answers are finished, yielding those with new tokens, which are to be read.

        Each answer is made when a step has room for it, so while the device works on the step before. Left early, it
        asks for no more and aborts those that are not finished.
        """
        scheduler = self.engine.scheduler
        unfinished: dict[TokenSequence, _Answer] = {}

        def sequences() -> Iterator[TokenSequence]:
            for answer in answers:
                unfinished[answer.sequence] = answer
                yield answer.sequence

        source = sequences()
        scheduler.feed(source)
        try:
            with _collecting_only_what_is_new():
                while count:
                    changed = [unfinished[sequence] for sequence in self.engine.step() if sequence in unfinished]
                    if changed:
                        yield changed
                    for answer in changed:
                        if answer.finish_reason is not None:
                            del unfinished[answer.sequence]
                            count -= 1
        finally:
            scheduler.withdraw(source)
            for sequence in unfinished:
                scheduler.abort(sequence)

    def _read(self, answer: _Answer) -> None:
        """Let an answer take in what is new, and end its sequence where the text has come to a stop text."""
        if stop := answer.read():
            self.engine.scheduler.stop(answer.sequence, answer.num_read, stop)

    def _checked(self, prompt: str | PromptParts, params: SamplingParams) -> tuple[Sequence[int], VisionPrompt | None]:
        """Return the tokens and images of a prompt that can run.

        Raises:
            InputError: it cannot.
        """
        if params.stop and self._tokenizer is None:
            raise InputError("the model comes without a tokenizer, so stop texts cannot be found; use stop_token_ids")
        token_ids, vision = self._reader.read(prompt)
        if params.truncate_prompt_tokens is not None:
            if vision is not None:
                raise InputError(
                    "truncate_prompt_tokens would cut the prompt's images; leave it out and shorten the text"
                )
            most = self.engine.limits.max_model_len - 1  # there is room for an answer
            token_ids = token_ids[-(most if params.truncate_prompt_tokens < 0 else params.truncate_prompt_tokens) :]
        self.engine.check(token_ids, params)
        return token_ids, vision


@dataclass(eq=False)
class _Request:
    """A prompt that can run, and the answers to it.

    Attributes:
        prompt: as it was given.
        params: how to sample.
        token_ids: the prompt's tokens.
        vision: its images.
        streamed: whether each token's text is wanted as it comes.
        answers: once they are begun.
    """

    prompt: str | PromptParts
    params: SamplingParams
    token_ids: Sequence[int]
    vision: VisionPrompt | None
    streamed: bool = False
    answers: list[_Answer] = field(default_factory=list)
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = self.params.n

    @property
    def output(self) -> RequestOutput:
        """What there is so far."""
        first = self.answers[0].sequence
        return RequestOutput(
            request_id=first.request_id,
            prompt=self.prompt if isinstance(self.prompt, str) else self.prompt.get("prompt"),
            prompt_token_ids=first.prompt_token_ids,
            outputs=[answer.output(index) for index, answer in enumerate(self.answers)],
            finished=all(answer.finish_reason is not None for answer in self.answers),
            prompt_logprobs=self.answers[0].prompt_logprobs,
            num_cached_tokens=first.num_cached,
        )


class _Answer:
    """A sequence and its text so far."""

    def __init__(self, request: _Request, sequence: TokenSequence, detokenizer: Detokenizer | None) -> None:
        self.request = request
        self.sequence = sequence
        self.num_read = len(sequence.prompt_token_ids)
        params = sequence.params
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
    def unread(self) -> bool:
        """Whether the sequence has tokens that are not taken in."""
        return self.num_read < len(self.sequence.token_ids)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it runs or has tokens that are not taken in."""
        return None if self.unread else self.sequence.finish_reason

    def read(self) -> str | None:
        """Take in the next token where each is streamed, else what there is.

        Returns:
            The stop text that the text has come to; ``num_read`` then ends with the token that completes it.
        """
        begin, end = self.num_read, self.num_read + 1 if self.request.streamed else len(self.sequence.token_ids)
        self.num_read = end
        if self._text is None:
            return None
        reason = self.finish_reason
        if reason == "stop" and not self.sequence.params.include_stop_str_in_output:
            end -= 1  # the token that ends an answer has no part in its text
        if self._text.feed(self.sequence.token_ids[begin:end], last=reason is not None):
            self.num_read = len(self.sequence.prompt_token_ids) + self._text.num_tokens
        return self._text.stop

    def output(self, index: int) -> CompletionOutput:
        """Return the completion so far, number ``index`` of its request."""
        sequence = self.sequence
        token_ids = sequence.token_ids[len(sequence.prompt_token_ids) : self.num_read]
        text = "" if self._text is None else self._text.shown
        output = CompletionOutput(index, text, token_ids, self.finish_reason)
        if output.finish_reason is not None:
            output.stop_reason = sequence.stop_reason
        if sequence.params.logprobs is not None:
            known = sequence.logprobs[: len(token_ids)]
            self._logprobs += [self._named(each) for each in known[len(self._logprobs) :]]
            output.logprobs = list(self._logprobs)
            chosen = zip(token_ids, self._logprobs, strict=True)
            output.cumulative_logprob = sum(each[token].logprob for token, each in chosen)
        return output

    @property
    def prompt_logprobs(self) -> list[Mapping[int, Logprob] | None] | None:
        """Those of the prompt, as far as they are computed; None where they were not asked for."""
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


@contextmanager
def _collecting_only_what_is_new() -> Iterator[None]:
    """Keep Python's collector of cycles from what exists already.

    With a model loaded there are some 400,000 objects, and a pass through all of them stops a step for 0.1 s and more.
    Where the caller has frozen objects, it is left to the caller.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _progress(total: int, enabled: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar on standard error, or nothing, and give what moves it on by one."""
    if not enabled:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=total)
        yield lambda: bar.advance(task)
