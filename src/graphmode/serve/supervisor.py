"""One engine process, as the process that starts it sees it."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from graphmode.serve import messages
from graphmode.serve.messages import FromEngine, Start, ToEngine

log = logging.getLogger(__name__)

ENGINE_MODULE = "graphmode.serve.engine_process"

_LONGEST_SOCKET_PATH = 80
_MOST_AT_ONCE = 32


class EngineProcess:
    """An engine process, and the sockets to and from it in a folder that only this user may enter.

    Once both processes are connected the folder is not needed any more, and is removed: nothing is left behind even
    where both are killed.
    """

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="graphmode-")
        if len(folder) > _LONGEST_SOCKET_PATH:  # addresses of sockets are bounded
            os.rmdir(folder)
            folder = tempfile.mkdtemp(prefix="graphmode-", dir="/tmp")
        self._folder: Path | None = Path(folder)
        self._context: zmq.Context[Any] = zmq.Context()
        self._inbox = zmq.asyncio.Socket(self._context, zmq.PULL)
        self._outbox: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        for socket in (self._inbox, self._outbox):
            socket.set_hwm(0)  # what is sent is bounded by the requests that are accepted, not here
        self._process: asyncio.subprocess.Process | None = None
        self._report = -1

    async def start(self, start: Start) -> None:
        """Start the process, which then loads its model."""
        assert self._folder is not None
        self._inbox.bind(f"ipc://{self._folder}/from-engine")
        self._outbox.connect(f"ipc://{self._folder}/to-engine")  # keeps messages until the engine binds it
        self.send(start)
        self._report, report = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                ENGINE_MODULE,
                str(self._folder),
                str(report),
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(report,),
            )
        finally:
            os.close(report)

    @property
    def pid(self) -> int | None:
        """The process's number; None before it has started."""
        return None if self._process is None else self._process.pid

    def send(self, message: ToEngine) -> None:
        """Send a message, without waiting."""
        self._outbox.send(messages.encode(message), zmq.NOBLOCK)

    async def receive(self) -> list[FromEngine]:
        """Wait for messages and return those that are there, not without a bound: others want their turn."""
        received = [messages.decode_from_engine(await self._inbox.recv())]
        with suppress(zmq.Again):
            while len(received) < _MOST_AT_ONCE:
                received.append(messages.decode_from_engine(await self._inbox.recv(zmq.NOBLOCK)))
        return received

    async def ended(self) -> str:
        """Wait until the process has ended, and return why."""
        assert self._process is not None
        status = await self._process.wait()
        os.set_blocking(self._report, False)
        with suppress(BlockingIOError):  # a process that the engine started holds the pipe open
            if cause := os.read(self._report, 4096).decode(errors="replace"):
                return cause
        if status == -signal.SIGKILL:
            return "the engine process was killed (SIGKILL), which the system does too where memory runs out"
        if status < 0:
            return f"the engine process was ended by {signal.Signals(-status).name}"
        return f"the engine process ended with status {status}; its log says why"

    async def wait(self) -> None:
        """Wait until the process has ended, or was never started."""
        if self._process is not None:
            await self._process.wait()

    def kill(self) -> None:
        """Kill the process. One that is stopped or hangs takes no other signal."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

    def remove_folder(self) -> None:
        """Remove the sockets' names, which nobody needs who is connected."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def close(self) -> None:
        """Free what this process holds of one that has ended."""
        for socket in (self._inbox, self._outbox):
            socket.close(linger=0)
        self._context.term()
        self.remove_folder()
        if self._report >= 0:
            os.close(self._report)
            self._report = -1
