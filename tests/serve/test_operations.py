"""Models, tokens, and what those ask who run the server."""

import httpx
import pytest

from graphmode import __version__

from .conftest import Served


def test_each_name_of_the_model_is_listed(served: Served) -> None:
    listed = served.client.models.list()
    assert [each.id for each in listed.data] == ["bard", "shakespeare"]
    assert served.client.models.retrieve("shakespeare").owned_by == "graphmode"
    assert served.http.get("/v1/models").json()["data"][0]["max_model_len"] == 512


def test_texts_are_tokenized_and_back(served: Served) -> None:
    found = served.post("/tokenize", {"prompt": "Hello, world", "return_token_strs": True}).json()
    assert found["tokens"] == served.engine.tokenizer("Hello, world")["input_ids"]
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 512)
    assert len(found["token_strs"]) == found["count"]
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "Hello, world"}


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": []}, {"messages": []}, {"prompt": 1}, {"text": "a"}])
def test_what_is_no_text_is_not_tokenized(served: Served, body: dict[str, object]) -> None:
    assert served.post("/tokenize", body).status_code == 400


def test_tokens_that_are_none_have_no_text(served: Served) -> None:
    for tokens in ([10**6], [-1], ["a"]):
        assert served.post("/detokenize", {"tokens": tokens}).status_code == 400


def status(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["status"]


@pytest.mark.parametrize(
    ("phase", "cause", "health", "ready"),
    [
        ("starting", None, (200, "ok"), (503, "starting")),
        ("starting", "it died", (503, "starting"), (503, "starting")),
        ("ready", None, (200, "ok"), (200, "ok")),
        ("stalled", "no step", (503, "stalled"), (503, "stalled")),
        ("dead", "it died", (503, "dead"), (503, "dead")),
    ],
)
def test_health_and_readiness_follow_the_engine(
    served: Served, phase: str, cause: str | None, health: tuple[int, str], ready: tuple[int, str]
) -> None:
    served.engine.state.phase, served.engine.state.cause = phase, cause
    assert status(served.http.get("/health")) == health
    assert status(served.http.get("/ready")) == ready
    for path in ("/health", "/ready"):
        response = served.http.get(path)
        assert response.status_code == 200 or response.json().get("cause") == cause


def test_a_server_that_drains_is_alive_and_not_ready(served: Served) -> None:
    served.app.state.service.draining = True
    assert status(served.http.get("/health")) == (200, "ok")
    assert status(served.http.get("/ready")) == (503, "draining")
    response = served.post("/v1/completions", {"prompt": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")


def test_the_version_names_what_runs(served: Served) -> None:
    found = served.http.get("/version").json()
    assert found["version"] == __version__
    assert found["device"] == "a script"
    assert {"torch", "transformers", "python"} <= found["versions"].keys()
