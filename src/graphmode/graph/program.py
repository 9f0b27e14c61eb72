"""Recording a function: one full graph, or graph, call, graph, ... where a marked function breaks it."""

from __future__ import annotations

import gc
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphmode.errors import CaptureError, CaptureMemoryError, GraphModeError, UnsupportedOpError
from graphmode.graph.addresses import OutsideMemory
from graphmode.graph.backends.base import Backend, Graph, MemoryTaken, Recording
from graphmode.graph.breaks import Breaks
from graphmode.graph.escapes import (
    Made,
    MemoryNotes,
    Snapshot,
    escaped,
    held_by_call_alone,
    put_back,
    snapshots_of,
    tensors_over,
)
from graphmode.graph.guard import Guard, tensors_in, written_by
from graphmode.graph.host_arguments import HostArguments
from graphmode.graph.locations import REMEDY, line_being_run, location_of
from graphmode.graph.memory import free_memory, in_words, is_out_of_memory
from graphmode.graph.outside import Alias, Crossing, OutsideCall, copy_to, extent, name_of, placed, range_of
from graphmode.graph.storages import key_of, users, weakly
from graphmode.graph.trees import Structure, flatten

P = ParamSpec("P")
R = TypeVar("R")


class Pool:
    """The memory that all captures of a runner share.

    Attributes:
        handle: the backend's own pool, for what graphs compute.
        slabs: one buffer for each result of a call outside the graph, in the order of the calls. Every graph sees a
            prefix of it, so that the memory of results that cross a break is the largest graph's, not the sum.
        breaks: the operators that graphs are known to break around.
        captured: whether there was a capture that succeeded.
    """

    def __init__(self, backend: Backend) -> None:
        self.handle = backend.make_pool()
        self.slabs: list[torch.Tensor] = []
        self.breaks = Breaks()
        self.captured = False
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
        """Bytes of the slabs on the host, where no allocator counts them."""
        return sum(slab.nbytes for slab in self.slabs) if self._backend.device.type == "cpu" else 0

    def crossing(self, index: int, nbytes: int, device: torch.device) -> torch.Tensor:
        """Return fixed memory, uint8 ``[nbytes]``, for the result ``index`` of the calls outside the graph."""
        if index == len(self.slabs):
            self.slabs.append(torch.empty(nbytes, dtype=torch.uint8, device=device))
        elif self.slabs[index].numel() < nbytes or self.slabs[index].device != device:
            self.slabs[index] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return self.slabs[index][:nbytes]


@dataclass(frozen=True)
class Program:
    """What was recorded of one call of a function.

    Attributes:
        steps: graphs and the calls between them, in order.
        outputs: the function's results, flat; every replay writes the same memory.
        structure: how the results nest.
        reads: the memory that the graphs read from outside.
        breaks: how often the graph breaks by itself, by the operator that it breaks around.
    """

    steps: Sequence[Graph | OutsideCall]
    outputs: list[torch.Tensor]
    structure: Structure
    reads: OutsideMemory
    breaks: Counter[str] = field(default_factory=Counter)

    @property
    def graphs(self) -> int:
        """Number of graphs."""
        return sum(not isinstance(step, OutsideCall) for step in self.steps)

    def replay(self) -> None:
        """Run every step in order on the current stream, in inference mode."""
        for step in self.steps:
            step.replay()


