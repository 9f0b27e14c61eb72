"""GraphRunner: any function as a set of graphs, one per bucket, with padding and dispatch."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphmode.graph.addresses import Addresses
from graphmode.graph.backends.base import Backend, get_backend
from graphmode.graph.buckets import check_buckets, make_buckets, spread
from graphmode.graph.context import CallContext
from graphmode.graph.dispatch import Decision, DispatchPolicy, GraphKey, Mode, Reason, dispatch
from graphmode.graph.errors import CaptureError, CaptureMemoryError, InputError, UnsupportedOpError
from graphmode.graph.host_arguments import HostArguments
from graphmode.graph.inputs import (
    AxisSize,
    BoundInputs,
    Input,
    InputBuffers,
    all_padding,
    check_fit,
    resolve_axes,
    true_sizes,
)
from graphmode.graph.program import Pool, Program, record, refuse_inside_recording
from graphmode.graph.stats import CaptureFailure, RunnerStats
from graphmode.graph.verify import Step, Verification, no_graph, verify

log = logging.getLogger(__name__)

DEFAULT_FAMILY = "default"
CHECK_EVERY = 256
"""Replays between two checks that the weights are still those of the capture."""
Buckets = int | Sequence[int]


class GraphRunner:
    """A function of tensors as a set of graphs.

    The function is captured once for each bucket, over persistent input buffers. A call finds the smallest bucket that
    holds it, copies its values in, refills the padding and replays; a call that no graph serves runs the function
    eagerly, and ``stats`` says why.

    The function may change its inputs in place: a step that leaves the inputs of the next one can be repeated by one
    call. It must be the same work each time: Python code, shapes and scalars are those of the capture, and only
    what tensors hold changes. It must leave padding rows harmless: the declared padding values are how it knows them.

    Example::

        runner = GraphRunner(policy, [Input("state", torch.float32, ("batch", 64))], buckets=32)
        runner.capture()
        action = runner(state=state)

    Args:
        fn: takes the inputs by name (and ``family`` and the static arguments, where there are any) and returns tensors
            in any structure.
        inputs: the declarations. All axes but one have a size in ``axes``; the one left is bucketed.
        buckets: the sizes that get a graph: a list, or the largest one, from which few are made. Or one of these for
            each family, by name: then each call names its family, and ``fn`` takes it as ``family``. A family with
            ``()`` runs eagerly.
        axes: the sizes of the other axes: fixed, or a function of the bucket.
        output_axes: for each output in flat order, the axis name (or None) of each dimension, to cut outputs to the
            true size. Default: dimension 0 of each output is the bucketed axis.
        static: Python arguments of ``fn`` by name, with all values they may take; each has graphs of its own.
        host_arguments: lists of integers that operators take on the host. Values that they are computed from must be
            given on the host. Only for a backend with the capability ``host_arguments``.
        backend: the device to run on, ``"auto"`` for the accelerator that is there, or a backend object.
        enabled: False runs everything eagerly.
        max_padding_ratio: a call whose padding is more than this share of its bucket runs eagerly.
        capture_on_first_use: whether a call that needs a graph not there captures it; else it runs eagerly.
        strict: whether a failed capture raises instead of leaving that bucket to run eagerly.
        on_capture_failure: called with each graph that cannot be captured, as soon as that is known. What it raises
            ends the capture.
        warmup_iterations: how often the function runs before each capture, at least once: what it sets up at its first
            runs, and what libraries choose then, is not to be captured.

    Raises:
        InputError: the declarations do not fit together.
        BackendError: the device has no backend.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Input],
        buckets: Buckets | Mapping[str, Buckets],
        *,
        axes: Mapping[str, AxisSize] | None = None,
        output_axes: Sequence[Sequence[str | None]] | None = None,
        static: Mapping[str, Sequence[Hashable]] | None = None,
        host_arguments: HostArguments | None = None,
        backend: str | torch.device | Backend = "auto",
        enabled: bool = True,
        max_padding_ratio: float | None = None,
        capture_on_first_use: bool = True,
        strict: bool = False,
        on_capture_failure: Callable[[CaptureFailure], object] | None = None,
        warmup_iterations: int = 1,
    ) -> None:
        if max_padding_ratio is not None and not 0 <= max_padding_ratio <= 1:
            raise InputError(f"max_padding_ratio is {max_padding_ratio}; it is a share, from 0 to 1")
        if warmup_iterations < 1:
            raise InputError(f"warmup_iterations is {warmup_iterations}; it must be at least 1")
        self.backend = get_backend(backend)
        if host_arguments is not None and not self.backend.capabilities.host_arguments:
            raise InputError(
                f"host_arguments are given, but graphs on {self.backend.device} keep those of the capture; "
                "pass what changes in tensors"
            )
        self.stats = RunnerStats()
        self._fn = fn
        self._inputs = tuple(inputs)
        self._axes = resolve_axes(self._inputs, axes or {})
        self._output_axes = output_axes
        self._host_arguments = host_arguments
        self._static = {name: tuple(values) for name, values in (static or {}).items()}
        self._strict = strict
        self._on_capture_failure = on_capture_failure
        self._warmup_iterations = warmup_iterations
        self._has_families = isinstance(buckets, Mapping)
        families = buckets if isinstance(buckets, Mapping) else {DEFAULT_FAMILY: buckets}
        self.policy = DispatchPolicy(
            buckets={name: _bucket_sizes(sizes) if sizes != () else () for name, sizes in families.items()},
            enabled=enabled,
            max_padding_ratio=max_padding_ratio,
            capture_on_first_use=capture_on_first_use,
        )
        self._programs: dict[GraphKey, Program] = {}
        self._context = CallContext(self.backend.device)
        self._addresses = Addresses()
        self._unchecked_replays = CHECK_EVERY
        self._failed: dict[GraphKey, Reason] = {}
        self._bound: dict[int, BoundInputs] = {}
        self._buffers = self._make_buffers()
        self._pool = Pool(self.backend)

    @property
    def keys(self) -> list[GraphKey]:
        """Every key that can have a graph, in the order of capture: the largest first, so that memory is shared.

        On a device that may run out of graphs, one family after the other as they were declared (full graphs first:
        piecewise ones take the room of many), each from its largest and smallest size to those between.
        """
        names = list(self._static)
        limited = self.backend.capabilities.graph_limit is not None
        keys = [
            GraphKey(family, size, tuple(zip(names, values, strict=True)))
            for family, sizes in self.policy.buckets.items()
            for values in product(*self._static.values())
            for size in (spread(sizes) if limited else sizes)
        ]
        return keys if limited else sorted(keys, key=lambda key: -key.size)

    @property
    def failed(self) -> Mapping[GraphKey, Reason]:
        """The keys whose capture failed, and why."""
        return self._failed

    def capture(self, *, progress: bool | None = None, **static: Hashable) -> None:
        """Capture every key that has no graph yet, in the order of :attr:`keys`.

        Where the device has no room for more graphs, capture ends, keeps what it has and leaves the other keys to
        larger buckets, or to run eagerly where there is none; a warning says how many.

        Args:
            progress: whether to show a progress bar on standard error. Default: where that is a terminal.
            **static: capture only the keys whose static arguments have these values.

        Raises:
            CaptureError: a capture failed and the runner is strict, or another runner's function calls this while it
                is captured.
        """
        refuse_inside_recording(self._fn)
        if not self.policy.enabled:
            return
        keys = [
            key
            for key in self.keys
            if key not in self._programs and key not in self._failed and static.items() <= dict(key.variant).items()
        ]
        self._capture_all(keys, progress)

    def recapture(self, *, progress: bool | None = None) -> None:
        """Drop all graphs, and their memory, and capture those that there were again, with the weights as they are now.

        To be called after weights were replaced, instead of written in place. Outputs that were returned before must
        not be used any more, except those that were asked for with ``own=True``.

        Args:
            progress: as of :meth:`capture`.

        Raises:
            CaptureError: a capture failed and the runner is strict.
        """
        self._context = CallContext(self.backend.device)
        self._context.check()
        keys = [key for key in self.keys if key in self._programs]
        self.backend.synchronize()  # what the graphs still compute
        self._programs.clear()
        self._addresses = Addresses()
        self._pool = Pool(self.backend)
        self.stats.graphs = self.stats.captures = self.stats.graph_bytes = 0
        self._capture_all(keys, progress)

    def check_addresses(self) -> None:
        """Check that all that the graphs read from outside of the function is still where it was at capture.

        The runner checks by itself before the first replay of each graph and every ``CHECK_EVERY`` (256) replays.

        Raises:
            StaleAddressError: naming the tensor that was freed or moved. Then call :meth:`recapture`.
        """
        self._addresses.check()
        self._unchecked_replays = 0

    def _capture_all(self, keys: Sequence[GraphKey], progress: bool | None) -> None:
        self._context.check()
        gc.collect()
        gc.freeze()
        try:
            show = sys.stderr.isatty() if progress is None else progress
            for key in _with_progress(keys) if show else keys:
                if key not in self._failed:
                    self._capture(key)
        finally:
            gc.unfreeze()

    def decide(self, size: int, family: str = DEFAULT_FAMILY, **static: Hashable) -> Decision:
        """Say how a call of ``size`` on the bucketed axis would run, and why. Changes nothing."""
        return dispatch(size, self.policy, self._programs, self._failed, family, self._variant(family, static))

    def __call__(self, *, family: str = DEFAULT_FAMILY, own: bool = False, repeats: int = 1, **values: Any) -> Any:
        """Run one step, or several over the same inputs as the function leaves them.

        Args:
            family: which family of graphs, where there are several.
            repeats: how many times in a row the step runs; what is returned is of the last.
            own: whether to return tensors that stay. Otherwise outputs are views of memory that the **next call of
                this runner overwrites**: use them, or copy them, before it.
            **values: the inputs, on the host or on the device, at their true sizes; and the static arguments.

        Returns:
            What the function returns, cut to the true sizes.

        Raises:
            InputError: a value does not fit its declaration, or a size its limit; or autocast is on around the call.
            CaptureError: the step needed a capture, it failed, and the runner is strict; or another runner's function
                calls this while it is captured.
            StaleAddressError: memory that the graph reads was freed or moved since capture.
        """
        variant, sizes, decision = self._prepare(family, values)
        self._count(decision, sizes[self._axes.bucketed], repeats)
        if decision.mode is Mode.EAGER or decision.key is None:
            return self._run_unpadded(family, variant, values, sizes, repeats)
        outputs = self._replay(decision.key, values, sizes, repeats)
        return _clone(outputs) if own else outputs

    def verify(self, *, family: str = DEFAULT_FAMILY, **values: Any) -> Verification:
        """Run one step in several ways and compare: replay, eager over the same buffers, other padding, no padding.

        Counts no step, and puts back what it changes: memory that the function reads or writes (all but its weights)
        and random states. A graph that is not there yet is captured, as by a call. Outputs of an earlier call are
        overwritten.

        Args:
            family: which family of graphs, where there are several.
            **values: as for a call. Give fewer rows than the bucket has, so that there is padding.

        Returns:
            What was found; ``print`` shows it. Where the step would run eagerly, it says that and why.

        Raises:
            InputError, CaptureError, StaleAddressError: as for a call.
        """
        variant, sizes, decision = self._prepare(family, values)
        key = decision.key
        if decision.mode is Mode.EAGER or key is None:
            return no_graph(str(decision.reason))
        return verify(
            Step(
                key=key,
                inputs=self._inputs,
                values=values,
                sizes=sizes,
                graph_sizes=self._bind(key.size).sizes,
                replay=lambda given: self._replay(key, given, sizes, repeats=1),
                eager=lambda: self.run_eagerly(key, **values),
                unpadded=lambda: self._run_unpadded(family, variant, values, sizes, repeats=1),
                carried={},
                buffers=[self._buffers.arena],
                device=self.backend.device,
            )
        )

    def _prepare(
        self, family: str, values: dict[str, Any]
    ) -> tuple[tuple[tuple[str, Hashable], ...], dict[str, int], Decision]:
        """Check a step and decide how it runs, capturing its graph where that is due; takes static arguments out."""
        refuse_inside_recording(self._fn)
        self._context.check()
        static = {name: values.pop(name) for name in self._static if name in values}
        variant = self._variant(family, static)
        sizes = true_sizes(self._inputs, values, self.backend.device)
        size = sizes[self._axes.bucketed]
        if size < 1:
            raise InputError(f"axis {self._axes.bucketed!r} has size {size}; a step has at least one row")
        decision = dispatch(size, self.policy, self._programs, self._failed, family, variant)
        if decision.mode is not Mode.EAGER and decision.key is not None:
            check_fit(sizes, self._bind(decision.key.size).sizes)
        if decision.mode is Mode.CAPTURE and decision.key is not None:
            self._capture(decision.key)
            after = dispatch(size, self.policy, self._programs, self._failed, family, variant)
            decision = replace(after, reason=after.reason or decision.reason)
        return variant, sizes, decision

    def _run_unpadded(
        self,
        family: str,
        variant: Sequence[tuple[str, Hashable]],
        values: Mapping[str, torch.Tensor],
        sizes: Mapping[str, int],
        repeats: int,
    ) -> Any:
        """Call the function as it is, on copies of the values."""
        if self._host_arguments is not None:
            self._host_arguments.set(family, sizes, values)
        device = self.backend.device
        on_device = {
            spec.name: values[spec.name].to(device, copy=True)
            if spec.name in values
            else all_padding(spec, sizes, device)
            for spec in self._inputs
        }
        with torch.inference_mode():
            for _ in range(repeats - 1):
                self._call(family, variant, on_device)
            return self._call(family, variant, on_device)

    def run_eagerly(self, key: GraphKey, **values: torch.Tensor) -> Any:
        """Run the function without its graph, over the same padded buffers as the graph of ``key``.

        What a replay of ``key`` returns for the same values is bitwise the same: this is what proves it.
        Counts nothing. Outputs stay valid.

        Raises:
            InputError: as for a call.
            CaptureError: another runner's function calls this while it is captured.
        """
        refuse_inside_recording(self._fn)
        self._context.check()
        sizes = true_sizes(self._inputs, values, self.backend.device)
        bound = self._bind(key.size)
        check_fit(sizes, bound.sizes)
        self._load(key.family, bound, values)
        with torch.inference_mode():
            return self._cut(self._call(key.family, key.variant, bound.views), sizes, bound.sizes)

    def _call(self, family: str, variant: Sequence[tuple[str, Hashable]], inputs: Mapping[str, torch.Tensor]) -> Any:
        if self._has_families:
            return self._fn(family=family, **dict(variant), **inputs)
        return self._fn(**dict(variant), **inputs)

    def _variant(self, family: str, static: Mapping[str, Hashable]) -> tuple[tuple[str, Hashable], ...]:
        if family not in self.policy.buckets:
            raise InputError(f"family {family!r} is not one of {sorted(self.policy.buckets)}")
        if len(static) != len(self._static):
            raise InputError(f"static arguments given: {sorted(static)}; declared are {sorted(self._static)}")
        for name, value in static.items():
            if value not in self._static[name]:
                raise InputError(f"static argument {name!r} is {value!r}; declared values are {self._static[name]}")
        return tuple((name, static[name]) for name in self._static)

    def _make_buffers(self) -> InputBuffers:
        largest = [sizes[-1] for sizes in self.policy.buckets.values() if sizes]
        if not largest:
            raise InputError("no family has buckets; give at least one, or enabled=False to run everything eagerly")
        at_largest = [self._axes.at(size) for size in largest]
        limits = {axis: max(sizes[axis] for sizes in at_largest) for axis in at_largest[0]}
        return InputBuffers(self._inputs, limits, self.backend)

    def _bind(self, bucket: int) -> BoundInputs:
        if bucket not in self._bound:
            self._bound[bucket] = self._buffers.bind(self._axes.at(bucket))
        return self._bound[bucket]

    def _load(self, family: str, bound: BoundInputs, values: Mapping[str, torch.Tensor]) -> None:
        """Write a step's values where its graph reads them."""
        if self._host_arguments is not None:
            self._host_arguments.set(family, bound.sizes, values)
        self._buffers.load(bound, values)

    def _capture(self, key: GraphKey) -> None:
        if problem := self._no_room(key):
            self._stop_capturing(problem)
            return
        bound = self._bind(key.size)
        start = time.perf_counter()
        try:
            with self._pool.measured() as taken:
                self._record(key, bound)
        finally:
            self.stats.capture_seconds += time.perf_counter() - start
            self.stats.graph_bytes += taken.kept
            self.stats.capture_peak_bytes = max(self.stats.capture_peak_bytes, taken.peak)

    def _record(self, key: GraphKey, bound: BoundInputs) -> None:
        self._load(key.family, bound, {})
        try:
            program = record(
                lambda **kwargs: self._call(key.family, key.variant, kwargs),
                self.backend,
                self._pool,
                bound.views,
                self._host_arguments,
                warmup_iterations=self._warmup_iterations,
            )
            self._cut(tree_unflatten(program.outputs, program.spec), bound.sizes, bound.sizes)
        except CaptureError as error:
            if self._strict:
                raise
            if error.__cause__ is not None and self.backend.out_of_resources(error.__cause__):
                self._stop_capturing(f"it refused the next: {error.__cause__}")
            else:
                # As text: whoever keeps the log must not keep what the error's frames hold.
                log.error("%s runs without a graph of its own: %s", key, str(error))
                self._fail(key, _reason(error), str(error))
        else:
            self._programs[key] = program
            self._addresses.watch(program.guard.reads, [*bound.views.values(), *self._pool.slabs])
            self._unchecked_replays = CHECK_EVERY  # before its first replay
            self._context.note_capture()
            self.stats.captures += 1
            self.stats.graphs += program.graphs
            self.stats.breaks.update(program.breaks)
        if self._failed.get(key) is Reason.OUT_OF_MEMORY:
            gc.collect()  # what the broken capture held in cycles is needed for the next

    def _no_room(self, key: GraphKey) -> str | None:
        """Return why the device has no room for the graphs of ``key``, as far as that is known beforehand."""
        limit, held = self.backend.capabilities.graph_limit, self.stats.graphs
        if limit is None:
            return None
        alike = (program.graphs for other, program in self._programs.items() if other.family == key.family)
        needed = next(alike, 1)
        return f"it holds {limit} at most and the next size takes {needed}" if held + needed > limit else None

    def _stop_capturing(self, problem: str) -> None:
        """Leave the keys that have no graph yet without one."""
        left = [key for key in self.keys if key not in self._programs and key not in self._failed]
        message = (
            f"{self.stats.graphs} graphs are captured and {self.backend.device} has no room for more: {problem}. "
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
        self._failed[key] = reason
        failure = CaptureFailure(key, reason, message)
        self.stats.capture_failures.append(failure)
        if self._on_capture_failure is not None:
            self._on_capture_failure(failure)

    def _replay(self, key: GraphKey, values: Mapping[str, torch.Tensor], sizes: Mapping[str, int], repeats: int) -> Any:
        program, bound = self._programs[key], self._bind(key.size)
        self._unchecked_replays += 1
        if self._unchecked_replays > CHECK_EVERY:
            self.check_addresses()
        self._load(key.family, bound, values)
        for _ in range(repeats):
            program.replay()
        return self._cut(tree_unflatten(program.outputs, program.spec), sizes, bound.sizes)

    def _cut(self, outputs: Any, sizes: Mapping[str, int], graph_sizes: Mapping[str, int]) -> Any:
        """Cut outputs from the graph's sizes to the true ones."""
        leaves, spec = tree_flatten(outputs)
        output_axes = self._output_axes or [(self._axes.bucketed,)] * len(leaves)
        if len(output_axes) != len(leaves):
            raise CaptureError(f"the function returned {len(leaves)} tensors; output_axes declares {len(output_axes)}")
        cut = []
        for index, (leaf, axes) in enumerate(zip(leaves, output_axes, strict=True)):
            expected = [
                graph_sizes[axis] if axis is not None else size for axis, size in zip(axes, leaf.shape, strict=False)
            ]
            if leaf.dim() < len(axes) or list(leaf.shape[: len(axes)]) != expected:
                raise CaptureError(
                    f"output {index} has shape {tuple(leaf.shape)}, but its dimensions are taken to be the axes "
                    f"{tuple(axes)} of sizes {expected}; declare them with output_axes"
                )
            cut.append(leaf[tuple(slice(None if axis is None else sizes[axis]) for axis in axes)])
        return tree_unflatten(cut, spec)

    def _count(self, decision: Decision, size: int, repeats: int) -> None:
        stats = self.stats
        stats.steps += repeats
        if decision.reason is not None:
            # A capture at first use serves the repeats too.
            stats.misses[decision.reason] += repeats if decision.mode is Mode.EAGER else 1
        if decision.mode is Mode.EAGER:
            stats.eager_steps += repeats
        else:
            stats.replays += repeats
            stats.rows += size * repeats
            stats.padded_rows += decision.padding * repeats


def _bucket_sizes(buckets: Buckets) -> tuple[int, ...]:
    return make_buckets(buckets) if isinstance(buckets, int) else check_buckets(buckets)


def _reason(error: CaptureError) -> Reason:
    if isinstance(error, CaptureMemoryError):
        return Reason.OUT_OF_MEMORY
    return Reason.UNSUPPORTED_OP if isinstance(error, UnsupportedOpError) else Reason.CAPTURE_FAILED


def _clone(outputs: Any) -> Any:
    leaves, spec = tree_flatten(outputs)
    return tree_unflatten([leaf.clone() for leaf in leaves], spec)


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("capturing graphs", total=total)
        yield lambda: progress.advance(task)


def _with_progress(keys: Sequence[GraphKey]) -> Iterator[GraphKey]:
    with _progress_bar(len(keys)) as advance:
        for key in keys:
            yield key
            advance()
