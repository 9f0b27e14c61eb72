"""The server's options: what the user chose, checked before any work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from graphmode.engine import aliases, checks
from graphmode.engine.aliases import Alias, Names, Refusal
from graphmode.engine.checks import unfit
from graphmode.errors import InputError
from graphmode.serve.parsing.formats import AUTO, reasoning_format, tool_formats

LogLevel = Literal["debug", "info", "warning", "error"]


def _no_key(value: object) -> Mapping[str, object]:
    """Refuse a key without repeating it."""
    if value is None:
        return {}
    raise InputError(
        "api_key is a key on a command line, where other users of the machine see it; use --api-key-file, or "
        "GRAPHMODE_API_KEY in the environment"
    )


_PROXY = Refusal("the server speaks plain HTTP at the root; put a reverse proxy in front of it")
SERVER: Names = {
    "uvicorn_log_level": Alias("log_level"),
    "api_key": Alias(options=_no_key),
    "enable_auto_tool_choice": Refusal("tools are always offered to the model", harmless=(None, True)),
    "enable_request_id_headers": Refusal("every answer has X-Request-Id", harmless=(None, True)),
    "disable_uvicorn_access_log": Refusal("there is a line a request; raise --log-level", harmless=(None, True, False)),
    "enable_prompt_tokens_details": Refusal("usage always tells cached tokens", harmless=(None, True)),
    "enable_log_outputs": Refusal("answers are in no log", harmless=(None, False)),
    "max_log_len": Refusal("prompts are in no log", harmless=(None, 0)),
    "api_server_count": Refusal("one process speaks HTTP", harmless=(None, 1)),
    "chat_template_content_format": Refusal(
        "parts of a message reach the template as they are where the model takes images, else as one text",
        harmless=(None, "auto"),
    ),
    "allowed_origins": Refusal("pages of other sites may not use the server from a browser; use a reverse proxy"),
    "response_role": Refusal("the role of an answer is assistant", harmless=(None, "assistant")),
    "allowed_local_media_path": Refusal("no path that a client names is read", harmless=(None, "")),
    "allowed_media_domains": Refusal("no address that a client names is fetched; images come as data URLs"),
    **dict.fromkeys(("root_path", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs"), _PROXY),
}
"""Of vLLM's command line."""


@aliases.by_name(SERVER, what="serve")
@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What the user may choose about the server; the engine's options are its own.

    Attributes:
        host: the address to listen on. The default is reached from this machine alone; 0.0.0.0 from everywhere.
        port: the port to listen on; 0 takes a free one.
        api_key_file: a file with a key a line; requests must have one of them. Default: the key in the environment's
            GRAPHMODE_API_KEY, if there is one; else no key is asked for.
        served_model_name: the model's name in requests; several are all the same model, the first is given in answers.
            Default: the last part of the model's path or hub name.
        chat_template: a file with a Jinja template in place of the tokenizer's own.
        tool_call_parser: the format in which the model writes tool calls. Default: by the model.
        reasoning_parser: the format in which the model writes its reasoning. Default: by the model.
        max_queue: requests that wait for their first step; one more is refused with 429.
        drain_seconds: how long the requests that run may take to end after SIGTERM.
        restart: an engine that died or stands still is started again.
        stall_seconds: the engine stands still when requests run and it has made no step for so long.
        request_seconds: how long a request may take in all; it may ask for less as its timeout. Default: no limit.
        slow_client_seconds: how long a client may leave an answer unread, or its own request unfinished, until it is
            disconnected.
        max_body_bytes: bytes of a request's body.
        max_prompts: prompts of a request for completions.
        max_answers: answers to a prompt (n).
        log_level: debug, info, warning or error. Prompts, answers and keys are in no log at any level.

    Raises:
        InputError: a value of another type or out of range, or a name that is not known or cannot be honoured.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | Path | None = None
    served_model_name: Sequence[str] = ()
    chat_template: str | Path | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    max_queue: int = 1024
    drain_seconds: float = 30.0
    restart: bool = True
    stall_seconds: float = 10.0
    request_seconds: float | None = None
    slow_client_seconds: float = 30.0
    max_body_bytes: int = 32 << 20
    max_prompts: int = 256
    max_answers: int = 128
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        settle = partial(checks.settle, self)
        if not isinstance(self.host, str) or not self.host:
            raise unfit("host", self.host, "an address such as 127.0.0.1, or 0.0.0.0 for all")
        settle(checks.integer, "port", least=0, most=65535)
        settle(checks.texts, "served_model_name")
        settle(checks.integer, "max_queue", "max_prompts", "max_answers", least=1)
        settle(checks.integer, "max_body_bytes", least=1024)
        settle(checks.number, "drain_seconds", least=0)
        settle(checks.number, "stall_seconds", "slow_client_seconds", above=0)
        settle(checks.number, "request_seconds", above=0, optional=True)
        tool_formats(self.tool_call_parser or AUTO, "")
        reasoning_format(self.reasoning_parser or AUTO, "")
        settle(checks.flag, "restart")
        settle(checks.choice, "log_level", choices=get_args(LogLevel))

    def chat_template_text(self) -> str | None:
        """Return the template that was given instead of the tokenizer's own; None where none was.

        Raises:
            InputError: the file cannot be read, or is no template.
        """
        if self.chat_template is None:
            return None
        text = read_text("chat_template", self.chat_template)
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        try:
            ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        except TemplateSyntaxError as error:
            raise InputError(
                f"chat_template {self.chat_template} is no Jinja template: line {error.lineno}: {error.message}; "
                "mend it, or leave it out for the tokenizer's own"
            ) from error
        return text


def read_text(name: str, file: str | Path) -> str:
    """Return the text in a file that an option names.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{name} {file} cannot be read: {error.strerror}; name another file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name} {file} is not a text in UTF-8: byte {error.start} is wrong; convert it") from error
