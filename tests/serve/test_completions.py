"""``/v1/completions`` as OpenAI's clients meet it."""

import asyncio
import json
from typing import Any

import pytest
from openai import AsyncOpenAI

from .conftest import Served

ANSWER = "Now is the winter of our discontent"


def create(served: Served, prompt: Any = "ROMEO.", **more: Any) -> Any:
    return served.client.completions.create(**{"model": "bard", "prompt": prompt, "max_tokens": 100} | more)


def lines(served: Served, **body: Any) -> list[str]:
    """The events of a stream."""
    body = {"prompt": "ROMEO.", "max_tokens": 100, "stream": True} | body
    with served.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    *events, end = text.split("\n\n")
    assert end == ""
    return events


def chunks(served: Served, **body: Any) -> list[dict[str, Any]]:
    *events, last = lines(served, **body)
    assert last == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_an_answer_has_text_reason_and_usage(served: Served) -> None:
    served.engine.cached = 2
    made = create(served)
    assert (made.object, made.model, made.id[:5]) == ("text_completion", "bard", "cmpl-")
    (choice,) = made.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, ANSWER, "stop", None)
    prompt, tokens = len(served.engine.requests[0].prompt_token_ids), len(served.engine.tokens) + 1
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (prompt, tokens)
    assert made.usage.total_tokens == prompt + tokens
    assert made.usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize("burst", [1, 3, 100])
def test_a_stream_gives_the_same_text(served: Served, burst: int) -> None:
    served.engine.burst = burst
    made = list(create(served, stream=True))
    assert "".join(each.choices[0].text for each in made) == ANSWER
    assert {each.id for each in made} == {made[0].id}
    assert [each.choices[0].finish_reason for each in made] == [None] * (len(made) - 1) + ["stop"]
    assert all(each.usage is None for each in made)
    assert len(made) > 3 or burst > 1


def test_asynchronous_clients_share_the_server(served: Served) -> None:
    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                stream = await client.completions.create(model="bard", prompt=f"{number}", max_tokens=99, stream=True)
                return "".join([each.choices[0].text async for each in stream])

            return await asyncio.gather(*map(one, range(8)))

    assert asyncio.run(all_of_them()) == [ANSWER] * 8


def test_events_have_the_format_of_openai(served: Served) -> None:
    first = lines(served, max_tokens=1)[0]
    assert first.startswith("data: {")
    assert "\n" not in first
    event = json.loads(first.removeprefix("data: "))
    assert event.keys() == {"id", "object", "created", "model", "choices"}
    assert event["choices"][0] == {"index": 0, "text": "Now", "logprobs": None, "finish_reason": "length"}


