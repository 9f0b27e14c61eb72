"""Answers taken apart: every format, in whatever pieces the text comes, whatever a model writes."""

import json
from dataclasses import replace

import llguidance.hf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from graphmode.errors import InputError
from graphmode.models.bundled_model import bundled_model
from graphmode.serve.parsing.formats import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    markers,
    reasoning_format,
    tool_formats,
)
from graphmode.serve.parsing.grammars import AnswerGrammar, Thoughts
from graphmode.serve.parsing.parser import AnswerParser
from graphmode.serve.parsing.parts import Arguments, CallEnd, CallStart, Content, Reasoning, merged

CITY, NOW = {"type": "string"}, None
WEATHER = {"type": "object", "properties": {"city": CITY, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS = {"get_weather": WEATHER, "now": NOW}

# Two calls as the models' own chat templates write them: get_weather(city=CITY, days=2), now().
WRITTEN = {
    "hermes": """<tool_call>
{"name": "get_weather", "arguments": {"city": CITY, "days": 2}}
</tool_call>
<tool_call>
{"name": "now", "arguments": {}}
</tool_call>""",
    "qwen3_coder": """<tool_call>
<function=get_weather>
<parameter=city>
TEXT
</parameter>
<parameter=days>
2
</parameter>
</function>
</tool_call>
<tool_call>
<function=now>
</function>
</tool_call>""",
    "glm45": """<tool_call>get_weather
<arg_key>city</arg_key>
<arg_value>TEXT</arg_value>
<arg_key>days</arg_key>
<arg_value>2</arg_value>
</tool_call>
<tool_call>now
</tool_call>""",
    "deepseek_v3": """<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
```json
{"city": CITY, "days": 2}
```<｜tool▁call▁end｜>
<｜tool▁call▁begin｜>function<｜tool▁sep｜>now
```json
{}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>""",
    "deepseek_v31": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": CITY, "days": 2}'
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "mistral": '[TOOL_CALLS]get_weather[ARGS]{"city": CITY, "days": 2}[TOOL_CALLS]now[ARGS]{}',
    "mistral_list": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": CITY, "days": 2}}, '
    '{"name": "now", "arguments": {}}]',
    "llama3_json": '{"name": "get_weather", "parameters": {"city": CITY, "days": 2}}; '
    '{"name": "now", "parameters": {}}',
}
FORMATS = {each.name: each for each in TOOL_FORMATS}
THINK = reasoning_format("qwen3", "")


def written(name, city="Paris"):
    return WRITTEN[name].replace("CITY", json.dumps(city)).replace("TEXT", city)


def read(pieces, formats=(), tools=TOOLS, **options):
    """Return the parts of an answer, without the calls' identifiers."""
    parser = AnswerParser(formats, tools, **options)
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.end()
    return merged([replace(part, id="") if isinstance(part, CallStart) else part for part in parts])


def said(parts, kind=Content):
    return "".join(part.text for part in parts if isinstance(part, kind))


def calls(parts):
    """Return name and arguments of each call."""
    found = []
    for part in parts:
        if isinstance(part, CallStart):
            found.append([part.name, ""])
        elif isinstance(part, Arguments):
            found[-1][1] += part.text
    return [(name, arguments) for name, arguments in found]


def split(draw, text):
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


@given(st.data(), st.sampled_from(sorted(WRITTEN)), st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=9))
def test_calls_are_read_in_any_pieces(data, name, city):
    before = data.draw(st.sampled_from(["", "Let me see.\n\n"])) if name != "llama3_json" else ""
    thoughts = data.draw(st.sampled_from(["", "<think>\nHm < {\n</think>\n\n"]))
    text = thoughts + before + written(name, city)
    parts = read(split(data.draw, text), [FORMATS[name]], reasoning=THINK)
    assert [(tool, json.loads(arguments)) for tool, arguments in calls(parts)] == [
        ("get_weather", {"city": city, "days": 2}),
        ("now", {}),
    ]
    assert said(parts, Reasoning) == ("Hm < {" if thoughts else "")
    assert said(parts) == before.strip()
    assert parts == read([text], [FORMATS[name]], reasoning=THINK)


def fragments(name):
    marks = sorted(FORMATS[name].texts | {"<think>", "</think>"})
    bits = ['{"name": "now"', ', "arguments": ', "{", "}", '"', "\\", "now", "get_weather", "\n", " ", "[", "null", "x"]
    whole = st.sampled_from([*marks, *bits, written(name)])
    return st.lists(whole | whole.map(lambda text: text[: len(text) // 2]), max_size=12).map("".join)


@given(st.data(), st.sampled_from(sorted(WRITTEN)))
def test_whatever_a_model_writes_is_kept_and_raises_nothing(data, name):
    text = data.draw(fragments(name))
    formats = tool_formats(name, "")
    parts = read([text], formats, reasoning=THINK)
    assert parts == read(split(data.draw, text), formats, reasoning=THINK)
    assert parts == read(text, formats, reasoning=THINK)
    if not calls(parts) and not text.lstrip().startswith("<think>"):
        assert said(parts) == text
    assert all(tool in TOOLS for tool, _ in calls(parts))
    assert sum(isinstance(part, CallEnd) for part in parts) == len(calls(parts))


def test_arguments_come_as_they_are_written():
    parser = AnswerParser([FORMATS["hermes"]], TOOLS)
    assert parser.feed("Well. <tool") == [Content("Well.")]
    assert parser.feed('_call>\n{"name": "get_weather", "arg') == []
    start, arguments = parser.feed('uments": {"city": "Pa')
    assert isinstance(start, CallStart)
    assert start.id.startswith("call_")
    assert arguments == Arguments('{"city": "Pa')
    assert parser.feed('ris"}}') == [Arguments('ris"}')]
    assert parser.feed("\n</tool_call>") == [CallEnd()]
    assert parser.end() == []


def test_arguments_between_tags_come_as_they_are_written():
    parser = AnswerParser([FORMATS["glm45"]], TOOLS)
    parser.feed("<tool_call>get_weather\n<arg_key>city</arg_key>")
    assert said(parser.feed('<arg_value>P"a'), Arguments) == '"P\\"a'
    assert said(parser.feed("ris</arg"), Arguments) == "ris"
    assert said(parser.feed("_value>"), Arguments) == '"'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', None),
        ("hermes", "<tool_call> I would call now() </tool_call>", None),
        ("hermes", '<tool_call>{"name": "now"', None),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": [', ("now", '{"a": [')),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1}</tool_call>', ("now", '{"a": 1}')),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>', ("now", '{"a": 1}')),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', ("now", '{"a": 1}')),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', ("now", "{}")),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>"}}', ("now", '{"a": "</tool_call>"}')),
        ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}}]', ("now", "{}")),
        ("mistral", "[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{}", ("now", "{}")),
        ("mistral", "[TOOL_CALLS]now{}", ("now", "{}")),
        ("llama3_json", '<|python_tag|>{"type": "function", "name": "now", "parameters": {}}', ("now", "{}")),
        ("llama3_json", '{"temperature": 21}', None),
        ("llama3_json", '<|python_tag|>brave_search.call(query="a")', None),
        ("glm45", "<tool_call>now</tool_call>", ("now", "{}")),
        ("glm45", "<tool_call>now or never</tool_call>", None),
        (
            "qwen3_coder",
            "<tool_call><function=now><parameter=a>True</parameter></function></tool_call>",
            ("now", '{"a": "True"}'),
        ),
    ],
)
def test_what_models_get_wrong(name, text, expected):
    """A call that is none stays in the content, word for word; one that can be read is read."""
    parts = read([text], tool_formats(name, ""))
    assert calls(parts) == ([expected] if expected else [])
    assert said(parts) == ("" if expected else text)


