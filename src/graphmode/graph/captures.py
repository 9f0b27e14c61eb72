"""The graphs of a runner: how each is captured, which sizes have none, and how their outputs follow the axes."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from graphmode.errors import CaptureError, CaptureMemoryError, UnsupportedOpError
from graphmode.graph.addresses import Addresses
from graphmode.graph.backends.base import Backend
from graphmode.graph.buffers import BoundInputs, InputBuffers
from graphmode.graph.context import CallContext
from graphmode.graph.declaration import Declaration, Variant
from graphmode.graph.dispatch import GraphKey, Reason
from graphmode.graph.host_arguments import HostArguments
from graphmode.graph.inputs import all_padding, examples
from graphmode.graph.outputs import OutputAxes, Sample, find_output_axes
from graphmode.graph.program import Pool, Program, record
from graphmode.graph.stats import CaptureFailure, RunnerStats
from graphmode.graph.training import inference_only
from graphmode.graph.trees import flatten

log = logging.getLogger(__name__)

CHECK_EVERY = 256
"""Replays between two checks that the weights are still those of the capture."""


class Captures:
    """The graphs of a runner, and the keys whose capture failed.

    Args:
        fn: the function.
        declared: its inputs, axes and outputs.
        buffers: of its inputs.
        backend: the device.
        host_arguments: this and the rest: see :class:`~graphmode.graph.GraphRunner`.

    Attributes:
        programs: each key's graph.
        failed: why a key has none.
        context: torch's global state at capture.
        stats: where captures are counted.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        declared: Declaration,
        buffers: InputBuffers,
        backend: Backend,
        host_arguments: HostArguments | None,
        *,
        strict: bool,
        on_capture_failure: Callable[[CaptureFailure], object] | None,
        warmup_iterations: int,
    ) -> None:
        self.fn = fn
        self.failed: dict[GraphKey, Reason] = {}
        self.stats = RunnerStats()
        self._declared = declared
        self._buffers = buffers
        self._backend = backend
        self._host_arguments = host_arguments
        self._strict = strict
        self._on_capture_failure = on_capture_failure
        self._warmup_iterations = warmup_iterations
        self._bound: dict[GraphKey, BoundInputs] = {}
        self.clear()

    def clear(self) -> None:
        """Drop all graphs and their memory, and what is known from them."""
        self.programs: dict[GraphKey, Program] = {}
        self.context = CallContext(self._backend.device)
        self._outputs: dict[tuple[str, Hashable], OutputAxes] = {}
        self._addresses = Addresses(self.fn)
        self._replays_since_check = CHECK_EVERY
        self._pool = Pool(self._backend)
        self.stats.graphs = self.stats.captures = self.stats.graph_bytes = 0
        self.stats.breaks.clear()

    @property
    def keys(self) -> list[GraphKey]:
        """Every key that can have a graph, in the order of capture."""
        return self._declared.keys(limited=self._backend.capabilities.graph_limit is not None)

    def check_addresses(self) -> None:
        """Check that all that the graphs read from outside of the function is still where it was at capture.

        Raises:
            StaleAddressError: it is not.
        """
        self._addresses.check()
        self._replays_since_check = 0

    def before_replay(self) -> None:
        """Check addresses before the first replay of each graph and then every ``CHECK_EVERY`` replays."""
        self._replays_since_check += 1
        if self._replays_since_check > CHECK_EVERY:
            self.check_addresses()

    def bind(self, key: GraphKey) -> BoundInputs:
        """Return the inputs as the graph of ``key`` sees them."""
        if key not in self._bound:
            self._bound[key] = self._buffers.bind(self._declared.axes.at(key.size, key.variant))
        return self._bound[key]

    def is_key(self, key: GraphKey) -> bool:
        """Return whether ``key`` can have a graph."""
        return key in self._bound or key in self.keys

    def set_host_arguments(self, family: str, sizes: Mapping[str, int], values: Mapping[str, Any]) -> None:
        """Compute the host arguments of the call that comes, where there are any."""
        if self._host_arguments is not None:
            self._host_arguments.set(family, sizes, self._declared.as_tensors(values))

    def call(self, family: str, variant: Variant, inputs: Mapping[str, torch.Tensor]) -> Any:
        """Call the function."""
        with inference_only(inputs):
            return self.fn(**self._declared.arguments(family, variant, inputs))

    def capture_all(self, keys: Iterable[GraphKey]) -> None:
        """Capture ``keys`` in order, as far as the device has room.

        Raises:
            CaptureError: one failed and the runner is strict.
        """
        self.context.check()
        if not self._backend.capabilities.host_memory:
            gc.collect()  # what is garbage to Python may hold memory of the device
        tried = []
        for key in keys:
            if key not in self.failed:
                tried.append(key)
                self.capture(key)
        for family, variant in dict.fromkeys((key.family, key.variant) for key in tried if key in self.programs):
            outputs = self.outputs_of(family, variant)
            if isinstance(outputs, str):
                if self._strict:
                    raise CaptureError(outputs)
                log.warning("calls that need padding will be refused: %s", outputs)

    def capture(self, key: GraphKey) -> None:
        """Capture one key, if the device has room; where that fails, ``failed`` says why.

        Raises:
            CaptureError: it failed and the runner is strict.
        """
        if problem := self._no_room(key):
            self._stop_capturing(problem)
            return
        start = time.perf_counter()
        try:
            with self._pool.measured() as taken:
                self._record(key, self.bind(key))
        finally:
            self.stats.capture_seconds += time.perf_counter() - start
            self.stats.graph_bytes += taken.kept
            self.stats.capture_peak_bytes = max(self.stats.capture_peak_bytes, taken.peak)

    def _record(self, key: GraphKey, bound: BoundInputs) -> None:
        self.set_host_arguments(key.family, bound.sizes, {})
        try:
            with self._buffers.carried_kept(), random_state_kept(self._backend.device):
                self._buffers.load(bound, examples(self._declared.inputs, bound.sizes))
                program = record(
                    lambda **kwargs: self.call(key.family, key.variant, kwargs),
                    self._backend,
                    self._pool,
                    bound.views,
                    self._host_arguments,
                    warmup_iterations=self._warmup_iterations,
                )
            known = self._known_outputs(key.family, key.variant)
            if known is not None and (problem := known.problem(shapes_of(program.outputs), bound.sizes)):
                raise CaptureError(problem)
        except CaptureError as error:
            if self._strict:
                raise
            if error.__cause__ is not None and self._backend.out_of_resources(error.__cause__):
                self._stop_capturing(f"it refused the next: {error.__cause__}")
            else:
                # As text: whoever keeps the log must not keep what the error's frames hold.
                log.error("%s runs without a graph of its own: %s", key, str(error))
                self._fail(key, _reason(error), str(error))
        else:
            self.programs[key] = program
            self._addresses.watch(program.reads, [*bound.views.values(), *self._pool.slabs])
            self._replays_since_check = CHECK_EVERY  # so that its first replay is preceded by a check
            self.context.note_capture()
            self.stats.captures += 1
            self.stats.graphs += program.graphs
            self.stats.breaks.update(program.breaks)
        if self.failed.get(key) is Reason.OUT_OF_MEMORY:
            gc.collect()  # the next capture needs what the failed one holds in reference cycles

    def outputs_of(self, family: str, variant: Variant) -> OutputAxes | str:
        """Return how the outputs of captured graphs follow the axes, or why that is not known."""
        if known := self._known_outputs(family, variant):
            return known  # each graph was held against it when it was captured
        keys = [key for key in self.programs if (key.family, key.variant) == (family, variant)]
        samples = [Sample(self.bind(key).sizes, shapes_of(self.programs[key].outputs)) for key in keys]
        return self.output_axes(family, variant, samples)

    def output_axes(self, family: str, variant: Variant, samples: list[Sample]) -> OutputAxes | str:
        """Return how outputs follow the axes: as declared, as known, or as shapes at several sizes show."""
        known = self._known_outputs(family, variant)
        if known is not None:
            return known.problem(samples[0].shapes, samples[0].sizes) or known

        def shapes_at(sizes: dict[str, int]) -> tuple[tuple[int, ...], ...]:
            self.set_host_arguments(family, sizes, {})
            inputs = {spec.name: all_padding(spec, sizes, self._backend.device) for spec in self._declared.inputs}
            for name, value in examples(self._declared.inputs, sizes).items():
                inputs[name] = value.to(self._backend.device)
            with torch.inference_mode(), random_state_kept(self._backend.device):
                return shapes_of(flatten(self.call(family, variant, inputs))[0])

        found = find_output_axes(
            samples, self._declared.axes, self._declared.input_axes, self._declared.limits, variant, shapes_at
        )
        if isinstance(found, OutputAxes):
            self._outputs[family, variant] = found
        return found

    def _known_outputs(self, family: str, variant: Variant) -> OutputAxes | None:
        return self._declared.output_axes or self._outputs.get((family, variant))

    def _no_room(self, key: GraphKey) -> str | None:
        """Return why the device has no room for the graphs of ``key``, as far as that is known beforehand."""
        limit, held = self._backend.capabilities.graph_limit, self.stats.graphs
        if limit is None:
            return None
        alike = (program.graphs for other, program in self.programs.items() if other.family == key.family)
        needed = next(alike, 1)
        return f"it holds {limit} at most and the next size takes {needed}" if held + needed > limit else None

    def _stop_capturing(self, problem: str) -> None:
        """Leave the keys that have no graph yet without one."""
        left = [key for key in self.keys if key not in self.programs and key not in self.failed]
        message = (
            f"{self.stats.graphs} graphs are captured and {self._backend.device} has no room for more: {problem}. "
            f"{len(left)} of {len(self.keys)} sizes stay without one; give fewer sizes, or use a mode with full graphs"
        )
        if self._strict:
            raise CaptureError(message)
        self.stats.out_of_graphs += len(left)
        log.warning("%s", message)
        for key in left:
            self._fail(key, Reason.OUT_OF_GRAPHS, message)

    def _fail(self, key: GraphKey, reason: Reason, message: str) -> None:
        """Leave a key without a graph, and say so."""
        self.failed[key] = reason
        failure = CaptureFailure(key, reason, message)
        self.stats.capture_failures.append(failure)
        if self._on_capture_failure is not None:
            self._on_capture_failure(failure)


def shapes_of(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of outputs."""
    return tuple(tuple(tensor.shape) for tensor in tensors)


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Restore the default random generators, so that a call draws the same numbers whether it captures or not."""
    has_one = device.type != "cpu" and hasattr(getattr(torch, device.type, None), "get_rng_state")
    devices: list[torch.device] = [device] if has_one else []
    return torch.random.fork_rng(devices, device_type=device.type if has_one else "cuda")


def _reason(error: CaptureError) -> Reason:
    if isinstance(error, CaptureMemoryError):
        return Reason.OUT_OF_MEMORY
    return Reason.UNSUPPORTED_OP if isinstance(error, UnsupportedOpError) else Reason.CAPTURE_FAILED