def test_usage_in_a_stream_comes_last_or_with_every_event(served: Served) -> None:
    made = chunks(served, stream_options={"include_usage": True})
    assert [each["usage"] for each in made[:-1]] == [None] * (len(made) - 1)
    assert made[-1]["choices"] == []
    assert made[-1]["usage"]["completion_tokens"] == len(served.engine.tokens) + 1
    made = chunks(served, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [each["usage"]["completion_tokens"] for each in made[:-1]] == list(range(1, len(served.engine.tokens) + 2))


def test_choices_are_numbered_over_all_prompts(served: Served) -> None:
    made = create(served, ["ROMEO.", "JULIET."], n=2, max_tokens=4)
    assert [each.index for each in made.choices] == [0, 1, 2, 3]
    assert made.usage.completion_tokens == 16
    texts = {each.index: each.text for each in made.choices}
    streamed = dict.fromkeys(range(4), "")
    for chunk in chunks(served, prompt=["ROMEO.", "JULIET."], n=2, max_tokens=4):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_prompts_may_be_tokens(served: Served) -> None:
    create(served, [5, 6, 7])
    create(served, [[5, 6], [7]])
    assert [list(each.prompt_token_ids) for each in served.engine.requests] == [[5, 6, 7], [5, 6], [7]]


def test_a_stop_text_ends_the_answer_in_the_engine_too(served: Served) -> None:
    (choice,) = create(served, stop=["winter", "xyz"]).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("Now is the ", "stop", "winter")
    assert served.engine.streams[0].ended == {0: "stop"}
    assert served.engine.aborted == []
    assert "".join(each["choices"][0]["text"] for each in chunks(served, stop="winter")) == "Now is the "
    (choice,) = create(served, stop="winter", extra_body={"include_stop_str_in_output": True}).choices
    assert choice.text == "Now is the winter"


def test_log_probabilities_name_tokens_and_where_they_begin(served: Served) -> None:
    (choice,) = create(served, logprobs=2, max_tokens=5).choices
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert told.token_logprobs == [-0.25] * 5
    assert [len(each) for each in told.top_logprobs] == [2] * 5
    assert told.text_offset == [len("".join(told.tokens[:at])) for at in range(5)]
    streamed = [each["choices"][0]["logprobs"] for each in chunks(served, logprobs=2, max_tokens=5)]
    assert [token for each in streamed for token in each["tokens"]] == told.tokens
    assert [offset for each in streamed for offset in each["text_offset"]] == told.text_offset


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_and_its_log_probabilities_first(served: Served, stream: bool) -> None:
    given: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 3, "n": 2}
    made = chunks(served, **given) if stream else [create(served, **given).model_dump()]
    for index in range(2):
        parts = [choice for each in made for choice in each["choices"] if choice["index"] == index]
        text = "".join(each["text"] for each in parts)
        assert text.startswith("ROMEO.Now")
        assert "".join(token for each in parts for token in each["logprobs"]["tokens"]) == text
        scored = [value for each in parts for value in each["logprobs"]["token_logprobs"]]
        assert scored == [None] + [-0.25] * (len(scored) - 1)


def test_a_prompt_alone_is_scored(served: Served) -> None:
    made = create(served, echo=True, logprobs=1, max_tokens=0)
    (choice,) = made.choices
    assert (choice.text, choice.finish_reason) == ("ROMEO.", "length")
    assert "".join(choice.logprobs.tokens) == "ROMEO."
    assert made.usage.completion_tokens == 0


def test_all_sampling_parameters_reach_the_engine(served: Served) -> None:
    ours = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "bad_words": ["bad"],
        "allowed_token_ids": [5, 6],
        "skip_special_tokens": False,
        "truncate_prompt_tokens": 1,
        "skip_reading_prefix_cache": True,
        "include_stop_str_in_output": True,
        "prompt_logprobs": 1,
    }
    openai = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "presence_penalty": 1, "frequency_penalty": -1, "n": 2}
    create(
        served, **openai, max_tokens=7, stop="x", logit_bias={"9": 5}, extra_body=ours | {"priority": -3, "timeout": 9}
    )
    (request,) = served.engine.requests
    for name, value in (ours | openai).items():
        got = getattr(request.params, name)
        assert (list(got) if isinstance(value, list) else got) == value, name
    assert (request.params.max_tokens, request.params.stop, request.params.logit_bias) == (7, ("x",), {9: 5})
    assert (request.priority, served.engine.deadlines) == (-3, [9])
    assert len(request.prompt_token_ids) == 1


def test_tokens_of_prompt_and_answer_are_told_where_asked_for(served: Served) -> None:
    body = {"prompt": [5, 6], "max_tokens": 4, "return_token_ids": True, "prompt_logprobs": 1}
    (choice,) = served.post("/v1/completions", body).json()["choices"]
    assert choice["prompt_token_ids"] == [5, 6]
    assert choice["token_ids"] == served.engine.tokens[:4]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1]["6"]["rank"] == 1


def test_the_first_token_of_a_half_text_waits(served: Served) -> None:
    served.engine.answer = "naïve 漢字 😀"
    assert "".join(each["choices"][0]["text"] for each in chunks(served)) == "naïve 漢字 😀"


def test_answers_are_held_to_schemas_and_grammars(served: Served) -> None:
    create(served, extra_body={"structured_outputs": {"regex": "[0-9]+"}})
    create(served, extra_body={"response_format": {"type": "json_object"}})
    made = [each.params.structured_outputs for each in served.engine.requests]
    assert [each.kind for each in made] == ["regex", "json"]
