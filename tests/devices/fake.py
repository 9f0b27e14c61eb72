"""Devices that are not here: modules such as ``torch.npu`` over CPU tensors.

A fake holds callers to the published signatures, refuses what the device refuses, and behind its graphs the CPU
backend's tape records and replays, so that real results come out. Time is simulated: a stream is a count of the work
put on it, and knows how much of other streams' work it has waited for.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

from graphmode.graph.backends.cpu import Tape, _TapeMode
from graphmode.graph.backends.streams import StreamBackend
from graphmode.graph.guard import tensors_in

NPU_INTERFACE = json.loads((Path(__file__).parent / "npu_interface.json").read_text())

# Typed out from torch_mlu 1.24.0 for torch 2.1: torch_mlu/mlu/graphs.py and streams.py.
MLU_SIGNATURES = {
    "graph.__init__": "self, mlu_graph, pool=None, stream=None, capture_error_mode='relaxed'",
    "MLUGraph.__init__": "self",
    "graph_pool_handle": "",
    "Stream.__new__": "cls, device=None, priority=0, **kwargs",
}


class DeviceError(RuntimeError):
    """What a device says when it is used wrongly."""


def as_signature(parameters: str) -> inspect.Signature:
    """Return the signature of ``parameters``, as they are written in a ``def``, without ``self`` or ``cls``."""
    namespace: dict[str, Any] = {}
    exec(f"def function({parameters}): ...", namespace)
    signature = inspect.signature(namespace["function"])
    kept = [each for name, each in signature.parameters.items() if name not in ("self", "cls")]
    return signature.replace(parameters=kept)


def installed_signatures(module: Any, graph_class: str) -> dict[str, str]:
    """Return the signatures of the installed torch's own device module."""
    found = {
        "graph.__init__": module.graph.__init__,
        f"{graph_class}.__init__": getattr(module, graph_class).__new__,
        "graph_pool_handle": module.graph_pool_handle,
    }
    plain = inspect.Parameter.empty
    texts = {}
    for name, function in found.items():
        parameters = inspect.signature(function).parameters.values()
        texts[name] = ", ".join(str(each.replace(annotation=plain)) for each in parameters)
    return {**texts, "Stream.__new__": "cls, device=None, priority=0, **kwargs"}


@dataclass(eq=False)
class FakeStream:
    """A stream: how much work it got, and how much of others' it has waited for."""

    device: FakeDevice
    device_index: int = 0
    work: int = 0
    waited: dict[FakeStream, int] = field(default_factory=dict)
    blocked_by: FakeGraph | None = None

    def wait_stream(self, other: FakeStream) -> None:
        self.device.log("wait_stream", self, other)
        if other.blocked_by is not None:
            self.blocked_by = other.blocked_by
        self.waited[other] = other.work

    def wait_event(self, event: FakeEvent) -> None:
        if event.point is not None:
            self.waited[event.point[0]] = max(self.waited.get(event.point[0], 0), event.point[1])


@dataclass(eq=False)
class FakeEvent:
    """An event."""

    device: FakeDevice
    point: tuple[FakeStream, int] | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        stream = stream or self.device.current
        self.point = (stream, stream.work)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.device.refuse_during_capture("Event.synchronize")


class DispatchMode(TorchDispatchMode):
    """Stands where torch_npu's own mode does while it captures. Left there, it would go on recording."""

    def __init__(self, update_stream: FakeStream) -> None:
        super().__init__()
        self.update_stream = update_stream
        self.graph_dispatch_records: list[Record] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        if _get_current_dispatch_mode() is not self:
            raise DeviceError("the dispatch mode of the capture is not the innermost one: another is taken off instead")
        super().__exit__(*error)


@dataclass
class Record:
    """An operator captured as a task group: it waits for its event, then runs with the arguments of the last update."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[torch.Tensor, ...]
    signalled: bool = False

    def replay(self) -> None:
        for fixed, now in zip(self.results, self.func(*self.args, **self.kwargs), strict=True):
            fixed.copy_(now)


class _DeviceTape(_TapeMode):
    """The device's own recording, which replays in the memory of the capture.

    With ``records``, operators in ``updatable`` become task groups.
    """

    def __init__(self, updatable: frozenset[str], records: list[Record] | None) -> None:
        super().__init__()
        self.parts: list[Tape | Record] = []
        self._updatable = updatable
        self._records = records
        self.tape = Tape()

    def _give_back(self) -> None:
        pass

    def own_tensors(self) -> list[torch.Tensor]:
        records = [(part.args, part.kwargs, part.results) for part in self.parts if isinstance(part, Record)]
        return [*super().own_tensors(), *tensors_in(records)]

    def close(self) -> Tape:
        tape = super().close()
        tape.instructions = [replace(instruction, bind=None) for instruction in tape.instructions]
        tape.seal()  # its memory has its final place from the start
        return tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._records is None or func.__name__ not in self._updatable:
            return super().__torch_dispatch__(func, types, args, kwargs)
        results = func(*args, **(kwargs or {}))
        record = Record(func, args, _copied(kwargs or {}), tuple(result.detach() for result in results))
        self._records.append(record)
        self.parts += [self.close(), record]
        self.tape = Tape()
        return results


class _DeviceMode(TorchDispatchMode):
    """The device below all that Python sees: it records what comes while it captures."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        capturing = self._device.capturing
        if capturing is None:
            return func(*args, **(kwargs or {}))
        assert capturing._tape is not None
        return capturing._tape.__torch_dispatch__(func, types, args, kwargs)


