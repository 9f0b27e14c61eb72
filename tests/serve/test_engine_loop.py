"""The loop of the engine process, on a played core, in this process."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from threading import Event, Thread
from typing import Any

import pytest
import torch
import zmq

from graphmode.engine.config import EngineOptions
from graphmode.engine.outputs import NewTokens
from graphmode.engine.requests import Request
from graphmode.engine.sampling_params import SamplingParams
from graphmode.errors import EngineError
from graphmode.serve import messages
from graphmode.serve.engine_process import EngineLoop, _Pulse
from graphmode.serve.messages import Abort, Refused, Step, StepFailed, Stop, ToEngine
from tests.serve.faulty_engine import LOSE_DEVICE, RAISE, UNFIT, PlayedCore


class Pair:
    """The ends of a loop's sockets that the HTTP process has, and the loop."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        kinds = (zmq.PULL, zmq.PUSH, zmq.PUSH, zmq.PULL)
        inbox, self._send, outbox, self._receive = (self.context.socket(kind) for kind in kinds)
        for bound, connected, name in ((inbox, self._send, "in"), (self._receive, outbox, "out")):
            bound.bind(f"inproc://{name}")
            connected.connect(f"inproc://{name}")
        self.core = PlayedCore("played", EngineOptions(), lambda done, total: None)
        self.loop = EngineLoop(self.core, inbox, outbox)  # type: ignore[arg-type]

    def send(self, *sent: ToEngine) -> None:
        for message in sent:
            self._send.send(messages.encode(message))

    def submit(self, request_id: str, first: int = 1, max_tokens: int = 3) -> None:
        self.send(messages.submission(request_id, Request([first, 10], SamplingParams(max_tokens=max_tokens))))

    def at_step(self, number: int, action: Callable[[], None]) -> None:
        """Do something while the core computes its step of that number."""
        step = self.core._step

        def acting() -> list[NewTokens]:
            if self.core.graphs.stats.steps == number:
                action()
            return step()

        self.core._step = acting  # type: ignore[method-assign]

    def received(self, *, wait: bool = False) -> list[Any]:
        """Return what the loop has sent; wait until there is something."""
        found = []
        while self._receive.poll(None if wait and not found else 0):
            found.append(messages.decode_from_engine(self._receive.recv()))
        return found


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.context.destroy(linger=0)


def tokens_of(received: list[Any], request_id: str) -> list[list[int]]:
    steps = [each for each in received if isinstance(each, Step)]
    return [new.token_ids for step in steps for new in step.answers if new.request_id == request_id]


def test_a_step_is_one_message_with_the_tokens_of_all(pair: Pair) -> None:
    pair.submit("a")
    pair.submit("b")
    pair.at_step(2, lambda: pair.submit("c", max_tokens=1))
    pair.at_step(3, lambda: pair.send(Stop()))
    pair.loop.run()
    received = pair.received()
    assert [len(each.answers) for each in received if isinstance(each, Step)] == [2, 2, 2, 1]
    assert tokens_of(received, "a") == [[11], [12], [13]]
    assert tokens_of(received, "c") == [[11]]


def test_what_comes_in_a_step_is_taken_in_before_the_next(pair: Pair) -> None:
    pair.submit("a", max_tokens=100)
    pair.submit("b", max_tokens=5)
    pair.at_step(2, lambda: pair.send(Abort("a", None, "abort")))
    pair.at_step(4, lambda: pair.send(Stop()))
    pair.loop.run()
    assert tokens_of(pair.received(), "a") == [[11], [12], [13], []]


def test_a_request_that_does_not_fit_is_refused_alone(pair: Pair) -> None:
    pair.submit("bad", first=UNFIT)
    pair.submit("good", max_tokens=1)
    pair.at_step(0, lambda: pair.send(Stop()))
    pair.loop.run()
    received = pair.received()
    assert Refused("bad", "unfit", of_input=True) in received
    assert tokens_of(received, "good") == [[11]]


def test_a_step_that_raises_fails_what_ran_and_the_engine_goes_on(pair: Pair) -> None:
    pair.submit("a", max_tokens=100)
    pair.submit("bad", first=RAISE)
    pair.at_step(1, lambda: pair.send(Stop()))
    pair.at_step(0, lambda: pair.submit("later", max_tokens=1))
    pair.loop.run()
    received = pair.received()
    assert StepFailed(["a", "bad"], "a step failed: ValueError: seeded fault") in received
    assert tokens_of(received, "later") == [[11]]
    assert pair.loop._snapshot().failed_steps == 1


def test_a_device_that_does_not_answer_after_a_failed_step_ends_the_engine(pair: Pair) -> None:
    pair.submit("bad", first=LOSE_DEVICE)
    with pytest.raises(EngineError, match="seeded loss; the device does not answer any more: RuntimeError: no device"):
        pair.loop.run()


def test_an_error_of_the_device_ends_the_engine(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def illegal(token: int) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pair.core, "_fail_as", illegal)
    pair.submit("a")
    with pytest.raises(EngineError, match=r"illegal memory access .*; the device is not used after that"):
        pair.loop.run()


def test_snapshots_hold_what_the_core_counts(pair: Pair) -> None:
    snapshot = pair.loop._snapshot()
    assert (snapshot.kv_blocks_used, snapshot.kv_blocks_total, snapshot.replays) == ([1], [4], {"decode:8": 3})
    assert snapshot.stats["generated_tokens"] == 0
    assert messages.decode_from_engine(messages.encode(snapshot)) == snapshot


def test_signs_of_life_say_whether_the_thread_moves(pair: Pair) -> None:
    wakes, ends = Event(), Event()

    def stands_still_then_moves() -> None:
        wakes.wait()
        while not ends.is_set():
            sum(range(100))

    thread = Thread(target=stands_still_then_moves)
    thread.start()
    outbox = pair.context.socket(zmq.PUSH)
    outbox.connect("inproc://out")
    assert thread.ident is not None
    pulse = _Pulse(outbox, os.getppid(), thread.ident)
    pulse.computes_on_host, pulse.loop = False, pair.loop
    pulse.start()

    def moves() -> Iterator[int]:
        while True:
            [alive] = pair.received(wait=True)
            yield alive.moves

    with closing(moves()) as seen:
        next(seen)
        before = next(seen)
        assert next(seen) == before
        wakes.set()
        while next(seen) == before:
            pass
    ends.set()
    thread.join()
    pulse.end()
