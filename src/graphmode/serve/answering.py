"""What chat completions and responses share: conversations with tools become prompts, and answers are taken apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from graphmode.engine.chat import ChatTemplate
from graphmode.engine.checks import shown
from graphmode.engine.outputs import Delta, Logprob
from graphmode.engine.prompts import PromptParts
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.structured_outputs import StructuredOutputs
from graphmode.errors import InputError
from graphmode.serve.errors import ApiError
from graphmode.serve.parsing.dialect import Dialect
from graphmode.serve.parsing.grammars import AnswerGrammar, Thoughts
from graphmode.serve.parsing.parser import AnswerParser
from graphmode.serve.parsing.parts import CallEnd, CallStart, Part
from graphmode.serve.protocol import SamplingFields
from graphmode.serve.protocol_chat import ChoiceLogprobs, Function, TokenLogprob, TopLogprob
from graphmode.serve.service import Generation, Service

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation, and what its answer may be.

    Attributes:
        messages: the conversation, as chat templates take it; the arguments of calls are JSON texts.
        tools: what can be called.
        choice: ``auto`` (the model chooses), ``none``, ``required``, or the name of the tool that must be called.
        several_calls: whether an answer may hold more than one.
        schema: the JSON schema of the answer; None where it may be any text.
        schema_parameter: the name of the parameter that asks for it.
        structured: what else the answer is held to, as ``structured_outputs``.
        template_options: what the chat template reads beside all that.
        add_generation_prompt: whether the prompt ends with the beginning of an answer.
        continue_final_message: whether the answer continues the last message.
        effort: how much the model is to think, for templates that read it.
    """

    messages: Messages
    tools: Sequence[Function] = ()
    choice: str = "auto"
    several_calls: bool = True
    schema: Mapping[str, Any] | None = None
    schema_parameter: str = "response_format"
    structured: Mapping[str, Any] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    effort: str | None = None

    @property
    def schemas(self) -> dict[str, Mapping[str, Any] | None]:
        """The schemas of the tools that may be called, by name."""
        named = self.choice not in ("auto", "none", "required")
        return {tool.name: tool.parameters for tool in self.tools if not named or tool.name == self.choice}

    @property
    def forced(self) -> bool:
        """Whether the answer must be calls."""
        return self.choice not in ("auto", "none")


@dataclass(frozen=True)
class Task:
    """A question that can be submitted.

    Attributes:
        prompt: its text and tokens, and its images.
        structured_outputs: what the answer is held to; None where it is free.
        keep_special: the special tokens that the answer's text must have.
        question: what was asked.
        dialect: how the model writes.
        thoughts: what the answer may begin with.
    """

    prompt: PromptParts
    structured_outputs: Mapping[str, Any] | None
    keep_special: frozenset[str]
    question: Question
    dialect: Dialect
    thoughts: Thoughts

    def reader(self) -> AnswerReader:
        """Return what takes one answer apart."""
        question = self.question
        parser = AnswerParser(
            self.dialect.tools if question.tools else (),
            question.schemas,
            self.thoughts.form,
            thinking=self.thoughts.begun,
        )
        return AnswerReader(parser, several_calls=question.several_calls)


class AnswerReader:
    """Takes one answer apart as it comes.

    Args:
        parser: of its text.
        several_calls: whether it may hold more than one call. If not, it ends with the first.

    Attributes:
        calls: how many it has made.
        finish_reason: why it ended: also ``tool_calls``; None while it goes on.
        stop_reason: the stop text or token that ended it.
    """

    def __init__(self, parser: AnswerParser, *, several_calls: bool) -> None:
        self.calls = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._parser = parser
        self._several_calls = several_calls

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def take(self, delta: Delta) -> list[Part] | None:
        """Return the parts that the next piece of the answer gives; None where it has ended before."""
        if self.ended:
            return None
        parts = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            parts += self._parser.end()
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        for at, part in enumerate(parts):
            if isinstance(part, CallStart):
                self.calls += 1
            elif isinstance(part, CallEnd) and not self._several_calls:
                parts = parts[: at + 1]
                self.finish_reason, self.stop_reason = "stop", None
                break
        if self.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return parts


async def prepare(service: Service, question: Question, params: SamplingParams) -> Task:
    """Return a question as what can be submitted.

    Raises:
        ApiError: what is asked for contradicts itself, or the model cannot do it.
        InputError: the conversation cannot be made a prompt.
    """
    text, dialect = service.text, service.dialect
    if not dialect.template:
        raise refused(
            "messages",
            "the model has no chat template, so conversations cannot be made prompts; start the server with a "
            "--chat-template, or use /v1/completions",
        )
    _check(question, dialect)
    template = ChatTemplate(
        tokenizer=text.tokenizer,
        takes_images=text.takes_images,
        chat_template=service.chat_template,
        add_generation_prompt=question.add_generation_prompt,
        continue_final_message=question.continue_final_message,
        tools=[_for_template(tool) for tool in question.tools] or None,
        options=_options(question, dialect),
    )
    messages = question.messages
    if "developer" not in dialect.template:  # it is the newer name of the same
        messages = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
    size = sum(_characters(message["content"]) for message in messages)
    if service.engine.info is not None:
        service.check_characters(size, params, service.engine.info.max_model_len)
    prompt = await service.in_reader(size, partial(_render, template, messages))
    whole = question.structured is not None  # it is all of the answer, and leaves no room for thoughts
    thoughts = Thoughts() if whole else dialect.thoughts(prompt["prompt"])
    held_to = question.structured or _held_to(question, dialect, thoughts)
    keep = frozenset(dialect.special) if question.tools or thoughts.form is not None else frozenset()
    return Task(prompt, held_to, keep, question, dialect, thoughts)


