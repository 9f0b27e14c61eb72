"""The engine process as the HTTP process sees it: requests go in, tokens come out, and it is watched."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal

from graphmode.engine.config import EngineOptions
from graphmode.engine.outputs import FinishReason, NewTokens
from graphmode.engine.requests import Request
from graphmode.errors import DeadlineExceededError, EngineDownError, EngineError, InputError, OverloadedError
from graphmode.serve.messages import (
    Abort,
    Alive,
    Capturing,
    EngineSnapshot,
    FromEngine,
    ModelInfo,
    Ready,
    Refused,
    Step,
    StepFailed,
    Stop,
    start_message,
    submission,
)
from graphmode.serve.supervisor import EngineProcess
from graphmode.serve.watchdog import Restarts, Watchdog

log = logging.getLogger(__name__)

Phase = Literal["starting", "ready", "stalled", "dead", "stopping"]

_TICK_SECONDS = 0.25
_EXIT_SECONDS = 10.0
"""How long the engine process may take to exit when it is told to."""
_LONGEST_RETRY_SECONDS = 60.0


@dataclass(frozen=True)
class QueueLimits:
    """How much is accepted.

    Attributes:
        max_waiting: answers that may wait beside those that the engine can run together (``max_num_seqs``).
        deadline_seconds: how long a request may take, waiting included; None: without end.
    """

    max_waiting: int = 512
    deadline_seconds: float | None = None


@dataclass(frozen=True)
class EngineState:
    """How the engine is.

    Attributes:
        phase: ``starting`` (for the first time or again), ``ready``, ``stalled`` (about to be killed), ``dead`` (for
            good) or ``stopping``.
        cause: why it is not ready, in a sentence; while it starts again, why it has to. None where nothing went wrong.
        captured: graphs captured while it starts.
        to_capture: graphs to capture in all.
        restarts: how often it was started again.
    """

    phase: Phase
    cause: str | None = None
    captured: int = 0
    to_capture: int = 0
    restarts: int = 0


class TokenStream:
    """The new tokens of one request, as they come: an asynchronous iterator of lists.

    What came since the last look is given together, so that a reader who is slow gets more at a time and holds nobody
    up. It ends when all answers have ended. Close it when you leave it: that aborts what has not ended.

    Raises:
        InputError: the request does not fit the model.
        EngineDownError: the engine died, stands still, was stopped, or a step failed.
        DeadlineExceededError: the request took too long.
    """

    def __init__(self, client: EngineClient, request_id: str, answers: int) -> None:
        self.request_id = request_id
        self._client = client
        self._unfinished = answers
        self._pending: list[NewTokens] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> list[NewTokens]:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pending, self._pending = self._pending, []
        return pending

    @property
    def unread(self) -> int:
        """Tokens that came and were not read. They are ``max_tokens`` of each answer at most."""
        return sum(len(each.token_ids) for each in self._pending)

    def end(self, index: int, reason: FinishReason = "stop") -> None:
        """End one answer, whose text has come to its end. Its last tokens say so, for this reason."""
        self._client._abort(self, index, reason)

    def close(self) -> None:
        """Abort the answers that have not ended; what was not read is dropped. Closing again does nothing."""
        self._client._abort(self, None, "abort")
        self._finish()
        self._pending.clear()
        self._wake()

    async def aclose(self) -> None:
        """Do what :meth:`close` does, for ``contextlib.aclosing``."""
        self.close()

    def _take_in(self, new: NewTokens) -> None:
        self._pending.append(new)
        if new.finish_reason is not None:
            self._unfinished -= 1
            self._client._note_end(self, 1)
        self._wake()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._finish()
        self._wake()

    def _finish(self) -> None:
        """Note that no more comes."""
        unfinished, self._unfinished = self._unfinished, 0
        self._client._forget(self, unfinished)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _expect_by(self, seconds: float | None) -> None:
        """Fail unless all answers have ended in so many seconds."""
        if seconds is not None:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        self._client._abort(self, None, "abort")
        self._fail(DeadlineExceededError(f"the request took longer than its deadline of {seconds:g} s; it was aborted"))


class EngineClient:
    """Starts the engine in a process of its own, watches it, and runs requests on it. One event loop uses it.

    The engine process that dies is noticed at once; one that stands still, by the judgement of
    :class:`~graphmode.serve.watchdog.Watchdog`, is killed. All requests then fail with the cause, and the engine is
    started again: at most five times in ten minutes, after a wait that doubles. A first start that fails is not tried
    again, since nothing would change.

    Args:
        model: a folder, a file or a hub name.
        options: of the engine; plain values alone, since it runs in another process.
        limits: how much is accepted.
        restart: whether the engine is started again.
        stall_seconds: how long the engine may stand still. The default is long for a device, where a step takes
            milliseconds. A step may take twelve times as long in all while it is seen to move; give more where eager
            steps of long prompts on a slow CPU take minutes.

    Attributes:
        state: how the engine is.
        info: the model's, once the engine was ready; None before.
        snapshot: what the engine counted, some four times a second; None before the first.
        on_snapshot: is called with each of them; None: nothing is.

    Raises:
        InputError: an option that does not travel between processes.
    """

    def __init__(
        self,
        model: str | Path,
        options: EngineOptions,
        *,
        limits: QueueLimits | None = None,
        restart: bool = True,
        stall_seconds: float = 10.0,
    ) -> None:
        self.state = EngineState("starting")
        self.info: ModelInfo | None = None
        self.snapshot: EngineSnapshot | None = None
        self.on_snapshot: Callable[[EngineSnapshot], object] | None = None
        self._start = start_message(model, options, logging.getLogger().getEffectiveLevel())
        self._limits = QueueLimits() if limits is None else limits
        self._restarts = Restarts() if restart else Restarts(most=0)
        self._stall_seconds = stall_seconds
        self._process: EngineProcess | None = None
        self._watchdog = Watchdog(stall_seconds)
        self._supervision: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._numbers = count()
        self._streams: dict[str, TokenStream] = {}
        self._answers = 0
        self._ends: deque[float] = deque(maxlen=256)
        self._started_at = 0.0
        self._start_seconds: float | None = None

    async def start(self) -> None:
        """Start the engine process and return; ``state`` tells how far it is."""
        self._supervision = asyncio.create_task(self._supervise(), name="engine supervision")

    async def wait_ready(self) -> None:
        """Wait until the engine takes requests.

        Raises:
            EngineDownError: it never will.
        """
        while self.state.phase != "ready":
            if self.state.phase in ("dead", "stopping"):
                raise EngineDownError(self.state.cause or "the server is stopping")
            await self._changed.wait()

    def generate(self, request: Request, deadline_seconds: float | None = None) -> TokenStream:
        """Submit a request.

        Args:
            request: what is asked; its ``request_id`` is not used.
            deadline_seconds: how long it may take; None: what the limits say.

        Raises:
            EngineDownError: the engine is not ready.
            OverloadedError: too many wait.
            InputError: a token that no model has. What else does not fit the model, the stream raises.
        """
        if self.state.phase != "ready" or self.info is None or self._process is None:
            raise self._down()
        answers = request.params.n
        most = self.info.max_num_seqs + self._limits.max_waiting
        if self._answers and self._answers + answers > most:
            raise OverloadedError(
                f"{self._answers} answers run or wait and {answers} would join them; {most} are accepted "
                f"(max_num_seqs={self.info.max_num_seqs} and max_waiting={self._limits.max_waiting}). Try again later",
                self._seconds_until_room(self._answers + answers - most),
            )
        request_id = str(next(self._numbers))
        self._process.send(submission(request_id, request))
        stream = TokenStream(self, request_id, answers)
        stream._expect_by(self._limits.deadline_seconds if deadline_seconds is None else deadline_seconds)
        self._streams[request_id] = stream
        self._answers += answers
        self._idle.clear()
        return stream

    async def close(self, drain_seconds: float) -> None:
        """Accept nothing more, let what runs end for so many seconds, fail the rest, and end the engine process."""
        self._change(replace(self.state, phase="stopping"))
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(drain_seconds):
                    await self._idle.wait()
        finally:
            self._fail_all("the server is stopping")
            await self._end()

    async def _end(self) -> None:
        """End the engine process and what watches it."""
        if self._supervision is None:
            return
        process = self._process
        if process is not None and self._watchdog.ready:
            process.send(Stop())
            await asyncio.wait({self._supervision}, timeout=_EXIT_SECONDS)
        if not self._supervision.done():  # it loads its model, or hangs
            self._supervision.cancel()
        with suppress(asyncio.CancelledError):
            await self._supervision
        self._supervision = None

    def _down(self) -> EngineDownError:
        state = self.state
        if state.phase == "dead":
            return EngineDownError(f"the engine is down: {state.cause}")
        if state.phase == "stopping":
            return EngineDownError("the server is stopping")
        if state.phase == "stalled":
            return EngineDownError(f"the engine stands still: {state.cause}", self._start_seconds)
        passed = asyncio.get_running_loop().time() - self._started_at
        expected = 10.0 if self._start_seconds is None else self._start_seconds
        because = "" if state.cause is None else f": {state.cause}"
        return EngineDownError(f"the engine is starting{because}", retry_after=max(1.0, expected - passed))

    def _seconds_until_room(self, answers: int) -> float:
        """Return how long so many answers take to end, by how fast the last ones ended."""
        if len(self._ends) < 2:
            return 1.0
        rate = len(self._ends) / max(asyncio.get_running_loop().time() - self._ends[0], 1e-3)
        return min(max(1.0, math.ceil(answers / rate)), _LONGEST_RETRY_SECONDS)

    def _abort(self, stream: TokenStream, index: int | None, reason: FinishReason) -> None:
        if stream.request_id in self._streams and self._process is not None:
            self._process.send(Abort(stream.request_id, index, reason))

    def _note_end(self, stream: TokenStream, answers: int) -> None:
        self._answers -= answers
        self._ends.append(asyncio.get_running_loop().time())
        if not stream._unfinished:
            stream._finish()

    def _forget(self, stream: TokenStream, unfinished: int) -> None:
        if self._streams.pop(stream.request_id, None) is not None:
            self._answers -= unfinished
            if stream._deadline is not None:
                stream._deadline.cancel()
            if not self._streams:
                self._idle.set()

    def _fail_all(self, cause: str, retry_after: float | None = None) -> None:
        for stream in list(self._streams.values()):
            stream._fail(EngineDownError(cause, retry_after))

    def _change(self, state: EngineState) -> None:
        if state.phase != self.state.phase:
            log.info("the engine is %s%s", state.phase, "" if state.cause is None else f": {state.cause}")
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def _supervise(self) -> None:
        """Run engine processes, one after the other, until one ends for good."""
        try:
            await self._run_all()
        except Exception as error:  # such as a disk without room for the sockets
            log.exception("the engine process cannot be run")
            cause = f"the engine process cannot be run: {error}"
            self._fail_all(cause)
            self._change(replace(self.state, phase="dead", cause=cause))

    async def _run_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._started_at = loop.time()
            cause = await self._run()
            stopping = self.state.phase == "stopping"
            self._fail_all(cause, None if stopping else self._start_seconds or 1.0)
            if stopping:
                return
            # Where the engine never was ready, it will not be the next time either.
            wait = None if self.info is None else self._restarts.next_wait(loop.time())
            if wait is None:
                if self.state.restarts and self._restarts.most:
                    cause += f". It is not started again: that was tried {self.state.restarts} times"
                log.error("the engine is down for good: %s", cause)
                self._change(replace(self.state, phase="dead", cause=cause))
                return
            log.error("%s; the engine is started again in %g s", cause, wait)
            restarts = self.state.restarts + 1
            self._change(EngineState("starting", cause, restarts=restarts))
            await asyncio.sleep(wait)

    async def _run(self) -> str:
        """Run one engine process, and return why it ended."""
        loop = asyncio.get_running_loop()
        self._watchdog = Watchdog(self._stall_seconds)
        self._process = process = EngineProcess()
        tasks: list[asyncio.Task[str]] = []
        try:
            await process.start(self._start)
            ended = asyncio.create_task(process.ended(), name="engine process")
            reading = asyncio.create_task(self._read(process), name="engine messages")
            tasks = [ended, reading]
            last = loop.time()
            while not ended.done():
                await asyncio.wait(tasks, timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                now = loop.time()
                cause = reading.result() if reading.done() else self._watchdog.passed(now - last)
                last = now
                if cause is not None and not ended.done():
                    stopping = self.state.phase == "stopping"
                    self._change(replace(self.state, phase="stopping" if stopping else "stalled", cause=cause))
                    self._fail_all(cause, self._start_seconds or 1.0)
                    process.kill()
                    await ended
                    return cause
            return ended.result()
        finally:
            self._process = None
            process.kill()
            await process.wait()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            process.close()

    async def _read(self, process: EngineProcess) -> str:
        """Take in what the engine says, until that cannot be read; return why."""
        while True:
            try:
                for message in await process.receive():
                    self._take_in(process, message)
            except Exception as error:
                log.exception("a message of the engine cannot be taken in")
                return f"a message of the engine cannot be taken in: {error!r}"
            await asyncio.sleep(0)  # streams have their turn, also while there is always more to read

    def _take_in(self, process: EngineProcess, message: FromEngine) -> None:
        if isinstance(message, Step):
            for new in message.answers:
                if (stream := self._streams.get(new.request_id)) is not None:  # otherwise it was closed
                    stream._take_in(new)
        elif isinstance(message, Alive):
            self._watchdog.heard(message)
            if self._watchdog.ready:
                process.remove_folder()
        elif isinstance(message, EngineSnapshot):
            self.snapshot = message
            if self.on_snapshot is not None:
                self.on_snapshot(message)
        elif isinstance(message, Refused):
            if (stream := self._streams.get(message.request_id)) is not None:
                stream._fail(InputError(message.cause) if message.of_input else EngineError(message.cause))
        elif isinstance(message, StepFailed):
            for request_id in message.request_ids:
                if (stream := self._streams.get(request_id)) is not None:
                    stream._fail(EngineDownError(message.cause, retry_after=1.0))
        elif isinstance(message, Capturing):
            self._watchdog.capturing = True
            self._watchdog.progressed()
            self._change(replace(self.state, captured=message.done, to_capture=message.total))
        elif isinstance(message, Ready):
            self._watchdog.ready = True
            self._watchdog.progressed()
            self._start_seconds = asyncio.get_running_loop().time() - self._started_at
            self.info = message.info
            if self.state.phase == "starting":
                self._change(replace(self.state, phase="ready", cause=None))