def _copied(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, torch.Tensor) else deepcopy(value) for name, value in kwargs.items()}


class FakeGraph:
    """A graph. Replays up to an operator whose event is not recorded, and goes on when it is."""

    device: FakeDevice

    def __init__(self) -> None:
        self.parts: list[Tape | Record] = []
        self.auto_dispatch_capture = False
        self.graph_dispatch_mode = DispatchMode(self.device.update_stream)
        self._tape: _DeviceTape | None = None
        self._captured: _DeviceTape | None = None
        self._rest: Iterator[Tape | Record] = iter(())
        self._random_state: torch.Tensor | None = None
        self._before: tuple[FakeStream, int] | None = None
        self._last: tuple[FakeStream, int] | None = None

    @property
    def records(self) -> list[Record]:
        return self.graph_dispatch_mode.graph_dispatch_records

    def capture_begin(self, pool: Any = None, **options: Any) -> None:
        device = self.device
        if device.current is device.default_stream:
            raise DeviceError("capture must be on a stream that is not the default one")
        if len(device.captured) >= device.max_graphs:
            raise DeviceError(
                "capture_begin: AclmdlRICaptureBegin(capture_stream_, capture_mode), error code is 207008 "
                "Insufficient_Stream_Resources(EL0009): The stream resources are insufficient."
            )
        device.log("capture_begin", pool, options)
        self._random_state = torch.empty(1, dtype=torch.int64)  # the device keeps it with the graph, as CUDA does
        device.capturing = self
        self._tape = _DeviceTape(device.updatable, self.records if self.auto_dispatch_capture else None)
        device.tapes.add(self._tape)

    def capture_end(self) -> None:
        assert self._tape is not None
        tape, self._tape = self._tape, None
        self._captured = tape  # what it holds is asked for
        self.device.capturing = None
        if self.device.fail_at_end:
            self.device.fail_at_end = False
            raise DeviceError("capture_end: the capture was invalidated")
        self.parts = [*tape.parts, tape.close()]
        self.device.captured.add(self)

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.device.log("register_generator_state", generator)

    def replay(self) -> None:
        stream = self.device.current
        self.device.refuse_during_capture("replay")
        if stream.blocked_by is not None:
            raise DeviceError("the stream waits for ever: the replay before was never updated")
        self.device.log("replay", self)
        stream.work += 1
        self._before, self._last = self._last, (stream, stream.work)
        self._rest = iter(self.parts)
        self._run(stream)

    def _run(self, stream: FakeStream) -> None:
        stream.blocked_by = None
        with _disable_current_modes(), torch.inference_mode():
            for part in self._rest:
                if isinstance(part, Record):
                    if not part.signalled:
                        self._rest = _before(part, self._rest)
                        stream.blocked_by = self
                        return
                    part.signalled = False
                part.replay()

    def update(self, cpu_update_input: list[dict[str, Any]]) -> None:
        if not self.auto_dispatch_capture:
            raise DeviceError("The current graph configuration does not support update: auto_dispatch_capture is False")
        self.device.log("update", self, cpu_update_input)
        stream = self.device.update_stream
        if stream.blocked_by is not None:
            raise DeviceError("the update waits for the replay that waits for it")
        finished = self._last if self._last and self._last[0].blocked_by is not self else self._before
        if finished is not None and stream.waited.get(finished[0], 0) < finished[1]:
            raise DeviceError("the update signals before the replay before it has finished")
        inputs = cpu_update_input * len(self.records) if len(cpu_update_input) == 1 else cpu_update_input
        for record, values in zip(self.records, inputs, strict=True):
            if record.signalled:
                raise DeviceError("the update signals twice for one replay")
            for name in values:
                if name in record.kwargs and len(values[name]) != len(record.kwargs[name]):
                    raise DeviceError(f"{name} has {len(values[name])} values; {len(record.kwargs[name])} at capture")
            record.kwargs.update({name: list(values[name]) for name in values if name in record.kwargs})
            record.signalled = True
        if self._last is not None and self._last[0].blocked_by is self:
            self._run(self._last[0])

    def reset(self) -> None:
        self.device.captured.discard(self)

    def pool(self) -> tuple[int, int]:
        return (0, 0)


