"""Every error that graphmode raises on purpose. Each message names the value, the limit and what to do."""

from __future__ import annotations


class GraphModeError(Exception):
    """Base of every error that graphmode raises on purpose."""


class InputError(GraphModeError, ValueError):
    """A value is not allowed: an input of a runner, an option, a prompt or a request."""


class TrainingError(InputError):
    """The function of a runner trains.

    Attributes:
        what: the call that does, such as ``Tensor.backward``.
    """

    def __init__(self, what: str, location: object = None) -> None:
        at = "" if location is None else f"\n  at {location}"
        super().__init__(
            f"{what} is called inside the function of a GraphRunner, which is inference only: train outside of the "
            "runner, whose graphs see weights that an optimizer changes in place, or use torch.func.grad for gradients "
            f"that are results{at}"
        )
        self.what = what


class BackendError(GraphModeError, RuntimeError):
    """No backend serves the device, or its device library is missing."""


class CaptureError(GraphModeError, RuntimeError):
    """A function could not be captured.

    Attributes:
        operator: the operator that broke the capture (``aten::item``), or None where no operator did.
        location: ``file:line`` in the captured code, or None where it is not known.
    """

    def __init__(self, message: str, *, operator: str | None = None, location: str | None = None) -> None:
        super().__init__(message)
        self.operator = operator
        self.location = location


class UnsupportedOpError(CaptureError):
    """An operator that no graph can hold: its result's shape, or Python's next step, depends on data."""


class CaptureMemoryError(CaptureError):
    """Memory ran out while a function was captured: its size is too large for what was left."""


class StaleAddressError(GraphModeError, RuntimeError):
    """Memory that a graph recorded was freed or moved between capture and replay."""


class EngineError(GraphModeError, RuntimeError):
    """A request ended without its last output: a step failed in another thread, or nothing was left to run for it."""


class EndpointError(GraphModeError, RuntimeError):
    """A server that is asked for something is not there, or refuses it. The message has its words."""


class ModelError(GraphModeError, ValueError):
    """A model that cannot be read, or that graphmode cannot run. The message names the file and what to do."""


class VersionError(GraphModeError, ImportError):
    """A package is older than graphmode needs. The message names it, and the command that installs another."""


class EngineDownError(EngineError):
    """The server's engine cannot serve: it died, stands still, starts, or a step failed. The message says the cause.

    Attributes:
        retry_after: seconds until it may serve again; None where it will not.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OverloadedError(GraphModeError, RuntimeError):
    """The server's queue is full.

    Attributes:
        retry_after: seconds until there is room, by what was measured.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceededError(GraphModeError, TimeoutError):
    """A request had not ended when its time was over, and was aborted."""


class NoCallError(GraphModeError):
    """A text that looked like the call of a tool is none, so that it is content. It stays inside the parser."""
