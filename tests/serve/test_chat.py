"""Chat completions as OpenAI's clients see them."""

import asyncio
import base64
import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, BadRequestError
from PIL import Image
from pydantic import BaseModel
from transformers import AutoTokenizer

from graphmode.engine.config import EngineOptions
from graphmode.engine.grammar import GrammarCompiler
from graphmode.engine.reading import load_text
from graphmode.models.bundled_model import bundled_model
from graphmode.serve.parsing.dialect import dialect
from tests.multimodal import IMAGE as IMAGE_TOKEN
from tests.multimodal import save_model, save_processors
from tests.serve.conftest import Served

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TWO_CALLS = """I look.
<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
<tool_call>
{"name": "now", "arguments": {}}
</tool_call>"""
IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYPgPAAEDAQAIicLsAAAAAElFTkSuQmCC"
)


def chat(served: Served, **options: Any) -> Any:
    return served.client.chat.completions.create(**({"model": "bard", "messages": HI} | options))


def joined(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """Return what a stream says of one answer, put together as clients do."""
    whole: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index != index:
                continue
            whole["content"] += choice.delta.content or ""
            whole["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            whole["finish_reason"] = choice.finish_reason or whole["finish_reason"]
            for call in choice.delta.tool_calls or ():
                if call.id:
                    assert call.index == len(whole["calls"])
                    whole["calls"].append([call.id, call.function.name, ""])
                whole["calls"][call.index][2] += call.function.arguments
    return whole


def prompt(served: Served) -> str:
    return served.engine.tokenizer.decode(served.engine.requests[-1].prompt_token_ids)


def refused(served: Served, body: dict[str, Any], path: str = "/v1/chat/completions") -> dict[str, Any]:
    answer = served.post(path, body)
    assert answer.status_code == 400, answer.text
    assert not served.engine.requests
    return answer.json()["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat(served: Served, stream: bool) -> None:
    messages = [
        {"role": "developer", "content": "A hall."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = chat(served, messages=messages, n=2, stream=stream, **options)
    if stream:
        chunks = list(answer)
        assert chunks[0].choices[0].delta.role == "assistant"
        wholes = [joined(chunks, index) for index in (0, 1)]
        usage = chunks[-1].usage
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    else:
        wholes = [{"content": each.message.content, "finish_reason": each.finish_reason} for each in answer.choices]
        usage = answer.usage
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.tool_calls is None
    for whole in wholes:
        assert (whole["content"], whole["finish_reason"]) == (served.engine.answer, "stop")
    assert prompt(served) == "[A hall.]\n\nFIRST LORD.\nHi\n\nSECOND LORD.\n"
    assert usage.completion_tokens == 2 * (len(served.engine.tokens) + 1)  # the last ends the answer
    assert usage.prompt_tokens == len(served.engine.requests[-1].prompt_token_ids)


def test_many_chats_of_one_async_client(served: Served) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:

            async def one(stream: bool) -> str:
                made = await client.chat.completions.create(model="bard", messages=HI, stream=stream)
                if not stream:
                    return made.choices[0].message.content
                return joined([chunk async for chunk in made])["content"]

            return await asyncio.gather(*(one(number % 2 == 0) for number in range(6)))

    assert asyncio.run(ask()) == [served.engine.answer] * 6


def test_a_length_is_said_and_without_one_the_model_goes_on(served: Served) -> None:
    assert chat(served, max_completion_tokens=2).choices[0].finish_reason == "length"
    assert served.engine.requests[-1].params.max_tokens == 2
    chat(served)
    assert served.engine.requests[-1].params.max_tokens is None


@pytest.mark.parametrize("burst", [1, 5, 1000])
def test_tools_are_called(served: Served, burst: int) -> None:
    served.engine.answer, served.engine.burst = TWO_CALLS, burst
    whole = chat(served, tools=[WEATHER, NOW])
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls"
    assert message.content == "I look."
    assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == [
        ("get_weather", {"city": "Paris"}),
        ("now", {}),
    ]
    streamed = joined(list(chat(served, tools=[WEATHER, NOW], stream=True)))
    assert [call[1:] for call in streamed["calls"]] == [
        [call.function.name, call.function.arguments] for call in message.tool_calls
    ]
    assert (streamed["content"], streamed["finish_reason"]) == ("I look.", "tool_calls")
    assert prompt(served).startswith('[Enter get_weather, who takes {"type": "object"')

    # The message is given back, with what the tools say.
    results = [{"role": "tool", "tool_call_id": call.id, "content": "Rain."} for call in message.tool_calls]
    chat(served, messages=[*HI, message, *results], tools=[WEATHER, NOW])
    assert "SECOND LORD.\n" + TWO_CALLS + "\n\nMESSENGER.\nRain.\n\n" in prompt(served)


def test_special_tokens_that_mark_calls_are_read_and_no_others_are_shown(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "mistral"
    shutil.copytree(bundled_model(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "[OTHER]"]})
    tokenizer.chat_template = "{{ tools }}{{ messages[-1].content }}{# [TOOL_CALLS] [ARGS] #}"
    tokenizer.save_pretrained(folder)
    service, text = served.app.state.service, load_text(folder, EngineOptions(device="cpu"))
    monkeypatch.setattr(service, "text", text)
    monkeypatch.setattr(service, "dialect", dialect(tokenizer.chat_template, text.detokenizer.special))
    monkeypatch.setattr(served.engine, "tokenizer", text.tokenizer)
    served.engine.answer = "So.[OTHER][TOOL_CALLS]now[ARGS]{}"
    message = chat(served, tools=[NOW]).choices[0].message
    assert (message.content, message.tool_calls[0].function.name) == ("So.", "now")
    assert len(message.tool_calls[0].id) == 9
    assert chat(served).choices[0].message.content == "So.now{}"

    grammars = GrammarCompiler(text.tokenizer, len(text.tokenizer), text.eos_token_ids)
    monkeypatch.setattr(service, "grammars", grammars)
    chat(served, tools=[NOW], tool_choice="required")
    grammars.close()
    mark = text.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    assert f"<[{mark}]>" in served.engine.requests[-1].params.structured_outputs.grammar


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_with_one_call_ends_with_it(served: Served, stream: bool) -> None:
    served.engine.answer = TWO_CALLS
    answer = chat(served, tools=[WEATHER, NOW], parallel_tool_calls=False, stream=stream)
    if stream:
        whole = joined(list(answer))
        assert (len(whole["calls"]), whole["finish_reason"]) == (1, "tool_calls")
    else:
        assert len(answer.choices[0].message.tool_calls) == 1
    assert served.engine.streams[-1].ended == {0: "stop"}


def test_the_choice_of_tools(served: Served) -> None:
    served.engine.answer = TWO_CALLS
    plain = chat(served, tools=[WEATHER], tool_choice="none").choices[0]
    assert (plain.message.content, plain.message.tool_calls, plain.finish_reason) == (TWO_CALLS, None, "stop")
    assert "get_weather" not in prompt(served)
    only = chat(served, tools=[WEATHER]).choices[0].message  # now is no tool, so that its call is a text
    assert [call.function.name for call in only.tool_calls] == ["get_weather"]
    assert '{"name": "now"' in only.content
    assert served.engine.requests[-1].params.structured_outputs is None

    def grammar(**options: Any) -> str:
        chat(served, tools=[WEATHER, NOW], **options)
        return served.engine.requests[-1].params.structured_outputs.grammar

    assert grammar(tool_choice="required").count("call_") > 2
    named = grammar(tool_choice={"type": "function", "function": {"name": "now"}})
    assert '\\"now\\"' in named
    assert "get_weather" not in named
    assert ")*" not in grammar(tool_choice="required", parallel_tool_calls=False).split("answer:")[1].split("\n")[0]
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    chat(served, tools=[strict])
    assert "TEXT" in served.engine.requests[-1].params.structured_outputs.grammar


class City(BaseModel):
    name: str
    people: int


def test_structured_answers(served: Served) -> None:
    served.engine.answer = '{"name": "Paris", "people": 2}'
    parsed = served.client.chat.completions.parse(model="bard", messages=HI, response_format=City)
    assert parsed.choices[0].message.parsed == City(name="Paris", people=2)

    def held_to(**options: Any) -> Any:
        chat(served, **options)
        return served.engine.requests[-1].params.structured_outputs

    assert json.loads(held_to(response_format={"type": "json_object"}).json) == {"type": "object"}
    assert held_to(response_format={"type": "text"}) is None
    assert held_to(extra_body={"structured_outputs": {"choice": ["a", "b"]}}).choice == ("a", "b")
    both = held_to(response_format={"type": "json_object"}, tools=[WEATHER])
    assert "get_weather" in both.grammar
    assert "%json" in both.grammar


def test_a_schema_that_cannot_be_honoured_is_told_with_the_parameter_that_asks_for_it(served: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    error = refused(served, {"messages": HI, "tools": [tool], "tool_choice": "required"})
    assert error["param"] == "tools"
    assert "uniqueItems" in error["message"]
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert refused(served, {"messages": HI, "response_format": form})["param"] == "response_format"


def test_thoughts_are_split_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    service = served.app.state.service
    monkeypatch.setattr(service, "dialect", dialect("tools <tool_call> </think> reasoning_effort", {}))
    served.engine.answer = "<think>\nParis or Rome?\n</think>\n\n" + TWO_CALLS
    message = chat(served, tools=[WEATHER, NOW], reasoning_effort="low").choices[0].message
    assert (message.reasoning_content, message.reasoning) == ("Paris or Rome?", "Paris or Rome?")
    assert (message.content, len(message.tool_calls)) == ("I look.", 2)
    streamed = joined(list(chat(served, tools=[WEATHER, NOW], stream=True)))
    assert (streamed["reasoning"], streamed["content"]) == ("Paris or Rome?", "I look.")
    chat(served, messages=[*HI, message, {"role": "user", "content": "So?"}], response_format={"type": "json_object"})
    assert "</think>" in served.engine.requests[-1].params.structured_outputs.grammar


def test_logprobs(served: Served) -> None:
    whole = chat(served, logprobs=True, top_logprobs=2, max_tokens=3).choices[0]
    tokens = served.engine.tokens[:3]
    assert [each.token for each in whole.logprobs.content] == [served.engine.tokenizer.decode([t]) for t in tokens]
    first = whole.logprobs.content[0]
    assert (first.logprob, first.bytes) == (-0.25, list(first.token.encode()))
    assert first.top_logprobs[0].token == first.token
    assert len(first.top_logprobs) == 2
    chunks = list(chat(served, logprobs=True, max_tokens=3, stream=True))
    streamed = [
        each for chunk in chunks for choice in chunk.choices if choice.logprobs for each in choice.logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in whole.logprobs.content]
    assert streamed[0].top_logprobs == []


def test_sampling_and_template_parameters_arrive(served: Served) -> None:
    more = {"top_k": 3, "chat_template_kwargs": {"speaker": "x"}, "return_token_ids": True, "prompt_logprobs": 1}
    answer = chat(
        served, seed=5, stop="zz", temperature=0, logit_bias={"7": 1}, user="me", metadata={"a": "b"}, extra_body=more
    )
    params = served.engine.requests[-1].params
    assert (params.seed, params.stop, params.temperature, params.top_k, params.logit_bias) == (5, ("zz",), 0, 3, {7: 1})
    assert answer.prompt_token_ids == list(served.engine.requests[-1].prompt_token_ids)
    assert answer.choices[0].token_ids[:-1] == served.engine.tokens
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)


def test_a_template_that_knows_no_developer_gets_a_system_message(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = served.app.state.service
    for template, role in (
        ("{{ messages[0].role }}", "system"),
        ("{{ messages[0].role }}{# developer #}", "developer"),
    ):
        monkeypatch.setattr(service, "chat_template", template)
        monkeypatch.setattr(service, "dialect", dialect(template, {}))
        chat(served, messages=[{"role": "developer", "content": "A hall."}])
        assert prompt(served) == role


def test_templates_take_arguments_as_objects_or_as_texts(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    function = {"name": "f", "arguments": '{"a": 1}'}
    messages = [*HI, {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]}]
    service, arguments = served.app.state.service, "messages[1].tool_calls[0].function.arguments"
    for template, text in ((f"{{{{ {arguments}.a }}}}", "1"), (f"{{{{ {arguments} + '' }}}}", '{"a": 1}')):
        monkeypatch.setattr(service, "chat_template", template)
        monkeypatch.setattr(service, "dialect", dialect(template, {}))
        chat(served, messages=messages)
        assert prompt(served) == text


def test_the_last_message_goes_on(served: Served) -> None:
    messages = [*HI, {"role": "assistant", "content": "Well"}]
    chat(served, messages=messages, extra_body={"continue_final_message": True})
    assert prompt(served).endswith("SECOND LORD.\nWell")


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role", "king"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "no content; give a text"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id", "give the id of the call"),
        ({"messages": [{**HI[0], "tool_call_id": "a"}]}, "messages[0].tool_call_id", "only messages of the role tool"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]", "must have text"),
        ({"frequency": 1}, "frequency", "there is no parameter frequency"),
        ({"functions": []}, "functions", "there is no parameter functions"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "they are one parameter"),
        ({"stream_options": {}}, "stream_options", "set stream to true"),
        ({"store": True}, "store", "store"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "two of the name get_weather"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "tool_choice names f; the tools are get_weather",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "give json_schema.schema"),
        ({"structured_outputs": {"regex": "a"}, "tools": [WEATHER]}, "structured_outputs", "contradicts tools"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "the chat template does not read"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize"),
        ({"continue_final_message": True}, "continue_final_message", "must be an assistant's"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "set stream to false"),
        ({"model": "gpt"}, "model", "not served here"),
    ],
)
def test_what_is_refused(served: Served, more: dict[str, Any], param: str, words: str) -> None:
    answer = served.post("/v1/chat/completions", {"messages": HI} | more)
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert not served.engine.requests


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.png", "/etc/passwd", "file:///etc/passwd", "a.png"])
def test_no_image_is_fetched(served: Served, url: str) -> None:
    for image in (url, {"url": url}):
        error = refused(
            served, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": image}]}]}
        )
        assert error["param"] == "messages[0].content[0].image_url"
        assert "give a data URL" in error["message"]
    text_alone = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}]}
    assert "takes text alone" in refused(served, text_alone)["message"]


def test_images_come_as_data_urls(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("vision")
    save_model("qwen2_vl", folder)
    save_processors(folder)
    service = served.app.state.service
    monkeypatch.setattr(service, "text", load_text(folder, EngineOptions(device="cpu")))
    template = (
        "{% for part in messages[0].content %}{{ part.text if part.type == 'text' else "
        "'<|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %}"
    )
    monkeypatch.setattr(service, "chat_template", template)
    monkeypatch.setattr(service, "dialect", dialect(template, {}))
    Image.new("RGB", (16, 8), "red").save(file := BytesIO(), "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "text", "text": "see "}, {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}]
    chat(served, messages=[{"role": "user", "content": parts}])
    vision = served.engine.requests[-1].vision
    assert vision is not None
    assert served.engine.requests[-1].prompt_token_ids.count(IMAGE_TOKEN) == 2  # 4 x 2 patches, four a token

    served.client.responses.create(
        model="bard", input=[{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]
    )
    assert served.engine.requests[-1].prompt_token_ids.count(IMAGE_TOKEN) == 2
    served.engine.requests.clear()
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert "image 1" in refused(served, {"messages": [{"role": "user", "content": [broken]}]})["message"]


def test_a_conversation_that_cannot_fit_is_not_even_rendered(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.app.state.service, "chat_template", "{{ raise_exception('rendered') }}")
    error = refused(served, {"messages": [{"role": "user", "content": "a " * 16000}]})
    assert "the prompt has 32000 characters" in error["message"]


def test_an_unknown_format_of_calls_is_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    service = served.app.state.service
    for template, words in (
        ("tools", "--tool-call-parser"),
        ("<tool_call>", "--chat-template"),
        (None, "--chat-template"),
    ):
        monkeypatch.setattr(service, "dialect", dialect(template, {}))
        with pytest.raises(BadRequestError, match=words):
            chat(served, tools=[NOW])


def test_langchain_calls_a_tool_and_takes_its_result(served: Served) -> None:
    @tool
    def get_weather(city: str) -> str:
        """Tell the weather."""
        return f"Rain in {city}."

    model = ChatOpenAI(model="bard", base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    served.engine.answer = TWO_CALLS.split('\n<tool_call>\n{"name": "now"')[0]
    called = model.bind_tools([get_weather]).invoke("How is Paris?")
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("get_weather", {"city": "Paris"})]
    result = get_weather.invoke(called.tool_calls[0])
    served.engine.answer = "It rains."
    assert model.invoke([("user", "How is Paris?"), called, result]).content == "It rains."
    assert "MESSENGER.\nRain in Paris.\n\n" in prompt(served)
    assert "".join(chunk.content for chunk in model.stream("Hi")) == "It rains."
    served.engine.answer = '{"name": "Paris", "people": 2}'
    assert model.with_structured_output(City).invoke("Which?") == City(name="Paris", people=2)