def _characters(content: str | Sequence[Mapping[str, Any]]) -> int:
    """Return the characters of a message's texts."""
    if isinstance(content, str):
        return len(content)
    return sum(len(part["text"]) for part in content if part["type"] == "text")


def _check(question: Question, dialect: Dialect) -> None:
    names = [tool.name for tool in question.tools]
    if len(set(names)) < len(names):
        raise refused("tools", f"tools has two of the name {max(names, key=names.count)}; names must differ")
    if question.forced and not names:
        raise refused("tool_choice", "tool_choice asks for a call, but there are no tools; give some")
    if question.choice not in ("auto", "none", "required", *names):
        raise refused("tool_choice", f"tool_choice names {question.choice}; the tools are {', '.join(names)}")
    if question.structured is not None and (names or question.schema is not None):
        other = "tools" if names else question.schema_parameter
        raise refused(
            "structured_outputs",
            f"structured_outputs is all of the answer and contradicts {other}; give one of them, or tool_choice none",
        )
    if names and not dialect.tools:
        raise refused(
            "tools",
            "tools cannot be used: the model's chat template shows no known format of calls; name one by the server's "
            "--tool-call-parser, or leave tools out",
        )
    if names and "tools" not in dialect.template:
        raise refused(
            "tools",
            "tools cannot be used: the model's chat template does not tell it of them; start the server with a "
            "--chat-template that does, or leave tools out",
        )
    if question.effort is not None and "reasoning_effort" not in dialect.template:
        raise refused(
            "reasoning_effort",
            f"reasoning_effort is {shown(question.effort)}, which the chat template does not read; leave it out",
        )


def _options(question: Question, dialect: Dialect) -> dict[str, Any]:
    effort = {} if question.effort is None else {"reasoning_effort": question.effort}
    return {**question.template_options, **effort}


def _for_template(tool: Function) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"strict"})}


def _render(template: ChatTemplate, messages: Messages) -> PromptParts:
    """Return the conversation as a prompt. Templates take the arguments of calls as objects, or else as JSON texts."""
    try:
        return template.prompt([_with_objects(message) for message in messages])
    except InputError:
        if not any(message.get("tool_calls") for message in messages):
            raise
        return template.prompt(messages)


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [{**call, "function": _with_object(call["function"])} for call in calls]}


def _with_object(function: dict[str, Any]) -> dict[str, Any]:
    """Return a called function with its arguments as an object; a text that is none stays as the model wrote it."""
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return function
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function


def _held_to(question: Question, dialect: Dialect, thoughts: Thoughts) -> Mapping[str, Any] | None:
    """Return what holds the answer to the tools and the schema that are asked for."""
    grammar = AnswerGrammar(dialect.special, thoughts)
    tools, several = question.schemas, question.several_calls
    if question.forced:
        return {"grammar": grammar.forced_calls(dialect.tools[0], tools, several=several)}
    if question.schema is not None and question.tools:
        return {"grammar": grammar.json_or_calls(question.schema, dialect.tools[0], tools, several=several)}
    if question.schema is not None:
        return {"json": question.schema} if thoughts.form is None else {"grammar": grammar.json(question.schema)}
    if any(tool.strict for tool in question.tools):
        loose = {tool.name: tool.parameters if tool.strict else {"type": "object"} for tool in question.tools}
        return {"grammar": grammar.free_calls(dialect.tools[0], loose, several=several)}
    return None


def refused(param: str, message: str) -> ApiError:
    """Return the error for a parameter that contradicts another, or cannot be honoured."""
    return ApiError(400, message, param=param, code="invalid_value")


async def submit(service: Service, task: Task, params: SamplingParams, body: SamplingFields) -> Generation:
    """Submit a task.

    Raises:
        ApiError: the answer cannot be held to the tools or the schema.
        InputError: the prompt or the parameters do not fit the model.
    """
    question, held_to = task.question, task.structured_outputs
    try:
        if held_to is not None:
            params = replace(params, structured_outputs=StructuredOutputs(**held_to))
        return await service.submit(
            task.prompt, params, priority=body.priority, timeout=body.timeout, keep_special=task.keep_special
        )
    except InputError as error:
        if question.structured is None and held_to is not None and "structured_outputs" in str(error):
            what = "tools" if question.tools else question.schema_parameter
            raise refused(what, f"{what} cannot be made a grammar of answers: {error}") from error
        raise


def image_url(where: str, url: str) -> str:
    """Return the address of an image if it holds the image itself.

    Raises:
        ApiError: it names a place to read or fetch it from.
    """
    if not url.startswith("data:"):
        raise refused(
            where, f"{where} is {shown(url)}; nothing is fetched: give a data URL, such as data:image/png;base64,..."
        )
    return url


def chat_logprobs(tokens: Sequence[int], known: Sequence[Mapping[int, Logprob]], count: int) -> ChoiceLogprobs:
    """Return the log-probabilities of tokens, each with those of the ``count`` most likely ones."""
    made = []
    for token, found in zip(tokens, known, strict=True):
        ranked = sorted((each for each in found.values() if each.rank <= count), key=lambda each: each.rank)
        top = [TopLogprob(*_told(each)) for each in ranked[:count]]
        made.append(TokenLogprob(*_told(found[token]), top))
    return ChoiceLogprobs(made)


def _told(known: Logprob) -> tuple[str, float, list[int] | None]:
    text = known.decoded_token or ""
    is_part = "\ufffd" in text or not text
    return text, max(known.logprob, -9999.0), None if is_part else list(text.encode())  # JSON has no infinity
