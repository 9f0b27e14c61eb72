"""Structured outputs at work: grammars are tried, compiled and followed, and say which tokens an answer may draw next.

None of it is done by the thread that steps the engine. A grammar is compiled, and each mask computed, by worker threads
(llguidance gives up the GIL meanwhile). An answer whose mask is not there yet sits the step out.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from pathlib import Path
from threading import Condition, Lock
from typing import Any
from weakref import finalize

import llguidance
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from graphmode.engine import grammar_trial
from graphmode.engine.restrictions import packed
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.structured_outputs import StructuredOutputs, structured_outputs
from graphmode.errors import EngineError, InputError
from graphmode.models.hf.tokenizer import backend_as_json

_KNOWN = 256  # grammars of which it is remembered what was found
_COMPILED = 32  # grammars that are kept compiled
_WALL_SECONDS = 20.0  # of a trial, whose processor time is what is bounded, on a machine that is busy
_START_SECONDS = 60.0
_WORKERS = 8
_LONGEST_WAIT = 0.005  # seconds
_MOMENT = 0.002  # seconds

Mask = npt.NDArray[np.int32]
"""A bit a token, int32 ``[ceil(vocab / 32)]``, as :class:`~graphmode.ops.Bans` has them."""


class GrammarCompiler:
    """Checks and compiles grammars for one model. Any thread may use it. It needs the tokenizer, and no weights.

    Args:
        tokenizer: the model's; None where it comes without one.
        vocab_size: tokens that the model has, those without a text included.
        eos_token_ids: tokens that end a text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._model_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._lock = Lock()
        self._trial: _Trial | None = None
        self._faults: dict[StructuredOutputs, str] = {}  # of the grammars tried last
        self._compiled = lru_cache(_COMPILED)(self._compile)

    def check(self, given: StructuredOutputs | Mapping[str, Any]) -> None:
        """Check that a grammar can be compiled: in a process of its own that may take a second, and be lost.

        The first check starts that process. It tries one grammar at a time; what it found is remembered.

        Raises:
            InputError: the model's tokenizer serves no grammars, or the grammar is malformed, too complex, or asks for
                what is not supported.
        """
        structured = structured_outputs("structured_outputs", given)
        fault = self._faults.get(structured)
        if fault is None:
            fault = self._try(structured)
        if fault:
            raise InputError(f"structured_outputs.{structured.kind} {fault}")

    def knows(self, given: StructuredOutputs | Mapping[str, Any]) -> bool:
        """Return whether :meth:`check` has its answer at once."""
        return structured_outputs("structured_outputs", given) in self._faults

    def compile(self, given: StructuredOutputs | Mapping[str, Any]) -> Grammar:
        """Compile a grammar that :meth:`check` has let pass, if it is not.

        Raises:
            InputError: it cannot be compiled.
        """
        return self._compiled(structured_outputs("structured_outputs", given))

    def close(self) -> None:
        """End the process that tries grammars. Another :meth:`check` starts another."""
        with self._lock:
            if self._trial is not None:
                self._trial.close()
            self._trial = None

    def _try(self, structured: StructuredOutputs) -> str:
        """Return what is wrong with a grammar, and remember it; empty where nothing is."""
        _, options = self._tokenizer
        with self._lock:
            if (fault := self._faults.get(structured)) is not None:  # it was tried for another
                return fault
            if self._trial is None:
                self._trial = _Trial(options)
            fault = self._trial.fault_of(*_source(structured))
            if self._trial.ended:
                self._trial = None
            while len(self._faults) >= _KNOWN:
                del self._faults[next(iter(self._faults))]
            self._faults[structured] = fault
        return fault

    @cached_property
    def _tokenizer(self) -> tuple[llguidance.LLTokenizer, dict[str, Any]]:
        """llguidance's tokenizer, and what it is made of."""
        tokenizer = self._model_tokenizer
        if tokenizer is None:
            raise InputError("structured_outputs need a tokenizer, and the model comes without one; leave them out")
        if not self._eos_token_ids:
            raise InputError(
                "structured_outputs need a token that ends a text, and the model names none; set eos_token_id in its "
                "config.json or generation_config.json"
            )
        source = backend_as_json(tokenizer)
        size = max(self._vocab_size, 1 + max(tokenizer.get_vocab().values(), default=0))
        options: dict[str, Any] = {"tokenizer": source, "n_vocab": size, "eos_token": self._eos_token_ids}
        if source is not None:
            with suppress(ValueError):
                return llguidance.LLTokenizer(**options), options
        raise InputError(
            "structured_outputs need a tokenizer of the tokenizers library that tells the bytes of its tokens: "
            "byte-level BPE, or SentencePiece with byte fallback; the model's "
            f"({type(tokenizer).__name__}) does not. Leave them out"
        )

    @cached_property
    def _real(self) -> npt.NDArray[np.bool_]:
        """Which of the model's tokens the tokenizer has."""
        assert self._model_tokenizer is not None
        real = np.zeros(self._vocab_size, dtype=np.bool_)
        ids = np.array(list(self._model_tokenizer.get_vocab().values()))
        real[ids[ids < self._vocab_size]] = True
        return real

    def _compile(self, structured: StructuredOutputs) -> Grammar:
        tokenizer, _ = self._tokenizer
        try:
            made = partial(grammar_trial.compiled, *_source(structured), tokenizer)
            return Grammar(made, -(-tokenizer.vocab_size // 32), packed(self._real), self._eos_token_ids)
        except ValueError as error:
            raise InputError(f"structured_outputs.{structured.kind}: {grammar_trial.in_one_line(error)}") from None


class Grammar:
    """A compiled grammar.

    Matchers that are copies of one share what they have found of the texts that it allows, which makes them fast. How
    much that may be is limited, so where they have come to the limit, those that go on get a new one to share.

    Args:
        compiled: returns a matcher at its beginning.
        words: entries of a mask.
        real: the tokens that exist.
        eos_token_ids: those that end a text.

    Raises:
        ValueError: it cannot be compiled.
    """

    def __init__(
        self, compiled: Callable[[], llguidance.LLMatcher], words: int, real: Mask, eos_token_ids: Sequence[int]
    ) -> None:
        self.real = real
        self.eos_token_ids = eos_token_ids
        self._compiled = compiled
        self._lock = Lock()
        self._shared = compiled()
        self._first = grammar_trial.first_mask(self._shared, words)

    def begin(self) -> tuple[llguidance.LLMatcher, Mask]:
        """Return what the matcher of an answer is a copy of, and the tokens that may come first."""
        return self._shared, self._first.copy()

    def another(self, shared: llguidance.LLMatcher) -> llguidance.LLMatcher:
        """Return what matchers are to be copies of that were copies of ``shared``, and could not go on."""
        with self._lock:
            if self._shared is shared:
                self._shared = self._compiled()
            return self._shared


class GrammarWorkers:
    """The threads that compile grammars and compute masks.

    Attributes:
        finished: how many jobs have come to their end.
    """

    def __init__(self) -> None:
        self.finished = 0
        self._count = min(_WORKERS, os.cpu_count() or 1)
        self._running = 0
        self._changed = Condition()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._count, thread_name_prefix="grammar")

    def run(self, job: Callable[[], object]) -> None:
        """Let a thread run a job, which raises nothing."""
        with self._changed:
            self._running += 1
        self._threads.submit(self._run, job)

    def advance(self, drawn: Sequence[tuple[GrammarState, list[int]]]) -> None:
        """Let answers go on in their grammars by the tokens that they have drawn, shared among the threads."""
        for state, _ in drawn:
            state.ready = False
        for start in range(min(self._count, len(drawn))):
            self.run(partial(_advance, drawn[start :: self._count]))

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        finally:
            with self._changed:
                self._running -= 1
                self.finished += 1
                self._changed.notify_all()

    def wait(self, finished: int) -> bool:
        """Wait until a job has ended beside the first ``finished`` ones; return False where none has and none runs.

        Those that run are waited for a moment, so that the next step has their rows too, but never for long: other
        requests may come meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._running, timeout=_MOMENT)
            self._changed.wait_for(lambda: self.finished != finished or not self._running, timeout=_LONGEST_WAIT)
            return self.finished != finished or self._running > 0


class GrammarState:
    """How far an answer has come in its grammar, and what it may draw next.

    A token that ends a text may be drawn where the grammar has come to an end. Before ``min_tokens``, and with
    ``ignore_eos``, it may not, unless nothing else is left; the same holds for stop tokens before ``min_tokens``.

    Args:
        grammar: the grammar.
        params: of the request.
        fail: called with the cause where the grammar cannot be followed any further.

    Attributes:
        ready: whether it is known what may be drawn next.
        forbidden: what may not, once it is known.
    """

    def __init__(self, grammar: Grammar, params: SamplingParams, fail: Callable[[str], None]) -> None:
        self._grammar = grammar
        self._params = params
        self.fail = fail
        self._drawn: list[int] = []
        self._shared, self._mask = grammar.begin()
        self._matcher = self._shared.deep_copy()
        self.forbidden = self._read()
        self.ready = True

    def advance(self, token_ids: list[int]) -> None:
        """Go on by the tokens that the answer has drawn.

        Raises:
            ValueError: the grammar cannot be followed any further.
        """
        self._drawn += token_ids
        if not self._follow(token_ids):
            self._shared = self._grammar.another(self._shared)
            self._matcher = self._shared.deep_copy()
            if not self._follow(self._drawn):
                raise ValueError(self._matcher.get_error())
        self.forbidden = self._read()
        self.ready = True

    def _follow(self, token_ids: list[int]) -> bool:
        """Take tokens in and compute the mask behind them; return whether that could be done."""
        self._matcher.consume_tokens(token_ids)
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        return not self._matcher.is_error()  # a state that a matcher does not leave

    def _read(self) -> Mask:
        """Return what may not be drawn."""
        allowed = self._mask[: len(self._grammar.real)] & self._grammar.real
        barred = list(self._grammar.eos_token_ids) if self._params.ignore_eos else []
        if len(self._drawn) < self._params.min_tokens:
            barred += [*self._grammar.eos_token_ids, *self._params.stop_token_ids]
        if barred:
            left = allowed.copy()
            for token in barred:
                left.view(np.uint32)[token // 32] &= ~np.uint32(1 << token % 32)
            allowed = left if left.any() else allowed
        return ~allowed


def _advance(drawn: Sequence[tuple[GrammarState, list[int]]]) -> None:
    for state, token_ids in drawn:
        try:
            state.advance(token_ids)
        except BaseException as error:  # also a panic of Rust: it ends this answer, and harms no other
            state.fail(f"the grammar cannot be followed any further: {grammar_trial.in_one_line(error)}")


def _source(structured: StructuredOutputs) -> tuple[str, str]:
    """Return what is compiled: its kind, and its text."""
    if structured.choice is not None:
        return "regex", "|".join(map(re.escape, structured.choice))
    return structured.kind, str(getattr(structured, structured.kind))


class _Trial:
    """The process that tries grammars.

    Args:
        options: what it makes the tokenizer of.

    Attributes:
        ended: whether it is lost.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.ended = False
        process = self._process = subprocess.Popen(
            # Its folder holds modules whose names are those of Python's own: -P keeps it from sys.path.
            [sys.executable, "-P", str(Path(grammar_trial.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._end = finalize(self, _end, process)
        if self._answer_to(json.dumps(options), _START_SECONDS) is None:
            raise EngineError(
                f"the process that tries grammars did not start: {sys.executable} ended with {process.returncode}"
            )

    def fault_of(self, kind: str, text: str) -> str:
        """Return what is wrong with a grammar; empty where nothing is."""
        answer = None if self.ended else self._answer_to(json.dumps([kind, text]), _WALL_SECONDS)
        if answer is not None:
            cause = str(json.loads(answer))
            return f"cannot be followed: {cause}. Leave it out or change it" if cause else ""
        return (
            f"is too complex: compiling it takes more than {grammar_trial.CPU_SECONDS:g} s, or nests too deep. Give a "
            "simpler one, with fewer alternatives, repetitions and references"
        )

    def close(self) -> None:
        """End the process."""
        self.ended = True
        self._end()

    def _answer_to(self, line: str, seconds: float) -> str | None:
        """Send a line and return the one that answers it; None where the process is lost."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            if select.select([self._process.stdout], [], [], seconds)[0] and (
                answer := self._process.stdout.readline()
            ):
                return answer
        self.close()
        return None


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
