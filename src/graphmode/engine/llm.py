"""LLM: generation for a list of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from graphmode.engine.config import EngineOptions
from graphmode.engine.core import Engine, EngineStats
from graphmode.engine.multimodal import VisionPrompt
from graphmode.engine.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput, TokenLogprobs
from graphmode.engine.prompts import Prompt, PromptReader
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.sequence import Sequence as TokenSequence
from graphmode.graph.errors import InputError
from graphmode.models.bundled_model import bundled_model


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
        self._reader = PromptReader(self.engine.loaded, self.engine.model)

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
            prompts: texts, ``{"prompt_token_ids": [...]}``, or with images or videos
                :class:`~graphmode.engine.prompts.PromptParts`; one or a list.
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
        requests = [(self._checked(prompt, each), each) for prompt, each in zip(prompts, params, strict=True)]
        answers = [
            [_Answer(sequence, self._tokenizer) for sequence in self.engine.add(token_ids, each, vision)]
            for (token_ids, vision), each in requests
        ]
        self._run([answer for completions in answers for answer in completions])
        return [_output(prompt, completions) for prompt, completions in zip(prompts, answers, strict=True)]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generate for one prompt, yielding its output after every token.

        Each output's texts and token ids hold all that is generated so far. A text waits for whole characters, and
        where its end may be the beginning of a stop text, for what follows.

        Raises:
            InputError: the prompt does not fit.
        """
        params = sampling_params or SamplingParams()
        token_ids, vision = self._checked(prompt, params)
        sequences = self.engine.add(token_ids, params, vision)
        answers = [_Answer(each, self._tokenizer, streamed=True) for each in sequences]
        for changed in self._steps(answers):
            if changed:
                yield _output(prompt, answers)

    def _run(self, answers: Sequence[_Answer]) -> None:
        """Step until everything is finished."""
        with _Progress(len(answers), self._progress) as progress:
            for changed in self._steps(answers):
                progress.advance(sum(answer.finish_reason is not None for answer in changed))

    def _steps(self, answers: Sequence[_Answer]) -> Iterator[list[_Answer]]:
        """Step until all answers are finished, yielding those that took in a token. Left early, it aborts the rest."""
        of = {answer.sequence: answer for answer in answers}
        try:
            while any(answer.sequence.finish_reason is None for answer in answers):
                changed = [of[sequence] for sequence in self.engine.step() if sequence in of]
                while changed:
                    for answer in changed:
                        if answer.read():
                            self.engine.scheduler.stop(answer.sequence, answer.num_read)
                    yield changed
                    changed = [answer for answer in changed if answer.unread]
        finally:
            for answer in answers:
                self.engine.scheduler.abort(answer.sequence)

    def _checked(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], VisionPrompt | None]:
        """Return the tokens and images of a prompt that can run.

        Raises:
            InputError: it cannot.
        """
        if params.stop and self._tokenizer is None:
            raise InputError("the model comes without a tokenizer, so stop texts cannot be found; use stop_token_ids")
        token_ids, vision = self._reader.read(prompt)
        self.engine.check(token_ids, params)
        return token_ids, vision


class _Answer:
    """A sequence and its text so far."""

    def __init__(
        self, sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase | None, *, streamed: bool = False
    ) -> None:
        self.sequence = sequence
        self.text = ""
        self._read = len(sequence.prompt_token_ids)
        # Decoding costs the host time at every token: where nothing looks at the text before its end, it is done there.
        self._as_it_comes = streamed or bool(sequence.params.stop)
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._searched = 0  # a stop text may begin here: what the minimum of tokens made is not searched
        self._logprobs: list[dict[int, Logprob]] = []
        self._prompt_logprobs: list[dict[int, Logprob] | None] = [None]

    @property
    def num_read(self) -> int:
        """The tokens that are taken in, the prompt's among them."""
        return self._read

    @property
    def unread(self) -> bool:
        """Whether the sequence has tokens that are not taken in."""
        return self._read < len(self.sequence.token_ids)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it runs or has tokens that are not taken in."""
        return None if self.unread else self.sequence.finish_reason

    def read(self) -> bool:
        """Take in the next token; return whether the text has come to a stop text, where it is cut."""
        self._read += 1
        if self._tokenizer is None:
            return False
        made = self._read - len(self.sequence.prompt_token_ids)
        if self.finish_reason is not None:
            tokens = self.sequence.output_token_ids
            new = str(self._tokenizer.decode(tokens, skip_special_tokens=True))[len(self.text) :]
        elif self._as_it_comes:
            new = self._decoder.step(self._tokenizer.backend_tokenizer, self.sequence.token_ids[self._read - 1]) or ""
        else:
            return False
        before, self.text = len(self.text), self.text + new
        if made <= self.sequence.params.min_tokens:
            self._searched = len(self.text)
            return False
        stops = self.sequence.params.stop
        longest = max(map(len, stops), default=0)
        found = [at for stop in stops if (at := self.text.find(stop, max(self._searched, before - longest + 1))) >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    @property
    def output(self) -> CompletionOutput:
        """The completion so far, without its index."""
        sequence = self.sequence
        token_ids = sequence.token_ids[len(sequence.prompt_token_ids) : self._read]
        output = CompletionOutput(0, self._shown(), token_ids, self.finish_reason)
        if sequence.params.logprobs is not None:
            known = sequence.logprobs[: len(token_ids)]
            self._logprobs += [self._named(each) for each in known[len(self._logprobs) :]]
            output.logprobs = list(self._logprobs)
            chosen = zip(token_ids, known, strict=True)
            output.cumulative_logprob = sum(each[token][0] for token, each in chosen)
        return output

    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Those of the prompt, as far as they are computed; None where they were not asked for."""
        if self.sequence.params.prompt_logprobs is None:
            return None
        known = self.sequence.prompt_logprobs
        self._prompt_logprobs += [self._named(each) for each in known[len(self._prompt_logprobs) - 1 :]]
        return list(self._prompt_logprobs)

    def _named(self, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        return {
            token: Logprob(log, rank, None if self._tokenizer is None else str(self._tokenizer.decode([token])))
            for token, (log, rank) in logprobs.items()
        }

    def _shown(self) -> str:
        """Return the text, without an end that may become a stop text."""
        if self.finish_reason is None:
            for stop in self.sequence.params.stop:
                for size in range(min(len(stop) - 1, len(self.text)), 0, -1):
                    if self.text.endswith(stop[:size]):
                        return self.text[:-size]
        return self.text


def _output(prompt: Prompt, answers: Sequence[_Answer]) -> RequestOutput:
    first = answers[0].sequence
    return RequestOutput(
        request_id=first.request_id,
        prompt=prompt if isinstance(prompt, str) else prompt.get("prompt"),
        prompt_token_ids=first.prompt_token_ids,
        outputs=[replace(answer.output, index=index) for index, answer in enumerate(answers)],
        finished=all(answer.finish_reason is not None for answer in answers),
        prompt_logprobs=answers[0].prompt_logprobs,
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
