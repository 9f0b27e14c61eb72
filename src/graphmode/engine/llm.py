"""LLM: generation for a list of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from graphmode.engine import aliases, checks
from graphmode.engine.chat import ChatTemplate, Conversation, conversations
from graphmode.engine.clients import Clients
from graphmode.engine.config import EngineOptions
from graphmode.engine.engine import Engine
from graphmode.engine.outputs import RequestOutput, VocabularyLogprobs
from graphmode.engine.prompts import Prompt, PromptParts, as_prompts
from graphmode.engine.requests import Request
from graphmode.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from graphmode.engine.stats import EngineStats
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
        self._clients = Clients(self.engine)

    @property
    def stats(self) -> EngineStats:
        """What the steps did and cost."""
        return self.engine.core.stats

    def get_default_sampling_params(self, **others: Any) -> SamplingParams:
        """Return the parameters of requests that bring none: what the model's generation_config.json asks for.

        Args:
            **others: parameters where that file names none, by name; default: those of ``SamplingParams``.
        """
        return self.engine.text.default_sampling_params(**others)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer.

        Raises:
            InputError: it comes without one.
        """
        if (tokenizer := self.engine.text.tokenizer) is None:
            raise InputError("the model comes without a tokenizer; give prompts as tokens")
        return tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        progress: bool | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Generate for all prompts together.

        Args:
            prompts: texts, lists of token ids, ``{"prompt_token_ids": [...]}``, or with images or videos
                :class:`~graphmode.engine.prompts.PromptParts`; one or a list.
            sampling_params: for all prompts, or one for each. None: :meth:`get_default_sampling_params`.
            priority: of all prompts, or one for each: lower ones run first. None is 0.
            progress: whether to show a progress bar; None: as the engine was made.
            **others: other names, as :mod:`graphmode.engine.aliases` has them.

        Returns:
            One output for each prompt, in their order.

        Raises:
            InputError: a prompt that does not fit; none is run then.
        """
        progress = self._shows_progress("generate", progress, others)
        return self._generate(as_prompts(prompts), sampling_params, priority, progress)

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
        priority: int | Sequence[int] | None = None,
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
            priority: as of :meth:`generate`.
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
            tokenizer=self.engine.text.tokenizer,
            takes_images=self.engine.text.takes_images,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            options={} if chat_template_kwargs is None else chat_template_kwargs,
        )
        prompts = [template.prompt(conversation) for conversation in conversations(messages)]
        if mm_processor_kwargs is not None:
            prompts = [{**prompt, "mm_processor_kwargs": mm_processor_kwargs} for prompt in prompts]
        return self._generate(prompts, sampling_params, priority, progress)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        **others: Any,
    ) -> Iterator[RequestOutput]:
        """Generate for one prompt or several together, yielding a prompt's output after each of its tokens.

        Each output's texts and token ids hold all that is generated so far; its ``request_id`` tells whose it is, its
        ``finished`` whether it is the last. A text waits for whole characters, and where its end may be the beginning
        of a stop text, for what follows. A stream that is closed or dropped aborts its requests.

        Args:
            prompts: as of :meth:`generate`.
            sampling_params: as of :meth:`generate`.
            priority: as of :meth:`generate`.
            **others: as of :meth:`generate`.

        Raises:
            InputError: a prompt does not fit; before the first output is asked for.
        """
        self._shows_progress("stream", None, others)
        return self._stream(self._requests(as_prompts(prompts), sampling_params, priority, stream=True))

    def _stream(self, requests: Sequence[Request]) -> Iterator[RequestOutput]:
        # Closed by us: some versions of Python keep what a closed generator iterates until that is collected.
        with closing(self._clients.run(requests)) as outputs:
            for _, output in outputs:
                yield output

    def _shows_progress(self, call: str, progress: Any, others: Mapping[str, Any]) -> bool:
        """Return whether a call shows a progress bar; ``others`` are what it was given beside its own arguments."""
        given = {} if progress is None else {"progress": progress}
        progress = aliases.named(call, {**given, **others}, ["progress"], aliases.CALL).get("progress")
        return self._progress if progress is None else checks.flag("progress", progress, also=", or None")

    def _requests(
        self,
        prompts: Sequence[str | PromptParts],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int] | None,
        *,
        stream: bool = False,
    ) -> list[Request]:
        """Return prompts that can run, each with its parameters.

        Raises:
            InputError: one cannot, or parameters are none.
        """
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params: list[Any] = list(sampling_params) if isinstance(sampling_params, (list, tuple)) else [sampling_params]
        for each in params:
            if not isinstance(each, SamplingParams):
                raise checks.unfit("sampling_params", each, "SamplingParams, or a list with one for each prompt")
        if isinstance(sampling_params, SamplingParams):
            params *= len(prompts)
        if len(params) != len(prompts):
            raise InputError(f"{len(prompts)} prompts, but {len(params)} sampling parameters; give one, or one each")
        priorities: list[int] = [0] * len(prompts)
        if priority is not None:
            given = priority if isinstance(priority, (list, tuple)) else [priority] * len(prompts)
            allowed = ", or a list with one for each prompt"
            priorities = [checks.integer("priority", each, also=allowed) for each in given]
        if len(priorities) != len(prompts):
            raise InputError(f"{len(prompts)} prompts, but {len(priorities)} priorities; give one, or one each")
        requests, max_model_len = [], self.engine.core.limits.max_model_len
        for index, (prompt, each, one) in enumerate(zip(prompts, params, priorities, strict=True)):
            try:
                request = self.engine.text.request(prompt, each, max_model_len, stream=stream, priority=one)
                self.engine.check(request)
                requests.append(request)
            except InputError as error:
                raise error if len(prompts) == 1 else InputError(f"prompts[{index}]: {error}") from error
        self._check_room_for_logprobs(requests)
        return requests

    def _check_room_for_logprobs(self, requests: Sequence[Request]) -> None:
        """Refuse log-probabilities of all tokens that would fill the host's memory."""
        wanted = 0
        for request in requests:
            prompt, params = len(request.prompt_token_ids), request.params
            if params.logprobs == -1:
                longest = self.engine.core.limits.max_model_len - prompt
                wanted += params.n * (longest if params.max_tokens is None else min(params.max_tokens, longest))
            if params.prompt_logprobs == -1:
                wanted += prompt - 1
        vocab = self.engine.core.loaded.shape.vocab_size
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
        priority: int | Sequence[int] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        requests = self._requests(prompts, sampling_params, priority)
        last: dict[int, RequestOutput] = {}
        with (
            _progress(sum(request.params.n for request in requests), progress) as advance,
            closing(self._clients.run(requests)) as outputs,
        ):
            for number, output in outputs:
                last[number] = output
                advance(len(output.outputs))
        return [last[number] for number in range(len(requests))]


@contextmanager
def _progress(total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error, or nothing, and give what moves it on by a number of answers."""
    if not enabled:
        yield lambda answers: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=total)
        yield lambda answers: bar.advance(task, answers)
