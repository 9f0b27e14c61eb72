"""Proof: one call run in several ways, and whether they agree. Nothing here knows how a runner captures or replays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path

from graphmode.graph.dispatch import GraphKey
from graphmode.graph.guard import tensors_in
from graphmode.graph.inputs import Input


@dataclass(frozen=True)
class Comparison:
    """One way to run a call, compared with its replay.

    Attributes:
        passed: whether they agree; None where the comparison could not be made.
        differences: outputs and carried inputs that differ, or the error that was raised: a sentence each.
        memory: memory from outside that the function left different: a sentence each.
        largest: the largest absolute difference of any element; infinite if one is NaN and the other a number, 0 if
            nothing can be subtracted.
        inputs: in the comparison with another padding: the inputs whose padding values change the result, each by
            itself, or all if only all together do.
        note: what else to know, such as why the comparison was not made.
    """

    passed: bool | None
    differences: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    largest: float = 0.0
    inputs: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        verdict = {True: "same", False: "DIFFERS", None: "not compared"}[self.passed]
        if self.passed and self.largest:
            verdict = f"close: the largest difference is {self.largest:.3g}"
        if self.inputs:
            verdict += f" with the padding of {_names(self.inputs)}"
        return "\n    ".join((f"{verdict}; {self.note}" if self.note else verdict, *self.differences, *self.memory))


@dataclass(frozen=True)
class Verification:
    """What :meth:`GraphRunner.verify` found, as text by ``print``.

    Attributes:
        key: the graph that was compared; None where the call has none.
        replay: the replay against ``run_eagerly``, bitwise. They differ where the function is not the same work each
            time, or where the runtime is wrong.
        padding: the replay against one with other padding values, bitwise on the true rows. They differ where true rows
            depend on what padding holds.
        unpadded: the replay against the function called without any padding, within the tolerances of
            ``torch.testing.assert_close``. They differ where padding changes true rows.
    """

    key: GraphKey | None
    replay: Comparison
    padding: Comparison
    unpadded: Comparison

    @property
    def ok(self) -> bool:
        """Whether a graph was compared and nothing differs."""
        return bool(self.replay.passed) and False not in (self.padding.passed, self.unpadded.passed)

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{'no graph' if self.key is None else self.key}: {'ok' if self.ok else 'not proven'}",
                f"  replay against run_eagerly: {self.replay}",
                f"  replay against another padding: {self.padding}",
                f"  replay against the unpadded call: {self.unpadded}",
            )
        )


@dataclass(frozen=True)
class Step:
    """One call as a runner can run it: each way returns the outputs, cut to the true sizes, and counts nothing.

    Attributes:
        key: the graph that serves it.
        inputs: the declarations of the inputs whose values may be chosen.
        values: the call's values by name, at their true sizes.
        sizes: the true size of every axis.
        graph_sizes: the size of every axis in the graph.
        replay: replays the graph on given values, which may be as large as the graph.
        eager: runs the function over the same padded buffers.
        unpadded: calls the function at the true sizes.
        carried: the persistent tensor of each input that is state, by name, and the corner of it at the true sizes.
        buffers: other memory of the runner, which every run writes anew.
        device: where it runs.
    """

    key: GraphKey
    inputs: Sequence[Input]
    values: Mapping[str, torch.Tensor]
    sizes: Mapping[str, int]
    graph_sizes: Mapping[str, int]
    replay: Callable[[Mapping[str, torch.Tensor]], Any]
    eager: Callable[[], Any]
    unpadded: Callable[[], Any]
    carried: Mapping[str, tuple[torch.Tensor, tuple[slice, ...]]]
    buffers: Sequence[torch.Tensor]
    device: torch.device


def no_graph(reason: str) -> Verification:
    """Return the verification of a call that replays no graph."""
    nothing = Comparison(None, note=reason)
    return Verification(None, nothing, nothing, nothing)


def verify(step: Step) -> Verification:
    """Compare the replay of a step with the other ways to run it.

    Every run starts from the same memory and the same random state, and both are restored at the end.
    """
    with _Surroundings(step).kept() as surroundings:
        graph = surroundings.run(lambda: step.replay(step.values))
        if graph.error is not None:
            raise graph.error
        eager = surroundings.run(step.eager)
        return Verification(
            step.key,
            _compare(graph, eager, bitwise=True),
            _with_another_padding(step, surroundings, graph),
            _without_padding(graph, surroundings.run(step.unpadded)),
        )


def other_padding(
    spec: Input, value: torch.Tensor, sizes: Mapping[str, int], graph_sizes: Mapping[str, int], number: float
) -> torch.Tensor | None:
    """Return the value of an input at the size of its graph, surrounded by something other than its padding.

    Numbers become ``number``, booleans the opposite; integers, which may be indices, become values that the input holds
    elsewhere.

    Returns:
        None where the input has no padding, and where no other value is known to be allowed.
    """
    shape, full = (
        tuple(at[axis] if isinstance(axis, str) else axis for axis in spec.shape) for at in (sizes, graph_sizes)
    )
    if shape == full:
        return None
    grown = torch.empty(full, dtype=spec.dtype, device=value.device)
    if spec.dtype is torch.bool:
        grown.fill_(not spec.padding)
    elif spec.dtype.is_floating_point or spec.dtype.is_complex:
        grown.fill_(number)
    else:
        held = value.to(torch.int64).unique()
        others = held[held != spec.padding]
        if not len(others):
            return None
        grown.copy_(others.repeat(-(-grown.numel() // len(others)))[: grown.numel()].view(full))
    grown[tuple(map(slice, shape))] = value
    return grown


def _with_another_padding(step: Step, surroundings: _Surroundings, graph: _Run) -> Comparison:
    """Vary all padding at once; where that shows, find the inputs that it comes from.

    Floats become NaN, and large numbers of either sign: sorting takes NaN for the largest. Where true rows change with
    NaN alone, padding is only multiplied by zero; finite padding is harmless then.
    """
    numbers = (math.nan, _large(step, 1), _large(step, -1))
    padded = [_other_paddings(step, number) for number in numbers]
    if not padded[0]:
        full = all(size == step.graph_sizes[axis] for axis, size in step.sizes.items())
        reason = "the call fills its graph; verify a smaller one" if full else "no other value is known to be allowed"
        return Comparison(None, note=reason)

    def compare(changed: Mapping[str, torch.Tensor]) -> Comparison:
        return _compare(graph, surroundings.run(lambda: step.replay({**step.values, **changed})), bitwise=True)

    together = [compare(changed) for changed in padded]
    failed = next((made for made in together if not made.passed), None)
    if failed is None:
        given = [spec for spec in step.inputs if spec.name in step.values and _is_padded(step, spec)]
        kept = [spec.name for spec in given if spec.name not in padded[0]]
        note = f"the padding of {_names(kept)} was not varied: the call's values are all like it" if kept else ""
        return Comparison(True, note=note)
    alone = {name: [compare({name: changed[name]}) for changed in padded] for name in padded[0]}
    relied = [name for name, (_, *finite) in alone.items() if not all(made.passed for made in finite)]
    if not relied and all(made.passed for made in together[1:]):
        not_nan = [name for name, (with_nan, *_) in alone.items() if not with_nan.passed]
        return Comparison(True, note=f"the padding of {_names(not_nan)} must not be NaN")
    return replace(failed, inputs=tuple(relied or padded[0]))


def _other_paddings(step: Step, number: float) -> dict[str, torch.Tensor]:
    """Return all values of a step that can have another padding, with it."""
    grown = {
        spec.name: other_padding(spec, step.values[spec.name], step.sizes, step.graph_sizes, number)
        for spec in step.inputs
        if spec.name in step.values  # one that is left out says so by its padding
    }
    return {name: value for name, value in grown.items() if value is not None}


def _is_padded(step: Step, spec: Input) -> bool:
    return any(isinstance(axis, str) and step.sizes[axis] != step.graph_sizes[axis] for axis in spec.shape)


def _names(inputs: Sequence[str]) -> str:
    return ", ".join(map(repr, inputs))


def _large(step: Step, sign: int) -> float:
    """Return a number larger than any that the step's values hold, which their dtypes can hold, too."""
    floats = [value.detach() for value in step.values.values() if value.dtype.is_floating_point]
    largest = max(
        (float(value.float().nan_to_num(0, 0, 0).abs().max()) for value in floats if value.numel()), default=0
    )
    limits = (torch.finfo(spec.dtype).max for spec in step.inputs if spec.dtype.is_floating_point)
    return sign * min(1024 * (1 + largest), *limits, torch.finfo(torch.float32).max)


