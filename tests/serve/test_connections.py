"""Clients that leave, and clients that do not read."""

import json
import socket
from typing import Any

import httpx
import pytest

from .conftest import Served, wait_for


def request_bytes(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content


def connect(served: Served) -> socket.socket:
    url = httpx.URL(served.url)
    assert url.port is not None
    return socket.create_connection((url.host, url.port), timeout=10)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(served: Served, stream: bool) -> None:
    served.engine.moves = stream
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 10**6, "ignore_eos": True, "stream": stream}
    with connect(served) as client:
        client.sendall(request_bytes(body))
        wait_for(lambda: len(served.engine.requests) == 2)
        if stream:
            assert b"text/event-stream" in client.recv(4096)
            served.engine.moves = False
    wait_for(lambda: len(served.engine.aborted) == 2)
    assert not served.app.state.service.generations


def test_a_client_that_leaves_while_it_sends_costs_nothing(served: Served) -> None:
    with connect(served) as client:
        client.sendall(request_bytes({"prompt": "a" * 1000})[:-500])
    assert served.http.get("/health").status_code == 200
    assert served.engine.requests == []


def test_a_client_that_does_not_read_is_let_go(served: Served) -> None:
    body = {"prompt": "a", "n": 4, "max_tokens": 10**6, "ignore_eos": True, "stream": True, "logprobs": 20}
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    url = httpx.URL(served.url)
    with client:
        client.connect((url.host, url.port))
        client.sendall(request_bytes(body))
        wait_for(lambda: served.engine.aborted)
        assert not served.app.state.service.generations


def test_a_client_that_does_not_send_is_let_go(served: Served) -> None:
    whole = request_bytes({"prompt": "a" * 1000})
    with connect(served) as silent, connect(served) as half:
        silent.sendall(whole[:20])
        half.sendall(whole[:-500])
        assert silent.recv(1000) == b""
        answer = half.recv(1000)
        assert b" 408 " in answer
        assert b"body_too_slow" in answer


def test_requests_follow_each_other_on_a_connection(served: Served) -> None:
    with connect(served) as client:
        client.sendall(request_bytes({"prompt": "a", "max_tokens": 1}) * 3)
        got = b""
        while got.count(b"HTTP/1.1 200") < 3 or not got.endswith(b"}"):
            got += client.recv(65536)
    assert served.engine.aborted == []
