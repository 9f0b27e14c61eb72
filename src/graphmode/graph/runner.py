"""GraphRunner: any function as a set of graphs, one per bucket, with padding and dispatch."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from graphmode.errors import GraphModeError, InputError
from graphmode.graph.axes import AxisSize, Size, volume
from graphmode.graph.backends.base import Backend, get_backend
from graphmode.graph.buckets import Buckets
from graphmode.graph.buffers import BoundInputs, InputBuffers
from graphmode.graph.captures import Captures, shapes_of
from graphmode.graph.declaration import DEFAULT_FAMILY, Declaration, Variant
from graphmode.graph.dispatch import Decision, DispatchPolicy, GraphKey, Mode, Reason, dispatch, exact
from graphmode.graph.host_arguments import HostArguments
from graphmode.graph.inputs import Input, InputTree, all_padding, check_fit
from graphmode.graph.outputs import Sample
from graphmode.graph.outside import name_of
from graphmode.graph.program import Program, refuse_inside_recording
from graphmode.graph.progress import reported, with_progress
from graphmode.graph.stats import CaptureFailure, RunnerStats
from graphmode.graph.trees import Structure, flatten
from graphmode.graph.turns import Turns
from graphmode.graph.verify import Step, Verification, no_graph, verify

log = logging.getLogger(__name__)

_MAX_PLANS = 1024


@dataclass(frozen=True, slots=True)
class _Plan:
    """What calls of one signature (family, static arguments, shapes) do, until the graphs change.

    Attributes:
        decision: how they run.
        family: which family.
        variant: the static arguments.
        sizes: the true size of every axis.
        rows: how many rows that is.
        idle: whether nothing runs: there is no row, and all outputs are empty.
        values: what the runner itself adds to the inputs: true sizes.
        program: the graph, where one serves them.
        bound: the inputs as the graph sees them.
        load: copies the values to where the graph reads them.
        beyond: the parts of carried inputs beyond the true sizes, which the step must not change.
        cuts: for each output the slices to the true sizes.
    """

    decision: Decision
    family: str
    variant: Variant
    sizes: dict[str, int]
    rows: int
    idle: bool
    values: dict[str, torch.Tensor]
    program: Program | None = None
    bound: BoundInputs | None = None
    load: Callable[[Mapping[str, torch.Tensor]], None] | None = None
    beyond: Sequence[torch.Tensor] = ()
    cuts: Sequence[tuple[slice, ...] | None] = ()


class GraphRunner:
    """A function of tensors as a set of graphs.

    The function is captured once for each bucket, over persistent input buffers. A call finds the smallest bucket that
    holds it, copies its values in, refills the padding and replays; a call that no graph serves runs the function
    eagerly, and ``stats`` says why.

    The function may change its inputs in place; if it leaves the inputs of the next step there, one call can run
    several steps (``repeats``). It must do the same work each time: Python code, shapes and scalars stay those of the
    capture, and only values in tensors change. Padding rows, which have the declared padding values, must do no harm.

    Example::

        runner = GraphRunner(policy, [Input("state", torch.float32, ("batch", 64))], buckets=32)
        runner.capture()
        action = runner(state=state)

    Args:
        fn: takes the inputs by name (and ``family`` and the static arguments, where there are any) and returns tensors
            in any structure.
        inputs: the declarations, each an argument of ``fn``; or a mapping from its arguments to inputs or to dicts,
            tuples, lists and dataclasses of them, as values will nest.
        buckets: the sizes that get a graph: a list, or the largest one, from which few are made. With several bucketed
            axes, a mapping from each axis to its sizes; every combination gets a graph. With families, a mapping from
            each family to any of these; then each call names its family, and ``fn`` takes it as ``family``. A family
            with ``()`` runs eagerly.
        axes: the sizes of the axes that are not bucketed: fixed, or a function whose parameters are named after
            bucketed axes and static arguments (with one bucketed axis, its one parameter may have any name). An axis
            that no input has may be one of an output: ``{"samples": lambda frames: 256 * frames}``.
        output_axes: for each output in flat order, the axis name (or None) of each leading dimension, to cut outputs to
            the true size. Default: found from the shapes of the outputs at two sizes or more, for which the function
            runs eagerly on padding once or a few times; if it cannot be found, calls that need padding are refused.
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
        warmup_iterations: how often the function runs before each capture, at least once, so that what it and libraries
            do only at first runs is not captured.

    Raises:
        InputError: the declarations do not fit together.
        BackendError: the device has no backend.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Input] | Mapping[str, InputTree],
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
        self._declared = Declaration(fn, inputs, buckets, axes or {}, output_axes, static or {})
        self.policy = DispatchPolicy(
            buckets=self._declared.buckets,
            enabled=enabled,
            max_padding_ratio=max_padding_ratio,
            capture_on_first_use=capture_on_first_use,
        )
        self._buffers = InputBuffers(self._declared.inputs, self._declared.limits, self.backend)
        self._captures = Captures(
            fn,
            self._declared,
            self._buffers,
            self.backend,
            host_arguments,
            strict=strict,
            on_capture_failure=on_capture_failure,
            warmup_iterations=warmup_iterations,
        )
        self._plans: dict[Hashable, _Plan] = {}
        self._turns = Turns(name_of(fn), self.backend.synchronize)

    @property
    def stats(self) -> RunnerStats:
        """What the steps did, and what the graphs cost."""
        return self._captures.stats

    @property
    def carried(self) -> Mapping[str, torch.Tensor]:
        """The state of each carried input, at its largest shape, on the device. Writing to it changes the state."""
        return self._buffers.carried

    @property
    def keys(self) -> list[GraphKey]:
        """Every key that can have a graph, in the order of capture: the largest first, so that memory is shared.

        On a device that may run out of graphs, families come in the order of their declaration (declare full graphs
        first: a piecewise size takes many), each with its largest and smallest size first.
        """
        return self._captures.keys

    @property
    def failed(self) -> Mapping[GraphKey, Reason]:
        """The keys whose capture failed, and why."""
        return self._captures.failed

    def capture(
        self,
        *,
        progress: bool | None = None,
        on_capture: Callable[[int, int], object] | None = None,
        **static: Hashable,
    ) -> None:
        """Capture every key that has no graph yet, in the order of :attr:`keys`.

        If the device has no room for more graphs, capture ends with a warning: calls of the other keys use larger
        buckets, or run eagerly.

        Args:
            progress: whether to show a progress bar on standard error. Default: where that is a terminal.
            on_capture: called before the first capture and after each with how many are done and how many there are.
            **static: capture only the keys whose static arguments have these values.

        Raises:
            CaptureError: a capture failed and the runner is strict, or another runner's function calls this while it
                is captured.
            InputError: a static argument has no such name or value.
        """
        refuse_inside_recording(self._captures.fn)
        wanted = {name: exact(self._declared.static_value(name, value)) for name, value in static.items()}
        if not self.policy.enabled:
            return
        with self._turns:
            self._capture_all(
                [
                    key
                    for key in self.keys
                    if key not in self._captures.programs
                    and key not in self._captures.failed
                    and all(exact(value) == wanted.get(name, exact(value)) for name, value in key.variant)
                ],
                progress,
                on_capture,
            )

    def _capture_all(
        self,
        keys: Sequence[GraphKey],
        progress: bool | None,
        on_capture: Callable[[int, int], object] | None = None,
    ) -> None:
        self._plans.clear()
        show = sys.stderr.isatty() if progress is None else progress
        each: Iterable[GraphKey] = with_progress(keys, "capturing graphs") if show else keys
        self._captures.capture_all(each if on_capture is None else reported(each, len(keys), on_capture))

    def recapture(self, *, progress: bool | None = None) -> None:
        """Drop all graphs and their memory, and capture the same keys again, with the weights as they are now.

        Call it after weights were replaced instead of written in place. Outputs that were returned before must not be
        used any more, except those that were asked for with ``own=True``.

        Args:
            progress: as of :meth:`capture`.

        Raises:
            CaptureError: a capture failed and the runner is strict.
        """
        refuse_inside_recording(self._captures.fn)
        with self._turns:
            self.backend.synchronize()  # what the graphs still compute
            keys = [key for key in self.keys if key in self._captures.programs]
            self._captures.clear()
            self._captures.context.check()
            self._capture_all(keys, progress)

    def check_addresses(self) -> None:
        """Check that all that the graphs read from outside of the function is still where it was at capture.

        The runner checks by itself before the first replay of each graph and every ``CHECK_EVERY`` (256) replays.

        Raises:
            StaleAddressError: naming the tensor that was replaced, moved or freed, or the module that was switched
                between training and evaluation, by its path from the function. Then call :meth:`recapture`.
        """
        self._captures.check_addresses()

    def decide(self, size: Size, /, family: str = DEFAULT_FAMILY, **static: Hashable) -> Decision:
        """Say how a call of ``size`` on the bucketed axis (of each, where there are several) would run, and why.

        Changes nothing.

        Raises:
            InputError: ``size`` is no size, or the family or a static argument is not declared.
        """
        self._declared.axes.check(size)
        return self._dispatch(size, family, self._declared.variant(family, static))

    def _dispatch(self, size: Size, family: str, variant: Variant) -> Decision:
        return dispatch(size, self.policy, self._captures.programs, self._captures.failed, family, variant)

    def __call__(self, *, family: str = DEFAULT_FAMILY, own: bool = False, repeats: int = 1, **values: Any) -> Any:
        """Run one step, or several, each on the inputs as the one before left them.

        Calls from several threads take turns. Outputs that are not ``own`` belong to the thread that got them: while it
        holds them, another thread's call is refused.

        Args:
            family: which family of graphs, where there are several.
            repeats: how many times in a row the step runs; the outputs of the last are returned.
            own: whether to return tensors that stay. Otherwise outputs are views of memory that the **next call of
                this runner overwrites**: use them, or copy them, before it.
            **values: the inputs, on the host or on the device, at their true sizes, as tensors or numpy arrays; and the
                static arguments. Without any row, outputs are empty and nothing runs, unless one has elements even so,
                such as a sum over rows.

        Returns:
            What the function returns, cut to the true sizes, in tensors that take no part in training.

        Raises:
            InputError: a value does not fit its declaration, a size its limit, or ``repeats`` is less than 1; or
                outputs must be cut, and which of their dimensions follow the axes is not declared and cannot be found.
            CaptureError: the step needed a capture, it failed, and the runner is strict; or another runner's function
                calls this while it is captured.
            StaleAddressError: as of :meth:`check_addresses`, which a call runs now and then.
            GraphModeError: another thread still holds outputs of an earlier call, or the call comes from inside the
                function.
        """
        refuse_inside_recording(self._captures.fn)
        if not isinstance(repeats, int) or repeats < 1:
            raise InputError(f"repeats is {repeats!r}; it must be an integer of at least 1")
        with self._turns:
            self._captures.context.check()
            signature = self._declared.signature(family, values)
            if signature is None:
                values = self._declared.flat_values(values)
                signature = self._declared.signature(family, values)
            plan = self._plans.get(signature) or self._planned(signature, family, values)
            self._count(plan, repeats)
            start = time.perf_counter()
            with torch.inference_mode():
                leaves, structure = self._run(plan, values, repeats)
            if plan.program is not None and not plan.idle:
                self.stats.replay_seconds += time.perf_counter() - start
            if own:
                with torch.no_grad():
                    leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            elif plan.program is not None:
                self._turns.lend([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
            return structure.build(leaves)

    def verify(self, *, family: str = DEFAULT_FAMILY, **values: Any) -> Verification:
        """Run one step in several ways and compare: replay, eager over the same buffers, other padding, no padding.

        Counts no step, and restores what it changes: memory that the function reads or writes (all but its weights),
        carried inputs and random states. A graph that is not there yet is captured, as by a call. Outputs of an earlier
        call are overwritten.

        Args:
            family: which family of graphs, where there are several.
            **values: as for a call. Give fewer rows than the bucket has, so that there is padding.

        Returns:
            What was found; ``print`` shows it. Where the step would run eagerly, it says that and why.

        Raises:
            InputError, CaptureError, StaleAddressError: as for a call.
        """
        refuse_inside_recording(self._captures.fn)
        with self._turns:
            self._captures.context.check()
            values = self._declared.as_tensors(self._declared.flat_values(values))
            plan = self._planned(None, family, values)
            decision, key, bound = plan.decision, plan.decision.key, plan.bound
            if key is None or bound is None:
                return no_graph(f"the call runs eagerly, without padding: {decision.reason}")
            if plan.idle:
                return no_graph("the call has no row, so nothing runs")
            static = dict(plan.variant)

            def run(given: Mapping[str, torch.Tensor], plan: _Plan) -> Any:
                with torch.inference_mode():
                    leaves, structure = self._run(plan, {**static, **given}, repeats=1)
                return structure.build(leaves)

            def replay(given: Mapping[str, torch.Tensor]) -> Any:
                return run(given, self._plan(decision, family, plan.variant, plan.sizes, plan.rows, given))

            tensors = self._declared.without_static(values)
            carried = self._buffers.bind_carried(plan.sizes)
            return verify(
                Step(
                    key=key,
                    inputs=[spec for spec in self._declared.inputs if not spec.carried and spec.size_of is None],
                    values=tensors,
                    sizes=plan.sizes,
                    graph_sizes=bound.sizes,
                    replay=replay,
                    eager=lambda: self._run_padded(key, tensors),
                    unpadded=lambda: run(tensors, replace(plan, program=None)),
                    carried={
                        name: (self.carried[name], tuple(map(slice, corner.shape))) for name, corner in carried.items()
                    },
                    buffers=[self._buffers.arena],
                    device=self.backend.device,
                )
            )

    def run_eagerly(self, key: GraphKey, /, **values: Any) -> Any:
        """Run the function without its graph, over the same padded buffers as the graph of ``key``.

        A replay of ``key`` returns bitwise the same for the same values; this is the way to prove it. Counts nothing.
        Outputs stay valid.

        Raises:
            InputError: as for a call, or there is no such key.
            CaptureError: another runner's function calls this while it is captured.
        """
        refuse_inside_recording(self._captures.fn)
        if not self._captures.is_key(key):
            raise InputError(f"{key!r} is no key of this runner; take one of its keys, or that of decide(...)")
        with self._turns:
            self._captures.context.check()
            return self._run_padded(key, self._declared.as_tensors(self._declared.flat_values(values)))

    def _run_padded(self, key: GraphKey, values: Mapping[str, Any]) -> Any:
        """Run the function eagerly over the buffers of a graph."""
        sizes = self._declared.sizes(values, key.variant, self.backend.device)
        bound = self._captures.bind(key)
        check_fit(sizes, bound.sizes)
        self._captures.set_host_arguments(key.family, bound.sizes, values)
        with torch.inference_mode():
            self._buffers.load(bound, {**values, **self._declared.size_values(sizes)})
            with _unchanged(self._buffers.beyond(bound, sizes)):
                leaves, structure = flatten(self._captures.call(key.family, key.variant, bound.views))
                leaves = [leaf.clone() for leaf in leaves]
            if self._declared.output_axes is None and sizes == bound.sizes:
                return structure.build(leaves)
            here = Sample(bound.sizes, shapes_of(leaves))
            outputs = self._captures.output_axes(key.family, key.variant, [here])
            if isinstance(outputs, str):
                raise InputError(outputs)
            return structure.build(_cut(leaves, outputs.cuts(here.shapes, sizes)))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise GraphModeError(
            f"the GraphRunner of {name_of(self._captures.fn)} cannot be copied or pickled: its graphs read the memory "
            "of its own function. Copy the function or the module without it, and make a runner of the copy"
        )

    def _planned(self, signature: Hashable, family: str, values: dict[str, Any]) -> _Plan:
        """Decide what a call does, after a capture if it needs one."""
        values = self._declared.as_tensors(values)
        variant = self._declared.variant(family, values)
        sizes = self._declared.sizes(self._declared.without_static(values), variant, self.backend.device)
        size = self._declared.axes.size_of(sizes)
        rows = volume(size)
        wanted = size if rows else self._declared.axes.size_of({axis: max(1, size) for axis, size in sizes.items()})
        decision = self._dispatch(wanted, family, variant)
        if decision.mode is not Mode.EAGER and decision.key is not None:
            check_fit(sizes, self._captures.bind(decision.key).sizes)
        if decision.mode is Mode.CAPTURE and decision.key is not None:
            self._plans.clear()
            self._captures.capture(decision.key)
            after = self._dispatch(wanted, family, variant)
            plan = self._plan(after, family, variant, sizes, rows, values)
            now = replace(plan, decision=replace(after, reason=after.reason or decision.reason))
        else:
            now = plan = self._plan(decision, family, variant, sizes, rows, values)
        if signature is not None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[signature] = plan
        return now

    def _plan(
        self,
        decision: Decision,
        family: str,
        variant: Variant,
        sizes: dict[str, int],
        rows: int,
        values: Mapping[str, Any],
    ) -> _Plan:
        true = self._declared.size_values(sizes)
        plan = _Plan(decision, family, variant, sizes, rows, not rows, true)
        if decision.mode is Mode.EAGER or decision.key is None:
            self._declared.check_state_holds(sizes)
            return plan
        program, bound = self._captures.programs[decision.key], self._captures.bind(decision.key)
        cuts: Sequence[tuple[slice, ...] | None] = [None] * len(program.outputs)
        if self._declared.output_axes is not None or any(sizes[axis] != bound.sizes[axis] for axis in sizes):
            outputs = self._captures.outputs_of(family, variant)
            if isinstance(outputs, str):
                raise InputError(outputs)
            cuts = outputs.cuts(shapes_of(program.outputs), sizes)
        return replace(
            plan,
            idle=not rows and not any(leaf.numel() for leaf in _cut(program.outputs, cuts)),
            program=program,
            bound=bound,
            load=self._buffers.loader(bound, {**self._declared.without_static(values), **true}),
            beyond=self._buffers.beyond(bound, sizes),
            cuts=cuts,
        )

    def _run(self, plan: _Plan, values: Mapping[str, Any], repeats: int) -> tuple[list[Any], Structure]:
        """Run a step and return its outputs at their true sizes, flat, and how they nest."""
        values = self._declared.without_static(values)
        if plan.values:
            values = {**values, **plan.values}
        if plan.program is None or plan.bound is None or plan.load is None:
            return self._run_unpadded(plan, values, repeats)
        if not plan.idle:
            self._captures.before_replay()
            self._captures.set_host_arguments(plan.family, plan.bound.sizes, values)
            plan.load(values)
            with _unchanged(plan.beyond) if plan.beyond else nullcontext():
                for _ in range(repeats):
                    plan.program.replay()
        return _cut(plan.program.outputs, plan.cuts), plan.program.structure

    def _run_unpadded(self, plan: _Plan, values: Mapping[str, Any], repeats: int) -> tuple[list[Any], Structure]:
        """Run the function eagerly at the true sizes, on copies of its inputs."""
        device, values = self.backend.device, self._declared.as_tensors(values)
        self._captures.set_host_arguments(plan.family, plan.sizes, values)
        inputs = self._buffers.bind_carried(plan.sizes)
        for spec in self._declared.inputs:
            value = values.get(spec.name)
            if value is None:
                if not spec.carried:
                    inputs[spec.name] = all_padding(spec, plan.sizes, device)
            elif spec.carried:
                inputs[spec.name].copy_(value)
            else:
                inputs[spec.name] = value.to(device, copy=True)
        for _ in range(repeats - 1):
            self._captures.call(plan.family, plan.variant, inputs)
        leaves, structure = flatten(self._captures.call(plan.family, plan.variant, inputs))
        return [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure

    def _count(self, plan: _Plan, repeats: int) -> None:
        if plan.idle:
            return
        stats, decision = self.stats, plan.decision
        stats.steps += repeats
        if decision.reason is not None:
            # A capture at first use serves the repeats too.
            stats.misses[decision.reason] += repeats if decision.mode is Mode.EAGER else 1
        if decision.mode is Mode.EAGER:
            stats.eager_steps += repeats
        else:
            assert decision.key is not None
            stats.replays += repeats
            stats.buckets[plan.family, decision.key.size] += repeats
            stats.rows += plan.rows * repeats
            stats.padded_rows += decision.padding * repeats


def _cut(leaves: Sequence[torch.Tensor], cuts: Sequence[tuple[slice, ...] | None]) -> list[torch.Tensor]:
    """Return the outputs at their true sizes; in inference mode, so that none takes part in training."""
    return [leaf.detach() if cut is None else leaf[cut] for leaf, cut in zip(leaves, cuts, strict=True)]


@contextmanager
def _unchanged(views: Sequence[torch.Tensor]) -> Iterator[None]:
    """Restore afterwards what ``views`` hold now."""
    before = [view.clone() for view in views]
    try:
        yield
    finally:
        for view, values in zip(views, before, strict=True):
            view.copy_(values)