def _without_padding(graph: _Run, unpadded: _Run) -> Comparison:
    if unpadded.random and not (made := _compare(graph, unpadded, bitwise=False)).passed:
        if unpadded.error is not None:
            return made
        return Comparison(None, note="the function draws random numbers, and draws others at another size")
    return _compare(graph, unpadded, bitwise=False)


@dataclass(frozen=True)
class _Run:
    """What one run left.

    Attributes:
        values: its outputs, and carried inputs as they were afterwards, by what to call them in a sentence.
        memory: memory from outside as it was afterwards, by such a name too.
        error: what it raised instead.
        random: whether it drew random numbers.
    """

    values: dict[str, Any]
    memory: dict[str, Any]
    error: Exception | None
    random: bool


@dataclass(frozen=True)
class _Memory:
    """Memory from outside of the function, as it was before: on the host, so that the device needs no room for it.

    Attributes:
        tensor: all of it.
        before: what it held.
        corner: the part that is compared.
    """

    tensor: torch.Tensor
    before: torch.Tensor
    corner: tuple[slice, ...] = ()

    def now(self) -> torch.Tensor:
        """Return what the part holds. What stayed as it was is the same object each time: it need not be compared."""
        now = self.tensor.to("cpu", copy=True)
        return self.before if _same_bits(now, self.before).all() else now[self.corner]


