"""Submit, abort and step: every request ends exactly once, whoever steps, and gets the tokens that it gets alone."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from graphmode import LLM, SamplingParams
from graphmode.engine.outputs import RequestOutput
from graphmode.engine.requests import Request
from graphmode.errors import EngineError, InputError

BLOCK = 2 * 2 * 16 * 2 * 16 * 4  # bytes: keys and values, layers, tokens, heads, dim, float32
OPTIONS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 16}
PROMPTS = [[number % 7 + 1] * 5 + list(range(number + 1, number + 2 + number * 5 % 23)) for number in range(12)]
PARAMS = [
    SamplingParams(temperature=0.8 * (number % 2), seed=number, max_tokens=1 + number * 7 % 19) for number in range(12)
]


@pytest.fixture(scope="module")
def llm(tiny: Path) -> LLM:
    """Blocks are so few that requests are preempted, and tokens come in bursts."""
    return LLM(tiny, decode_steps=3, kv_cache_memory=9 * BLOCK, **OPTIONS)


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    """The tokens of each request by itself."""
    outputs = [llm.generate(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    return [output.outputs[0].token_ids for (output,) in outputs]


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    while llm.engine.has_requests:
        llm.engine.step()
    llm.engine.step()
    assert not llm.engine.core.scheduler.has_work
    assert llm.engine.core.scheduler.blocks.num_free == (9,)


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def run_in_threads(count: int, work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(count) as threads:
        for done in [threads.submit(work, number) for number in range(count)]:
            done.result(timeout=120)


def test_streams_and_a_generate_between_them_get_what_each_gets_alone(llm: LLM, alone: list[list[int]]) -> None:
    streams = [llm.stream(PROMPTS[number], PARAMS[number]) for number in (3, 5, 8)]
    seen: list[list[list[int]]] = [[], [], []]
    for round_, outputs in enumerate(zip_longest(*streams)):
        for mine, output in zip(seen, outputs, strict=True):
            if output is not None:
                mine.append(tokens(output))
        if round_ == 2:
            assert [tokens(output) for output in llm.generate(PROMPTS, PARAMS)] == alone
    for mine, number in zip(seen, (3, 5, 8), strict=True):
        assert mine == [alone[number][:length] for length in range(1, len(alone[number]) + 1)]


def test_a_stream_of_several_prompts_gives_each_token_of_each(llm: LLM, alone: list[list[int]]) -> None:
    by_request: dict[str, list[RequestOutput]] = {}
    for output in llm.stream(PROMPTS, PARAMS):
        by_request.setdefault(output.request_id, []).append(output)
    assert len(by_request) == len(PROMPTS)
    for outputs in by_request.values():
        number = PROMPTS.index(outputs[0].prompt_token_ids)
        assert [tokens(output) for output in outputs] == [
            alone[number][:length] for length in range(1, len(alone[number]) + 1)
        ]
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_a_stream_of_several_answers_gives_each_token_of_each_and_ends_once(llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, seed=4, max_tokens=7, n=3)
    (whole,) = llm.generate(PROMPTS[2], params)
    outputs = list(llm.stream(PROMPTS[2], params))
    assert [output.finished for output in outputs] == [False] * (3 * 7 - 1) + [True]
    assert [sum(len(answer.token_ids) for answer in output.outputs) for output in outputs] == list(range(1, 22))
    assert outputs[-1].outputs == whole.outputs


def test_a_stream_that_is_dropped_ends_no_other_request(llm: LLM, alone: list[list[int]]) -> None:
    kept, dropped = llm.stream(PROMPTS[5], PARAMS[5]), llm.stream(PROMPTS, PARAMS)
    next(kept)
    next(dropped)
    del dropped
    *_, last = kept
    assert tokens(last) == alone[5]


def test_eight_threads_of_fifty_requests_with_aborts_between(llm: LLM, alone: list[list[int]]) -> None:
    aborted = [0] * 8

    def work(thread: int) -> None:
        for turn in range(50):
            number = (thread * 5 + turn) % len(PROMPTS)
            if turn % 5 == 1:  # a stream that is left early
                stream, length = llm.stream(PROMPTS[number], PARAMS[number]), 0
                for output, length in zip(stream, range(1, 2 + turn % 4), strict=False):
                    assert tokens(output) == alone[number][:length]
                aborted[thread] += length < len(alone[number])
                stream.close()  # type: ignore[attr-defined]
            elif turn % 5 == 3:
                *_, last = llm.stream(PROMPTS[number], PARAMS[number])
                assert tokens(last) == alone[number]
            else:
                (output,) = llm.generate(PROMPTS[number], PARAMS[number])
                assert tokens(output) == alone[number]

    run_in_threads(8, work)
    assert all(aborted)


def test_an_error_in_a_step_reaches_all_that_wait_and_the_engine_goes_on(llm: LLM, alone: list[list[int]]) -> None:
    launch, together = llm.engine.core.runner.launch, threading.Barrier(4)

    def fails(batch: Any) -> Any:
        if len(batch.scheduled) == 4:  # one row for each thread: all of them wait
            raise RuntimeError("the device is gone")
        return launch(batch)

    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        together.wait(timeout=60)
        with pytest.raises((RuntimeError, EngineError), match="the device is gone") as caught:
            llm.generate(PROMPTS[thread][:5], params)
        errors.append(caught.value)

    llm.engine.core.runner.launch = fails  # type: ignore[method-assign]
    try:
        run_in_threads(4, work)
    finally:
        llm.engine.core.runner.launch = launch  # type: ignore[method-assign]
    assert sorted(type(error).__name__ for error in errors) == ["EngineError"] * 3 + ["RuntimeError"]
    assert not llm.engine.has_requests
    assert [tokens(output) for output in llm.generate(PROMPTS, PARAMS)] == alone


def test_outputs_that_somebody_else_took_are_an_error_and_no_loop(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0, max_tokens=9))
    next(stream)
    while llm.engine.has_requests:
        llm.engine.step()
    with pytest.raises(EngineError, match="stepped by somebody else"):
        list(stream)


def test_requests_that_the_scheduler_does_not_have_are_an_error_and_no_loop(llm: LLM) -> None:
    llm.engine.submit(Request(PROMPTS[0], PARAMS[0]))
    llm.engine.core.scheduler._arrived.clear()
    with pytest.raises(EngineError, match="1 requests have not ended"):
        llm.engine.step()


def test_generating_inside_of_a_step_is_refused(llm: LLM) -> None:
    launch = llm.engine.core.runner.launch
    llm.engine.core.runner.launch = lambda batch: llm.generate(PROMPTS[0], PARAMS[0])  # type: ignore[assignment]
    try:
        with pytest.raises(EngineError, match="inside a step"):
            llm.generate(PROMPTS[0], PARAMS[0])
    finally:
        llm.engine.core.runner.launch = launch  # type: ignore[method-assign]


def test_names_of_requests(llm: LLM) -> None:
    engine = llm.engine
    request = Request(PROMPTS[2], PARAMS[2], request_id="mine")
    assert engine.submit(request) == "mine"
    with pytest.raises(InputError, match="'mine' is that of a request that has not ended"):
        engine.submit(request)
    given = engine.submit(Request(PROMPTS[2], PARAMS[2]))
    taken = engine.submit(Request(PROMPTS[2], PARAMS[2], request_id=str(int(given) + 1)))
    assert int(engine.submit(Request(PROMPTS[2], PARAMS[2]))) > int(taken)
    while engine.has_requests:
        engine.step()
    assert engine.submit(request) == "mine"
    for name in ("", 5):
        with pytest.raises(InputError, match=f"request_id is {name!r}; it must be a text that is not empty, or None"):
            engine.submit(Request(PROMPTS[0], PARAMS[0], request_id=name))  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_abort_ends_all_answers_that_have_not_ended_once(llm: LLM, steps: int) -> None:
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=40, n=3)
    name = engine.submit(Request([1, 2, 3], params, stream=False))
    for _ in range(steps):
        assert engine.step() == []
    engine.abort(name)
    engine.abort(name)
    (last,) = engine.step()
    assert last.finished
    assert [answer.finish_reason for answer in last.outputs] == ["abort"] * 3
    (whole,) = llm.generate([1, 2, 3], params)
    for answer, complete in zip(last.outputs, whole.outputs, strict=True):
        assert answer.token_ids == complete.token_ids[: len(answer.token_ids)]
    assert any(answer.token_ids for answer in last.outputs) == (steps > 1)
    engine.abort(name)
    engine.abort("nobody's")
    assert engine.step() == []


class EngineMachine(RuleBasedStateMachine):
    """Requests that come and are aborted at any time."""

    llm: LLM
    alone: list[list[int]]

    @initialize()
    def start(self) -> None:
        self.asked: dict[str, tuple[int, bool]] = {}
        self.ended: set[str] = set()
        self.aborted: set[str] = set()
        self.seen: dict[str, int] = {}

    @rule(number=st.integers(0, len(PROMPTS) - 1), stream=st.booleans(), named=st.booleans())
    def submit(self, number: int, stream: bool, named: bool) -> None:
        name = f"request {len(self.asked)}" if named else None
        request = Request(PROMPTS[number], PARAMS[number], request_id=name, stream=stream)
        request_id = self.llm.engine.submit(request)
        assert name in (None, request_id)
        assert request_id not in self.asked
        self.asked[request_id] = number, stream

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(list(self.asked)))
        self.llm.engine.abort(request_id)
        self.aborted |= {request_id} - self.ended

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(list(self.asked)))
        if request_id not in self.ended:
            with pytest.raises(InputError, match="has not ended"):
                self.llm.engine.submit(Request([1], PARAMS[0], request_id=request_id))

    @rule()
    def step(self) -> None:
        aborted = self.aborted - self.ended
        for output in self.llm.engine.step():
            number, stream = self.asked[output.request_id]
            (answer,) = output.outputs
            assert output.request_id not in self.ended
            assert output.finished == (answer.finish_reason is not None)
            assert answer.token_ids == self.alone[number][: len(answer.token_ids)]
            assert stream or output.finished
            if output.finished:
                self.ended.add(output.request_id)
            if output.request_id in aborted:
                assert answer.finish_reason == "abort"
            else:
                assert answer.finish_reason in (None, "length")
                assert output.finished == (answer.token_ids == self.alone[number])
                assert not stream or len(answer.token_ids) == self.seen.get(output.request_id, 0) + 1
            self.seen[output.request_id] = len(answer.token_ids)
        assert aborted <= self.ended, "an aborted request ends with the next step"

    def teardown(self) -> None:
        for _ in range(30 * (1 + len(getattr(self, "asked", ())))):
            if not self.llm.engine.has_requests:
                break
            self.step()
        assert not self.llm.engine.has_requests
        assert self.ended == set(getattr(self, "asked", ()))
        self.llm.engine.step()
        assert not self.llm.engine.core.scheduler.has_work
        assert self.llm.engine.core.scheduler.blocks.num_free == (9,)


def test_any_order_of_submit_abort_and_step(llm: LLM, alone: list[list[int]]) -> None:
    EngineMachine.llm, EngineMachine.alone = llm, alone
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=checks),
    )
