"""torch's global state that changes what a function computes: graphs keep that of their capture."""

from __future__ import annotations

import torch

from graphmode.errors import InputError


class CallContext:
    """Checks that state around the calls of one runner. A check costs about half a microsecond.

    Args:
        device: that of the runner.
    """

    def __init__(self, device: torch.device) -> None:
        self._autocast = device.type if torch.amp.is_autocast_available(device.type) else None
        self._captured: tuple[torch.dtype, bool] | None = None

    def note_capture(self) -> None:
        """Remember the current state as the one that graphs were captured in."""
        self._captured = (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())

    def check(self) -> None:
        """Check that the state is that of the captures, and that autocast is off.

        Raises:
            InputError: autocast is on around the call, or torch's default dtype or its use of deterministic algorithms
                is another one than at capture.
        """
        if self._autocast is not None and torch.is_autocast_enabled(self._autocast):
            raise InputError(
                f"autocast is on for {self._autocast!r} around a call of a GraphRunner, whose graphs cannot follow it; "
                "put `with torch.autocast(...)` inside the captured function, where every graph keeps it"
            )
        if self._captured is not None:
            dtype, deterministic = self._captured
            if torch.get_default_dtype() != dtype:
                raise InputError(
                    f"torch's default dtype is {torch.get_default_dtype()}; graphs were captured with {dtype} and "
                    "keep it. Set it back around the call, or call recapture() of the runner"
                )
            if torch.are_deterministic_algorithms_enabled() != deterministic:
                raise InputError(
                    f"torch.use_deterministic_algorithms is {not deterministic}; graphs were captured with "
                    f"{deterministic} and keep it. Set it back around the call, or call recapture() of the runner"
                )
