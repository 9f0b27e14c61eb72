"""Parameters are checked before any work, whatever was given; None and the names of vLLM's users are understood."""

import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode import SamplingParams
from graphmode.engine.aliases import SAMPLING, Alias, Refusal, named
from graphmode.graph import InputError

NAN, INF = float("nan"), float("inf")
BAD: list[tuple[str, Any, str]] = [
    ("max_tokens", 2.5, "max_tokens is 2.5; it must be an integer of at least 1, or None"),
    ("max_tokens", 0, "max_tokens is 0; it must be an integer of at least 1"),
    ("max_tokens", True, "max_tokens is True; it must be an integer"),
    ("max_tokens", "16", "max_tokens is '16'; it must be an integer"),
    ("max_tokens", 10**30, "max_tokens is 1000000"),
    ("min_tokens", 1.5, "min_tokens is 1.5; it must be an integer of at least 0"),
    ("min_tokens", 17, "min_tokens is 17, more than max_tokens=16"),
    ("top_k", 1.5, "top_k is 1.5; it must be an integer of at least -1, 0 or -1 is off"),
    ("top_k", -2, "top_k is -2; it must be an integer"),
    ("top_p", "0.5", "top_p is '0.5'; it must be a finite number above 0, 1 at most, 1 is off"),
    ("top_p", 0, "top_p is 0; it must be a finite number above 0"),
    ("top_p", 1e-60, "top_p is 1e-60; it must be a finite number above 0"),
    ("top_p", NAN, "top_p is nan"),
    ("min_p", 1.1, "min_p is 1.1; it must be a finite number from 0 to 1"),
    ("temperature", -0.1, "temperature is -0.1; it must be a finite number of at least 0, 0 is greedy"),
    ("temperature", INF, "temperature is inf"),
    ("temperature", 1e300, "temperature is 1e\\+300"),
    ("temperature", 10**400, "temperature is 1000"),
    ("temperature", "hot", "temperature is 'hot'; it must be a finite number"),
    ("temperature", True, "temperature is True; it must be a finite number"),
    ("temperature", [1.0], r"temperature is \[1.0\]"),
    ("repetition_penalty", 0.0, "repetition_penalty is 0.0; it must be a finite number above 0, 1 is off"),
    ("presence_penalty", 2.5, "presence_penalty is 2.5; it must be a finite number from -2 to 2"),
    ("frequency_penalty", NAN, "frequency_penalty is nan; it must be a finite number from -2 to 2"),
    ("logit_bias", {3: 101}, "logit_bias of token 3 is 101; it must be a finite number from -100 to 100"),
    ("logit_bias", {1.5: 1}, "a token of logit_bias is 1.5; it must be an integer"),
    ("logit_bias", {-1: 1}, "a token of logit_bias is -1"),
    ("logit_bias", [3], r"logit_bias is \[3\]; it must be a mapping"),
    ("logit_bias", dict.fromkeys(range(301), 1.0), "logit_bias names 301 tokens; it may name 300"),
    ("logprobs", 1.5, "logprobs is 1.5; it must be an integer from -1 to 20, -1 is the whole vocabulary, or None"),
    ("logprobs", 21, "logprobs is 21; it must be an integer from -1 to 20"),
    ("prompt_logprobs", -2, "prompt_logprobs is -2; it must be an integer from"),
    ("seed", 1.9, "seed is 1.9; it must be an integer"),
    ("seed", 2**63, "seed is 9223372036854775808"),
    ("ignore_eos", "no", "ignore_eos is 'no'; it must be True or False"),
    ("ignore_eos", 1, "ignore_eos is 1; it must be True or False"),
    ("stop", 7, "stop is 7; it must be a text or a list of texts"),
    ("stop", ["a", 7], r"stop is \['a', 7\]; it must be a list of texts that are not empty"),
    ("stop", ["a", ""], "that are not empty"),
    ("stop", "", "that are not empty"),
    ("stop", b"a", "stop is b'a'; it must be a text"),
    ("stop", ["a\ud800"], "stop holds '.ud800' at character 1, half of a surrogate pair"),
    ("stop_token_ids", 7, "stop_token_ids is 7; it must be a list of token ids"),
    ("stop_token_ids", np.array(7), r"stop_token_ids is array\(7\)"),
    ("stop_token_ids", torch.zeros(1, 1), "stop_token_ids is tensor"),
    ("stop", np.array("a"), "stop is array"),
    ("stop_token_ids", ["a"], "stop_token_ids holds 'a'; it must be a list of token ids, integers"),
    ("stop_token_ids", "ab", "stop_token_ids is 'ab'"),
    ("stop_token_ids", [1, None], "stop_token_ids holds None"),
    ("stop_token_ids", [1.0], "stop_token_ids holds 1.0"),
    ("stop_token_ids", [True], "stop_token_ids holds True"),
    ("stop_token_ids", [-1], "stop_token_ids holds -1; token ids are 0 or more"),
    ("allowed_token_ids", [], "allowed_token_ids is empty, which allows nothing"),
    ("allowed_token_ids", 7, "allowed_token_ids is 7; it must be a list of token ids, or None"),
    ("allowed_token_ids", ["a"], "allowed_token_ids holds 'a'"),
    ("bad_words", ["a", ""], "that are not empty"),
    ("bad_words", [["a"]], r"bad_words is \[\['a'\]\]; it must be a list of texts"),
    ("n", 0, "n is 0; it must be an integer of at least 1"),
    (
        "n",
        10**9,
        "n is 1000000000; it may be at most 16384. The host keeps at least 1024 bytes of an answer, 953.7 GiB",
    ),
    ("n", 1.0, "n is 1.0"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_a_value_of_another_type_or_range_is_refused(name: str, value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        SamplingParams(**{name: value})


@given(
    st.sampled_from([each.name for each in fields(SamplingParams)]),
    st.one_of(
        st.integers(),
        st.floats(),
        st.text(max_size=3),
        st.binary(max_size=3),
        st.booleans(),
        st.complex_numbers(),
        st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=2), st.none()), max_size=3),
        st.dictionaries(st.one_of(st.integers(), st.text(max_size=2)), st.floats(), max_size=2),
        st.just(object()),
    ),
)
def test_whatever_is_given_is_taken_or_refused(name: str, value: Any) -> None:
    """No other error, and what is taken is of plain types."""
    try:
        params = SamplingParams(**{name: value})
    except InputError:
        return
    taken = getattr(params, name)
    assert type(taken) in (int, float, bool, tuple, dict, type(None))
    assert pickle.loads(pickle.dumps(params)) == params == replace(params)


