"""``graphmode serve`` as a process of its own, and what can be seen of it from outside."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

_TASKS_FILE = "GRAPHMODE_TEST_TASKS"


class ServerProcess:
    """A server that runs; ``url`` is where.

    Args:
        folder: for its log.
        *arguments: of ``graphmode serve``.
        key: of requests.
    """

    def __init__(self, folder: Path, *arguments: str, key: str | None = None) -> None:
        self.log = folder / "log"
        self._tasks = folder / "tasks"
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "tests.serve.process", "serve", "--port", "0", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, _TASKS_FILE: str(self._tasks)},
            )
        self.process = psutil.Process(self.popen.pid)
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        found = re.search(r"http://\S+?:\d+", line)
        assert found, f"{line!r}, status {self.popen.wait(60)}: {self.log.read_text()}"
        self.url = found[0]
        self.http = httpx.Client(base_url=self.url, timeout=60)
        if key is not None:
            self.http.headers["Authorization"] = f"Bearer {key}"

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        [engine] = [each for each in self.process.children() if "graphmode.serve.engine_process" in each.cmdline()]
        return engine

    def metric(self, name: str) -> float:
        """Return the sum of a metric's series."""
        text = self.http.get("/metrics").raise_for_status().text
        values = re.findall(rf"^{re.escape(name)}(?:{{[^\n]*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"{name} is not among the metrics"
        return sum(map(float, values))

    def tasks(self) -> list[str]:
        """Return what the asyncio tasks of the HTTP process run."""
        self._tasks.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        wait_for(self._tasks.exists)
        return list(json.loads(self._tasks.read_text()))

    def complete(self, prompt: str = "ROMEO.\n", max_tokens: int = 8) -> str:
        """Return a greedy completion."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the status that it ends with."""
        self.popen.send_signal(number)
        return self.popen.wait(60)

    def close(self) -> None:
        """End it, however it is."""
        self.http.close()
        children = self.process.children(recursive=True) if self.process.is_running() else []
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(60)
        if self.popen.stdout is not None:
            self.popen.stdout.close()
        psutil.wait_procs(children, 10)


@contextmanager
def serving(folder: Path, *arguments: str, key: str | None = None) -> Iterator[ServerProcess]:
    """Run a server."""
    server = ServerProcess(folder, *arguments, key=key)
    try:
        yield server
    finally:
        server.close()


def wait_for(condition: Any, seconds: float = 30) -> None:
    """Wait until something holds that another process brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.02)


def _tell_tasks(number: int, frame: object) -> None:
    names = sorted(str(task.get_coro().__qualname__) for task in asyncio.all_tasks())  # type: ignore[union-attr]
    file = Path(os.environ[_TASKS_FILE])
    written = file.with_suffix(".new")
    written.write_text(json.dumps(names))
    written.rename(file)


if __name__ == "__main__":
    # The signal is handled between two callbacks of the event loop.
    signal.signal(signal.SIGUSR1, _tell_tasks)
    from graphmode.__main__ import main

    main()