class _Surroundings:
    """All that a run finds outside of its inputs: memory that it may change, and random generators."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._memory: dict[str, _Memory] = {}
        self._carried: dict[str, _Memory] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in (*step.buffers, *step.values.values())}
        self._generators = {generator: generator.get_state() for generator in _default_generators(step.device)}
        for name, (tensor, corner) in step.carried.items():
            self._carried[name] = _Memory(tensor, tensor.to("cpu", copy=True), corner)
            self._known.add(tensor.untyped_storage()._cdata)

    @contextmanager
    def kept(self) -> Iterator[_Surroundings]:
        """Find out what a call takes from outside; put everything back in the end."""
        try:
            # The unpadded call touches no buffer of the runner. What it raises is told when it is compared.
            with _Watch(self), suppress(Exception):
                self._step.unpadded()
            yield self
        finally:
            self._put_back()

    def run(self, run: Callable[[], Any]) -> _Run:
        """Run from the memory and the random state that were there first."""
        self._put_back()
        values: dict[str, Any] = {}
        error = None
        try:
            for name, leaf in _leaves(run(), ""):
                values[f"output {name}" if name else "the output"] = (
                    leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
                )
        except Exception as raised:
            error = raised
        values |= {f"carried input {name!r}": memory.now() for name, memory in self._carried.items()}
        memory = {name: memory.now() for name, memory in self._memory.items()}
        random = any(not torch.equal(generator.get_state(), state) for generator, state in self._generators.items())
        return _Run(values, memory, error, random)

    def _put_back(self) -> None:
        with torch.inference_mode():
            for memory in (*self._memory.values(), *self._carried.values()):
                memory.tensor.copy_(memory.before)
        for generator, state in self._generators.items():
            generator.set_state(state)

    def note_generator(self, generator: torch.Generator) -> None:
        """Keep the state of a generator that the function draws from."""
        self._generators.setdefault(generator, generator.get_state())

    def note(self, tensor: torch.Tensor) -> None:
        """Keep the memory of a tensor from outside."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known or tensor.device.type == "meta":
            return
        self._known.add(storage._cdata)
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
        whole = flat.view(tensor.shape) if tensor.is_contiguous() and tensor.numel() == flat.numel() else flat
        name = f"the {str(tensor.dtype).removeprefix('torch.')} tensor of shape {tuple(tensor.shape)} that it changes"
        alike = sum(other.startswith(name) for other in self._memory)
        self._memory[f"{name}, number {alike + 1}" if alike else name] = _Memory(whole, whole.to("cpu", copy=True))