def test_a_faulty_call_takes_nothing_of_the_others():
    text = '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "nobody", "arguments": {}}]'
    parts = read([text], tool_formats("mistral", ""))
    assert calls(parts) == [("now", "{}")]
    assert said(parts) == ', {"name": "nobody", "arguments": {}}]'


def test_values_between_tags_take_the_kind_that_the_schema_names():
    schema = {
        "properties": {
            "text": {"type": "string"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "choice": {"enum": ["1", "2"]},
            "flag": {"type": "boolean"},
            "any": {},
        }
    }
    values = {"text": "1", "maybe": "null", "choice": "2", "flag": "True", "any": "[1]", "other": "a\nb"}
    arguments = "".join(f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in values.items())
    [(_, text)] = calls(read([f"<tool_call>f{arguments}</tool_call>"], [FORMATS["glm45"]], {"f": schema}))
    assert json.loads(text) == {"text": "1", "maybe": None, "choice": "2", "flag": True, "any": [1], "other": "a\nb"}


def test_thoughts():
    assert read(["<think>\na \n</think>\n\nb"], reasoning=THINK) == [Reasoning("a"), Content("b")]
    assert read(["a </th", "ink> b"], reasoning=THINK, thinking=True) == [Reasoning("a"), Content("b")]
    assert read(["a \n"], reasoning=THINK, thinking=True) == [Reasoning("a")]
    assert read([" <thin", "g> b\n"], reasoning=THINK) == [Content(" <thing> b\n")]
    assert read(["b <think> c"], reasoning=THINK) == [Content("b <think> c")]
    mistral = reasoning_format("mistral", "")
    assert read(["[THINK]a[/THINK]b"], reasoning=mistral) == [Reasoning("a"), Content("b")]


def test_formats_are_found_by_the_chat_template():
    for each in TOOL_FORMATS:
        assert tool_formats("auto", " ".join(each.signs))[0] == each
    assert tool_formats("auto", "{{ messages }}") == ()
    assert tool_formats("none", "<tool_call>") == ()
    assert [each.name for each in tool_formats("mistral", "[TOOL_CALLS] [")] == ["mistral_list", "mistral"]
    assert tool_formats("deepseek_v31", "") == tool_formats("deepseek_v3", "")
    with pytest.raises(InputError, match=r"tool_call_parser is 'pythonic'; it must be one of auto, none, .*hermes"):
        tool_formats("pythonic", "")
    assert reasoning_format("auto", "...</think>") == reasoning_format("deepseek_r1", "") == THINK
    assert reasoning_format("auto", "") is None
    for names in (tool_formats(name, "") for name in WRITTEN):
        assert len({each.trigger for each in names}) == 1


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_model())


