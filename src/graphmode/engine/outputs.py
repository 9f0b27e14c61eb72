"""What a request returns, in the shape that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: its number among the completions of its request.
        text: the text that the token ids stand for; empty where the model has no tokenizer.
        token_ids: the generated tokens, with the end-of-text token where there is one.
        finish_reason: ``stop`` (end of text), ``length`` (``max_tokens`` or the model's limit); None while it runs.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None


@dataclass
class RequestOutput:
    """A request and its completions.

    Attributes:
        request_id: its number, in the order of submission.
        prompt: the prompt's text; None where it was given as token ids.
        prompt_token_ids: the prompt's tokens.
        outputs: its completions.
        finished: whether all of them are complete.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
