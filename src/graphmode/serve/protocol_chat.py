"""Requests and answers of ``/v1/chat/completions``, in OpenAI's shapes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field

from graphmode.engine.outputs import Logprob
from graphmode.serve.protocol import GenerationHead, SamplingFields, StreamOptions, Strict, Usage

NO_EFFECT = "Taken, as OpenAI does, and of no effect on the answer."


class ImageUrl(Strict):
    """An image."""

    url: str = Field(description="A data URL (data:image/png;base64,...): no other address is read.")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        default=None,
        description="Taken, and of no effect: images have the resolution that the model's processor gives.",
    )


class Part(Strict):
    """A part of a message: a text, or an image where the model takes them."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | str | None = None


class CalledFunction(Strict):
    """The function that a call names."""

    name: str
    arguments: str = Field(description="A JSON text.")


class Call(Strict):
    """A call that an answer has made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    """A message of a conversation. What an answer's message has is taken here too."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = Field(default=None, description="Of an assistant's message.")
    tool_call_id: str | None = Field(default=None, description="Of a tool's message: the call that it answers.")
    reasoning_content: str | None = Field(default=None, description="What the assistant thought before it answered.")
    reasoning: str | None = Field(default=None, description="Another name of reasoning_content.")
    refusal: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None


class Function(Strict):
    """What can be called."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="The JSON schema of its arguments.")
    strict: bool | None = Field(default=None, description="Arguments are always such as the schema allows.")


class Tool(Strict):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A schema with a name."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="Of no effect: every answer is held to its schema.")


class ResponseFormat(Strict):
    """What the answer is: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(SamplingFields):
    """A request for the next message of a conversation."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = Field(default=None, description="The served model; default: the one that there is.")
    max_completion_tokens: int | None = None
    max_tokens: int | None = Field(default=None, description="Another name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, description="With logprobs: the most likely tokens, 20 at most.")
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="If false, an answer has one call at most.")
    stream: bool | None = Field(default=None, description="Send the answer in server-sent events as it comes.")
    stream_options: StreamOptions | None = None
    add_generation_prompt: bool | None = Field(
        default=None, description="The prompt ends with the beginning of an answer; default: unless it continues one."
    )
    continue_final_message: bool = Field(default=False, description="The answer continues the last message.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="What else the chat template reads, such as enable_thinking."
    )
    reasoning_effort: str | None = Field(default=None, description="For a chat template that reads it; else refused.")
    metadata: dict[str, str] | None = Field(default=None, description=NO_EFFECT)
    safety_identifier: str | None = Field(default=None, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(default=None, description=NO_EFFECT)
    service_tier: Literal["auto", "default"] | None = Field(default=None, description=NO_EFFECT)
    modalities: list[Literal["text"]] | None = Field(default=None, description="Answers are text.")
    store: Literal[False] | None = Field(default=None, description="Nothing is stored: it may be false.")


class FunctionCall(msgspec.Struct):
    """What is called, or what is new of it: its name comes once, its arguments in pieces of a JSON text."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct):
    """A call, or what is new of it: in events it has an index, and name and identifier once."""

    function: FunctionCall
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    index: int | UnsetType = UNSET


class AnswerMessage(msgspec.Struct):
    """A message that is the answer.

    Attributes:
        content: what it says; None where it only calls tools.
        reasoning_content: what was thought before.
        reasoning: the same, by its newer name.
    """

    role: str
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class Delta(msgspec.Struct):
    """What is new of a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """How likely a token was.

    Attributes:
        token: its text alone.
        logprob: the natural logarithm of its probability.
        bytes: of its text; None where it is only a part of a character, or has no text.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    """The same of a token of the answer, with the most likely ones in its place."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct):
    """The log-probabilities of all tokens of an answer, also of those that call tools or think."""

    content: list[TokenLogprob]
    refusal: None = None


class Choice(msgspec.Struct):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """What is new of one answer."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


PromptLogprobs = list[dict[int, Logprob] | None]


class ChatCompletion(GenerationHead):
    """The answers to a conversation."""

    choices: list[Choice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(GenerationHead):
    """An event of the answers to a conversation.

    Attributes:
        usage: of the whole request; null in events before the last where it was asked for.
    """

    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
