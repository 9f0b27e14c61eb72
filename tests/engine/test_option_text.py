"""Options as texts: every field is one, and a value is read as its type says."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphmode.engine import aliases
from graphmode.engine.config import EngineOptions
from graphmode.engine.option_text import Kind, TextOption, named_value, text_options
from graphmode.engine.sampling_params import SamplingParams
from graphmode.graph import InputError

ENGINE = text_options(EngineOptions, aliases.ENGINE)
SAMPLING = text_options(SamplingParams, aliases.SAMPLING)


def test_every_option_can_be_written_and_says_what_it_does() -> None:
    for options, texts in ((EngineOptions, ENGINE), (SamplingParams, SAMPLING)):
        only_python = {"on_capture_failure"}
        assert {each.name for each in fields(options)} - texts.keys() <= only_python
        assert all(texts[each.name].help for each in fields(options) if each.name in texts)
    assert ENGINE.keys() > aliases.ENGINE.keys()


def test_the_guide_lists_every_option() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    for options in (EngineOptions, SamplingParams):
        assert [each.name for each in fields(options) if f"`{each.name}`" not in guide] == []


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("graph_sizes=[1,2]", [1, 2]),
        ("graph_sizes=1, 2", [1, 2]),
        ("cudagraph_capture_sizes=1,2", [1, 2]),
        ("strict=true", True),
        ("enable-prefix-caching=OFF", False),
        ("fuse=none", "none"),
        ("graph_mode=none", "none"),
        ("max_graph_tokens=none", None),
        ("dtype=bfloat16", "bfloat16"),
        ("max_num_seqs=64", 64),
        ("max_padding_ratio=0.25", 0.25),
        ("tensor_parallel_size=2", 2),
        ("quantization=awq", "awq"),
        ("quantization=None", None),
        ('compilation_config={"cudagraph_mode": "FULL"}', {"cudagraph_mode": "FULL"}),
        ("of_nobody=[1]", [1]),
        # Of another kind: left as they are, for the check of the option to refuse.
        ("max_num_seqs=many", "many"),
        ("max_num_seqs=", ""),
        ("graph_sizes=a,b", "a,b"),
        ("strict=maybe", "maybe"),
        ("max_padding_ratio=0,5", "0,5"),
    ],
)
def test_a_value_is_read_as_its_option_says(written: str, value: Any) -> None:
    name, read = named_value(written, ENGINE)
    assert (name, read) == (written.partition("=")[0].replace("-", "_"), value)
    assert type(read) is type(value)


def test_an_option_without_a_value_is_refused() -> None:
    with pytest.raises(InputError, match=r"option 'fuse' has no value; write NAME=VALUE"):
        named_value("fuse", ENGINE)


@given(st.integers(), st.floats(allow_nan=False), st.lists(st.integers(), min_size=1), st.text())
def test_what_is_written_is_what_is_read(integer: int, number: float, integers: list[int], text: str) -> None:
    assert TextOption("x", Kind.INTEGER).read(str(integer)) == integer
    assert TextOption("x", Kind.NUMBER).read(str(number)) == number
    assert TextOption("x", Kind.INTEGERS).read(json.dumps(integers)) == integers
    assert TextOption("x", Kind.TEXT).read(text) == text
    assert TextOption("x", Kind.VALUE).read(json.dumps({"text": text})) == {"text": text}
