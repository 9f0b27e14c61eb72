"""The engine's client alone, on an engine process that the test plays."""

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from graphmode.engine.config import EngineOptions
from graphmode.engine.outputs import NewTokens
from graphmode.engine.requests import Request
from graphmode.engine.sampling_params import SamplingParams
from graphmode.errors import DeadlineExceededError, EngineDownError, InputError, OverloadedError
from graphmode.serve.client import EngineClient, QueueLimits, TokenStream
from graphmode.serve.messages import Abort, FromEngine, ModelInfo, Ready, Refused, Start, Step, StepFailed, Stop, Submit

INFO = ModelInfo("m", "float32", "cpu", 64, 2, 8, 100, [0], [4], [16], "none", {})


class PlayedProcess:
    """Notes what is sent to the engine; the test says what comes back."""

    def __init__(self) -> None:
        self.sent: list[object] = []
        self.inbox: asyncio.Queue[FromEngine] = asyncio.Queue()
        self._ended = asyncio.get_running_loop().create_future()

    async def start(self, start: Start) -> None:
        self.sent.append(start)

    def send(self, message: object) -> None:
        self.sent.append(message)
        if isinstance(message, Stop):
            self.end("stopped")

    def end(self, cause: str) -> None:
        if not self._ended.done():
            self._ended.set_result(cause)

    def kill(self) -> None:
        self.end("killed")

    async def receive(self) -> list[FromEngine]:
        return [await self.inbox.get()]

    async def ended(self) -> str:
        return await asyncio.shield(self._ended)

    async def wait(self) -> None:
        await self.ended()

    def remove_folder(self) -> None: ...

    def close(self) -> None: ...

    def says(self, message: FromEngine) -> None:
        self.inbox.put_nowait(message)

    def makes(self, *answers: NewTokens) -> None:
        self.says(Step(list(answers)))


class Played:
    """A client that is ready, and the processes that it started."""

    def __init__(self, patch: pytest.MonkeyPatch, **options: Any) -> None:
        self.processes: list[PlayedProcess] = []
        self._patch = patch
        self._options = options

    async def __aenter__(self) -> "Played":
        def make() -> PlayedProcess:
            self.processes.append(PlayedProcess())
            return self.processes[-1]

        self._patch.setattr("graphmode.serve.client.EngineProcess", make)
        self.client = EngineClient("m", EngineOptions(), **self._options)
        await self.client.start()
        await self.ready()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.close(0)

    async def ready(self) -> None:
        while not self.processes or self.processes[-1].inbox is None:
            await asyncio.sleep(0)
        self.engine.says(Ready(INFO))
        await self.client.wait_ready()

    @property
    def engine(self) -> PlayedProcess:
        return self.processes[-1]

    def asks(self, n: int = 1, **given: Any) -> TokenStream:
        return self.client.generate(Request([1, 2], SamplingParams(n=n)), **given)

    async def turns(self) -> None:
        """Let the client take in what was said."""
        while not self.engine.inbox.empty():
            await asyncio.sleep(0)
        await asyncio.sleep(0)


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 30))


async def rest_of(stream: TokenStream) -> list[NewTokens]:
    return [new async for news in stream for new in news]


def test_tokens_that_nobody_read_come_together_and_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with Played(monkeypatch) as played:
            slow, quick = played.asks(), played.asks()
            for token in range(5):
                played.engine.makes(NewTokens(slow.request_id, 0, [token]), NewTokens(quick.request_id, 0, [token]))
                assert [new.token_ids for new in await anext(quick)] == [[token]]
            assert slow.unread == 5
            assert [new.token_ids for new in await anext(slow)] == [[token] for token in range(5)]
            assert slow.unread == 0

    run(body())


def test_streams_have_their_turn_while_there_is_always_more_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with Played(monkeypatch) as played:
            stream = played.asks()
            unread = []

            async def receive() -> list[FromEngine]:
                unread.append(stream.unread)
                assert len(unread) < 100
                return [Step([NewTokens(stream.request_id, 0, [1])])]

            monkeypatch.setattr(played.engine, "receive", receive)
            played.engine.makes()
            for _ in range(10):
                await anext(stream)
            stream.close()
            monkeypatch.undo()

    run(body())


def test_a_stream_ends_with_the_last_of_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with Played(monkeypatch) as played:
            stream = played.asks(n=2)
            played.engine.makes(NewTokens(stream.request_id, 1, [5], finish_reason="stop"))
            played.engine.makes(NewTokens(stream.request_id, 0, [6], finish_reason="length"))
            assert [new.index for new in await rest_of(stream)] == [1, 0]
            stream.close()
            assert not any(isinstance(each, Abort) for each in played.engine.sent)

    run(body())


def test_closing_aborts_once_and_what_still_comes_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with Played(monkeypatch) as played:
            async with aclosing(played.asks()) as stream:
                stream.end(0)
            stream.close()
            assert played.engine.sent[-2:] == [
                Abort(stream.request_id, 0, "stop"),
                Abort(stream.request_id, None, "abort"),
            ]
            other = played.asks()
            played.engine.makes(NewTokens(stream.request_id, 0, [5]), NewTokens(other.request_id, 0, [6]))
            assert [new.token_ids for new in await anext(other)] == [[6]]
            assert await rest_of(stream) == []

    run(body())


