"""Recording a function: one full graph, or graph, call, graph, ... where a marked function breaks it."""

from __future__ import annotations

import gc
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from math import prod
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from graphmode.graph.backends.base import Backend, Graph, MemoryTaken, Recording
from graphmode.graph.errors import CaptureError, CaptureMemoryError, GraphModeError, UnsupportedOpError
from graphmode.graph.guard import Guard
from graphmode.graph.host_arguments import HostArguments
from graphmode.graph.locations import REMEDY, location_of
from graphmode.graph.memory import free_memory, in_words, is_out_of_memory
from graphmode.graph.trees import Structure, flatten

P = ParamSpec("P")
R = TypeVar("R")


class Pool:
    """The memory that all captures of a runner share.

    Attributes:
        handle: the backend's own pool, for what graphs compute.
        slabs: one buffer for each result of a call outside the graph, in the order of the calls. Every graph sees a
            prefix of it, so that the memory of results that cross a break is the largest graph's, not the sum.
    """

    def __init__(self, backend: Backend) -> None:
        self.handle = backend.make_pool()
        self.slabs: list[torch.Tensor] = []
        self._backend = backend

    @contextmanager
    def measured(self) -> Iterator[MemoryTaken]:
        """Measure the memory that a capture inside takes."""
        before = self._slabs_uncounted
        with self._backend.measured(self.handle) as taken:
            yield taken
        taken.kept += self._slabs_uncounted - before
        taken.peak += self._slabs_uncounted - before

    @property
    def _slabs_uncounted(self) -> int:
        """Bytes of the slabs where the graphs are on the host, which counts nothing by itself as a device does."""
        return sum(slab.nbytes for slab in self.slabs) if self._backend.device.type == "cpu" else 0

    def crossing(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """Return fixed memory in the shape of ``like`` for the result ``index`` of the calls outside the graph."""
        nbytes = prod(like.shape) * like.dtype.itemsize
        if index == len(self.slabs):
            self.slabs.append(torch.empty(nbytes, dtype=torch.uint8, device=like.device))
        elif self.slabs[index].numel() < nbytes or self.slabs[index].device != like.device:
            self.slabs[index] = torch.empty(nbytes, dtype=torch.uint8, device=like.device)
        return self.slabs[index][:nbytes].view(like.dtype).view(like.shape)


@dataclass(frozen=True)
class OutsideCall:
    """A call that runs between two graphs at every replay.

    Attributes:
        fn: the function.
        arguments: its arguments, flat.
        spec: the structure of ``(args, kwargs)``.
        results: the fixed memory that the following graphs read its results from.
    """

    fn: Callable[..., Any]
    arguments: list[Any]
    spec: TreeSpec
    results: list[torch.Tensor | None]

    def replay(self) -> None:
        """Run the function and copy its results to where the next graph reads them.

        Raises:
            CaptureError: a result has another shape or dtype than at capture.
        """
        args, kwargs = tree_unflatten(self.arguments, self.spec)
        results, _ = tree_flatten(self.fn(*args, **kwargs))
        if len(results) != len(self.results):
            raise CaptureError(f"{name_of(self.fn)} returned {len(results)} values, {len(self.results)} at capture")
        for fixed, result in zip(self.results, results, strict=True):
            if fixed is None:
                continue
            if not isinstance(result, torch.Tensor) or (result.shape, result.dtype) != (fixed.shape, fixed.dtype):
                now = f"{tuple(result.shape)} {result.dtype}" if isinstance(result, torch.Tensor) else repr(result)
                raise CaptureError(
                    f"{name_of(self.fn)} runs outside the graph and returned {now}; at capture it was "
                    f"{tuple(fixed.shape)} {fixed.dtype}. Results that graphs read must keep their shape: pad them"
                )
            if result.data_ptr() != fixed.data_ptr():
                fixed.copy_(result)


@dataclass(frozen=True)
class Program:
    """What was recorded of one call of a function.

    Attributes:
        steps: graphs and the calls between them, in order.
        outputs: the function's results, flat; every replay writes the same memory.
        structure: how the results nest.
        guard: knows the memory that the graphs read from outside.
        breaks: how often the graph breaks by itself, by the operator that it breaks around.
    """

    steps: Sequence[Graph | OutsideCall]
    outputs: list[torch.Tensor]
    structure: Structure
    guard: Guard
    breaks: Counter[str] = field(default_factory=Counter)

    @property
    def graphs(self) -> int:
        """Number of graphs."""
        return sum(not isinstance(step, OutsideCall) for step in self.steps)

    def replay(self) -> None:
        """Run every step in order on the current stream, in inference mode."""
        for step in self.steps:
            step.replay()


@dataclass
class _Recorder:
    """The state of the recording under way."""

    backend: Backend
    recording: Recording
    guard: Guard
    pool: Pool
    steps: list[Graph | OutsideCall] = field(default_factory=list)
    results: int = 0

    def call_outside(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        graph = self.recording.end()
        if not self.backend.capabilities.runs_while_capturing:
            graph.replay()  # the function reads what the graph computes
        self.steps.append(graph)
        with self.guard.suspended():
            leaves, spec = tree_flatten((args, kwargs))
            returned, results_spec = tree_flatten(fn(*args, **kwargs))
            results = [self._fix(fn, result) for result in returned]
            self.steps.append(OutsideCall(fn, leaves, spec, results))
        self.recording.begin()
        return tree_unflatten(results, results_spec)

    def _fix(self, fn: Callable[..., Any], result: Any) -> torch.Tensor | None:
        if result is None:
            return None
        if not isinstance(result, torch.Tensor):
            raise CaptureError(
                f"{name_of(fn)} runs outside the graph and returned {result!r}, a {type(result).__name__}, which the "
                "next graph would hold for ever; return tensors or None"
            )
        fixed = self.pool.crossing(self.results, result)
        self.results += 1
        fixed.copy_(result)
        return fixed


_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)
_warm_up: ContextVar[Guard | None] = ContextVar("warm_up", default=None)


def recording_active() -> bool:
    """Return whether a function is being warmed up or captured in this thread, calls outside the graph left out."""
    recorder, warm_up = _recorder.get(), _warm_up.get()
    return (recorder is not None and recorder.guard.active) or (warm_up is not None and warm_up.active)


def refuse_inside_recording(fn: Callable[..., Any]) -> None:
    """Refuse to run a runner of ``fn`` inside the function of another runner that is warmed up or captured.

    Raises:
        CaptureError: naming the function.
    """
    if recording_active():
        raise CaptureError(
            f"the GraphRunner of {name_of(fn)} was called inside the function of another runner, which is being "
            "captured: a graph cannot hold another runner's copies and replays. Call the function itself there, or "
            "call the runner in a function marked @outside_graph"
        )


def outside_graph(fn: Callable[P, R]) -> Callable[P, R]:
    """Mark a function to run outside the graph: it breaks a capture into graph, call, graph, ...

    The function may do what a graph cannot: read values on the host, choose by them, call a library that waits for the
    device. It runs at every replay, in order. It takes anything and returns tensors or None, of the same shape each
    time; arguments that are not tensors are those of the capture. Outside of a capture it is called as it is.
    """

    @wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if (recorder := _recorder.get()) is not None and recorder.guard.active:
            return recorder.call_outside(fn, args, kwargs)  # type: ignore[no-any-return]
        if (guard := _warm_up.get()) is not None:
            with guard.suspended():
                return fn(*args, **kwargs)
        return fn(*args, **kwargs)

    return wrapper


def record(
    fn: Callable[..., Any],
    backend: Backend,
    pool: Pool,
    kwargs: dict[str, Any],
    host_arguments: HostArguments | None = None,
    *,
    warmup_iterations: int = 1,
) -> Program:
    """Warm ``fn`` up, then capture ``fn(**kwargs)``.

    Args:
        fn: the function. Its tensors stay where they are; it returns tensors in any structure.
        backend: the device.
        pool: the memory that captures share.
        kwargs: its arguments: tensors of fixed memory, and static values.
        host_arguments: those of its operators, where the backend takes any.
        warmup_iterations: how often it runs before it is captured, at least once.

    Raises:
        UnsupportedOpError: an operator that no graph can hold, with its name and the line that called it.
        CaptureMemoryError: memory ran out, with the line that asked for it.
        CaptureError: anything else that broke the capture. The device is usable afterwards.
    """
    with backend.capture_stream(), torch.inference_mode(), _no_garbage_collection():
        warm_up = Guard(backend.device)
        with _errors_located(warm_up), _set(_warm_up, warm_up), warm_up.installed():
            for _ in range(warmup_iterations):
                fn(**kwargs)
        backend.synchronize()
        guard = Guard(backend.device, warm_up.generators)
        recording = backend.recording(pool.handle, host_arguments)
        recorder = _Recorder(backend, recording, guard, pool)
        installed = recording.installed(warm_up.generators)
        # The guard goes last: what a device puts on top of it to capture must be gone before it.
        with _errors_located(guard), installed, _set(_recorder, recorder), guard.installed():
            try:
                recording.begin()
                outputs, structure = flatten(fn(**kwargs))
                for output in outputs:
                    if not isinstance(output, torch.Tensor):
                        raise CaptureError(
                            f"the function returned {reprlib.repr(output)}, a {type(output).__name__}; a replay would "
                            "return the same for ever. Return tensors"
                        )
                recorder.steps.append(recording.end())
            except BaseException:
                recording.abort()
                raise
        with _errors_located(guard):
            recording.finish()
    return Program(recorder.steps, outputs, structure, guard)


@contextmanager
def _errors_located(guard: Guard) -> Iterator[None]:
    """Give every error the operator and the user's line that it came from."""
    try:
        yield
    except GraphModeError as error:
        location = location_of(error)
        if isinstance(error, CaptureError) and location:
            kind = UnsupportedOpError if isinstance(error, UnsupportedOpError) else CaptureError
            told = str(error).replace(REMEDY, location.remedy)
            raise kind(f"{told}\n  at {location}", operator=error.operator, location=location.line) from error
        raise
    except Exception as error:
        where = "before the first operator" if guard.operator is None else f"in or after {guard.operator}"
        location = location_of(error)
        line, at = (None, "") if location is None else (location.line, f"\n  at {location}")
        if is_out_of_memory(error):
            left = in_words(free_memory(guard.device))
            raise CaptureMemoryError(
                f"capture ran out of memory {where}: {type(error).__name__}: {error}{at}\n  "
                f"{left} are free on {guard.device} now. Capture smaller sizes (by graph_sizes,"
                " max_num_batched_tokens or max_num_seqs), or leave more memory (by a smaller kv_cache_memory)",
                operator=guard.operator,
                location=line,
            ) from error
        raise CaptureError(
            f"capture failed {where}: {type(error).__name__}: {error}{at}\n  If the code "
            f" there must read values or wait for the device: {REMEDY if location is None else location.remedy}",
            operator=guard.operator,
            location=line,
        ) from error


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python from freeing device memory in the middle of a capture, which would break it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def name_of(fn: Callable[..., Any]) -> str:
    """Return the name that a function is known by to who wrote it."""
    named = fn if hasattr(fn, "__qualname__") else getattr(fn, "func", type(fn))  # a partial, or an object
    return f"{named.__module__}.{getattr(named, '__qualname__', type(named).__qualname__)}"
