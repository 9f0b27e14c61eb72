"""Conversations: messages as prompts, by the chat template of the model's tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from graphmode.engine import checks
from graphmode.engine.prompts import PromptParts
from graphmode.errors import InputError

Message = Mapping[str, Any]
Conversation = Sequence[Message]

# What a part of a message may be, and the kind of medium that it holds.
_MEDIA = {"image": "image", "image_pil": "image", "image_url": "image", "video": "video"}
_PARTS = ("text", *_MEDIA)
# What apply_chat_template takes for itself; graphmode sets it.
_NOT_FOR_TEMPLATES = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
    *("documents", "kwargs"),  # for the template
    "sanitize_control_tokens",  # for the user, since 5.24
}


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How conversations become prompts.

    Attributes:
        tokenizer: the model's; None where it comes without one.
        takes_images: whether the model does; its template then reads the parts of a message itself.
        chat_template: Jinja text instead of the tokenizer's template.
        add_generation_prompt: whether the prompt ends with the beginning of an answer.
        continue_final_message: whether the answer continues the last message, which is left open.
        tools: JSON schemas, or functions with types and docstrings, that the template may name.
        options: what else the template reads, by name.
    """

    tokenizer: PreTrainedTokenizerBase | None
    takes_images: bool
    chat_template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise InputError(
                "the model comes without a tokenizer, so it has no chat template; use generate with tokens"
            )
        if self.chat_template is not None:
            checks.text("chat_template", self.chat_template)
        elif not self.tokenizer.chat_template:
            raise InputError("the model's tokenizer has no chat template; give one as chat_template, or use generate")
        checks.flag("add_generation_prompt", self.add_generation_prompt)
        checks.flag("continue_final_message", self.continue_final_message)
        if self.add_generation_prompt and self.continue_final_message:
            raise InputError(
                "continue_final_message=True goes on with the last message and add_generation_prompt=True begins a new "
                "one; set add_generation_prompt=False"
            )
        if self.tools is not None and not (
            isinstance(self.tools, (list, tuple))
            and all(isinstance(tool, Mapping) or callable(tool) for tool in self.tools)
        ):
            raise checks.unfit("tools", self.tools, "a list of JSON schemas (dicts) or functions, or None")
        if not isinstance(self.options, Mapping) or not all(isinstance(name, str) for name in self.options):
            raise checks.unfit("chat_template_kwargs", self.options, "a dict of what the template reads, by name")
        if taken := sorted(self.options.keys() & _NOT_FOR_TEMPLATES):
            raise InputError(f"chat_template_kwargs holds {', '.join(taken)}, which the template does not read")

    def prompt(self, conversation: Conversation) -> PromptParts:
        """Return a conversation as a prompt.

        Raises:
            InputError: a message is malformed, or the template refuses the conversation.
        """
        media: dict[str, list[Any]] = {}
        messages = [self._message(index, message, media) for index, message in enumerate(conversation)]
        assert self.tokenizer is not None
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=None if self.tools is None else list(self.tools),
                chat_template=self.chat_template,
                add_generation_prompt=self.add_generation_prompt,
                continue_final_message=self.continue_final_message,
                tokenize=False,
                **self.options,
            )
        # A template is a program of the model's: what it raises on messages that it does not expect can be anything.
        except Exception as error:
            raise InputError(
                f"the chat template cannot render the conversation: {type(error).__name__}: {error}; give "
                "messages such as it expects, or another chat_template"
            ) from error
        prompt = PromptParts(prompt=checks.text("the rendered conversation", text))
        if media:
            prompt["multi_modal_data"] = media
        if "video" not in media:  # a video's frames are written into the text by the model's processor
            # The template has written the special tokens.
            prompt["prompt_token_ids"] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return prompt

    def _message(self, index: int, message: Any, media: dict[str, list[Any]]) -> dict[str, Any]:
        """Return a message for the template, and note its images and videos."""
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise checks.unfit(where, message, "a dict such as {'role': 'user', 'content': 'a text'}")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise InputError(f"{where} is {checks.shown(dict(message))}; it must have a 'role', such as 'user'")
        content = message.get("content")
        if content is None:  # of a message that only calls tools, for example
            if not message.keys() - {"role", "content"}:
                raise InputError(f"{where} has no 'content'; give a text")
            return dict(message)
        if isinstance(content, str):
            return {**message, "content": checks.text(f"{where}['content']", content)}
        if not isinstance(content, (list, tuple)):
            raise checks.unfit(f"{where}['content']", content, "a text or a list of parts")
        parts = [self._part(f"{where}['content'][{at}]", part, media) for at, part in enumerate(content)]
        if self.takes_images:
            return {**message, "content": parts}
        # Templates of text take texts.
        return {**message, "content": "\n".join(part["text"] for part in parts)}

    def _part(self, where: str, part: Any, media: dict[str, list[Any]]) -> dict[str, Any]:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _PARTS or kind not in part:
            raise checks.unfit(where, part, f"a text or a dict with a 'type' and what it names: {', '.join(_PARTS)}")
        if kind == "text":
            return {**part, "text": checks.text(f"{where}['text']", part["text"])}
        if not self.takes_images:
            raise InputError(f"{where} is {_MEDIA[kind]}, but the model takes text alone")
        medium = part[kind]
        if kind == "image_url" and isinstance(medium, Mapping):
            medium = medium.get("url")
        media.setdefault(_MEDIA[kind], []).append(medium)
        return {"type": _MEDIA[kind]}


def conversations(messages: object) -> list[Conversation]:
    """Return one conversation, or a list of them, as a list.

    Raises:
        InputError: it is neither.
    """
    allowed = "a list of messages such as {'role': 'user', 'content': 'a text'}, or a list of such lists"
    if not isinstance(messages, (list, tuple)) or not messages:
        raise checks.unfit("messages", messages, allowed)
    given = [messages] if all(isinstance(each, Mapping) for each in messages) else list(messages)
    for each in given:
        if not isinstance(each, (list, tuple)) or not each:
            raise checks.unfit("a conversation of messages", each, allowed)
    return given
