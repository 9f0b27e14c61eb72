"""LLM: generation for a list of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from tokenizers.decoders import DecodeStream

from graphmode.engine.config import EngineOptions
from graphmode.engine.core import Engine, EngineStats
from graphmode.engine.outputs import CompletionOutput, RequestOutput
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.sequence import Sequence as TokenSequence
from graphmode.graph.errors import InputError
from graphmode.models.bundled_model import bundled_model


class TokensPrompt(TypedDict):
    """A prompt given as token ids."""

    prompt_token_ids: list[int]


Prompt = str | TokensPrompt


class LLM:
    """A model and its engine, for generation offline.

    Example::

        llm = LLM()
        for output in llm.generate(["ROMEO:", "JULIET:"], SamplingParams(temperature=0, max_tokens=40)):
            print(output.outputs[0].text)

    Args:
        model: a local folder or hub name; default: the bundled model.
        progress: whether to show progress bars.
        **options: see :class:`~graphmode.engine.config.EngineOptions`.

    Raises:
        ModelError: the model cannot be loaded or run.
        InputError: an option out of range.
        BackendError: the device is not there.
    """

    def __init__(self, model: str | Path | None = None, *, progress: bool = False, **options: Any) -> None:
        self._progress = progress
        self.engine = Engine(model or bundled_model(), _options(options), progress)
        self._tokenizer = self.engine.loaded.tokenizer

    @property
    def stats(self) -> EngineStats:
        """What the steps did and cost."""
        return self.engine.stats

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate for all prompts together.

        Args:
            prompts: texts, or ``{"prompt_token_ids": [...]}``; one or a list.
            sampling_params: for all prompts, or one for each.

        Returns:
            One output for each prompt, in their order.

        Raises:
            InputError: a prompt that does not fit; none is run then.
        """
        prompts = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(prompts)
        else:
            params = list(sampling_params)
            if len(params) != len(prompts):
                raise InputError(
                    f"{len(prompts)} prompts, but {len(params)} sampling parameters; give one, or one each"
                )
        requests = [(prompt, self._token_ids(prompt), each) for prompt, each in zip(prompts, params, strict=True)]
        for _, token_ids, each in requests:
            self.engine.check(token_ids, each)
        sequences = [self.engine.add(token_ids, each) for _, token_ids, each in requests]
        try:
            self._run(len(sequences))
        finally:
            for sequence in sequences:
                self.engine.scheduler.abort(sequence)
        return [self._output(prompt, sequence) for (prompt, _, _), sequence in zip(requests, sequences, strict=True)]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generate for one prompt, yielding its output after every token.

        Each output's text and token ids hold all that is generated so far; text waits for whole characters.

        Raises:
            InputError: the prompt does not fit.
        """
        sequence = self.engine.add(self._token_ids(prompt), sampling_params or SamplingParams())
        decoder, text = DecodeStream(skip_special_tokens=True), ""
        try:
            while sequence.finish_reason is None:
                if sequence not in self.engine.step():
                    continue
                if self._tokenizer is not None:
                    text += decoder.step(self._tokenizer.backend_tokenizer, sequence.token_ids[-1]) or ""
                yield self._output(prompt, sequence, None if sequence.finish_reason else text)
        finally:
            self.engine.scheduler.abort(sequence)

    def _run(self, count: int) -> None:
        """Step until everything is finished."""
        with _Progress(count, self._progress) as progress:
            while self.engine.has_work:
                changed = self.engine.step()
                progress.advance(sum(sequence.finish_reason is not None for sequence in changed))

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, Mapping):
            token_ids = prompt.get("prompt_token_ids")
            if not isinstance(token_ids, list) or not all(isinstance(token, int) for token in token_ids):
                raise InputError(f"prompt {prompt!r} has no list of integers under 'prompt_token_ids'")
            return token_ids
        if not isinstance(prompt, str):
            raise InputError(f"prompt is {type(prompt).__name__}; give a text or {{'prompt_token_ids': [...]}}")
        if self._tokenizer is None:
            raise InputError("the model comes without a tokenizer; give prompts as {'prompt_token_ids': [...]}")
        token_ids = self._tokenizer(prompt)["input_ids"]
        assert isinstance(token_ids, list)
        return token_ids

    def _output(self, prompt: Prompt, sequence: TokenSequence, text: str | None = None) -> RequestOutput:
        """Return the output of ``sequence``; ``text`` is what its tokens stand for, where that is known."""
        token_ids = sequence.output_token_ids
        if text is None:
            text = "" if self._tokenizer is None else str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
        return RequestOutput(
            request_id=sequence.request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=sequence.prompt_token_ids,
            outputs=[CompletionOutput(0, text, token_ids, sequence.finish_reason)],
            finished=sequence.finish_reason is not None,
        )


class _Progress:
    """A progress bar over requests on standard error, or nothing."""

    def __init__(self, total: int, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True, disable=not enabled)
        self._task = self._bar.add_task("generating", total=total)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)


def _options(options: Mapping[str, Any]) -> EngineOptions:
    """Return the options, refusing unknown ones by name."""
    known = EngineOptions.__dataclass_fields__
    if unknown := sorted(options.keys() - known.keys()):
        raise InputError(f"unknown options {unknown}; there are {sorted(known)}")
    return EngineOptions(**options)
