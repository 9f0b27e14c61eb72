"""The engine's core gives tokens alone; text is made of what it gives, here or in another process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from graphmode import LLM, SamplingParams
from graphmode.engine.config import EngineOptions
from graphmode.engine.core import EngineCore
from graphmode.engine.outputs import Delta, NewTokens, RequestOutput
from graphmode.engine.requests import ActiveRequest, Request
from graphmode.engine.text import Detokenizer
from graphmode.errors import InputError


@pytest.fixture(scope="module")
def llm(bundled: Path) -> LLM:
    return LLM(bundled, device="cpu", enforce_eager=True, max_num_seqs=4, max_num_batched_tokens=64, decode_steps=3)


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    core = llm.engine.core
    while core.has_requests:
        core.step()
    core.step()
    assert not core.scheduler.has_work
    assert core.scheduler.blocks.num_free == core.num_blocks


PROMPT = list(range(20, 40))


def run_apart(llm: LLM, params: SamplingParams, every: int = 1) -> tuple[RequestOutput, list[Delta]]:
    """Do what an HTTP process does: tokens come as messages, ``every`` of them are made to text together."""
    core, tokenizer = llm.engine.core, llm.get_tokenizer()
    request = Request(PROMPT, params)
    request_id = core.submit(request)
    active = ActiveRequest(request, request_id, Detokenizer(tokenizer))
    deltas: list[Delta] = []
    waiting: list[NewTokens] = []
    while core.has_requests:
        waiting += msgspec.msgpack.decode(msgspec.msgpack.encode(core.step()), type=list[NewTokens])
        if len(waiting) >= every or not core.has_requests:
            for index in dict.fromkeys(new.index for new in waiting):
                ended = active.answers[index].finish_reason is not None
                for new in waiting:
                    if new.index == index:
                        answer = active.take_in(new)
                        if answer.finish_reason is not None and new.finish_reason is None:
                            core.abort(request_id, index, "stop")
                if not ended:
                    deltas.append(active.answers[index].delta())
            waiting = []
    assert active.finished
    return active.output(), deltas


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3, "temperature": 0.9, "logprobs": 2, "prompt_logprobs": 1},
        {"logprobs": -1, "max_tokens": 4},
        {"stop": True, "logprobs": 0, "n": 2},
        {"stop": True, "include_stop_str_in_output": True},
        {"detokenize": False},
    ],
)
def test_text_made_in_another_process_is_that_of_the_engine(llm: LLM, options: dict[str, Any], every: int) -> None:
    params = SamplingParams(**{"temperature": 0, "seed": 3, "max_tokens": 24, **options, "stop": ()})
    if options.get("stop"):
        text = llm.generate(PROMPT, params)[0].outputs[0].text
        params = SamplingParams(**{**vars(params), "stop": [text[9:12]]})
    (expected,) = llm.generate(PROMPT, params)
    output, deltas = run_apart(llm, params, every)
    assert [vars(each) | {"logprobs": None} for each in output.outputs] == [
        vars(each) | {"logprobs": None} for each in expected.outputs
    ]
    assert output.prompt_logprobs == expected.prompt_logprobs
    for answer, whole in zip(output.outputs, expected.outputs, strict=True):
        assert list(map(dict, answer.logprobs or [])) == list(map(dict, whole.logprobs or []))
        of_it = [delta for delta in deltas if delta.index == answer.index]
        assert "".join(delta.text for delta in of_it) == whole.text
        assert [token for delta in of_it for token in delta.token_ids] == whole.token_ids
        assert sum(len(delta.logprobs or ()) for delta in of_it) == len(whole.logprobs or ())
        assert [delta.finish_reason for delta in of_it] == [None] * (len(of_it) - 1) + [whole.finish_reason]
        assert of_it[-1].stop_reason == whole.stop_reason


def test_one_answer_is_aborted_and_the_others_go_on(llm: LLM) -> None:
    core, params = llm.engine.core, SamplingParams(temperature=0, max_tokens=30, n=3)
    name = core.submit(Request(PROMPT, params))
    news = [new for _ in range(3) for new in core.step()]
    core.abort(name, 1, "stop")
    core.abort(name, 1)
    core.abort(name, 7)
    while core.has_requests:
        news += core.step()
    ends = {new.index: new.finish_reason for new in news if new.finish_reason is not None}
    assert ends == {0: "length", 1: "stop", 2: "length"}
    assert [new.finish_reason for new in news].count("stop") == 1
    lengths = [sum(len(new.token_ids) for new in news if new.index == index) for index in range(3)]
    assert lengths[0] == lengths[2] == 30 > lengths[1]
    assert max(len(new.token_ids) for new in news) == 3, "a burst's tokens come together"


def test_a_name_is_taken_where_its_owner_says_so(llm: LLM) -> None:
    core, request = llm.engine.core, Request(PROMPT, SamplingParams(max_tokens=1))
    number = int(core.submit(request))
    assert core.submit(request, {str(number + 1), str(number + 2)}) == str(number + 3)
    with pytest.raises(InputError, match="'mine' is that of a request that has not ended"):
        core.submit(Request(PROMPT, request.params, request_id="mine"), {"mine"})


def test_captures_are_reported_as_they_are_done(tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = EngineOptions(device="cpu", max_num_seqs=2, graph_sizes=[1, 2])
    core = EngineCore(tiny, options, on_capture=lambda done, total: seen.append((done, total)))
    total = core.stats.graphs
    assert seen == [(done, total) for done in range(total + 1)]


def test_what_runs_and_waits_is_counted(tiny: Path) -> None:
    block = 2 * 2 * 16 * 2 * 16 * 4
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "graph_sizes": [1, 2, 32], "kv_cache_memory": 9 * block}
    core = EngineCore(tiny, EngineOptions(device="cpu", **options))
    assert (core.stats.running, core.stats.waiting, core.stats.blocks_used) == (0, 0, [0])
    core.submit(Request([7] * 20, SamplingParams(temperature=0, max_tokens=4, n=3)))
    core.step()
    stats = core.stats
    assert (stats.running, stats.waiting, stats.blocks_used, stats.blocks_total) == (2, 1, [3], [9])
    while core.has_requests:
        core.step()
    core.step()
    stats = core.stats
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, [0])
    assert (stats.prefix_queries, stats.prefix_hits) == (60, 16), "the third finds a block of the first two"
    assert sum(stats.queue_seconds) == 1
    assert sum(steps for sizes in stats.buckets.values() for steps in sizes.values()) == stats.replays == stats.steps
    assert set(stats.buckets["decode"]) <= {1, 2}
    padded = sum(size * steps for sizes in stats.buckets.values() for size, steps in sizes.items())
    assert padded == stats.rows + stats.padded_rows
    assert stats.decode_steps > 0
    assert msgspec.json.decode(msgspec.json.encode(stats.as_dict()))["waiting"] == 0


def test_priorities_decide_who_runs_first(llm: LLM) -> None:
    core = llm.engine.core
    names = [
        core.submit(Request(PROMPT, SamplingParams(temperature=0, max_tokens=3, n=4), priority=priority))
        for priority in (1, 1, 0, -1)
    ]
    ended: dict[str, None] = {}
    while core.has_requests:
        ended |= dict.fromkeys(new.request_id for new in core.step() if new.finish_reason is not None)
    assert list(ended) == [names[3], names[2], names[0], names[1]]


def test_prompts_of_one_call_have_priorities(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3)
    outputs = llm.stream([PROMPT[:4]] * 8, params, priority=[1, 1, 1, 1, 0, 0, 0, 0])
    ended = [int(output.request_id) for output in outputs if output.finished]
    first = min(ended)
    assert [number - first for number in ended] == [4, 5, 6, 7, 0, 1, 2, 3]
    one, other = (llm.generate(PROMPT, params, priority=priority) for priority in (None, 7))
    assert one[0].outputs == other[0].outputs
