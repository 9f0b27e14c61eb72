"""Grammars for llguidance, and a process that tries them.

What is compiled may come from anybody, and llguidance runs in its caller's process: a chain of a thousand references
overflows its stack, some products of patterns take forever. So each grammar is first compiled here, by a process that
may be lost. It is run as a script, ``python grammar_trial.py``, and imports little: it must start fast.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from threading import Thread, stack_size
from typing import IO, Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

CPU_SECONDS = 1.0
"""What compiling a grammar and its first mask may take."""
_MEMORY = 4 * 2**30  # of addresses; most of them are never touched
_STACK = 2**20  # that of the threads that compile afterwards is larger
_LIMITS = llguidance.LLParserLimits(
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    max_items_in_row=20_000,  # an object with a thousand optional properties has 4,000
    verbose_errors=False,
)
# As readers like it, and bounded: a model that is unsure must not draw spaces forever.
_JSON: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"( |\n[ \t]{0,20})",
    "lenient": False,
    "coerce_one_of": False,
}


def compiled(kind: str, content: str, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """Return a matcher at the beginning of a grammar.

    Args:
        kind: ``json``, ``regex`` or ``grammar``.
        content: its text.
        tokenizer: of the model.

    Raises:
        ValueError: the grammar is malformed, or something in it is not supported.
    """
    if kind == "json":
        grammar = llguidance.LLMatcher.grammar_from_json_schema(content, overrides=_JSON)
    elif kind == "regex":
        grammar = llguidance.LLMatcher.grammar_from_regex(content)
    else:
        try:
            grammar = llguidance.LLMatcher.grammar_from_lark(any_to_lark(content))
        except ValueError:
            raise
        except Exception as error:  # GBNF is read in Python, which raises anything
            raise ValueError(f"{error or type(error).__name__}") from None
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    if warnings := matcher.get_grammar_warnings():
        raise ValueError("; ".join(warnings))
    return matcher


def first_mask(matcher: llguidance.LLMatcher, words: int) -> np.ndarray:
    """Return which tokens may come next, a bit each, int32 ``[words]``.

    Raises:
        ValueError: the grammar is too complex at this point, or nothing can follow.
    """
    mask = np.zeros(words, dtype=np.int32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    error = matcher.get_error()
    if error.startswith("NoExtension") or not mask.any():
        raise ValueError("it allows no answer at all, like a definition that is nothing but itself")
    if error:
        raise ValueError(error)
    return mask


def in_one_line(error: object) -> str:
    """Return what an error of llguidance says, without the source and the state that follow."""
    text = str(error).partition("\n<state>")[0].removesuffix("<non-verbose/>")
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def _answer(line: str, tokenizer: llguidance.LLTokenizer, words: int) -> str:
    try:
        kind, content = json.loads(line)
        first_mask(compiled(kind, content, tokenizer), words)
    except Exception as error:
        return in_one_line(error)
    return ""


def main(requests: IO[str], answers: IO[str]) -> None:
    """Read the tokenizer, then grammars, a line of JSON each; answer each with what is wrong with it."""
    options: dict[str, Any] = json.loads(requests.readline())
    tokenizer = llguidance.LLTokenizer(**options)
    words = -(-tokenizer.vocab_size // 32)
    for limit, most in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # it is lower already, or the system does not keep it
            resource.setrlimit(limit, (most, most))
    print("ready", file=answers, flush=True)
    for line in requests:
        # The signal's default action ends the process: nothing else stops a compilation.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = _answer(line, tokenizer, words)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    stack_size(_STACK)
    thread = Thread(target=main, args=(sys.stdin, sys.stdout))
    thread.start()
    thread.join()
