"""How one model writes: what its answers are read by, and what its prompts have begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphmode.serve.parsing.formats import (
    AUTO,
    ReasoningFormat,
    ToolFormat,
    markers,
    reasoning_format,
    template_text,
    tool_formats,
)
from graphmode.serve.parsing.grammars import Thoughts


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a model writes.

    Attributes:
        template: its chat template; empty where it has none.
        tools: the formats in which its calls of tools are read; none where none is known.
        reasoning: how its thoughts are set apart; None where it has none.
        special: the ids of the special tokens that mark calls and thoughts, by their texts.
    """

    template: str = ""
    tools: tuple[ToolFormat, ...] = ()
    reasoning: ReasoningFormat | None = None
    special: Mapping[str, int] = field(default_factory=dict)

    def thoughts(self, prompt: str) -> Thoughts:
        """Return what thoughts an answer to a prompt may begin with."""
        form, prompt = self.reasoning, prompt.rstrip()
        if form is None or prompt.endswith(form.end):
            return Thoughts()
        return Thoughts(form=form, begun=prompt.endswith(form.begin))


def dialect(
    template: str | Mapping[str, str] | None,
    special: Mapping[int, str],
    *,
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> Dialect:
    """Return how a model writes.

    Args:
        template: its chat template, or several by name.
        special: the texts of its tokenizer's special tokens, by their ids.
        tool_call_parser: the name of the format of its calls; None: as the template shows.
        reasoning_parser: the same of its thoughts.

    Raises:
        InputError: a name is not known.
    """
    text = template_text(template)
    tools, reasoning = tool_formats(tool_call_parser or AUTO, text), reasoning_format(reasoning_parser or AUTO, text)
    marks = markers(tools, reasoning)
    return Dialect(
        template=text,
        tools=tools,
        reasoning=reasoning,
        special={mark: token for token, mark in special.items() if mark in marks},
    )
