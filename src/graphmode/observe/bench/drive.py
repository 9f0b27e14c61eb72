"""The client of a load test: sends requests from one process or several, and watches how far behind it is itself."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection as Pipe
from threading import BrokenBarrierError
from typing import Any

from graphmode.errors import EndpointError
from graphmode.observe.bench.streams import Answer, Client, Endpoint

_TICK = 0.005  # seconds between looks at the client's own delay


@dataclass(frozen=True)
class Phase:
    """Requests of a part of the run, which begins in all processes at once.

    Attributes:
        bodies: as they are sent.
        due: when each is sent, in seconds from the beginning; None: ``streams`` of them at a time.
        streams: how many of this process are in flight.
        counted: whether it is measured; otherwise it warms up.
    """

    bodies: list[bytes]
    due: list[float] | None
    streams: int
    counted: bool


@dataclass
class Seen:
    """What a process of the client saw.

    Attributes:
        phases: the answers of each phase.
        delays: seconds that the client's event loop was behind, at each look.
        cpu_seconds: that it took in counted phases.
        wall_seconds: of these.
    """

    phases: list[list[Answer]] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0


async def _drive(to: Endpoint, phases: Sequence[Phase], timeout: float, together: Callable[[], object]) -> Seen:
    """Send the requests of all phases, each phase when ``together`` returns."""
    client, done = Client(to, timeout), Seen()
    for phase in phases:
        together()
        watch = asyncio.create_task(_watch(done.delays)) if phase.counted else None
        wall, cpu = time.perf_counter(), time.process_time()
        done.phases.append(await _send(client, phase))
        if watch is not None:
            done.cpu_seconds += time.process_time() - cpu
            done.wall_seconds += time.perf_counter() - wall
            watch.cancel()
    client.close()
    return done


async def _send(client: Client, phase: Phase) -> list[Answer]:
    if phase.due is not None:
        start = time.perf_counter()
        tasks = []
        for body, due in zip(phase.bodies, phase.due, strict=True):
            if (wait := start + due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(client.ask(body, start + due)))
        return await asyncio.gather(*tasks)
    answers: list[Answer] = []
    remaining = iter(phase.bodies)

    async def stream() -> None:
        for body in remaining:
            answers.append(await client.ask(body))  # noqa: PERF401  (streams share the iterator)

    await asyncio.gather(*(stream() for _ in range(phase.streams)))
    return answers


async def _watch(delays: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(_TICK)
        delays.append(max(0.0, time.perf_counter() - before - _TICK))


@contextmanager
def _without_collections() -> Iterator[None]:
    """The collector of cycles would stop the client for milliseconds."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _process(to: Endpoint, phases: Sequence[Phase], timeout: float, together: Any, pipe: Pipe) -> None:
    try:
        with _without_collections():
            pipe.send(asyncio.run(_drive(to, phases, timeout, lambda: together.wait(timeout=timeout + 60))))
    except BaseException:
        together.abort()  # the others would wait for it
        raise


def run(
    to: Endpoint, phases: Sequence[Phase], timeout: float, processes: int, between: Callable[[], None]
) -> list[Seen]:
    """Send the requests of all phases, and return what each process saw.

    Args:
        to: where they go.
        phases: one after another, each when the one before is answered.
        timeout: seconds that a request may take.
        processes: of the client, which share the requests of each phase; at most one for each.
        between: called at the beginning of each phase and at the end.

    Raises:
        EndpointError: a process of the client has ended.
    """
    if processes == 1:
        with _without_collections():
            done = [asyncio.run(_drive(to, phases, timeout, between))]
        between()
        return done
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(processes)
    shares = [[_share(phase, index, processes) for phase in phases] for index in range(processes)]
    pipes, running = [], []
    for share in shares[1:]:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_process, args=(to, share, timeout, together, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        running.append(process)

    def wait() -> None:
        together.wait(timeout=timeout + 60)
        between()

    try:
        with _without_collections():
            done = [asyncio.run(_drive(to, shares[0], timeout, wait))]
        done += [pipe.recv() for pipe in pipes]
    except (BrokenBarrierError, EOFError):
        raise EndpointError("a process of the client has ended; it has said why above") from None
    for process in running:
        process.join()
    between()
    return done


def _share(phase: Phase, index: int, processes: int) -> Phase:
    mine = slice(index, None, processes)
    due = None if phase.due is None else phase.due[mine]
    return replace(phase, bodies=phase.bodies[mine], due=due, streams=len(range(phase.streams)[mine]))
