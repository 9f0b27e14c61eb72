"""Tools with the real engine: the bundled model has never seen one, and calls them all the same when it must."""

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.serve.test_chat import NOW, WEATHER, joined
from tests.serve.test_dashboard_in_browser import KEY, serving

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What news of the weather?"}]
PLAY = {
    "type": "function",
    "function": {
        "name": "play",
        "parameters": {
            "type": "object",
            "properties": {"act": {"type": "integer", "minimum": 1, "maximum": 5}, "lord": {"enum": ["Hal", "Percy"]}},
            "required": ["act", "lord"],
        },
    },
}


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with (
        serving(enforce_eager=True, max_num_seqs=4, max_num_batched_tokens=256) as address,
        OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_required_fits_its_schema(client: OpenAI, stream: bool) -> None:
    answer = client.chat.completions.create(
        model="bundled",
        messages=ASK,
        tools=[PLAY],
        tool_choice="required",
        parallel_tool_calls=False,
        stream=stream,
        max_completion_tokens=100,
        seed=3,
    )
    if stream:
        whole = joined(list(answer))
        [(_, name, arguments)], reason = whole["calls"], whole["finish_reason"]
    else:
        [call], reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        name, arguments = call.function.name, call.function.arguments
    assert (name, reason) == ("play", "tool_calls")
    given = json.loads(arguments)
    assert given.keys() == {"act", "lord"}
    assert given["act"] in range(1, 6)
    assert given["lord"] in ("Hal", "Percy")


def test_the_tool_that_is_named_is_called(client: OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "now"}}
    answer = client.chat.completions.create(
        model="bundled", messages=ASK, tools=[WEATHER, NOW], tool_choice=choice, parallel_tool_calls=False
    )
    [call] = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("now", "{}")
