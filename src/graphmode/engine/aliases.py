"""Names that users bring from vLLM: what they are called here, and why some cannot be honoured.

One table for sampling parameters and engine options. The documentation speaks of our own names alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from graphmode.engine.checks import shown
from graphmode.graph.errors import InputError


@dataclass(frozen=True)
class Alias:
    """Another name of an option.

    Attributes:
        name: ours, which takes the same value; or
        options: what a value says in our options, by name. It raises InputError for a value that it does not know.
    """

    name: str = ""
    options: Callable[[Any], Mapping[str, Any]] | None = None

    def read(self, value: Any) -> Mapping[str, Any]:
        """Return our options for a value."""
        return {self.name: value} if self.options is None else self.options(value)


@dataclass(frozen=True)
class Refusal:
    """An option that cannot be honoured.

    Attributes:
        reason: a sentence: why not, and what to do instead.
        harmless: values that ask for nothing, which are accepted.
    """

    reason: str
    harmless: tuple[Any, ...] = (None,)


Names = Mapping[str, Alias | Refusal]

_GUIDED = Refusal("answers cannot be held to a grammar or schema; allowed_token_ids and bad_words choose tokens")
_BEAMS = Refusal("there is no beam search; n gives several sampled answers", harmless=(None, False))

SAMPLING: Names = {
    "structured_outputs": _GUIDED,
    "guided_decoding": _GUIDED,
    "logits_processors": Refusal(
        "a graph cannot run Python code at each token; logit_bias, allowed_token_ids, bad_words and the penalties are "
        "computed inside the graph",
        harmless=(None, [], ()),
    ),
    "output_kind": Refusal("generate returns final outputs, and stream all that there is so far after every token"),
    "best_of": Refusal(
        "answers are not ranked; ask for n with logprobs and choose by cumulative_logprob", harmless=(None, 1)
    ),
    "use_beam_search": _BEAMS,
    "length_penalty": Refusal("there is no beam search, whose scores it would change", harmless=(None, 1.0)),
    "early_stopping": Refusal("there is no beam search, which it would end", harmless=(None, False)),
    "flat_logprobs": Refusal(
        "log-probabilities come as one mapping for each token; leave it out", harmless=(None, False)
    ),
    "extra_args": Refusal("nothing here would read them; leave them out", harmless=(None, {})),
    "thinking_token_budget": Refusal("thinking is not told apart from the answer; max_tokens bounds both"),
    "repetition_detection": Refusal("an answer that repeats itself is not ended; repetition_penalty makes it rarer"),
    "skip_clone": Refusal("parameters are never changed, so nothing is copied; leave it out", harmless=(None, False)),
}

ENGINE: Names = {}


Class = TypeVar("Class")


def by_name(names: Names) -> Callable[[type[Class]], type[Class]]:
    """Make a dataclass take other names of its fields, and refuse names that it does not know with an InputError.

    Args:
        names: the other names.
    """

    def decorate(made: type[Class]) -> type[Class]:
        known = [each.name for each in fields(made)]  # type: ignore[arg-type]
        init = made.__init__

        @functools.wraps(init)
        def __init__(self: Any, *values: Any, **options: Any) -> None:  # noqa: N807
            if values:
                raise InputError(f"{made.__name__} was given {shown(values[0])} without a name; give each by its name")
            init(self, **named(made.__name__, options, known, names))

        made.__init__ = __init__  # type: ignore[method-assign]
        return made

    return decorate


def named(what: str, given: Mapping[str, Any], known: list[str], names: Names) -> dict[str, Any]:
    """Return options by our own names.

    Args:
        what: takes them, for messages.
        given: the options, by any name.
        known: our own names.
        names: other names.

    Raises:
        InputError: an option is not known, cannot be honoured, or is given twice.
    """
    options = {name: value for name, value in given.items() if name in known}
    for name in given.keys() - options.keys():
        other, value = names.get(name), given[name]
        if other is None:
            raise InputError(f"{what} has no {name}; it has {', '.join(known)}")
        if isinstance(other, Refusal):
            if not any(type(value) is type(each) and value == each for each in other.harmless):
                raise InputError(f"{name}={shown(value)} cannot be honoured: {other.reason}")
            continue
        for ours, meant in other.read(value).items():
            if ours in options and options[ours] != meant:
                raise InputError(
                    f"{name}={shown(value)} and {ours}={shown(options[ours])} contradict; give one of them"
                )
            options[ours] = meant
    return options
