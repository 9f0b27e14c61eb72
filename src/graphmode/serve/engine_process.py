"""The engine process: loads the model, steps, and speaks in tokens with the HTTP process that started it."""

from __future__ import annotations

import bisect
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread, get_ident
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import zmq

from graphmode.engine.config import EngineOptions
from graphmode.engine.outputs import NewTokens
from graphmode.errors import EngineError, GraphModeError, InputError
from graphmode.graph.axes import volume
from graphmode.serve import messages
from graphmode.serve.messages import Abort, EngineSnapshot, ModelInfo, Start, Stop, Submit

if TYPE_CHECKING:
    from graphmode.engine.core import EngineCore

log = logging.getLogger(__name__)

SIGN_OF_LIFE_SECONDS = 0.25
SNAPSHOT_SECONDS = 0.25
IDLE_MILLISECONDS = 1000
"""How long the engine sleeps at most when it has nothing to do."""

_PR_SET_PDEATHSIG = 1

Load = Callable[[str, EngineOptions, Callable[[int, int], object]], "EngineCore"]


class EngineLoop:
    """Steps an engine for the HTTP process.

    Args:
        core: the engine.
        inbox: where requests come from.
        outbox: where tokens go.

    Attributes:
        busy: whether there is anything to do.
        turns: how many times the loop has run.
    """

    def __init__(self, core: EngineCore, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> None:
        self.core = core
        self.busy = True
        self.turns = 0
        self._inbox = inbox
        self._outbox = outbox
        self._running: dict[str, int] = {}  # answers that have not ended, by request
        self._stopping = False
        self._failed_steps = 0
        self._step_seconds = [0] * (len(messages.STEP_BOUNDS) + 1)
        self._step_seconds_sum = 0.0
        self._next_snapshot = 0.0

    def run(self) -> None:
        """Step while there are requests, and sleep while there are none, until the HTTP process says to stop.

        Raises:
            EngineError: a step failed and left the device unusable.
        """
        while not self._stopping:
            self.turns += 1
            if not self.core.has_requests:
                self._rest()
            self._receive()
            if self.core.has_requests:
                self._step()

    def _rest(self) -> None:
        self._send_snapshot()
        self.busy = False
        self._inbox.poll(IDLE_MILLISECONDS)
        self.busy = True

    def _receive(self) -> None:
        """Take in all messages that are there, without waiting."""
        while not self._stopping and self._inbox.poll(0):
            message = messages.decode_to_engine(self._inbox.recv())
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, Abort):
                self.core.abort(message.request_id, message.index, message.reason)
            elif isinstance(message, Stop):
                self._stopping = True

    def _submit(self, message: Submit) -> None:
        try:
            request = messages.submitted(message)
            self.core.submit(request)
        except InputError as error:
            self._outbox.send(messages.encode(messages.Refused(message.request_id, str(error), of_input=True)))
        except Exception as error:
            log.exception("request %s cannot be queued", message.request_id)
            self._outbox.send(messages.encode(messages.Refused(message.request_id, _in_words(error), of_input=False)))
        else:
            self._running[message.request_id] = request.params.n

    def _step(self) -> None:
        launched = self.core.runner.graphs.stats.steps
        start = time.perf_counter()
        try:
            answers = self.core.step()
        except Exception as error:
            self._fail(error)
            return
        now = time.perf_counter()
        if answers:
            self._outbox.send(messages.encode(messages.Step(answers)))
            self._note_ends(answers)
        if steps := self.core.runner.graphs.stats.steps - launched:
            self._step_seconds[bisect.bisect_left(messages.STEP_BOUNDS, (now - start) / steps)] += steps
            self._step_seconds_sum += now - start
        if now >= self._next_snapshot:
            self._send_snapshot()

    def _note_ends(self, answers: list[NewTokens]) -> None:
        for answer in answers:
            if answer.finish_reason is not None:
                self._running[answer.request_id] -= 1
                if not self._running[answer.request_id]:
                    del self._running[answer.request_id]

    def _fail(self, error: Exception) -> None:
        """End all requests, which a step that raised has ended; go on, unless the device does not answer any more.

        Raises:
            EngineError: it does not.
        """
        log.error("a step failed", exc_info=error)
        cause = f"a step failed: {_in_words(error)}"
        self._failed_steps += 1
        self._outbox.send(messages.encode(messages.StepFailed(list(self._running), cause)))
        self._running.clear()
        try:
            self.core.runner.graphs.backend.synchronize()
        except Exception as lost:
            raise EngineError(f"{cause}; the device does not answer any more: {_in_words(lost)}") from error
        if isinstance(error, torch.AcceleratorError):
            raise EngineError(f"{cause}; the device is not used after that") from error

    def _send_snapshot(self) -> None:
        self._outbox.send(messages.encode(self._snapshot()))
        self._next_snapshot = time.perf_counter() + SNAPSHOT_SECONDS

    def _snapshot(self) -> EngineSnapshot:
        found = self.core.stats
        stats = found.as_dict()
        stats["capture_failures"] = [
            {"graph": str(failure.key), "reason": str(failure.reason), "message": failure.message}
            for failure in found.capture_failures
        ]
        buckets = stats.pop("buckets")
        return EngineSnapshot(
            running=stats.pop("running"),
            waiting=stats.pop("waiting"),
            kv_blocks_used=stats.pop("blocks_used"),
            kv_blocks_total=stats.pop("blocks_total"),
            prefix_queries=stats.pop("prefix_queries"),
            prefix_hits=stats.pop("prefix_hits"),
            replays={f"{family}:{size}": steps for family, sizes in buckets.items() for size, steps in sizes.items()},
            stats=stats,
            failed_steps=self._failed_steps,
            step_seconds=list(self._step_seconds),
            step_seconds_sum=self._step_seconds_sum,
        )


