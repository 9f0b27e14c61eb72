"""What is sent from one process to the other arrives as it was."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.engine.config import EngineOptions
from graphmode.engine.multimodal import Span, VisionItem, VisionPrompt
from graphmode.engine.outputs import NewTokens
from graphmode.engine.requests import Request
from graphmode.engine.sampling_params import SamplingParams
from graphmode.errors import InputError
from graphmode.graph import get_backend
from graphmode.serve import messages
from graphmode.serve.messages import Step, Submit

TOKENS = st.integers(0, 2**31 - 1)
FLOATS = st.floats(allow_nan=False, width=32)
LOGPROBS = st.none() | st.lists(
    st.dictionaries(TOKENS, st.tuples(FLOATS, st.integers(1, 10**6))) | st.binary(max_size=20),
    max_size=3,
)
RESTRICTIONS = st.fixed_dictionaries(
    {},
    optional={
        "allowed_token_ids": st.lists(TOKENS, min_size=1, max_size=3),
        "bad_words": st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=2),
    },
) | st.sampled_from([{"regex": "[0-9]+"}, {"choice": ["a", "b"]}, {"json": {"type": "object"}}]).map(
    lambda held: {"structured_outputs": held}
)
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100), max_size=3),
        "max_tokens": st.none() | st.integers(1, 100),
        "stop": st.text(st.characters(codec="utf-8"), min_size=1) | st.lists(st.just("end"), max_size=2),
        "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
        "n": st.integers(1, 4),
        "logprobs": st.none() | st.integers(-1, 20),
    },
)


def as_received(request: Request) -> Request:
    message = messages.decode_to_engine(messages.encode(messages.submission("7", request)))
    assert isinstance(message, Submit)
    return messages.submitted(message)


@given(prompt=st.lists(TOKENS, min_size=1), params=PARAMS, restrictions=RESTRICTIONS, priority=st.integers(-5, 5))
def test_requests_arrive(
    prompt: list[int], params: dict[str, Any], restrictions: dict[str, Any], priority: int
) -> None:
    sent = SamplingParams(**params, **restrictions)
    received = as_received(Request(prompt, sent, priority=priority))
    assert list(received.prompt_token_ids) == prompt
    assert received.params == sent
    assert (received.request_id, received.priority, received.vision) == ("7", priority, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_arrive_each_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    image = VisionItem("image", torch.randn(8, 6).to(dtype), (2, 2, 2))
    video = VisionItem("video", torch.randn(16, 6).to(dtype), (4, 2, 2), seconds_per_grid=0.5)
    spans = (Span(0, 2, image, 0), Span(3, 5, video, 0), Span(6, 8, video, 2))
    sent = VisionPrompt(spans, torch.arange(27).view(9, 3))
    received = as_received(Request([1] * 9, SamplingParams(), vision=sent)).vision
    assert received is not None
    assert received.positions.equal(sent.positions)
    assert received.contents == sent.contents
    assert received.spans[1].item is received.spans[2].item
    for before, after in zip(sent.spans, received.spans, strict=True):
        assert (after.start, after.end, after.first_unit) == (before.start, before.end, before.first_unit)
        assert (after.item.kind, after.item.grid) == (before.item.kind, before.item.grid)
        assert after.item.seconds_per_grid == before.item.seconds_per_grid
        assert after.item.pixels.equal(before.item.pixels)


@given(
    st.lists(
        st.builds(
            NewTokens,
            st.text(st.characters(codec="utf-8")),
            st.integers(0, 9),
            st.lists(TOKENS),
            LOGPROBS,
            LOGPROBS,
            st.integers(0, 99),
            st.sampled_from([None, "stop", "length", "abort"]),
            st.none() | TOKENS,
        )
    )
)
def test_steps_arrive(sent: list[NewTokens]) -> None:
    assert messages.decode_from_engine(messages.encode(Step(sent))) == Step(sent)


def test_a_token_of_a_step_takes_few_bytes() -> None:
    step = [NewTokens(str(1000 + number), 0, [100_000 + number]) for number in range(256)]
    assert len(messages.encode(Step(step))) < 20 * 256


def test_options_arrive() -> None:
    sent = EngineOptions(device=torch.device("cpu"), dtype="float32", graph_sizes=[2, 1], seed=3, strict=True)
    start = messages.decode_to_engine(messages.encode(messages.start_message("a/b", sent, 20)))
    assert isinstance(start, messages.Start)
    received = EngineOptions(**start.options)
    for each in fields(EngineOptions):
        assert str(getattr(received, each.name)) == str(getattr(sent, each.name))
    assert (start.model, start.log_level) == ("a/b", 20)


@pytest.mark.parametrize("options", [{"device": get_backend("cpu")}, {"on_capture_failure": print}])
def test_objects_of_this_process_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))} .* plain value"):
        messages.start_message("model", EngineOptions(**options), 20)


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 10**30])
def test_tokens_that_no_model_has_are_refused(token: int) -> None:
    with pytest.raises(InputError, match="token id"):
        messages.submission("1", Request([1, token], SamplingParams()))
