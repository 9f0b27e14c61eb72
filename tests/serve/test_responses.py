"""Responses as OpenAI's clients see them."""

import asyncio
import json
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.lib.streaming.responses import ResponseTextDeltaEvent

from graphmode.serve.parsing.dialect import dialect
from tests.serve.conftest import Served
from tests.serve.test_chat import IMAGE, TWO_CALLS, City, prompt, refused

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
NOW = {"type": "function", "name": "now", "parameters": None, "strict": None}


def respond(served: Served, **options: Any) -> Any:
    return served.client.responses.create(**({"model": "bard", "input": "Hi"} | options))


def test_a_text(served: Served) -> None:
    response = respond(served, instructions="A hall.", temperature=0.5, metadata={"a": "b"})
    assert response.output_text == served.engine.answer
    assert (response.status, response.object, response.model) == ("completed", "response", "bard")
    assert (response.instructions, response.temperature, response.metadata) == ("A hall.", 0.5, {"a": "b"})
    assert response.usage.input_tokens == len(served.engine.requests[-1].prompt_token_ids)
    assert response.usage.output_tokens == len(served.engine.tokens) + 1  # the last ends the answer
    assert prompt(served) == "[A hall.]\n\nFIRST LORD.\nHi\n\nSECOND LORD.\n"


def test_a_response_that_is_cut_is_incomplete(served: Served) -> None:
    response = respond(served, max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.status for item in response.output] == ["incomplete"]
    last = list(respond(served, max_output_tokens=2, stream=True))[-1]
    assert last.type == "response.incomplete"


def test_the_events_of_a_text_in_order(served: Served) -> None:
    served.engine.burst = 4
    events = list(respond(served, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas == 3
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == served.engine.answer == events[-1].response.output_text
    assert (events[0].response.status, events[0].response.output) == ("in_progress", [])
    assert (events[2].item.content, events[-2].item.content[0].text) == ([], text)
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {events[-2].item.id}


@pytest.mark.parametrize("burst", [1, 1000])
def test_functions_are_called(served: Served, burst: int) -> None:
    served.engine.answer, served.engine.burst = TWO_CALLS, burst
    response = respond(served, tools=[WEATHER, NOW])
    said, weather, now = response.output
    assert said.content[0].text == "I look."
    assert (weather.name, json.loads(weather.arguments), weather.status) == (
        "get_weather",
        {"city": "Paris"},
        "completed",
    )
    assert (now.name, now.arguments) == ("now", "{}")

    events = list(respond(served, tools=[WEATHER, NOW], stream=True))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == [weather.arguments, "{}"]
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(event.delta for event in deltas if event.output_index == 1) == weather.arguments
    assert [item.type for item in events[-1].response.output] == ["message", "function_call", "function_call"]

    # The output is given back, with what the functions say.
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "Rain."} for call in (weather, now)]
    respond(served, input=[{"role": "user", "content": "Hi"}, *response.output, *results], tools=[WEATHER, NOW])
    assert "SECOND LORD.\n" + TWO_CALLS + "\n\nMESSENGER.\nRain.\n\n" in prompt(served)

    respond(served, tools=[WEATHER, NOW], tool_choice={"type": "function", "name": "now"})
    assert "get_weather" not in served.engine.requests[-1].params.structured_outputs.grammar
    assert len(respond(served, tools=[WEATHER, NOW], parallel_tool_calls=False).output) == 2
    assert served.engine.streams[-1].ended == ({0: "stop"} if burst == 1 else {})


def test_thoughts_are_items(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.app.state.service, "dialect", dialect("</think> reasoning_effort", {}))
    served.engine.answer = "<think>\nHm.\n</think>\n\nWell."
    response = respond(served, reasoning={"effort": "low"})
    thought, said = response.output
    assert (thought.type, thought.content[0].text, said.content[0].text) == ("reasoning", "Hm.", "Well.")
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    events = list(respond(served, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "Hm."
    respond(served, input=[{"role": "user", "content": "Hi"}, *response.output, {"role": "user", "content": "So?"}])
    assert "SECOND LORD.\nWell." in prompt(served)


def test_structured_answers(served: Served) -> None:
    served.engine.answer = '{"name": "Paris", "people": 2}'
    assert served.client.responses.parse(model="bard", input="Hi", text_format=City).output_parsed == City(
        name="Paris", people=2
    )
    assert "people" in served.engine.requests[-1].params.structured_outputs.json


def test_logprobs(served: Served) -> None:
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    known = respond(served, **options).output[0].content[0].logprobs
    assert "".join(each.token for each in known).startswith(served.engine.answer)
    assert len(known[0].top_logprobs) == 2
    deltas = [each for each in respond(served, stream=True, **options) if each.type == "response.output_text.delta"]
    assert [one.token for each in deltas for one in each.logprobs][:5] == [each.token for each in known][:5]


def test_an_async_client(served: Served) -> None:
    async def ask() -> str:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            async with client.responses.stream(model="bard", input="Hi") as stream:
                text = "".join([each.delta async for each in stream if isinstance(each, ResponseTextDeltaEvent)])
                assert (await stream.get_final_response()).output_text == text
            return (await client.responses.create(model="bard", input="Hi")).output_text

    assert asyncio.run(ask()) == served.engine.answer


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"store": True}, "store", "nothing is stored here"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "give all that came before as input"),
        ({"input": []}, "input", "input is empty"),
        ({"input": [{"type": "message", "role": "user"}]}, "input[0]", "must have role and content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]", "must have call_id, name and arguments"),
        ({"input": [{"type": "function_call_output"}]}, "input[0]", "must have call_id and output"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type", "item_reference"),
        ({"n": 2}, "n", "use /v1/chat/completions"),
        ({"top_logprobs": 2}, "top_logprobs", "needs include"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format", "give text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"truncation": "auto"}, "truncation", "auto"),
        ({"reasoning": {"effort": "low"}}, "reasoning_effort", "the chat template does not read"),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "contradicts text.format",
        ),
        ({"max_output_tokens": 0}, "max_tokens", "at least 1"),
    ],
)
def test_what_is_refused(served: Served, more: dict[str, Any], param: str, words: str) -> None:
    error = refused(served, {"input": "Hi"} | more, "/v1/responses")
    assert error["param"] == param
    assert words in error["message"]


def test_what_no_answer_could_hold_is_refused(served: Served) -> None:
    body = json.dumps({"input": "Hi", "metadata": {"a": "\ud800"}})
    answer = served.post("/v1/responses", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "half of a surrogate pair" in answer.json()["error"]["message"]
    assert not served.engine.requests


def test_no_image_is_fetched(served: Served) -> None:
    def ask(url: str) -> str:
        part = {"type": "input_image", "image_url": url}
        return refused(served, {"input": [{"role": "user", "content": [part]}]}, "/v1/responses")["message"]

    assert "give a data URL" in ask("http://127.0.0.1/a.png")
    assert "takes text alone" in ask(IMAGE)
