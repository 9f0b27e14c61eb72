"""What requests and answers of several routes share.

Bodies of requests are pydantic models that take what they name and nothing else, each value of its own type. Answers
are msgspec structs, since they are made for every event of a stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from graphmode.engine import checks
from graphmode.engine.option_text import descriptions
from graphmode.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from graphmode.serve.errors import ApiError
from graphmode.serve.options import ServeOptions

_DESCRIPTIONS = descriptions(SamplingParams)
_SAMPLING = [each.name for each in fields(SamplingParams)]
_encode = msgspec.json.Encoder().encode


def _describe(schema: dict[str, Any]) -> None:
    for name, entry in schema.get("properties", {}).items():
        if name in _DESCRIPTIONS:
            entry.setdefault("description", _DESCRIPTIONS[name])


class Strict(BaseModel):
    """A body, or a part of one: parameters that it does not name are refused, and so are values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_describe)


class SamplingFields(Strict):
    """The parameters of every request that generates: OpenAI's, and all others of SamplingParams by their names.

    What is left out, or null, is what the model's generation_config.json asks for, else the parameter's default.
    """

    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = Field(default=None, description="Taken, as OpenAI does, and of no effect.")
    # Those that OpenAI does not have.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: str | list[str] | None = None
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    skip_reading_prefix_cache: bool | None = None
    priority: int = Field(
        default=0, description="Requests of a lower number run first; first come, first served among equals."
    )
    timeout: float | None = Field(
        default=None, description="Seconds after which the request fails with deadline_exceeded."
    )
    return_token_ids: bool = Field(default=False, description="Answers have token_ids, and the first prompt_token_ids.")


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: bool = Field(default=False, description="A last event has the usage of the whole request.")
    continuous_usage_stats: bool = Field(default=False, description="Every event has the usage so far.")


class CachedTokens(msgspec.Struct):
    """Tokens of a prompt whose keys and values were cached."""

    cached_tokens: int


class GenerationHead(msgspec.Struct, gc=False):
    """What every answer of completions and of chat completions begins with, whole or an event of it."""

    id: str
    object: str
    created: int
    model: str


class Usage(msgspec.Struct, omit_defaults=True):
    """The tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """Return the usage of a request."""
    total = prompt_tokens + completion_tokens
    return Usage(prompt_tokens, completion_tokens, total, CachedTokens(cached_tokens))


def total_usage(parts: Iterable[Usage]) -> Usage:
    """Return the usage of several prompts together."""
    prompt = completion = cached = 0
    for part in parts:
        prompt += part.prompt_tokens
        completion += part.completion_tokens
        cached += part.prompt_tokens_details.cached_tokens if part.prompt_tokens_details else 0
    return usage(prompt, completion, cached)


def json_response(content: object, status: int = 200) -> Response:
    """Return an answer with what msgspec makes JSON of."""
    return Response(_encode(content), status, media_type="application/json")


def sampling_params(
    body: SamplingFields, defaults: SamplingParams, options: ServeOptions, **others: Any
) -> SamplingParams:
    """Return the sampling parameters that a request asks for.

    Args:
        body: the request.
        defaults: those of requests that say nothing.
        options: the server's, for its limits.
        **others: parameters that the route has read itself, by any name that SamplingParams takes; None leaves one out.

    Raises:
        InputError: one is out of range.
        ApiError: one is beyond what the server allows.
    """
    given = {name: getattr(body, name) for name in _SAMPLING if getattr(body, name, None) is not None}
    given |= {name: value for name, value in others.items() if value is not None}
    if given.get("n", 1) > options.max_answers:
        raise ApiError(
            400,
            f"n is {given['n']}; it may be at most {options.max_answers} here. Send several requests",
            param="n",
            code="invalid_value",
        )
    for name in ("logprobs", "prompt_logprobs"):
        if not 0 <= given.get(name, 0) <= MAX_LOGPROBS:
            raise ApiError(
                400,
                f"{name} is {given[name]}; it must be an integer from 0 to {MAX_LOGPROBS}",
                param=name,
                code="invalid_value",
            )
    # Defaults of the model do not contradict what is asked for: a least length may be above the model's most.
    if "max_tokens" not in given and given.get("min_tokens", 0) > (defaults.max_tokens or checks.LARGEST):
        given["max_tokens"] = given["min_tokens"]
    merged = {name: getattr(defaults, name) for name in _SAMPLING} | given
    return SamplingParams(
        **{name: value for name, value in merged.items() if value is not None or name == "max_tokens"}
    )


def check_seconds(name: str, seconds: float | None) -> float | None:
    """Return a time that a request may take.

    Raises:
        InputError: it is no positive number.
    """
    return None if seconds is None else checks.number(name, seconds, above=0)


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


_STATUSES = {
    400: "A parameter is not known, malformed or out of range, or the body is not JSON.",
    401: "The API key is missing or wrong.",
    404: "The model is not served here.",
    408: "The body has not come.",
    413: "The body is too large.",
    429: "Too many requests wait; Retry-After says when to try again.",
    500: "The server has failed at this request.",
    503: "The engine does not run, or the server is shutting down.",
    504: "The request took longer than it may.",
}

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """Return the description of a route's errors."""
    return {status: {"model": ErrorBody, "description": _STATUSES[status]} for status in statuses}


GENERATION_ERRORS = errors(400, 401, 404, 408, 413, 429, 500, 503, 504)


def answer(type_: type, *, stream: bool = False) -> Responses:
    """Return the description of a route's answer.

    Args:
        type_: what msgspec makes JSON of.
        stream: whether it may also come as events of that type.
    """
    named = msgspec.json.schema(type_)
    content = {"application/json": {"schema": _inlined(named, named.get("$defs", {}))}}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {200: {"description": "The answer.", "content": content}}


def _inlined(schema: Any, named: dict[str, Any]) -> Any:
    """Return a schema in one piece: an OpenAPI page has other places for named parts."""
    if isinstance(schema, list):
        return [_inlined(each, named) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(named[schema["$ref"].rpartition("/")[2]], named)
    return {name: _inlined(each, named) for name, each in schema.items() if name != "$defs"}