@pytest.fixture(scope="module")
def special_tokenizer():
    """Return a tokenizer that has the marks of all formats as special tokens, as Mistral's and DeepSeek's do."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    marks = [text for text in markers(TOOL_FORMATS, THINK) if text[0] in "<[" and text[-1] in ">]" and len(text) > 2]
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(marks)})
    return tokenizer


@pytest.mark.parametrize("kind", ["tokenizer", "special_tokenizer"])
@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_grammars_allow_what_is_read_and_nothing_else(name, kind, request):
    tokenizer = request.getfixturevalue(kind)
    special = {text: tokenizer.convert_tokens_to_ids(text) for text in tokenizer.all_special_tokens}
    known = llguidance.hf.from_tokenizer(tokenizer)

    def allows(grammar, text):
        matcher = llguidance.LLMatcher(known, grammar)
        assert not matcher.is_error(), matcher.get_error()
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    two, form = written(name), FORMATS[name]
    tools = {"get_weather": {**WEATHER, "required": ["city", "days"]}, "now": NOW}
    forced = AnswerGrammar(special, Thoughts()).forced_calls(form, tools, several=True)
    assert allows(forced, two)
    assert not allows(forced, "Hello.")
    assert not allows(forced, two.replace("days", "hours"))
    assert not allows(AnswerGrammar(special, Thoughts()).forced_calls(form, tools, several=False), two)
    assert not allows(AnswerGrammar(special, Thoughts()).forced_calls(form, {"now": NOW}, several=True), two)

    free = AnswerGrammar(special, Thoughts(form=THINK)).free_calls(form, tools, several=True)
    assert allows(free, two)
    assert allows(free, "Hello.")
    assert allows(free, "<think>a\n</think>\n\n" + two)
    assert not allows(free, two.replace("days", "hours"))

    thinking = AnswerGrammar(special, Thoughts(form=THINK, begun=True))
    assert allows(thinking.forced_calls(form, tools, several=True), "a\n</think>\n\n" + two)
    assert allows(AnswerGrammar(special, Thoughts(form=THINK)).json({"const": 1}), "<think>a</think>1")


def test_reasoning_formats_have_names_that_are_known():
    assert [reasoning_format(each.name, "") for each in REASONING_FORMATS] == list(REASONING_FORMATS)


def test_the_bundled_model_has_a_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "A hall."},
        {"role": "user", "content": "What is it o'clock?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "Nine."},
    ]
    tools = [{"type": "function", "function": {"name": "now"}}]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert text.startswith(
        "[Enter now, who takes {}]\n\n[A hall.]\n\nFIRST LORD.\nWhat is it o'clock?\n\nSECOND LORD.\n"
    )
    assert text.endswith("\n</tool_call>\n\nMESSENGER.\nNine.\n\nSECOND LORD.\n")
    formats = tool_formats("auto", tokenizer.chat_template)
    [(_, arguments)] = calls(read([text.split("SECOND LORD.\n")[1]], formats))
    assert json.loads(arguments) == {"a": 1}
