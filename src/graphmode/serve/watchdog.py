"""Whether the engine stands still, and how often it is started again: decisions alone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from graphmode.serve.messages import Alive

START_SECONDS = 60.0
"""As ``stall_seconds``, while the engine starts: reading weights and capturing may keep other threads waiting."""

LONGEST_STEP = 12
"""How many times ``stall_seconds`` a step may take in all."""

_MOST_SECONDS_A_TICK = 1.0


@dataclass
class Watchdog:
    """Judges by the engine's signs of life.

    The engine stands still where nothing is heard of it for ``stall_seconds`` (its process is stopped, or a call holds
    the interpreter), or where the thread that steps has something to do and was not seen to move for as long: it
    completed no step, and was at the same place in the code whenever it was looked at. So a long step that computes
    layer after layer is no standstill, until it takes ``LONGEST_STEP`` times as long; one that waits for a device that
    never answers is.

    Attributes:
        stall_seconds: see above.
        ready: whether the engine has started. Before, ``START_SECONDS`` are allowed where these are more.
        capturing: whether the engine captures graphs; before, while weights are read or fetched, its thread may wait.
    """

    stall_seconds: float
    ready: bool = False
    capturing: bool = False
    _last: Alive | None = None
    _silent: float = 0.0
    _still: float = 0.0
    _stepping: float = 0.0

    def heard(self, alive: Alive) -> None:
        """Take in a sign of life."""
        last, self._last = self._last, alive
        self._silent = 0.0
        if last is None or not alive.busy or alive.steps != last.steps:
            self._still = self._stepping = 0.0
        elif alive.moves != last.moves:
            self._still = 0.0

    def progressed(self) -> None:
        """Note that the engine's start came further."""
        self._silent = self._still = self._stepping = 0.0

    def passed(self, seconds: float) -> str | None:
        """Let time pass, and return why the engine stands still; None where it does not.

        Args:
            seconds: since the last call. Much more than the time between two calls is not counted: then this process
                itself did not run, and has not read what the engine sent.
        """
        seconds = min(seconds, _MOST_SECONDS_A_TICK)
        self._silent += seconds
        if self._last is not None and self._last.busy:
            self._still += seconds
            self._stepping += seconds
        limit = self.stall_seconds if self.ready else max(self.stall_seconds, START_SECONDS)
        if self._silent >= limit:
            return f"the engine process has given no sign of life for {limit:g} s"
        if not (self.ready or self.capturing):
            return None
        doing = "completed no step" if self.ready else "captured no graph"
        if self._still >= limit:
            return f"the engine has {doing} for {limit:g} s, and its thread does not move"
        if self._stepping >= LONGEST_STEP * limit:
            return f"the engine has {doing} for {LONGEST_STEP * limit:g} s"
        return None


@dataclass
class Restarts:
    """Says how long to wait before the engine is started again: longer each time, and not for ever.

    Attributes:
        most: restarts within ``seconds``.
        seconds: see above.
        first_wait: before the first restart; it doubles with each.
    """

    most: int = 5
    seconds: float = 600.0
    first_wait: float = 0.5
    _times: deque[float] = field(default_factory=deque)

    def next_wait(self, now: float) -> float | None:
        """Count a restart at the time ``now`` and return the seconds to wait before it; None where it is too many."""
        while self._times and now - self._times[0] > self.seconds:
            self._times.popleft()
        if len(self._times) >= self.most:
            return None
        self._times.append(now)
        return self.first_wait * 2.0 ** (len(self._times) - 1)
