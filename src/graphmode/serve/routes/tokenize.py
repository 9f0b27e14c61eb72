"""``/tokenize`` and ``/detokenize``: texts and conversations to tokens, and tokens to text, in vLLM's shapes."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from graphmode.engine.chat import ChatTemplate
from graphmode.errors import InputError
from graphmode.serve.errors import ApiError
from graphmode.serve.protocol import Strict, answer, errors, json_response
from graphmode.serve.service import Service, get_service

router = APIRouter(tags=["tokens"])


class TokenizeRequest(Strict):
    """A text, or a conversation that the chat template makes a text of."""

    model: str | None = Field(default=None, description="The served model; default: the one that there is.")
    prompt: str | None = Field(default=None, description="A text; or")
    messages: list[dict[str, Any]] | None = Field(default=None, description="a conversation.")
    add_special_tokens: bool | None = Field(
        default=None,
        description="The tokenizer adds its tokens. Default: to a text; a chat template writes them itself.",
    )
    return_token_strs: bool | None = Field(default=None, description="The answer has the tokens' texts too.")
    add_generation_prompt: bool = Field(
        default=True, description="The conversation ends with the beginning of an answer."
    )
    continue_final_message: bool = Field(default=False, description="The last message is left open.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="What else the template reads.")
    tools: list[dict[str, Any]] | None = Field(default=None, description="Tools that the template may name.")


class Tokens(msgspec.Struct):
    """Tokens.

    Attributes:
        max_model_len: tokens of a prompt and its answer together; null until the engine is ready.
        token_strs: the tokens' texts; null where they were not asked for.
    """

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    """Tokens to make a text of."""

    model: str | None = Field(default=None, description="The served model; default: the one that there is.")
    tokens: list[int]


class Text(msgspec.Struct):
    """A text."""

    prompt: str


@router.post("/tokenize", responses=answer(Tokens) | errors(400, 401, 404, 408, 413, 500))
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Return the tokens of a text, or of a conversation."""
    service = get_service(request)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give prompt or messages, one of the two", param="prompt", code="invalid_value")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        tokens = await service.tokenize(body.prompt, add_special_tokens=special)
    else:
        text = _rendered(service, body)
        tokens = await service.tokenize(text, add_special_tokens=bool(body.add_special_tokens))
    info, tokenizer = service.engine.info, service.text.tokenizer
    texts = None
    if body.return_token_strs and tokenizer is not None:
        texts = [str(tokenizer.convert_ids_to_tokens(token)) for token in tokens]
    return json_response(Tokens(len(tokens), None if info is None else info.max_model_len, tokens, texts))


def _rendered(service: Service, body: TokenizeRequest) -> str:
    template = ChatTemplate(
        tokenizer=service.text.tokenizer,
        takes_images=service.text.takes_images,
        chat_template=service.chat_template,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        tools=body.tools,
        options=body.chat_template_kwargs or {},
    )
    if not body.messages:
        raise InputError("messages is []; it must be a list of messages, and not empty")
    return template.prompt(body.messages)["prompt"]


@router.post("/detokenize", responses=answer(Text) | errors(400, 401, 404, 408, 413, 500))
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Return the text of tokens."""
    service = get_service(request)
    service.check_model(body.model)
    tokenizer = service.text.tokenizer
    if tokenizer is None:
        raise InputError("the model comes without a tokenizer, so its tokens have no text")
    size = len(tokenizer)
    for token in body.tokens:
        if not 0 <= token < size:
            raise InputError(f"tokens holds {token}; the tokenizer's ids are 0 to {size - 1}")
    detokenizer = service.text.detokenizer
    assert detokenizer is not None
    return json_response(Text(await service.in_reader(len(body.tokens), partial(detokenizer.decode, body.tokens))))
