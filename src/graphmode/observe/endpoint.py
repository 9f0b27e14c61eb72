"""An OpenAI-compatible server as its clients find it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from graphmode.errors import EndpointError, InputError


@dataclass(frozen=True)
class Server:
    """What the endpoint is like.

    Attributes:
        url: without ``/v1``.
        headers: of every request.
        model: its name there.
        longest: the tokens of prompt and answer that it takes; None where it does not say.
        version: what it says of itself; empty where nothing.
    """

    url: str
    headers: dict[str, str]
    model: str
    longest: int | None
    version: Mapping[str, Any]


def find_server(http: httpx.Client, base_url: str, key: str | None, model: str | None) -> Server:
    """Return what a server says of itself.

    Args:
        http: the client.
        base_url: of the server, such as ``http://127.0.0.1:8000``, with or without ``/v1``.
        key: sent as a bearer token; None for none.
        model: the name of its model; None: the first that it lists.

    Raises:
        InputError: the URL or the key is none.
        EndpointError: the server does not answer, refuses the key or lists no model.
    """
    url = base_url.rstrip("/").removesuffix("/v1")
    _check_url(base_url)
    if key is not None and not (key.isascii() and key.isprintable()):
        raise InputError("the key holds what no HTTP header can; give one of printable ASCII")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        listed = http.get(f"{url}/v1/models", headers=headers)
        version = http.get(f"{url}/version", headers=headers)
    except httpx.HTTPError as error:
        raise EndpointError(f"{url} does not answer: {error}; is the server running, and is base_url right?") from error
    models: list[Any] = []
    if listed.status_code == 200:
        models = listed.json().get("data", [])
    elif model is None or listed.status_code in (401, 403):
        raise EndpointError(f"GET {url}/v1/models: {refusal(listed)}" + advice(listed.status_code))
    names = [each["id"] for each in models]
    if model is None and not names:
        raise EndpointError(f"{url}/v1/models lists no model; give --model")
    model = model or names[0]
    longest = next((each.get("max_model_len") for each in models if each["id"] == model), None)
    says: Any = {}
    if version.status_code == 200:
        with suppress(ValueError):
            says = version.json()
    return Server(url, headers, model, longest, says if isinstance(says, dict) else {})


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise InputError(f"base_url is {url!r}; give one such as http://127.0.0.1:8000")


def refusal(response: httpx.Response) -> str:
    """Return a status and what the server says of it."""
    try:
        said = response.json()["error"]
        words = said["message"] if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError):
        words = response.text[:300]
    return f"{response.status_code} {words}"


def advice(status: int) -> str:
    """Return what to do about a status, to be added to a message."""
    return "; give the key's file as --api-key-file" if status in (401, 403) else ""


def read_key(file: Path) -> str:
    """Return the key that a file holds on its first line.

    Raises:
        InputError: it cannot be read or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not lines or not lines[0].strip():
        raise InputError(f"{file} holds no key; write it on the first line")
    return lines[0].strip()