def _before(part: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield part
    yield from rest


class FakeDevice:
    """A device's module.

    Args:
        name: of the graph class.
        signatures: of the module's functions and classes, as written.
        updatable: names of the operators whose host arguments a graph can be updated with.
        max_graphs: graphs that the device holds.
    """

    def __init__(
        self,
        name: str,
        signatures: Mapping[str, str],
        *,
        updatable: frozenset[str] = frozenset(),
        max_graphs: int = 10000,
    ) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.signatures = {key: as_signature(text) for key, text in signatures.items()}
        self.updatable = updatable
        self.max_graphs = max_graphs
        self.captured: WeakSet[FakeGraph] = WeakSet()
        self.tapes: WeakSet[_DeviceTape] = WeakSet()
        self.capturing: FakeGraph | None = None
        self.fail_at_end = False
        self.pools = 0
        self.default_stream = FakeStream(self)
        self.current = self.default_stream
        self.update_stream = FakeStream(self)
        setattr(self, name, self._checked(f"{name}.__init__", type(name, (FakeGraph,), {"device": self})))
        self.Stream = self._checked("Stream.__new__", lambda **options: FakeStream(self))
        self.graph_pool_handle = self._checked("graph_pool_handle", self._new_pool)

    def _checked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.signatures[name].bind(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    def log(self, *call: Any) -> None:
        self.calls.append(call)

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]

    def refuse_during_capture(self, what: str) -> None:
        if self.capturing is not None:
            raise DeviceError(f"{what} is not permitted while the stream captures")

    def own(self) -> list[torch.Tensor]:
        """Return the tensors that graphs hold."""
        return [tensor for tape in self.tapes for tensor in tape.own_tensors()]

    def _new_pool(self) -> tuple[int, int]:
        self.pools += 1
        return (0, self.pools)

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: Any = None) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def Event(self) -> FakeEvent:  # noqa: N802
        return FakeEvent(self)

    def synchronize(self, device: Any = None) -> None:
        self.refuse_during_capture("synchronize")
        if self.default_stream.blocked_by is not None:
            raise DeviceError("the device waits for ever: a replay was never updated")

    def empty_cache(self) -> None:
        self.refuse_during_capture("empty_cache")

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return (1 << 30, 1 << 31)

    def memory_reserved(self, device: Any = None) -> int:
        return 1 << 20

    def max_memory_reserved(self, device: Any = None) -> int:
        return 1 << 20

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.refuse_during_capture("reset_peak_memory_stats")

    def graph(self, *args: Any, **kwargs: Any) -> Capture:
        if len(args) > 3:
            raise DeviceError(f"the fourth positional argument of graph is not the same on every device: {args[3]!r}")
        bound = self.signatures["graph.__init__"].bind(*args, **kwargs)
        graph, pool, stream = bound.args[0], bound.arguments.get("pool"), bound.arguments.get("stream")
        options = {name: value for name, value in kwargs.items() if name not in ("pool", "stream")}
        self.log("graph", pool, stream, options)
        return Capture(self, graph, pool, stream, options)


class Capture:
    """What ``graph(...)`` returns. The order in which it enters and leaves is that of the published one."""

    def __init__(self, device: FakeDevice, graph: FakeGraph, pool: Any, stream: Any, options: dict[str, Any]) -> None:
        self.device, self.fake, self.pool, self.options = device, graph, pool, dict(options)
        graph.auto_dispatch_capture = self.options.pop("auto_dispatch_capture", False)
        self.stream_context = device.stream(stream or device.Stream())

    def __enter__(self) -> None:
        self.device.synchronize()
        self.device.empty_cache()
        self.stream_context.__enter__()
        if self.fake.auto_dispatch_capture:
            self.fake.graph_dispatch_mode.__enter__()
        self.fake.capture_begin(pool=self.pool, **self.options)

    def __exit__(self, *error: Any) -> None:
        self.fake.capture_end()
        if self.fake.auto_dispatch_capture:
            self.fake.graph_dispatch_mode.__exit__(*error)
        self.stream_context.__exit__(*error)


@contextmanager
def _both(one: Any, other: Any) -> Iterator[None]:
    with one, other:
        yield


def on_cpu(backend: type[StreamBackend], device: FakeDevice) -> StreamBackend:
    """Return the backend of a device over its fake, whose tensors are the CPU's and cannot be pinned."""
    capabilities = replace(backend.capabilities, pinned_host_memory=False)

    def recording(self: Any, pool: Any, host_arguments: Any) -> Any:
        made = backend.recording(self, pool, host_arguments)
        made.own = device.own  # a device's graph knows addresses; the fake's holds tensors
        installed = made.installed
        made.installed = lambda generators: _both(installed(generators), _DeviceMode(device))
        return made

    fake = type(backend.__name__, (backend,), {"capabilities": capabilities, "recording": recording})
    made: StreamBackend = fake(torch.device("cpu"), device)
    return made