def test_one_more_than_run_and_wait_is_refused_until_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with Played(monkeypatch, limits=QueueLimits(max_waiting=1)) as played:  # two run
            first, second = played.asks(n=2), played.asks()
            with pytest.raises(OverloadedError, match=r"3 answers .*max_num_seqs=2 and max_waiting=1") as refused:
                played.asks()
            assert refused.value.retry_after >= 1
            assert sum(isinstance(each, Submit) for each in played.engine.sent) == 2
            played.engine.makes(NewTokens(first.request_id, 0, [], finish_reason="stop"))
            await anext(first)
            third = played.asks()
            with pytest.raises(OverloadedError):
                played.asks()
            second.close()
            third.close()
            first.close()
            wide = played.asks(n=50)  # alone, any number is accepted
            wide.close()

    run(body())


def test_a_request_is_aborted_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with Played(monkeypatch, limits=QueueLimits(deadline_seconds=0.01)) as played:
            stream, patient = played.asks(), played.asks(deadline_seconds=60)
            with pytest.raises(DeadlineExceededError, match=r"0\.01 s"):
                await anext(stream)
            assert played.engine.sent[-1] == Abort(stream.request_id, None, "abort")
            played.engine.makes(NewTokens(patient.request_id, 0, [1], finish_reason="stop"))
            assert len(await rest_of(patient)) == 1

    run(body())


def test_what_the_engine_refuses_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with Played(monkeypatch) as played:
            unfit, other, broken = played.asks(), played.asks(), played.asks()
            played.engine.says(Refused(unfit.request_id, "too long", of_input=True))
            played.engine.says(StepFailed([broken.request_id], "a step failed: seeded"))
            with pytest.raises(InputError, match="too long"):
                await anext(unfit)
            with pytest.raises(EngineDownError, match="seeded"):
                await anext(broken)
            played.engine.makes(NewTokens(other.request_id, 0, [1], finish_reason="stop"))
            assert len(await rest_of(other)) == 1

    run(body())


def test_what_a_dead_engine_had_fails_with_the_cause_and_the_next_one_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphmode.serve.watchdog.Restarts.next_wait", lambda self, now: 0.0)

    async def body() -> None:
        async with Played(monkeypatch) as played:
            stream, other = played.asks(), played.asks()
            played.engine.makes(NewTokens(stream.request_id, 0, [1]))
            await played.turns()
            played.engine.end("the lights went out")
            assert len(await anext(stream)) == 1  # what came before is not lost
            with pytest.raises(EngineDownError, match="the lights went out") as down:
                await anext(stream)
            assert down.value.retry_after is not None
            with pytest.raises(EngineDownError, match="the lights went out") as of_other:
                await anext(other)
            assert of_other.value is not down.value  # each raise adds to what its traceback holds
            state = played.client.state
            assert (state.phase, state.cause, state.restarts) == ("starting", "the lights went out", 1)
            with pytest.raises(EngineDownError, match="starting: the lights went out"):
                played.asks()
            while len(played.processes) < 2:
                await asyncio.sleep(0)
            await played.ready()
            stream = played.asks()
            played.engine.makes(NewTokens(stream.request_id, 0, [1], finish_reason="stop"))
            assert len(await rest_of(stream)) == 1

    run(body())


@pytest.mark.parametrize("restart", [True, False])
def test_it_is_dead_for_good_where_it_never_was_ready_or_is_not_to_be_started_again(
    monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    async def body() -> None:
        played = Played(monkeypatch, restart=restart)
        if restart:  # it never was ready
            monkeypatch.setattr(Played, "ready", lambda self: asyncio.sleep(0))
        async with played:
            while not played.processes:
                await asyncio.sleep(0)
            played.engine.end("no such model")
            while played.client.state.phase != "dead":
                await asyncio.sleep(0)
            with pytest.raises(EngineDownError, match="no such model"):
                await played.client.wait_ready()
            with pytest.raises(EngineDownError, match="no such model") as down:
                played.asks()
            assert down.value.retry_after is None
            assert len(played.processes) == 1

    run(body())


def test_draining_lets_requests_end_and_accepts_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with Played(monkeypatch) as played:
            stream = played.asks()
            closing = asyncio.create_task(played.client.close(30))
            await asyncio.sleep(0)
            with pytest.raises(EngineDownError, match="stopping"):
                played.asks()
            played.engine.makes(NewTokens(stream.request_id, 0, [1], finish_reason="stop"))
            assert len(await rest_of(stream)) == 1
            await closing
            assert isinstance(played.engine.sent[-1], Stop)

    run(body())


def test_what_has_not_ended_at_the_end_of_the_drain_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with Played(monkeypatch) as played:
            stream = played.asks()
            await played.client.close(0.01)
            with pytest.raises(EngineDownError, match="stopping"):
                await anext(stream)

    run(body())