def test_numpys_and_torchs_numbers_are_numbers() -> None:
    given_ = SamplingParams(
        max_tokens=np.int64(3),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        ignore_eos=np.bool_(True),  # type: ignore[arg-type]
        stop_token_ids=torch.tensor([4, 5]),  # type: ignore[arg-type]
        logit_bias={np.int32(3): np.float64(2), "7": 1},  # type: ignore[dict-item]
    )
    plain = SamplingParams(
        max_tokens=3, temperature=0.5, ignore_eos=True, stop_token_ids=(4, 5), logit_bias={3: 2.0, 7: 1.0}
    )
    assert given_ == plain
    assert type(given_.max_tokens) is int


def test_none_stands_for_the_default() -> None:
    """Of every parameter; of max_tokens it is the model's limit."""
    nothing: dict[str, Any] = {each.name: None for each in fields(SamplingParams)}
    assert SamplingParams(**nothing) == SamplingParams(max_tokens=None)
    assert SamplingParams(max_tokens=None).max_tokens is None
    assert SamplingParams(max_tokens=None, min_tokens=5).min_tokens == 5


def test_spellings_of_the_same() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(stop="ab") == SamplingParams(stop=["ab"])
    assert SamplingParams(stop_token_ids={4}) == SamplingParams(stop_token_ids=[4])


@pytest.mark.parametrize("name", [name for name, other in SAMPLING.items() if isinstance(other, Refusal)])
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}=.* cannot be honoured: [a-z].*"):
        SamplingParams(**{name: "something"})
    assert SamplingParams(**{name: None}) == SamplingParams()


def test_a_name_that_nobody_knows_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"no temprature; did you mean temperature\? It has temperature, top_k"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"given 0\.5 without a name"):
        SamplingParams(0.5)  # type: ignore[misc]


def test_other_names_mean_the_same() -> None:
    given_ = SamplingParams(max_new_tokens=3, num_return_sequences=2, num_beams=1)  # type: ignore[call-arg]
    assert given_ == SamplingParams(max_tokens=3, n=2)
    with pytest.raises(InputError, match="max_new_tokens=3 and max_tokens=4 contradict"):
        SamplingParams(max_new_tokens=3, max_tokens=4)  # type: ignore[call-arg]


def test_other_names_become_ours() -> None:
    names = {
        "other": Alias("ours"),
        "config": Alias(options=lambda value: {"ours": value["ours"]}),
        "never": Refusal("it is not there", harmless=(None, False)),
    }

    def read(**given_: Any) -> dict[str, Any]:
        return named("Options", given_, ["ours", "also"], names)

    assert read(other=1, also=2) == {"ours": 1, "also": 2}
    assert read(config={"ours": 3}, never=False) == {"ours": 3}
    assert read(ours=1, other=1) == {"ours": 1}
    with pytest.raises(InputError, match="other=1 and ours=2 contradict; give one"):
        read(ours=2, other=1)
    with pytest.raises(InputError, match="never=0 cannot be honoured: it is not there"):
        read(never=0)
