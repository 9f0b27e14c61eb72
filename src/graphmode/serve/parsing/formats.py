"""How models write the calls of tools and their thoughts: a table, from which answers are read and grammars made.

Texts stand here as models write them. Where they are read, white space around them does not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from secrets import choice
from string import ascii_letters, digits

from graphmode.engine import checks

AUTO = "auto"
NONE = "none"


@dataclass(frozen=True, kw_only=True)
class JsonCall:
    """A JSON object that holds the tool's name and its arguments.

    Attributes:
        arguments: their key. Where a call is read, each of ``arguments`` and ``parameters`` will do.
    """

    arguments: str = "arguments"


@dataclass(frozen=True, kw_only=True)
class NamedCall:
    """The tool's name, then a JSON object with its arguments.

    Attributes:
        before: stands before the name.
        between: stands between name and arguments. Where a call is read, it may be missing.
        after: stands after the arguments. Where a call is read, it may be missing.
        id_begin: begins an identifier between name and ``between`` that some models write. It is not used.
    """

    before: str = ""
    between: str = ""
    after: str = ""
    id_begin: str = ""


@dataclass(frozen=True, kw_only=True)
class TaggedCall:
    """The tool's name, then each argument's name and value between tags. Texts stand without quotes.

    Attributes:
        name: stand before and after the tool's name.
        key: before and after an argument's name.
        value: before and after its value.
        after: stands after all arguments.
    """

    name: tuple[str, str]
    key: tuple[str, str]
    value: tuple[str, str]
    after: str = ""


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a model calls tools.

    Attributes:
        name: of the format.
        begin: open a run of calls, one after the other.
        call: stand before and after each call.
        body: the call itself.
        between: stands between two calls.
        end: closes the run.
        bare: whether an answer may begin with a run that has no ``begin``.
        signs: texts in the chat template that tell the format.
        short_ids: whether a call's identifier must be nine letters and digits: Mistral's templates refuse others.
    """

    name: str
    begin: tuple[str, ...] = ()
    call: tuple[str, str] = ("", "")
    body: JsonCall | NamedCall | TaggedCall
    between: str = ""
    end: str = ""
    bare: bool = False
    signs: tuple[str, ...]
    short_ids: bool = False

    def new_id(self) -> str:
        """Return an identifier for a call."""
        letters = "".join(choice(ascii_letters + digits) for _ in range(9 if self.short_ids else 24))
        return letters if self.short_ids else f"call_{letters}"

    @property
    def trigger(self) -> str:
        """The text that begins a call."""
        return (self.begin[0] if self.begin else self.call[0]).strip()

    @property
    def texts(self) -> frozenset[str]:
        """The texts that mark calls, without white space."""
        body = self.body
        own: tuple[str, ...] = ()
        if isinstance(body, NamedCall):
            own = (body.before, body.between, body.after, body.id_begin)
        elif isinstance(body, TaggedCall):
            own = (*body.name, *body.key, *body.value, body.after)
        return frozenset(map(str.strip, (*self.begin, *self.call, *own, self.between, self.end))) - {""}


@dataclass(frozen=True, kw_only=True)
class ReasoningFormat:
    """How a model sets its thoughts apart, which stand before all else.

    Attributes:
        name: of the format.
        begin: stands before them, unless the chat template has written it.
        end: stands after them.
    """

    name: str
    begin: str
    end: str


_XML = ("<tool_call>\n", "\n</tool_call>")

TOOL_FORMATS = (
    ToolFormat(
        name="qwen3_coder",
        call=_XML,
        body=TaggedCall(
            name=("<function=", ">\n"),
            key=("<parameter=", ">"),
            value=("\n", "\n</parameter>\n"),
            after="</function>",
        ),
        between="\n",
        signs=("<tool_call>", "<function=", "<parameter="),
    ),
    ToolFormat(
        name="glm45",
        call=("<tool_call>", "</tool_call>"),
        body=TaggedCall(name=("", "\n"), key=("<arg_key>", "</arg_key>\n"), value=("<arg_value>", "</arg_value>\n")),
        between="\n",
        signs=("<tool_call>", "<arg_key>"),
    ),
    ToolFormat(name="hermes", call=_XML, body=JsonCall(), between="\n", signs=("<tool_call>",)),
    ToolFormat(
        name="deepseek_v3",
        begin=("<｜tool▁calls▁begin｜>",),
        call=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        body=NamedCall(before="function<｜tool▁sep｜>", between="\n```json\n", after="\n```"),
        between="\n",
        end="<｜tool▁calls▁end｜>",
        signs=("<｜tool▁calls▁begin｜>", "```json"),
    ),
    ToolFormat(
        name="deepseek_v31",
        begin=("<｜tool▁calls▁begin｜>",),
        call=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        body=NamedCall(between="<｜tool▁sep｜>"),
        end="<｜tool▁calls▁end｜>",
        signs=("<｜tool▁calls▁begin｜>",),
    ),
    ToolFormat(
        name="mistral",
        call=("[TOOL_CALLS]", ""),
        body=NamedCall(between="[ARGS]", id_begin="[CALL_ID]"),
        signs=("[TOOL_CALLS]", "[ARGS]"),
        short_ids=True,
    ),
    ToolFormat(
        name="mistral_list",
        begin=("[TOOL_CALLS]", "["),
        body=JsonCall(),
        between=", ",
        end="]",
        signs=("[TOOL_CALLS]",),
        short_ids=True,
    ),
    ToolFormat(
        name="llama3_json",
        begin=("<|python_tag|>",),
        body=JsonCall(arguments="parameters"),
        between="; ",
        bare=True,
        signs=('{"name": ', '"parameters": '),
    ),
)

