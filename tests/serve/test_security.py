"""Who may use the server, and what it keeps to itself."""

import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphmode.errors import InputError
from graphmode.serve.options import ServeOptions
from graphmode.serve.security import ApiKeys, read_keys

from .conftest import Served, start, wait_for

KEYS = ["sk-first-secret", "sk-second-secret"]


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    yield from start(ServeOptions(served_model_name=["bard"]), ApiKeys(KEYS))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def basic(user: str, key: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()}


def test_every_route_but_health_needs_a_key(locked: Served) -> None:
    paths = {getattr(route, "path", "") for route in locked.app.routes} | set(locked.app.openapi()["paths"])
    assert {"/v1/completions", "/docs", "/openapi.json", "/health", "/ready", "/version"} <= paths
    paths |= {"/metrics", "/dashboard", "/dashboard/data", "/dashboard/index.html"}
    for path in {*paths, "/", "/nothing", "/health/", "//health", "/health/../version", "/HEALTH"} - {"/health"}:
        for method in ("GET", "POST", "OPTIONS", "HEAD"):
            response = locked.http.request(method, path)
            assert response.status_code == 401, (method, path)
            assert method == "HEAD" or response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers.get_list("www-authenticate") == ["Bearer", 'Basic realm="graphmode"']
    assert locked.http.get("/health").status_code == 200


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_let_in(locked: Served, key: str) -> None:
    for headers in (bearer(key), {"authorization": f"bearer {key}"}, basic("anybody", key), basic("", key)):
        assert locked.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": ""},
        {"authorization": "Bearer"},
        bearer("sk-first-secre"),
        bearer("sk-first-secret2"),
        bearer("SK-FIRST-SECRET"),
        basic("sk-first-secret", "x"),
        {"authorization": "sk-first-secret"},
        {"authorization": "Basic !!!"},
        {"authorization": b"Bearer \xff\xfe"},
        {"x-api-key": "sk-first-secret"},
    ],
)
def test_other_keys_are_not(locked: Served, headers: dict[str, Any]) -> None:
    assert locked.http.get("/v1/models", headers=headers).status_code == 401


def test_a_browser_sends_the_key_for_its_own_pages_alone(locked: Served) -> None:
    for site, status in (("same-origin", 200), ("none", 200), ("cross-site", 401), ("same-site", 401)):
        headers = basic("", KEYS[0]) | {"sec-fetch-site": site}
        assert locked.http.get("/v1/models", headers=headers).status_code == status, site


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHMODE_API_KEY", raising=False)
    assert read_keys(None) is None
    file = tmp_path / "keys"
    file.write_text("\n  one \n\ntwo\n")
    keys = read_keys(file)
    assert keys is not None
    assert [keys.admit(f"Bearer {key}") for key in ("one", "two", "", "three")] == [True, True, False, False]
    monkeypatch.setenv("GRAPHMODE_API_KEY", "three")
    keys = read_keys(None)
    assert keys is not None
    assert keys.admit("Bearer three")
    assert not read_keys(file).admit("Bearer three")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "has no key"), (b"a b", "number 1"), (b"ok\n\xc3\xa9", "number 2"), (b"\xff", "UTF-8")]
)
def test_a_file_without_keys_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_keys(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "other")


def test_an_empty_key_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHMODE_API_KEY", " ")
    with pytest.raises(InputError, match="has no key"):
        read_keys(None)


def test_no_prompt_answer_or_key_is_logged(locked: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    locked.engine.reset()
    headers = bearer(KEYS[0]) | {"content-type": "application/json"}

    def post(content: str | bytes) -> None:
        locked.http.post("/v1/completions", content=content, headers=headers)

    post(json.dumps({"prompt": "the password is swordfish", "stop": "swordfish", "max_tokens": 5}))
    post(json.dumps({"prompt": "swordfish", "stream": True}))
    post(json.dumps({"prompt": ["swordfish"], "swordfish": "swordfish", "n": "swordfish"}))
    post('{"prompt": "swordfish"')
    locked.engine.failure = RuntimeError("swordfish")
    post(json.dumps({"prompt": "swordfish"}))
    locked.http.get("/swordfish?swordfish=swordfish", headers=headers)
    locked.http.get("/v1/models", headers=bearer("swordfish"))
    locked.engine.reset()
    wait_for(lambda: sum(each.name == "graphmode.serve.logs" for each in caplog.records) == 8)
    records = [each for each in caplog.records if each.name.split(".")[0] not in ("httpx", "httpcore", "openai")]
    logged = "".join(str(vars(record)) + record.getMessage() for record in records)
    assert "RuntimeError" in caplog.text
    for word in ("swordfish", "secret", "winter"):
        assert word not in logged


def test_each_request_has_a_line_with_its_name(locked: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "graphmode.serve.logs")
    headers = bearer(KEYS[0]) | {"x-request-id": "my-id 1\t<script>"}
    response = locked.post("/v1/completions", {"prompt": "ROMEO.", "max_tokens": 5}, headers=headers)
    assert response.headers["x-request-id"] == "my-id1script"
    assert response.json()["id"] == "cmpl-my-id1script"
    wait_for(lambda: caplog.records)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("POST /v1/completions 200 prompt_tokens=")
    assert "completion_tokens=5 ms=" in line
    other = locked.http.get("/v1/nothing", headers=bearer(KEYS[1]))
    assert len(other.headers["x-request-id"]) == 32
    wait_for(lambda: len(caplog.records) == 2)
    assert caplog.records[-1].getMessage().startswith("GET unmatched 404")
