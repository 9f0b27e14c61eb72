"""The engine: the core with text on top."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock

from graphmode.engine.config import EngineOptions
from graphmode.engine.core import EngineCore
from graphmode.engine.outputs import NewTokens, RequestOutput
from graphmode.engine.reading import load_text
from graphmode.engine.requests import ActiveRequest, Request


class Engine:
    """Requests in, texts out: submitted and aborted from any thread, stepped by one at a time.

    Args:
        model: a local folder or hub name.
        options: everything else.
        progress: whether to show a progress bar while graphs are captured.
        on_capture: as of :class:`~graphmode.engine.core.EngineCore`.

    Attributes:
        core: what makes the tokens.
        text: what turns prompts into tokens, and tokens into text.

    Raises:
        ModelError: the model cannot be loaded or run.
        InputError: an option out of range.
        BackendError: the device is not there.
    """

    def __init__(
        self,
        model: str | Path,
        options: EngineOptions,
        progress: bool = False,
        on_capture: Callable[[int, int], object] | None = None,
    ) -> None:
        self.text = load_text(model, options)
        self.core = EngineCore(self.text.files, options, progress, on_capture)
        self._active: dict[str, ActiveRequest] = {}
        self._lock = Lock()  # held to change which requests there are
        self._stepping = Lock()

    def check(self, request: Request) -> None:
        """Check a request without queueing it.

        Raises:
            InputError: as for ``core.check`` and ``text.check``.
        """
        self.text.check(request.params)
        self.core.check(request)

    def submit(self, request: Request) -> str:
        """Queue a request and return its name, by which outputs and :meth:`abort` know it. Any thread may call it.

        Raises:
            InputError: as for :meth:`check`, or a request of that name has not ended.
        """
        self.text.check(request.params)
        if request.params.structured_outputs is not None:
            self.core.check(request)  # submit checks all but the grammar
        with self._lock:
            request_id = self.core.submit(request, self._active)
            self._active[request_id] = ActiveRequest(request, request_id, self.text.detokenizer)
        return request_id

    def abort(self, request_id: str) -> None:
        """Let a request end at the next :meth:`step`, which gives its last output. Any thread may call it.

        A name that no request has, or one that has ended, is left alone.
        """
        self.core.abort(request_id)

    @property
    def has_requests(self) -> bool:
        """Whether any request has not had its last output."""
        return self.core.has_requests

    def step(self) -> list[RequestOutput]:
        """Let the core step, and return the outputs that follow. One thread steps at a time.

        Returns:
            What is new, in the order in which it came: of a request that streams an output for every token, of others
            the last one alone. The last output of a request says that it is finished.

        Raises:
            EngineError: requests have not ended, and there is nothing to run.
            Exception: whatever a step raises. All requests have then ended without a last output; the engine has
                forgotten them and what its cache holds, and takes new ones.
        """
        with self._stepping:
            try:
                return self._take_in(self.core.step())
            except BaseException:
                with self._lock:
                    self.core.start_anew()
                    self._active.clear()
                raise

    def _take_in(self, news: list[NewTokens]) -> list[RequestOutput]:
        """Let requests take in new tokens, and end the answers whose texts have come to a stop text."""
        with self._lock:  # a request that is being submitted is noted first
            requests = [self._active.get(new.request_id) for new in news]
        outputs: list[RequestOutput] = []
        stopped = False
        for request, new in zip(requests, news, strict=True):
            if request is None:  # its last answer has ended with a stop text
                continue
            outputs += request.outputs(new)
            if new.finish_reason is None and request.answers[new.index].finish_reason is not None:
                self.core.abort(new.request_id, new.index, "stop")
                stopped = True
            if request.finished:
                self._active.pop(new.request_id, None)
        return outputs + self._take_in(self.core.end_aborted()) if stopped else outputs