REASONING_FORMATS = (
    ReasoningFormat(name="mistral", begin="[THINK]", end="[/THINK]"),
    ReasoningFormat(name="think", begin="<think>", end="</think>"),
)

# Formats that begin alike are read together: the first that fits a call counts.
_TOOL_NAMES = {
    "qwen3_coder": ("qwen3_coder", "hermes"),
    "glm45": ("glm45",),
    "hermes": ("hermes",),
    "deepseek_v3": ("deepseek_v3", "deepseek_v31"),
    "mistral": ("mistral", "mistral_list"),
    "llama3_json": ("llama3_json",),
}
_OTHER_TOOL_NAMES = {
    **dict.fromkeys(("qwen25", "qwen3", "qwen"), "hermes"),
    "qwen3_xml": "qwen3_coder",
    "mistral_list": "mistral",
    **dict.fromkeys(("deepseek_v31", "deepseek_r1"), "deepseek_v3"),
    **dict.fromkeys(("glm46", "glm47"), "glm45"),
    **dict.fromkeys(("llama3", "llama4_json"), "llama3_json"),
}
_OTHER_REASONING_NAMES = dict.fromkeys(("deepseek_r1", "deepseek_v3", "qwen3", "glm45", "hunyuan"), "think")


def tool_formats(name: str, template: str) -> tuple[ToolFormat, ...]:
    """Return the formats in which a model's calls are read; grammars are made from the first.

    Args:
        name: ``auto`` (what the template shows), ``none``, or the name of a format, vLLM's names among them.
        template: the chat template, of any purpose; empty where there is none.

    Returns:
        Formats that have the same trigger. None where ``name`` is ``none``, or where the template shows none of them.

    Raises:
        InputError: ``name`` is none of these.
    """
    checks.choice("tool_call_parser", name, [AUTO, NONE, *_TOOL_NAMES, *_OTHER_TOOL_NAMES])
    by_name = {each.name: each for each in TOOL_FORMATS}
    shown = [each for each in TOOL_FORMATS if all(sign in template for sign in each.signs)]
    if name == NONE or (name == AUTO and not shown):
        return ()
    name = shown[0].name if name == AUTO else name
    formats = [by_name[each] for each in _TOOL_NAMES[_OTHER_TOOL_NAMES.get(name, name)]]
    return tuple(sorted(formats, key=lambda each: each not in shown))


def reasoning_format(name: str, template: str) -> ReasoningFormat | None:
    """Return how a model's thoughts are set apart; arguments and errors as of :func:`tool_formats`."""
    by_name = {each.name: each for each in REASONING_FORMATS}
    checks.choice("reasoning_parser", name, [AUTO, NONE, *by_name, *_OTHER_REASONING_NAMES])
    if name == AUTO:
        return next((each for each in REASONING_FORMATS if each.end in template), None)
    return by_name.get(_OTHER_REASONING_NAMES.get(name, name))


def template_text(template: str | Mapping[str, str] | None) -> str:
    """Return a tokenizer's chat template, or all that it has by name, as one text."""
    return "\n".join(template.values()) if isinstance(template, Mapping) else template or ""


def markers(formats: Collection[ToolFormat], reasoning: ReasoningFormat | None) -> frozenset[str]:
    """Return the texts that mark calls and thoughts: they must be seen in answers though special tokens are not."""
    own = [each.texts for each in formats]
    return frozenset().union(*own, () if reasoning is None else (reasoning.begin, reasoning.end))
