"""Clients of one engine, in any threads: each waits for its own requests, and one of those that wait steps for all."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from threading import Condition, RLock, get_ident
from typing import Any

from graphmode.engine.engine import Engine
from graphmode.engine.outputs import RequestOutput
from graphmode.engine.requests import Request
from graphmode.errors import EngineError


@dataclass(eq=False)
class _Client:
    """One caller.

    Attributes:
        numbers: of its requests whose last output has not come, by their names.
        outputs: what came and was not fetched, with the numbers of the requests.
        error: why no more will come; None where nothing failed.
    """

    numbers: dict[str, int] = field(default_factory=dict)
    outputs: deque[tuple[int, RequestOutput]] = field(default_factory=deque)
    error: BaseException | None = None


class Clients:
    """Runs requests for callers in any threads.

    The first that waits leads: it steps the engine and hands each output to the caller whose request it is, until it
    has one itself. Then another leads. So a single caller steps in its own thread, and none waits for others' requests.

    Args:
        engine: what runs the requests.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Reentrant: Python may close a generator that was dropped anywhere, in this thread too.
        self._changed = Condition(RLock())
        self._clients: dict[str, _Client] = {}
        self._leader: int | None = None

    def run(self, requests: Iterable[Request]) -> Generator[tuple[int, RequestOutput], None, None]:
        """Submit requests and yield their outputs as they come, each with its request's number.

        Left early, it aborts those of its requests that have not ended, and nothing else.

        Raises:
            InputError: a request that cannot run.
            EngineError: a step failed in another thread, or outputs are lost since somebody else steps the engine.
            Exception: a step failed in this thread.
        """
        client = _Client()
        try:
            with _HEAP_FROZEN:
                with self._changed:  # no output is handed over before it is known whose it is
                    for number, request in enumerate(requests):
                        request_id = self._engine.submit(request)
                        client.numbers[request_id] = number
                        self._clients[request_id] = client
                while client.numbers or client.outputs:
                    if not client.outputs:
                        self._wait(client)
                    yield client.outputs.popleft()
        finally:
            for request_id in list(client.numbers):  # another thread may just hand over the last output of one
                self._clients.pop(request_id, None)
                self._engine.abort(request_id)

    def _wait(self, client: _Client) -> None:
        """Wait until there is an output: step for it, or while another thread steps, let that one."""
        with self._changed:
            if self._leader == get_ident():
                raise EngineError("requests were run from inside a step of the engine that is to run them")
            self._changed.wait_for(lambda: client.outputs or client.error is not None or self._leader is None)
            if client.outputs:
                return
            if client.error is not None:
                raise EngineError(
                    f"a step that another thread ran has failed, and all requests with it: {client.error!r}"
                ) from client.error
            self._leader = get_ident()
        try:
            while not client.outputs:
                if outputs := self._engine.step():
                    self._hand_over(outputs)
                elif not self._engine.has_requests:
                    raise EngineError("outputs are lost: the engine was stepped by somebody else too")
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            with self._changed:
                self._leader = None
                self._changed.notify_all()

    def _hand_over(self, outputs: Iterable[RequestOutput]) -> None:
        with self._changed:
            for output in outputs:
                if (client := self._clients.get(output.request_id)) is not None:  # otherwise it has left
                    client.outputs.append((client.numbers[output.request_id], output))
                    if output.finished:
                        self._clients.pop(output.request_id, None)
                        client.numbers.pop(output.request_id, None)
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            for client in list(self._clients.values()):
                client.error = error
            self._clients.clear()


class _FrozenHeap:
    """Keeps Python's collector of cycles from what exists already, while anything generates in this process.

    With a model loaded there are some 400,000 objects, and a pass through all of them stops a step for 0.1 s and more.
    Where the caller has frozen objects, it is left to the caller.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._users = 0
        self._ours = False

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0 and not gc.get_freeze_count():
                gc.freeze()
                self._ours = True
            self._users += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._ours:
                gc.unfreeze()
                self._ours = False


_HEAP_FROZEN = _FrozenHeap()