class _Watch(TorchDispatchMode):
    """Notes memory before the first operator that takes it; weights only if an operator says that it changes them."""

    def __init__(self, surroundings: _Surroundings) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._surroundings = surroundings
        self._made: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (generator := kwargs.get("generator")) is not None:
            self._surroundings.note_generator(generator)
        for tensor in tensors_in((args, kwargs)):
            is_weight = isinstance(tensor, torch.nn.Parameter) and not func._schema.is_mutable
            if not is_weight and tensor.untyped_storage()._cdata not in self._made:
                self._surroundings.note(tensor)
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        results = func(*args, **kwargs)
        for tensor in tensors_in(results):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._made[storage._cdata] = storage  # held, so that nothing else comes to lie there
        return results


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what outputs consist of, in order, each with where it stands in them."""
    for path, leaf in tree_flatten_with_path(tree)[0]:
        at = name + keystr(path)
        if is_dataclass(leaf) and not isinstance(leaf, type):
            for each in fields(leaf):
                yield from _leaves(getattr(leaf, each.name), f"{at}.{each.name}")
        else:
            yield at, leaf


def _default_generators(device: torch.device) -> list[torch.Generator]:
    """Return the generators that operators draw from where they are given none."""
    found = [torch.default_generator]
    if device.type != "cpu":
        module = torch.get_device_module(device)
        index = module.current_device() if device.index is None else device.index
        found += list(getattr(module, "default_generators", ()))[index : index + 1]
    return found


def _compare(graph: _Run, other: _Run, *, bitwise: bool) -> Comparison:
    if other.error is not None:
        raised = f"it raised {type(other.error).__name__}: {other.error}"
        return Comparison(False, (raised,), largest=math.inf)
    largest = 0.0

    def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
        nonlocal largest
        for name in dict.fromkeys([*here, *there]):
            if name not in here or name not in there:
                yield f"{name} is there in {'the replay' if name in here else 'the other run'} alone"
            elif here[name] is not there[name]:
                largest = max(largest, _largest(here[name], there[name]))
                if problem := _problem(here[name], there[name], bitwise=bitwise):
                    yield f"{name}: {problem}"

    outputs, memory = tuple(differences(graph.values, other.values)), tuple(differences(graph.memory, other.memory))
    return Comparison(not outputs and not memory, outputs, memory, largest)


def _problem(here: Any, there: Any, *, bitwise: bool) -> str | None:
    """Return how two values differ, None where they do not."""
    if not isinstance(here, torch.Tensor) or not isinstance(there, torch.Tensor):
        return None if here == there else f"{here!r}, and {there!r} of the other run"
    if (here.shape, here.dtype) != (there.shape, there.dtype):
        return f"{here.dtype} {tuple(here.shape)}, and {there.dtype} {tuple(there.shape)} of the other run"
    here, there = here.cpu(), there.cpu()
    if bitwise:
        different = ~_same_bits(here, there)
        if not different.any():
            return None
        first = tuple(different.nonzero()[0].tolist())
        return (
            f"{int(different.sum())} of {here.numel()} elements differ; at {list(first)} it is {here[first].item()}, "
            f"and {there[first].item()} of the other run"
        )
    try:
        torch.testing.assert_close(_wide(here), _wide(there), equal_nan=True)
    except AssertionError as error:
        return "; ".join(line for line in str(error).splitlines()[1:] if line).rstrip(".")
    return None


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dtype that ``assert_close`` has tolerances for."""
    return tensor.bfloat16() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _largest(here: Any, there: Any) -> float:
    """Return the largest absolute difference; infinite where two values cannot be subtracted."""
    if not isinstance(here, torch.Tensor) or not isinstance(there, torch.Tensor):
        return 0.0 if here == there else math.inf
    if here.shape != there.shape:
        return math.inf
    here, there = here.cpu(), there.cpu()
    different = ~_same_bits(here, there)
    kind = torch.complex128 if here.is_complex() or there.is_complex() else torch.float64
    here, there = here[different].to(kind), there[different].to(kind)
    apart = (here - there).abs()[here != there]
    return float(apart.nan_to_num(math.inf).max()) if apart.numel() else 0.0


def _same_bits(here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Return where two tensors of one shape hold the same bits; all NaNs count as the same."""
    if here.dtype != there.dtype:
        return torch.zeros_like(here, dtype=torch.bool)
    if here.is_complex():
        parts = [torch.view_as_real(tensor.resolve_conj()) for tensor in (here, there)]
        return _same_bits(*parts).all(-1)
    number = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[here.itemsize]
    same = here.view(number) == there.view(number)
    return same | (here.isnan() & there.isnan()) if here.is_floating_point() else same
