"""``POST /v1/responses``: OpenAI's newer API for the same. Nothing is stored: each request has all that came before."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from msgspec import UNSET
from starlette.responses import Response

from graphmode.engine.outputs import Delta
from graphmode.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from graphmode.serve.answering import Question, Task, chat_logprobs, image_url, prepare, refused, submit
from graphmode.serve.parsing.parts import Arguments, CallEnd, CallStart, Content, Part, Reasoning
from graphmode.serve.protocol import GENERATION_ERRORS, answer, json_response, sampling_params
from graphmode.serve.protocol_chat import Function, TokenLogprob
from graphmode.serve.protocol_responses import (
    ContentPart,
    FunctionCallItem,
    FunctionChoice,
    IncompleteDetails,
    InputTokensDetails,
    Item,
    ItemEvent,
    MessageItem,
    OutputItem,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ResponseBody,
    ResponseEvent,
    ResponsesRequest,
    ResponseUsage,
    TextFormat,
)
from graphmode.serve.service import Generation, Service, get_service
from graphmode.serve.sse import event, event_stream

router = APIRouter(tags=["generation"])

Event = ResponseEvent | ItemEvent


@router.post("/v1/responses", responses=answer(ResponseBody, stream=True) | GENERATION_ERRORS)
async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """Answer a text or a conversation."""
    service = get_service(request)
    model = service.check_model(body.model)
    params = _params(service, body)
    response = _response(body, params, *service.new_name("resp"), model)
    task = await prepare(service, _question(body), params)
    generation = await submit(service, task, params, body)
    maker = _ResponseMaker(body, task, generation, response)
    if body.stream:
        return await event_stream(_encoded(maker))
    async with aclosing(maker.events()) as events:
        async for _ in events:
            pass
    return json_response(maker.response)


async def _encoded(maker: _ResponseMaker) -> AsyncGenerator[bytes, None]:
    async with aclosing(maker.events()) as events:
        async for each in events:
            yield event(each, each.type.encode())


def _params(service: Service, body: ResponsesRequest) -> SamplingParams:
    """Return the sampling parameters.

    Raises:
        ApiError: a parameter contradicts another, or cannot be honoured.
        InputError: one is out of range.
    """
    if body.store:
        raise refused("store", "store is true, but nothing is stored here; set it to false, or leave it out")
    if body.previous_response_id is not None:
        raise refused(
            "previous_response_id",
            "previous_response_id refers to what is stored, and nothing is stored here; give all that came before as "
            "input: the output of a response can be given back",
        )
    for name, harmless in (("n", 1), ("prompt_logprobs", None), ("return_token_ids", False)):
        if getattr(body, name) not in (None, harmless):
            raise refused(name, f"{name} is not for responses, which have one answer; use /v1/chat/completions")
    if body.top_logprobs is not None and not body.include:
        raise refused("top_logprobs", "top_logprobs needs include=['message.output_text.logprobs']")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise refused("top_logprobs", f"top_logprobs is {body.top_logprobs}; it must be from 0 to {MAX_LOGPROBS}")
    logprobs = {"logprobs": body.top_logprobs or 0} if body.include else {}
    return sampling_params(
        body,
        service.text.default_sampling_params(max_tokens=None),
        service.options,
        max_tokens=body.max_output_tokens,
        **logprobs,
    )


def _question(body: ResponsesRequest) -> Question:
    """Return what is asked.

    Raises:
        ApiError: an item or a parameter is none.
    """
    choice = body.tool_choice or "auto"
    form = None if body.text is None else body.text.format
    return Question(
        messages=_messages(body),
        tools=[] if choice == "none" else [Function(**tool.model_dump(exclude={"type"})) for tool in body.tools or ()],
        choice=choice.name if isinstance(choice, FunctionChoice) else choice,
        several_calls=body.parallel_tool_calls is not False,
        schema=_schema(form),
        schema_parameter="text.format",
        structured=body.structured_outputs,
        template_options=body.chat_template_kwargs or {},
        effort=None if body.reasoning is None else body.reasoning.effort,
    )


def _schema(form: TextFormat | None) -> Mapping[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.schema_ is None:
        raise refused("text.format", "text.format is json_schema without a schema; give text.format.schema")
    return form.schema_


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the input as a conversation: what one answer thought, said and called is one message."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    if not items:
        raise refused("input", "input is empty; give a text or items")
    for index, item in enumerate(items):
        where = f"input[{index}]"
        if item.type == "message":
            if item.role is None or item.content is None:
                raise refused(where, f"{where} is a message; it must have role and content")
            content = _content(where, item.content)
            if item.role == "assistant":
                if not isinstance(content, str):
                    raise refused(where, f"{where} is an assistant's message; its parts must be texts")
                _answer_before(messages)["content"] += content
            else:
                messages.append({"role": item.role, "content": content})
        elif item.type == "reasoning":
            thought = _content(where, item.content or item.summary or "")
            _answer_before(messages)["reasoning_content"] = thought
        elif item.type == "function_call":
            if item.call_id is None or item.name is None or item.arguments is None:
                raise refused(where, f"{where} is a function_call; it must have call_id, name and arguments")
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            _answer_before(messages).setdefault("tool_calls", []).append(call)
        else:
            if item.call_id is None or item.output is None:
                raise refused(where, f"{where} is a function_call_output; it must have call_id and output")
            output = _content(where, item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
    return messages


def _answer_before(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant's message at the end of a conversation, which is put there if there is none."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _content(where: str, content: str | Sequence[ContentPart]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    made: list[dict[str, Any]] = []
    for at, part in enumerate(content):
        place = f"{where}.content[{at}]"
        if part.type == "input_image":
            if part.image_url is None:
                raise refused(place, f"{place} is an input_image; it must have image_url")
            made.append({"type": "image_url", "image_url": image_url(f"{place}.image_url", part.image_url)})
        elif part.text is None:
            raise refused(place, f"{place} is of type {part.type}; it must have text")
        else:
            made.append({"type": "text", "text": part.text})
    if all(part["type"] == "text" for part in made):
        return "".join(part["text"] for part in made)
    return made


def _response(body: ResponsesRequest, params: SamplingParams, name: str, created: int, model: str) -> ResponseBody:
    """Return the response before anything has come of it, with what was asked for.

    Raises:
        ApiError: that holds what no UTF-8 text has, so that it could not be sent.
    """
    form = TextFormat() if body.text is None or body.text.format is None else body.text.format
    choice = body.tool_choice or "auto"
    response = ResponseBody(
        id=name,
        created_at=created,
        model=model,
        status="in_progress",
        output=[],
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        tools=[tool.model_dump() for tool in body.tools or ()],
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        text={"format": form.model_dump(by_alias=True, exclude_none=True)},
        reasoning={"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        metadata=body.metadata or {},
        user=body.user,
    )
    try:
        json_response(response)
    except UnicodeEncodeError as error:
        raise refused(
            "input",
            f"the request holds {error.object[error.start]!r}, half of a surrogate pair, which no "
            "UTF-8 text has; decode the text anew, or replace it",
        ) from None
    return response


class _ResponseMaker:
    """Makes a response from an answer as it comes, and the events that tell of it.

    Args:
        body: the request.
        task: its prompt, and how the answer is read.
        generation: the answer.
        response: the response, which grows.
    """

    def __init__(self, body: ResponsesRequest, task: Task, generation: Generation, response: ResponseBody) -> None:
        self.response = response
        self._body = body
        self._generation = generation
        self._reader = task.reader()
        self._item: OutputItem | None = None
        self._number = 0
        self._reasoning_tokens = 0
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text has not come

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield the events; at the end of them the response is whole."""
        reader = self._reader
        async with aclosing(self._generation) as generation:
            async for deltas in generation:
                if not self._number:  # what the engine refuses must fail before the first event
                    yield self._about_all("response.created")
                    yield self._about_all("response.in_progress")
                for delta in deltas:
                    parts = reader.take(delta)
                    if parts is None:
                        continue
                    for each in self._take(delta, parts):
                        yield each
                    if reader.ended and delta.finish_reason is None:
                        generation.end(0)
        complete = reader.finish_reason != "length"
        if not self.response.output:
            for each in self._add(Content("")):
                yield each
        for each in self._close("completed" if complete else "incomplete"):
            yield each
        self._finish(complete)
        yield self._about_all("response.completed" if complete else "response.incomplete")

    def _finish(self, complete: bool) -> None:
        response, used = self.response, self._generation.usage()
        response.status = "completed" if complete else "incomplete"
        response.completed_at = int(time.time()) if complete else None
        response.incomplete_details = None if complete else IncompleteDetails("max_output_tokens")
        cached = 0 if used.prompt_tokens_details is None else used.prompt_tokens_details.cached_tokens
        response.usage = ResponseUsage(
            used.prompt_tokens,
            InputTokensDetails(cached),
            used.completion_tokens,
            OutputTokensDetails(self._reasoning_tokens),
            used.total_tokens,
        )

    def _take(self, delta: Delta, parts: Sequence[Part]) -> Iterator[Event]:
        if self._body.include and delta.logprobs is not None:
            self._logprobs += chat_logprobs(delta.token_ids, delta.logprobs, self._body.top_logprobs or 0).content
        if any(isinstance(part, Reasoning) for part in parts) or (not parts and isinstance(self._item, ReasoningItem)):
            self._reasoning_tokens += len(delta.token_ids)
        for part in parts:
            yield from self._add(part)

    def _add(self, part: Part) -> Iterator[Event]:
        if isinstance(part, CallStart):
            yield from self._open(FunctionCallItem(_new("fc"), part.id, part.name, "", "in_progress"))
        elif isinstance(part, Arguments):
            assert isinstance(self._item, FunctionCallItem)
            self._item.arguments += part.text
            yield self._about("response.function_call_arguments.delta", delta=part.text)
        elif isinstance(part, CallEnd):
            yield from self._close("completed")
        elif isinstance(part, Reasoning):
            if not isinstance(self._item, ReasoningItem):
                yield from self._open(ReasoningItem(_new("rs"), "in_progress", []))
                yield from self._open_part(ReasoningText(""))
            assert isinstance(self._item, ReasoningItem)
            self._item.content[0].text += part.text
            yield self._about("response.reasoning_text.delta", content_index=0, delta=part.text)
        else:
            if not isinstance(self._item, MessageItem):
                yield from self._open(MessageItem(_new("msg"), "in_progress", []))
                yield from self._open_part(OutputText(""))
            assert isinstance(self._item, MessageItem)
            text = self._item.content[0]
            text.text += part.text
            logprobs, self._logprobs = self._logprobs, []
            text.logprobs += logprobs
            yield self._about("response.output_text.delta", content_index=0, delta=part.text, logprobs=logprobs)

    def _open(self, item: OutputItem) -> Iterator[Event]:
        yield from self._close("completed")
        if not isinstance(item, MessageItem):
            self._logprobs = []  # there are none for calls and thoughts
        self._item = item
        self.response.output.append(item)
        yield self._about("response.output_item.added", item=item, item_id=UNSET)

    def _open_part(self, part: OutputText | ReasoningText) -> Iterator[Event]:
        yield self._about("response.content_part.added", content_index=0, part=part)
        assert isinstance(self._item, MessageItem | ReasoningItem)
        self._item.content.append(part)  # type: ignore[arg-type]

    def _close(self, status: str) -> Iterator[Event]:
        """End the item that is open, if there is one."""
        item = self._item
        if item is None:
            return
        if isinstance(item, FunctionCallItem):
            yield self._about("response.function_call_arguments.done", name=item.name, arguments=item.arguments)
        else:
            part = item.content[0]
            if isinstance(part, OutputText):
                yield self._about("response.output_text.done", content_index=0, text=part.text, logprobs=part.logprobs)
            else:
                yield self._about("response.reasoning_text.done", content_index=0, text=part.text)
            yield self._about("response.content_part.done", content_index=0, part=part)
        item.status = status
        yield self._about("response.output_item.done", item=item, item_id=UNSET)
        self._item = None

    def _about(self, kind: str, **fields: Any) -> ItemEvent:
        assert self._item is not None
        fields = {"item_id": self._item.id, **fields}
        return ItemEvent(kind, self._next(), len(self.response.output) - 1, **fields)

    def _about_all(self, kind: str) -> ResponseEvent:
        return ResponseEvent(kind, self._next(), self.response)

    def _next(self) -> int:
        self._number += 1
        return self._number - 1


def _new(kind: str) -> str:
    return f"{kind}_{uuid4().hex}"