class _WarmUp:
    """Plain runs of the function, which note the memory that it makes and the operators to break around."""

    def __init__(self, backend: Backend, breaks: Breaks | None, inputs: Sequence[torch.Tensor]) -> None:
        self.memory = MemoryNotes(inputs)
        self.guard = Guard(backend.device)
        self._breaks = breaks

    def installed(self) -> AbstractContextManager[Guard]:
        return self.guard.installed(self.run_operator, self.note_outside)

    def run_operator(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self.memory.forget_freed()
        if self._breaks is not None:
            results = self._breaks.probe(func, args, kwargs, self.guard.device)
        else:
            results = func(*args, **kwargs)
        taken, written = tensors_in((args, kwargs)), written_by(func, args, kwargs)
        self.memory.note(func.name(), line_being_run(), taken, written, tensors_in(results))
        return results

    def note_outside(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        written = written_by(func, args, kwargs)
        self.memory.note(func.name(), None, tensors_in((args, kwargs)), written, ())

    def call_outside(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        taken = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        with self.guard.suspended():
            returned, spec = tree_flatten(fn(*args, **kwargs))
            given = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in returned]
            returned.clear()  # so that what uses the memory now is not this code
        tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
        count = Counter(key_of(tensor) for tensor in tensors)
        made = [tensor for tensor in tensors if users(key_of(tensor)) == count[key_of(tensor)]]
        self.memory.note(name_of(fn), line_being_run(), taken, (), made)
        self.guard.note_results(made)
        return tree_unflatten(given, spec)


ResultIndex = tuple[int, int]
"""A result of a call outside the graph: which call, and which of its results."""


class _Recorder:
    """One recording of the function."""

    def __init__(
        self,
        backend: Backend,
        recording: Recording,
        pool: Pool,
        inputs: Sequence[torch.Tensor],
        kept: set[ResultIndex],
        generators: Sequence[torch.Generator],
    ) -> None:
        self.backend = backend
        self.recording = recording
        self.pool = pool
        self.guard = Guard(backend.device, generators)
        self.memory = MemoryNotes(inputs)
        self.steps: list[Graph | OutsideCall] = []
        self.outputs: list[torch.Tensor] = []
        self.broken: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.failed: Any = None
        """The operator whose kernel raised an error."""
        self.written_aliases: set[ResultIndex] = set()
        """Results that were copied although they share memory, and that the code wrote to."""
        self._kept = kept
        self._calls = 0
        self._crossings = 0
        self._own: list[torch.Tensor] = []
        self._slabs: dict[int, int] = {}
        """Users of the storages of fixed memory before this recording, by key."""
        self._aliases: dict[int, set[ResultIndex]] = {}
        self._alive: list[StorageWeakRef] = []
        self._host_values: set[int] = set()

    # Operators.

    def installed(self) -> AbstractContextManager[Guard]:
        return self.guard.installed(self.run_operator, self.note_outside)

    def run_operator(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self.memory.forget_freed()
        taken, written = tensors_in((args, kwargs)), written_by(func, args, kwargs)
        self._note_written(written)
        if reason := self._why_outside(func, args, kwargs, taken):
            if not self.recording.breaks_inside_operators:
                raise UnsupportedOpError(f"{func.name()} cannot be captured: {reason}", operator=func.name())
            return self._break_around(func, args, kwargs, reason)
        try:
            results = func(*args, **kwargs)
        except Exception:
            self.failed = func
            raise
        self.memory.note(func.name(), line_being_run(), taken, written, tensors_in(results))
        return results

    def note_outside(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        written = written_by(func, args, kwargs)
        self._note_written(written)
        self.memory.note(func.name(), None, tensors_in((args, kwargs)), written, ())

    def _why_outside(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], taken: Sequence[torch.Tensor]
    ) -> str | None:
        device = self.backend.device
        if reason := self.pool.breaks.reason(func, args, kwargs, device):
            return reason
        on_host = any(each.device.type != device.type and key_of(each) in self._host_values for each in taken)
        return "it computes on the host with values that come from the device" if on_host and not func.is_view else None

    def _break_around(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], reason: str) -> Any:
        name, line = func.name(), line_being_run()
        self.broken[name] += 1
        self.reasons.setdefault(name, f"{reason}\n  at {line}" if line else reason)
        if "non_blocking" in kwargs:  # the host reads the copy next
            kwargs = {**kwargs, "non_blocking": False}
        return self.call_outside(func, args, kwargs)

    # Calls outside the graph.

    def call_outside(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call, self._calls = self._calls, self._calls + 1
        leaves, spec = tree_flatten((args, kwargs))
        known: dict[int, torch.Tensor] = {}
        arguments = [self._owned(leaf, known) for leaf in leaves]
        self._end_segment()
        with self.guard.suspended():
            returned, results_spec = tree_flatten(fn(*args, **kwargs))
            if isinstance(fn, OpOverload):
                given, results = self._take_from_operator(fn, returned, leaves)
            else:
                given, results = self._take(fn, call, returned)
            self.steps.append(OutsideCall(fn, arguments, spec, results))
        self.begin()
        return tree_unflatten(given, results_spec)

    def begin(self) -> None:
        """Start a segment. Memory that the device allocates for the graph itself is not the function's."""
        with self.guard.suspended():
            self.recording.begin()

    def end(self) -> Graph | None:
        """End the segment and return its graph, if it has work to do."""
        with self.guard.suspended():
            return self.recording.end()

    def _end_segment(self) -> None:
        graph = self.end()
        if graph is not None:
            if not self.backend.capabilities.runs_while_capturing:
                graph.replay()  # the call that follows reads what the graph computes
            self.steps.append(graph)

    def _owned(self, leaf: Any, known: dict[int, torch.Tensor]) -> Any:
        """Return another tensor over memory that the function made, so that its own references can be counted."""
        if type(leaf) is not torch.Tensor or leaf.layout is not torch.strided:
            return leaf
        key = key_of(leaf)
        if key not in self.memory.made and key not in self._slabs:
            return leaf
        if id(leaf) not in known:
            known[id(leaf)] = leaf.detach()
            self._own.append(known[id(leaf)])
        return known[id(leaf)]

    def _take_from_operator(
        self, func: OpOverload[..., Any], returned: list[Any], leaves: list[Any]
    ) -> tuple[list[Any], list[Crossing | Alias | None]]:
        """Take the results of an operator: what it did not make lies in an argument, and is left there."""
        arguments = {key_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
        given: list[Any] = []
        results: list[Crossing | Alias | None] = []
        for result in returned:
            if result is not None and not isinstance(result, torch.Tensor):
                raise UnsupportedOpError(
                    f"{func.name()} cannot be captured: it reads values on the host and returned {result!r}, a "
                    f"{type(result).__name__}, which Python would go on with; a replay would not return it again",
                    operator=func.name(),
                )
            if result is None or key_of(result) in arguments:
                given.append(result)
                results.append(None)
            else:
                [crossing] = self._cross([result])
                given.append(crossing.fixed.detach())
                results.append(crossing)
        return given, results

    def _take(
        self, fn: Callable[..., Any], call: int, returned: list[Any]
    ) -> tuple[list[Any], list[Crossing | Alias | None]]:
        """Take the results of a function: as copies, except those that share memory that the code writes to."""
        for result in returned:
            if result is not None and not isinstance(result, torch.Tensor):
                raise CaptureError(
                    f"{name_of(fn)} runs outside the graph and returned {result!r}, a {type(result).__name__}, which "
                    "the next graph would hold for ever; return tensors or None"
                )
        tensors = {index: result.detach() for index, result in enumerate(returned) if result is not None}
        given: list[Any] = [None] * len(returned)
        results: list[Crossing | Alias | None] = [None] * len(returned)
        returned.clear()
        result = None  # so that what uses the memory now is not this code
        by_storage: dict[int, list[int]] = {}
        for index, tensor in tensors.items():
            by_storage.setdefault(key_of(tensor), []).append(index)
        for key, indices in by_storage.items():
            places = {(call, index) for index in indices}
            group = [tensors[index] for index in indices]
            held = users(key) > len(group)
            kept = not places.isdisjoint(self._kept)
            if held and kept:
                for index, tensor in zip(indices, group, strict=True):
                    given[index], results[index] = tensor, Alias(tensor)
                continue
            crossings = self._cross(group, together=kept)
            for index, crossing in zip(indices, crossings, strict=True):
                given[index], results[index] = crossing.fixed.detach(), crossing
            if not kept and (held or len(group) > 1):
                for tensor in (*group, *(crossing.fixed for crossing in crossings)):
                    self._alive.append(weakly(tensor))
                    self._aliases.setdefault(key_of(tensor), set()).update(places)
        return given, results

    def _cross(self, group: Sequence[torch.Tensor], together: bool = False) -> list[Crossing]:
        """Copy results that share a storage to fixed memory: to a buffer each, or to one buffer in the same layout."""
        if not together:
            memories = [(self._fixed_memory(extent(tensor), tensor.device), 0) for tensor in group]
        else:
            start, end = range_of(group)
            shared = self._fixed_memory(end - start, group[0].device)
            memories = [(shared, int(tensor.storage_offset()) * tensor.dtype.itemsize - start) for tensor in group]
        crossings: list[Crossing] = []
        for tensor, (memory, offset) in zip(group, memories, strict=True):
            fixed = placed(memory, tensor, offset)
            copy_to(fixed, tensor)
            crossings.append(Crossing(fixed, crossings[0].fixed if together and crossings else None))
        return crossings

    def _fixed_memory(self, nbytes: int, device: torch.device) -> torch.Tensor:
        memory = self.pool.crossing(self._crossings, nbytes, device)
        self._crossings += 1
        key = key_of(memory)
        self._slabs.setdefault(key, users(key) - 1)
        if device.type != self.backend.device.type:
            self._host_values.add(key)
        return memory

    def _note_written(self, written: Sequence[torch.Tensor]) -> None:
        for tensor in written:
            self.written_aliases |= self._aliases.get(key_of(tensor), set())

    # What outlives the call.

    def finish(self, fn: Callable[..., Any], state: Sequence[Snapshot], warm_up: MemoryNotes) -> None:
        """Refuse results that outlive the call, after the function has returned."""
        held = self._held_elsewhere()
        if held:
            gc.collect()
            held = self._held_elsewhere()
        kept = [key for key in held if self._escaped(key, held[key])]
        unwritten = [key for key in warm_up.filled_and_kept() if key not in self.memory.written]
        if kept or unwritten:
            made = {**warm_up.made, **self.memory.made}
            slab = Made("a call outside the graph", None, True, None)
            raise escaped([*kept, *unwritten], {**dict.fromkeys(self._slabs, slab), **made}, fn, state)

    def _ours(self) -> list[torch.Tensor]:
        calls = [step for step in self.steps if isinstance(step, OutsideCall)]
        results = [result for call in calls for result in call.results if result is not None]
        fixed = [result.tensor if isinstance(result, Alias) else result.fixed for result in results]
        return [*self._own, *self.outputs, *fixed, *self.recording.own()]

    def _held_elsewhere(self) -> dict[int, int]:
        """Return, by key of memory that the call made, how many tensors other than this recording's use it."""
        ours = Counter(key_of(tensor) for tensor in self._ours())
        before = {**dict.fromkeys(self.memory.made, 0), **self._slabs}
        counts = {key: users(key) - known - ours[key] for key, known in before.items()}
        return {key: count for key, count in counts.items() if count > 0}

    def _escaped(self, key: int, count: int) -> bool:
        """Return whether anything but the arguments of calls outside the graph holds the memory."""
        ours = {id(tensor) for tensor in (*self._ours(), *self.pool.slabs)}
        over = [tensor for tensor in tensors_over({key}) if id(tensor) not in ours]
        if len(over) < count:
            return True  # by something that Python does not see
        calls = [step for step in self.steps if isinstance(step, OutsideCall)]
        may_hold = [each for call in calls for each in (call, vars(call), call.arguments)]
        return not held_by_call_alone(over, may_hold)


_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)
_warm_up: ContextVar[_WarmUp | None] = ContextVar("warm_up", default=None)


def recording_active() -> bool:
    """Return whether this thread warms up or captures a function, and is not in a call outside the graph."""
    recorder, warm_up = _recorder.get(), _warm_up.get()
    return (recorder is not None and recorder.guard.active) or (warm_up is not None and warm_up.guard.active)


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

    The function may do what a graph cannot: read values on the host, branch on them, call a library that waits for the
    device. It runs at every replay, in order. It takes anything and returns tensors or None, of the same shape each
    time; arguments that are not tensors stay those of the capture. Outside of a capture it is an ordinary function.
    """

    @wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if (recorder := _recorder.get()) is not None and recorder.guard.active:
            return recorder.call_outside(fn, args, kwargs)  # type: ignore[no-any-return]
        if (warm_up := _warm_up.get()) is not None and warm_up.guard.active:
            return warm_up.call_outside(fn, args, kwargs)  # type: ignore[no-any-return]
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
    inputs = [leaf for leaf in flatten(kwargs)[0] if isinstance(leaf, torch.Tensor)]
    # State that a function keeps shows in its first capture. Searching at each would take about as long as recording.
    state = [] if pool.captured else snapshots_of(fn)
    with backend.capture_stream(), torch.inference_mode(), _no_garbage_collection():
        recording = backend.recording(pool.handle, host_arguments)
        warm_up = _WarmUp(backend, pool.breaks if recording.breaks_inside_operators else None, inputs)
        recorder: _Recorder | None = None
        try:
            with _errors_located(warm_up.guard), _set(_warm_up, warm_up), warm_up.installed():
                for _ in range(warmup_iterations):
                    fn(**kwargs)
            backend.synchronize()
            if warm_up.memory.computed_and_kept():
                gc.collect()
            if kept := warm_up.memory.computed_and_kept():
                raise escaped(kept, warm_up.memory.made, fn, state)
            shared: set[ResultIndex] = set()
            while True:
                recorder = _Recorder(backend, recording, pool, inputs, shared, warm_up.guard.generators)
                try:
                    with recording.installed(warm_up.guard.generators):
                        structure = _capture(fn, kwargs, recorder)
                except CaptureError as error:
                    if not _learned(recorder, error, shared):
                        raise
                else:
                    if recorder.written_aliases <= shared:
                        break
                    shared |= recorder.written_aliases
                recording.abort()
                recording = backend.recording(pool.handle, host_arguments)
            try:
                recorder.finish(fn, state, warm_up.memory)
            except BaseException:
                recording.abort()
                raise
            with _errors_located(recorder.guard):
                recording.finish()
        except BaseException:
            results = {key for key, made in warm_up.memory.made.items() if made.computed}
            put_back(state, results | (recorder.memory.made.keys() if recorder else set()))
            raise
    pool.captured = True
    pool.breaks.tell(recorder.broken, recorder.reasons)
    return Program(recorder.steps, recorder.outputs, structure, recorder.guard.reads, recorder.broken)


def _capture(fn: Callable[..., Any], kwargs: dict[str, Any], recorder: _Recorder) -> Structure:
    """Record one run of the function; return the structure of its results."""
    recording, guard = recorder.recording, recorder.guard
    # The guard leaves last, after whatever the device put on top of it to capture.
    with _errors_located(guard), _set(_recorder, recorder), recorder.installed():
        try:
            recorder.begin()
            outputs, structure = flatten(fn(**kwargs))
            for output in outputs:
                if not isinstance(output, torch.Tensor):
                    raise CaptureError(
                        f"the function returned {reprlib.repr(output)}, a {type(output).__name__}; a replay would "
                        "return the same for ever. Return tensors"
                    )
            # New tensors over the same memory, so that references that the function keeps can be counted.
            recorder.outputs = [output.detach() for output in outputs]
            outputs.clear()
            if (graph := recorder.end()) is not None:
                recorder.steps.append(graph)
        except BaseException:
            recording.abort()
            raise
    return structure


def _learned(recorder: _Recorder, error: CaptureError, shared: set[ResultIndex]) -> bool:
    """Return whether a failed capture showed what the next attempt must do differently."""
    if not recorder.written_aliases <= shared:
        shared |= recorder.written_aliases
        return True
    cause, func, breaks = error.__cause__, recorder.failed, recorder.pool.breaks
    if func is None or isinstance(cause, GraphModeError) or isinstance(error, CaptureMemoryError):
        return False
    if func in breaks.reasons or "previous error" in str(cause) or not recorder.recording.breaks_inside_operators:
        return False
    breaks.learn(func, f"the device refused to capture it: {type(cause).__name__}: {cause}")
    shared.clear()  # one more break changes the numbers of calls
    return True


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
    """Keep Python from freeing device memory in the middle of a capture, which would break it.

    Objects that exist already are frozen, so that a collection after the capture looks only at those of the call.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