class _Pulse(Thread):
    """Tells the HTTP process several times a second that the engine process lives, and whether its main thread moves.

    It ends the process where the HTTP process has gone: nobody reads any more.
    """

    def __init__(self, outbox: zmq.Socket[bytes], parent: int, main_thread: int) -> None:
        super().__init__(name="sign of life", daemon=True)
        self.loop: EngineLoop | None = None
        self.computes_on_host = True  # while it starts, wherever it computes then
        self._outbox = outbox
        self._parent = parent
        self._main_thread = main_thread
        self._ended = Event()

    def run(self) -> None:
        """Send signs of life until the end."""
        moves, cpu_seconds = 0, time.process_time()
        place: tuple[int, list[tuple[int, int]]] = 0, []
        while True:
            if os.getppid() != self._parent:
                os._exit(1)
            before, place = place, (0 if self.loop is None else self.loop.turns, _place(self._main_thread))
            cpu_before, cpu_seconds = cpu_seconds, time.process_time()
            # Where the host computes, the thread may be seen at the same operator of one layer after the other.
            computes = self.computes_on_host and cpu_seconds - cpu_before > SIGN_OF_LIFE_SECONDS / 5
            moves += place != before or computes
            steps = 0 if self.loop is None else self.loop.core.runner.graphs.stats.steps
            busy = self.loop is None or self.loop.busy
            self._outbox.send(messages.encode(messages.Alive(steps, moves, busy)))
            if self._ended.wait(SIGN_OF_LIFE_SECONDS):
                break
        self._outbox.close()

    def end(self) -> None:
        """Stop, and wait until that is done."""
        self._ended.set()
        self.join()


def _place(thread: int) -> list[tuple[int, int]]:
    """Return where in the code a thread is: each function on its stack, and the instruction in it."""
    frame: FrameType | None = sys._current_frames()[thread]
    place = []
    while frame is not None:
        place.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return place


def _outbox(context: zmq.Context[Any], folder: Path) -> zmq.Socket[bytes]:
    """Return a socket that queues without a bound, so that the engine never waits: requests bound what it sends."""
    made: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    made.set_hwm(0)
    made.connect(f"ipc://{folder}/from-engine")
    return made


def _die_with(parent: int) -> None:
    """Let the system kill this process when the one that started it dies, on Linux; elsewhere, see ``_Pulse``."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, GraphModeError) else f"{type(error).__name__}: {error}".rstrip(": ")


def _info(core: EngineCore) -> ModelInfo:
    graphs, limits = core.runner.graphs, core.limits
    buckets = graphs.policy.buckets if graphs.policy.enabled else {}
    return ModelInfo(
        model=core.loaded.files.checkpoint.name,
        dtype=str(core.loaded.model.dtype).removeprefix("torch."),
        device=str(core.device),
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        vocab_size=core.loaded.shape.vocab_size,
        eos_token_ids=sorted(core.loaded.shape.eos_token_ids),
        num_blocks=list(core.num_blocks),
        block_sizes=[group.block_size for group in core.cache_groups],
        graph_mode=core.options.resolved_graph_mode,
        buckets={family: [volume(size) for size in sizes] for family, sizes in buckets.items()},
    )


def load_core(model: str, options: EngineOptions, on_capture: Callable[[int, int], object]) -> EngineCore:
    """Load the engine, whose imports take seconds."""
    from transformers import logging as transformers_logging

    from graphmode.engine.core import EngineCore

    transformers_logging.disable_progress_bar()
    return EngineCore(model, options, on_capture=on_capture)


def main(arguments: list[str], load: Load = load_core) -> NoReturn:
    """Run the engine process, and exit.

    Args:
        arguments: the folder of the sockets, the file descriptor that takes the cause if the engine ends by an error,
            and the process that started this one.
        load: makes the engine.
    """
    folder, report, parent = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    _die_with(parent)
    # A terminal and a service manager signal all processes of a server. The HTTP process drains, and then says stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.set_inheritable(report, False)
    status = 0
    try:
        _serve(folder, parent, load)
    except BaseException as error:
        if not isinstance(error, GraphModeError):
            log.critical("the engine ends", exc_info=error)
        os.write(report, _in_words(error).encode(errors="replace")[:4096])  # what a pipe takes at once
        status = 1
    logging.shutdown()
    with suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
    os._exit(status)  # to take the interpreter apart takes seconds, in which a device's library may hang


def _serve(folder: Path, parent: int, load: Load) -> None:
    context: zmq.Context[Any] = zmq.Context()
    inbox: zmq.Socket[bytes] = context.socket(zmq.PULL)
    inbox.set_hwm(0)
    inbox.bind(f"ipc://{folder}/to-engine")
    outbox = _outbox(context, folder)
    pulse = _Pulse(_outbox(context, folder), parent, get_ident())
    pulse.start()
    try:
        start = messages.decode_to_engine(inbox.recv())
        assert isinstance(start, Start)
        logging.basicConfig(level=start.log_level, format="%(asctime)s %(levelname)s engine: %(message)s")

        def on_capture(done: int, total: int) -> None:
            outbox.send(messages.encode(messages.Capturing(done, total)))

        core = load(start.model, EngineOptions(**start.options), on_capture)
        # Python's collector is kept from what lives as long as the process: a pass through it stops a step for 0.1 s.
        gc.collect()
        gc.freeze()
        loop = EngineLoop(core, inbox, outbox)
        pulse.computes_on_host = core.device.type == "cpu"
        pulse.loop = loop
        outbox.send(messages.encode(messages.Ready(_info(core))))
        loop.run()
    finally:
        pulse.end()
        context.destroy(linger=1000)


if __name__ == "__main__":
    main(sys.argv[1:])
