"""API keys: who may use the server."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from graphmode.errors import InputError
from graphmode.serve.errors import ApiError
from graphmode.serve.options import read_text

KEY_VARIABLE = "GRAPHMODE_API_KEY"
_OPEN = frozenset({"/health"})


class ApiKeys:
    """The keys that are let in. Only their digests are kept.

    Args:
        keys: as users have them.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def admit(self, authorization: str) -> bool:
        """Return whether a header lets a request in: ``Bearer KEY``, or ``Basic`` with the key as the password.

        All keys are compared, and each in constant time, so how long it takes says nothing of them.
        """
        given = sha256(_key(authorization)).digest()
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0


def _key(authorization: str) -> bytes:
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip().encode()
    if scheme.lower() == "basic":  # browsers ask their users for it
        try:
            return base64.b64decode(credentials, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def read_keys(file: str | Path | None) -> ApiKeys | None:
    """Return the keys in a file, one a line, or the one in the environment; None where there is neither.

    Raises:
        InputError: the file cannot be read or has no key, or a key is none that a header can hold.
    """
    if file is None:
        if (key := os.environ.get(KEY_VARIABLE)) is None:
            return None
        source, keys = f"the environment's {KEY_VARIABLE}", [key.strip()]
    else:
        source = f"api_key_file {file}"
        keys = [line.strip() for line in read_text("api_key_file", file).splitlines() if line.strip()]
    if not keys or not keys[0]:
        raise InputError(f"{source} has no key; write one a line, or leave it out and no key is asked for")
    for number, key in enumerate(keys, start=1):
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise InputError(f"{source} has a key, number {number}, with a space or a character that is not in ASCII")
    return ApiKeys(keys)


class Authentication:
    """Lets requests through that have a key, and those for /health. Whether there is such a route it does not tell.

    Args:
        app: what they are let through to.
        keys: that are let in.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            headers = dict(reversed(scope["headers"]))  # the first of a name counts
            given = headers.get(b"authorization", b"").decode("latin-1")
            # Browsers send a password that they keep to us for pages of other sites too.
            foreign = headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none")
            if (foreign and given.lower().startswith("basic")) or not self._keys.admit(given):
                await _unauthorized(bool(given))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _unauthorized(given: bool) -> ASGIApp:
    message = "the API key is wrong" if given else "the API key is missing"
    error = ApiError(
        401, f"{message}; send it as Authorization: Bearer KEY", type="authentication_error", code="invalid_api_key"
    )
    response = error.response()
    response.headers.append("WWW-Authenticate", "Bearer")
    response.headers.append("WWW-Authenticate", 'Basic realm="graphmode"')
    return response
