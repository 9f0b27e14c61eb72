"""Requests and answers of ``/v1/responses``, in OpenAI's shapes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field

from graphmode.serve.protocol import SamplingFields, Strict
from graphmode.serve.protocol_chat import NO_EFFECT, TokenLogprob

LOGPROBS = "message.output_text.logprobs"


class ContentPart(Strict):
    """A part of a message, or of a thought."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text", "input_image"]
    text: str | None = None
    image_url: str | None = Field(default=None, description="A data URL: no other address is read.")
    detail: Literal["auto", "low", "high", "original"] | None = None
    file_id: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    logprobs: list[Any] | None = Field(default=None, description="Of an answer, which may be given back; not read.")


class Item(Strict):
    """A message, a call, its result or a thought. What an answer holds is taken here too."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None
    encrypted_content: None = None
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: str | None = None
    namespace: None = None


class FunctionTool(Strict):
    """A function that can be called."""

    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="The JSON schema of its arguments.")
    strict: bool | None = Field(default=None, description="Arguments are always such as the schema allows.")


class FunctionChoice(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(Strict):
    """What the answer is: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="Of no effect: every answer is held to its schema.")


class TextOptions(Strict):
    """How the answer is written."""

    format: TextFormat | None = None


class ReasoningOptions(Strict):
    """How much is thought."""

    effort: str | None = Field(
        default=None, description="For a chat template that reads reasoning_effort; else refused."
    )


class ResponsesRequest(SamplingFields):
    """A request for a response. Nothing is stored: each request has all that came before."""

    input: str | list[Item] = Field(description="A text, or what has been said and called so far.")
    model: str | None = Field(default=None, description="The served model; default: the one that there is.")
    instructions: str | None = Field(default=None, description="A system message before the input.")
    max_output_tokens: int | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="If false, an answer has one call at most.")
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: int | None = Field(default=None, description="The most likely tokens, with include. 20 at most.")
    include: list[Literal["message.output_text.logprobs"]] | None = None
    stream: bool | None = Field(default=None, description="Send the response in server-sent events as it comes.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="What else the chat template reads, such as enable_thinking."
    )
    store: bool | None = Field(default=None, description="Nothing is stored: it may be false.")
    previous_response_id: str | None = Field(default=None, description="Nothing is stored: it may be null.")
    truncation: Literal["disabled"] | None = Field(default=None, description="Input that is too long is refused.")
    background: Literal[False] | None = Field(default=None, description="Responses are made while you wait.")
    metadata: dict[str, str] | None = Field(default=None, description=NO_EFFECT)
    safety_identifier: str | None = Field(default=None, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(default=None, description=NO_EFFECT)
    service_tier: Literal["auto", "default"] | None = Field(default=None, description=NO_EFFECT)


class OutputText(msgspec.Struct, tag="output_text"):
    """A text of a message."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(msgspec.Struct, tag="reasoning_text"):
    """A text of a thought."""

    text: str


class MessageItem(msgspec.Struct, tag="message"):
    """What is said."""

    id: str
    status: str
    content: list[OutputText]
    role: str = "assistant"


class FunctionCallItem(msgspec.Struct, tag="function_call"):
    """A call."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str


class ReasoningItem(msgspec.Struct, tag="reasoning"):
    """What is thought."""

    id: str
    status: str
    content: list[ReasoningText]
    summary: list[Any] = []


OutputItem = MessageItem | FunctionCallItem | ReasoningItem


class IncompleteDetails(msgspec.Struct):
    """Why a response is incomplete."""

    reason: str


class InputTokensDetails(msgspec.Struct):
    """Of the input's tokens, those whose keys and values were cached."""

    cached_tokens: int


class OutputTokensDetails(msgspec.Struct):
    """Of the output's tokens, those of thoughts, as far as events tell them apart."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    """The tokens that a response took."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseBody(msgspec.Struct):
    """A response: complete, or as far as it has come."""

    id: str
    created_at: int
    model: str
    status: str
    output: list[OutputItem]
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    tools: list[Any]
    tool_choice: Any
    parallel_tool_calls: bool
    text: Any
    reasoning: Any
    metadata: dict[str, str]
    object: str = "response"
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None
    previous_response_id: None = None
    store: bool = False
    truncation: str = "disabled"
    background: bool = False
    user: str | None = None
    completed_at: int | None = None


class ResponseEvent(msgspec.Struct):
    """An event about the whole response."""

    type: str
    sequence_number: int
    response: ResponseBody


class ItemEvent(msgspec.Struct):
    """An event about what the response holds. Its type decides which fields it has, as in OpenAI's API."""

    type: str
    sequence_number: int
    output_index: int
    item: OutputItem | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET
