"""``POST /v1/chat/completions``: the next message of a conversation, as OpenAI's API has it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from graphmode.engine import outputs
from graphmode.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from graphmode.serve.answering import (
    Question,
    Task,
    chat_logprobs,
    image_url,
    prepare,
    refused,
    submit,
)
from graphmode.serve.parsing.parts import Arguments, CallStart, Content, Part, Reasoning
from graphmode.serve.protocol import GENERATION_ERRORS, StreamOptions, Usage, answer, json_response, sampling_params
from graphmode.serve.protocol_chat import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    FunctionCall,
    Message,
    NamedTool,
    ToolCall,
)
from graphmode.serve.protocol_chat import Part as MessagePart
from graphmode.serve.service import Generation, Service, get_service
from graphmode.serve.sse import DONE, event, event_stream

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", responses=answer(ChatCompletion, stream=True) | GENERATION_ERRORS)
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    service = get_service(request)
    model = service.check_model(body.model)
    params = _params(service, body)
    task = await prepare(service, _question(body), params)
    generation = await submit(service, task, params, body)
    name, created = service.new_name("chatcmpl")
    asked = _Asked(body, name, created, model, task)
    if body.stream:
        return await event_stream(_events(asked, generation))
    chunks: list[list[ChunkChoice]] = [[] for _ in range(params.n)]
    async with aclosing(_chunks(asked, generation)) as news:
        async for choices in news:
            for choice in choices:
                chunks[choice.index].append(choice)
    whole = [_joined(index, each) for index, each in enumerate(chunks)]
    completion = ChatCompletion(name, "chat.completion", created, model, whole, generation.usage())
    if body.return_token_ids:
        completion.prompt_token_ids = list(generation.request.prompt_token_ids)
    if params.prompt_logprobs is not None:
        completion.prompt_logprobs = generation.active.output().prompt_logprobs  # type: ignore[assignment]
    return json_response(completion)


@dataclass(frozen=True)
class _Asked:
    """What is asked for.

    Attributes:
        body: the request.
        name: of the answer.
        created: when, in seconds since 1970.
        model: its name in the answer.
        task: the prompt, and how answers are read.
    """

    body: ChatRequest
    name: str
    created: int
    model: str
    task: Task

    def chunk(self, choices: list[ChunkChoice], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        """Return an event."""
        return ChatCompletionChunk(self.name, "chat.completion.chunk", self.created, self.model, choices, usage)


def _params(service: Service, body: ChatRequest) -> SamplingParams:
    """Return the sampling parameters.

    Raises:
        ApiError: a parameter contradicts another, or cannot be honoured.
        InputError: one is out of range.
    """
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options", "stream_options is for streams; set stream to true, or leave it out")
    if body.stream and body.prompt_logprobs is not None:
        raise refused("prompt_logprobs", "prompt_logprobs comes with whole answers; set stream to false")
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("top_logprobs", f"top_logprobs is {body.top_logprobs}; it needs logprobs=true")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise refused("top_logprobs", f"top_logprobs is {body.top_logprobs}; it must be from 0 to {MAX_LOGPROBS}")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise refused(
            "max_tokens",
            f"max_tokens is {body.max_tokens} and max_completion_tokens is {body.max_completion_tokens}; they are one "
            "parameter: give the second alone",
        )
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    ours = body.model_copy(update={"logprobs": logprobs, "max_tokens": most})
    return sampling_params(ours, service.text.default_sampling_params(max_tokens=None), service.options)


def _question(body: ChatRequest) -> Question:
    """Return what is asked.

    Raises:
        ApiError: a message or a parameter is none.
    """
    choice = body.tool_choice or "auto"
    begins = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    if body.continue_final_message and (begins or body.messages[-1].role != "assistant"):
        raise refused(
            "continue_final_message",
            "continue_final_message is true, which goes on with the last message: that must be an assistant's, and "
            "add_generation_prompt must not be true",
        )
    return Question(
        messages=[_message(f"messages[{index}]", message) for index, message in enumerate(body.messages)],
        tools=[] if choice == "none" else [tool.function for tool in body.tools or ()],
        choice=choice.function.name if isinstance(choice, NamedTool) else choice,
        several_calls=body.parallel_tool_calls is not False,
        schema=_schema(body),
        structured=body.structured_outputs,
        template_options=body.chat_template_kwargs or {},
        add_generation_prompt=begins,
        continue_final_message=body.continue_final_message,
        effort=body.reasoning_effort,
    )


def _schema(body: ChatRequest) -> Mapping[str, Any] | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise refused("response_format", "response_format is json_schema without a schema; give json_schema.schema")
    return form.json_schema.schema_


def _message(where: str, message: Message) -> dict[str, Any]:
    """Return a message as chat templates take it."""
    made: dict[str, Any] = {"role": message.role, "content": _content(where, message)}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_calls:
        made["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    thought = message.reasoning_content if message.reasoning is None else message.reasoning
    if thought is not None:
        made["reasoning_content"] = thought
    for field, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
        if field in made and message.role != role:
            raise refused(f"{where}.{field}", f"{where} has {field}, which only messages of the role {role} have")
    if message.role == "tool" and message.tool_call_id is None:
        raise refused(f"{where}.tool_call_id", f"{where} has no tool_call_id; give the id of the call that it answers")
    return made


def _content(where: str, message: Message) -> str | list[dict[str, Any]]:
    content = message.content
    if content is None:
        if message.role != "assistant" or not message.tool_calls:
            raise refused(f"{where}.content", f"{where} has no content; give a text")
        return ""
    if isinstance(content, str):
        return content
    return [_part(f"{where}.content[{at}]", part) for at, part in enumerate(content)]


def _part(where: str, part: MessagePart) -> dict[str, Any]:
    value = part.text if part.type == "text" else part.image_url
    if value is None or (part.text is not None and part.image_url is not None):
        raise refused(where, f"{where} is of type {part.type}; it must have {part.type} and nothing else")
    if isinstance(value, str) and part.type == "text":
        return {"type": "text", "text": value}
    url = value if isinstance(value, str) else value.url
    return {"type": "image_url", "image_url": image_url(f"{where}.image_url", url)}


class _ChunkMaker:
    """Makes the events of one answer.

    Args:
        asked: what is asked for.
        generation: the answers as they come.
        index: of the answer.
    """

    def __init__(self, asked: _Asked, generation: Generation, index: int) -> None:
        self._body = asked.body
        self._generation = generation
        self._index = index
        self._reader = asked.task.reader()
        self._begun = False
        self._calls = -1
        options = asked.body.stream_options or StreamOptions()
        self._tells_tokens = asked.body.logprobs or asked.body.return_token_ids or options.continuous_usage_stats

    def chunk(self, new: outputs.Delta) -> ChunkChoice | None:
        """Return what is new of the answer for its client; None where nothing is."""
        reader, body = self._reader, self._body
        parts = reader.take(new)
        if parts is None:
            return None
        ended = reader.ended
        if ended and new.finish_reason is None:
            self._generation.end(self._index)
        if not (parts or ended or self._tells_tokens or not self._begun):
            return None
        delta = self._delta(parts)
        if not self._begun:
            delta.role, self._begun = "assistant", True
            delta.content = "" if delta.content is UNSET else delta.content
        chunk = ChunkChoice(self._index, delta, None, reader.finish_reason)
        if body.logprobs:
            chunk.logprobs = chat_logprobs(new.token_ids, new.logprobs or (), body.top_logprobs or 0)
        if body.return_token_ids:
            chunk.token_ids = new.token_ids
        if ended:
            chunk.stop_reason = reader.stop_reason
        return chunk

    def _delta(self, parts: Sequence[Part]) -> Delta:
        if len(parts) == 1 and isinstance(parts[0], Content):  # what most events are
            return Delta(content=parts[0].text)
        texts: dict[type[Part], str] = {}
        calls: list[ToolCall] = []
        for part in parts:
            if isinstance(part, CallStart):
                self._calls += 1
                calls.append(ToolCall(FunctionCall("", part.name), part.id, "function", self._calls))
            elif isinstance(part, Arguments):
                if not calls:
                    calls.append(ToolCall(FunctionCall(""), index=self._calls))
                calls[-1].function.arguments += part.text
            elif isinstance(part, Content | Reasoning):
                texts[type(part)] = texts.get(type(part), "") + part.text
        thought = texts.get(Reasoning, UNSET)
        return Delta(
            content=texts.get(Content, UNSET),
            tool_calls=calls or UNSET,
            reasoning_content=thought,
            reasoning=thought,
        )


def _joined(index: int, chunks: Sequence[ChunkChoice]) -> Choice:
    """Return all events of an answer as one."""
    deltas = [chunk.delta for chunk in chunks]
    calls: list[ToolCall] = []
    for delta in deltas:
        for call in delta.tool_calls or ():
            if call.id is not UNSET:
                calls.append(ToolCall(call.function, call.id, call.type))
            else:
                calls[-1].function.arguments += call.function.arguments
    text = "".join(delta.content or "" for delta in deltas)
    message = AnswerMessage("assistant", text if text or not calls else None, tool_calls=calls or UNSET)
    if any(delta.reasoning for delta in deltas):
        message.reasoning = message.reasoning_content = "".join(delta.reasoning or "" for delta in deltas)
    known = [each for chunk in chunks if chunk.logprobs for each in chunk.logprobs.content]
    last = chunks[-1]
    choice = Choice(index, message, None, last.finish_reason or "abort", last.stop_reason or None)
    if any(chunk.logprobs for chunk in chunks):
        choice.logprobs = ChoiceLogprobs(known)
    if last.token_ids is not UNSET:
        choice.token_ids = [token for chunk in chunks for token in chunk.token_ids or ()]
    return choice


async def _events(asked: _Asked, generation: Generation) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream."""
    options = asked.body.stream_options or StreamOptions()
    nothing = None if options.include_usage else UNSET
    first = True
    async with aclosing(_chunks(asked, generation)) as chunks:
        async for choices in chunks:
            used = generation.usage() if options.continuous_usage_stats else nothing
            chunk = asked.chunk(choices, used)
            if first and asked.body.return_token_ids:
                chunk.prompt_token_ids = list(generation.request.prompt_token_ids)
            first = False
            yield event(chunk)
    if options.include_usage:
        yield event(asked.chunk([], generation.usage()))
    yield DONE


async def _chunks(asked: _Asked, generation: Generation) -> AsyncGenerator[list[ChunkChoice], None]:
    """Yield what is new of all answers."""
    makers = [_ChunkMaker(asked, generation, index) for index in range(generation.request.params.n)]
    async with aclosing(generation):
        async for deltas in generation:
            made = [makers[delta.index].chunk(delta) for delta in deltas]
            if choices := [choice for choice in made if choice is not None]:
                yield choices
