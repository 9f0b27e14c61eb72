"""Errors in OpenAI's shape: what is refused, and what fails later."""

import json
from typing import Any

import httpx
import openai
import pytest

from graphmode.errors import DeadlineExceededError, EngineDownError, OverloadedError

from .conftest import Served

PROMPT = {"prompt": "ROMEO."}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "there is no parameter temprature; did you mean temperature?"),
        ({"zzz": 1}, "zzz", "there is no parameter zzz"),
        ({"temperature": -1}, "temperature", "temperature is -1"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot'"),
        ({"top_p": 1.5}, "top_p", "1 at most"),
        ({"n": True}, "n", "n is True"),
        ({"n": 0}, "n", "n is 0; it must be an integer of at least 1"),
        ({"n": 5}, "n", "n is 5; it may be at most 4"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"logprobs": -1}, "logprobs", "from 0 to 20"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
        ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
        ({"stop": ""}, "stop", "not empty"),
        ({"stop": [1]}, "stop[0]", "stop"),
        ({"best_of": 2}, "best_of", "answers are not ranked"),
        ({"suffix": "end"}, "suffix", "leave it out"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
        ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use", "no parameter"),
        ({"timeout": 0}, "timeout", "above 0"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regex"),
        ({"structured_outputs": {}}, "structured_outputs", "give exactly one of json"),
        ({"prompt": []}, "prompt", "not empty"),
        ({"prompt": None}, "prompt", "prompt"),
        ({"prompt": ["a"] * 5}, "prompt", "there may be 4"),
        ({"prompt": [[1], "a"]}, "prompt[0]", "prompt"),
        ({"prompt": "\ud800"}, "prompt", "prompt"),
        ({"prompt": [-1]}, "prompt", "-1"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_limit(
    served: Served, wrong: dict[str, Any], param: str, words: str
) -> None:
    content = json.dumps(PROMPT | wrong)
    response = served.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert served.engine.requests == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"prompt": "a"} x',
        b'{"prompt":' + b"[" * 20000,
        b'{"n": 1' + b"0" * 5000,
    ],
)
def test_what_is_no_json_object_is_refused(served: Served, content: bytes) -> None:
    response = served.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    error_of(response, 400)


def test_another_content_type_is_refused(served: Served) -> None:
    content = json.dumps(PROMPT)
    assert "application/json" in error_of(served.http.post("/v1/completions", content=content), 400)["message"]


def test_openai_raises_its_own_errors(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="n is 0") as refused:
        served.client.completions.create(model="bard", prompt="a", n=0)
    assert refused.value.param == "n"
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here; there is bard, shakespeare") as unknown:
        served.client.completions.create(model="gpt-9", prompt="a")
    assert unknown.value.code == "model_not_found"


def test_routes_and_methods_that_are_not_there(served: Served) -> None:
    assert error_of(served.http.get("/v2"), 404)["code"] == "not_found"
    assert error_of(served.http.get("/v1/completions"), 405)["code"] == "method_not_allowed"
    assert error_of(served.http.get("/v1/models/other"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused(served: Served, declared: bool) -> None:
    content = json.dumps({"prompt": "a" * 70000}).encode()
    sent: Any = content if declared else iter([content[at : at + 5000] for at in range(0, len(content), 5000)])
    response = served.http.post("/v1/completions", content=sent, headers={"content-type": "application/json"})
    assert "65536" in error_of(response, 413)["message"]


def test_an_engine_that_does_not_take_a_request_says_when_to_come_back(served: Served) -> None:
    served.engine.refusal = OverloadedError("8 answers wait", 7.2)
    response = served.post("/v1/completions", PROMPT)
    assert error_of(response, 429)["code"] == "queue_full"
    assert response.headers["retry-after"] == "7"
    served.engine.refusal = None
    served.engine.state.phase, served.engine.state.cause = "dead", "it was killed by signal 9"
    assert "signal 9" in error_of(served.post("/v1/completions", PROMPT), 503)["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status", "code"), [
    (EngineDownError("the engine stands still"), 503, "engine_unavailable"),
    (DeadlineExceededError("it took longer than 2 s"), 504, "deadline_exceeded"),
    (RuntimeError("a secret"), 500, None),
])  # fmt: skip
def test_what_fails_before_the_first_token_has_a_status(
    served: Served, stream: bool, failure: Exception, status: int, code: str | None
) -> None:
    served.engine.failure = failure
    error = error_of(served.post("/v1/completions", PROMPT | {"stream": stream}), status)
    assert error["code"] == code
    assert "secret" not in error["message"]
    assert not served.app.state.service.generations


def test_what_fails_in_a_stream_becomes_its_last_event(served: Served) -> None:
    served.engine.failure, served.engine.fails_after = EngineDownError("the engine was killed"), 3
    response = served.post("/v1/completions", PROMPT | {"stream": True, "max_tokens": 9})
    assert response.status_code == 200
    *_, last, end = response.text.split("\n\n")
    assert end == ""
    assert "[DONE]" not in response.text
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    stream = served.client.completions.create(model="bard", prompt="a", stream=True)
    with pytest.raises(openai.APIError, match="the engine was killed"):
        list(stream)


def test_one_of_several_prompts_that_does_not_fit_ends_all(served: Served) -> None:
    error = error_of(served.post("/v1/completions", {"prompt": ["a", "long " * 999, "b"]}), 400)
    assert error["param"] == "prompt"
    assert "max_model_len" in error["message"]
    assert not served.app.state.service.generations


def test_a_deadline_ends_a_request(served: Served) -> None:
    served.engine.moves = False
    response = served.post("/v1/completions", PROMPT | {"timeout": 0.05})
    assert error_of(response, 504)["code"] == "deadline_exceeded"
    assert response.headers["x-should-retry"] == "false"


def test_grammars_that_are_new_wait_in_a_queue_that_ends(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"structured_outputs": {"choice": ["known"]}}
    assert served.post("/v1/completions", PROMPT | known).status_code == 200
    monkeypatch.setattr("graphmode.serve.service._MOST_TRIALS", 0)
    assert served.post("/v1/completions", PROMPT | known).status_code == 200
    new = {"structured_outputs": {"choice": ["new"]}}
    assert error_of(served.post("/v1/completions", PROMPT | new), 429)["code"] == "queue_full"


def test_a_text_that_cannot_fit_is_refused_before_it_is_read(served: Served) -> None:
    error = error_of(served.post("/v1/completions", {"prompt": "a" * 60000}), 400)
    assert "the prompt has 60000 characters" in error["message"]
    assert served.engine.requests == []
    body = {"prompt": "word " * 8000, "truncate_prompt_tokens": 5, "max_tokens": 1}
    assert served.post("/v1/completions", body).json()["usage"]["prompt_tokens"] == 5


def test_more_answers_than_ever_find_room_are_refused(served: Served) -> None:
    served.engine.info.max_num_seqs = 2 - served.app.state.service.options.max_queue  # type: ignore[union-attr]
    assert "max_queue" in error_of(served.post("/v1/completions", {"prompt": ["a"] * 3}), 400)["message"]
    assert served.post("/v1/completions", {"prompt": ["a"] * 2}).status_code == 200
