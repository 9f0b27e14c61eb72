"""A real CPU backend: it records the operator calls of a function into a flat program and replays that.

Views are computed once, at capture. Operators that compute write into the memory that they wrote at capture, by their
``out=`` forms where those exist and give the same. After recording, memory is planned: results that are never alive
together share a place in the pool, and graphs share the pool, so that it has the size of the largest graph.

A replay reads what lies in memory then, as a device graph does, and nothing else: Python scalars, shapes and addresses
are those of the capture.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.dlpack import from_dlpack
from torch.utils.weak import WeakIdKeyDictionary

from graphmode.errors import CaptureError
from graphmode.graph.backends.base import Capabilities, MemoryTaken, Support
from graphmode.graph.backends.out_forms import out_form
from graphmode.graph.guard import tensors_in
from graphmode.graph.host_arguments import HostArguments
from graphmode.graph.staging import Event
from graphmode.graph.storages import key_of, users

ALIGNMENT = 64
# Memory that is freed while recording is scattered among what the tape keeps, and often fits no later result. Whenever
# half of the peak of the recording, and at least this much, was freed, free pages are returned to the system.
_TRIM_AFTER = 16 << 20

SUPPORT = Support(
    captured="a recorder of operator calls below the dispatcher",
    parameters="tensors, read at replay",
    limits="operators of torch only",
    verified="run in CI, torch 2.13",
)


@dataclass
class CpuPool:
    """Memory that the graphs share. It grows when a larger graph comes; earlier graphs keep what they have.

    Attributes:
        storage: the memory.
        retired: bytes of earlier, smaller storages that earlier graphs keep, and of results that cannot be moved.
        peak: the most bytes that there were at a time, those made while recording included.
    """

    storage: torch.UntypedStorage = field(default_factory=lambda: torch.UntypedStorage(0))
    retired: int = 0
    peak: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the graphs hold."""
        return self.storage.nbytes() + self.retired

    def reserve(self, nbytes: int) -> torch.UntypedStorage:
        """Return a storage of at least ``nbytes``."""
        if self.storage.nbytes() < nbytes:
            self.retired += self.storage.nbytes()
            self.storage = torch.UntypedStorage(nbytes)
        return self.storage


class _Done:
    """An event of a device that has always finished."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CpuBackend:
    """Graphs on the CPU."""

    capabilities = Capabilities(
        runs_while_capturing=True, shared_pool=True, random=True, pinned_host_memory=False, host_memory=True
    )

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device.type)

    def make_pool(self) -> CpuPool:
        return CpuPool()

    def recording(self, pool: CpuPool, host_arguments: HostArguments | None) -> CpuRecording:
        return CpuRecording(pool)

    def capture_stream(self) -> nullcontext[None]:
        return nullcontext()

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def event(self) -> Event:
        return _Done()

    def synchronize(self) -> None:
        pass

    @contextmanager
    def measured(self, pool: CpuPool) -> Iterator[MemoryTaken]:
        """Measure what recordings made; temporary memory inside operators is not seen."""
        taken, before = MemoryTaken(), pool.nbytes
        pool.peak = before
        try:
            yield taken
        finally:
            taken.kept, taken.peak = pool.nbytes - before, max(pool.peak, pool.nbytes) - before

    def out_of_resources(self, error: BaseException) -> bool:
        return False


@dataclass(frozen=True)
class Instruction:
    """One operator call of the program.

    Attributes:
        run: makes the call.
        memory: keys of the memory made while recording that it reads or writes.
        bind: for an operator that says how (its attribute ``bind``, a function of its arguments): returns a call that
            does the same with less work, as long as the memory stays where it is.
    """

    run: Callable[[], object]
    memory: frozenset[int]
    bind: Callable[[], Callable[[], object]] | None = None


@dataclass
class TapeMemory:
    """Memory that an operator made while recording.

    Attributes:
        start: the instruction before which it came to be, counted over the whole program.
        nbytes: its size.
        own: the tensors over it that instructions use.
        theirs: the tensors over it that the recorded code got.
        given_back: whether the memory was freed while recording, since nothing but the tape held it.
    """

    start: int
    nbytes: int
    own: list[torch.Tensor] = field(default_factory=list)
    theirs: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    given_back: bool = False

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors over it that are alive."""
        return self.own + [tensor for ref in self.theirs if (tensor := ref()) is not None]


@dataclass(frozen=True)
class Lifetime:
    """When memory must hold its value: from ``start`` to ``end``, both included, in instructions of the program."""

    start: int
    end: int
    nbytes: int


@dataclass
class Tape:
    """A segment: operator calls in order."""

    instructions: list[Instruction] = field(default_factory=list)
    _calls: list[Callable[[], object]] = field(default_factory=list)

    def seal(self) -> None:
        """Make ready to replay, when all memory has its final place."""
        with torch._C.DisableTorchFunction():  # operators read addresses here, which the guard would take for values
            self._calls = [
                instruction.run if instruction.bind is None else instruction.bind() for instruction in self.instructions
            ]

    def replay(self) -> None:
        for call in self._calls:
            call()


class CpuRecording:
    """One function being recorded, segment by segment."""

    breaks_inside_operators = True

    def __init__(self, pool: CpuPool) -> None:
        self._pool = pool
        self._mode = _TapeMode()
        self._tapes: list[Tape] = []

    @contextmanager
    def installed(self, generators: Sequence[torch.Generator]) -> Iterator[None]:
        with self._mode:
            yield

    def begin(self) -> None:
        self._mode.tape = Tape()

    def end(self) -> Tape | None:
        tape = self._mode.close()
        self._tapes.append(tape)
        return tape if tape.instructions else None

    def abort(self) -> None:
        self._mode.tape = None

    def own(self) -> Sequence[torch.Tensor]:
        return self._mode.own_tensors()

    def finish(self) -> None:
        mode, pool = self._mode, self._pool
        offsets, nbytes = plan_memory(mode.lifetimes())
        before = pool.nbytes
        storage = pool.reserve(nbytes)
        pool.retired += sum(memory.nbytes for key, memory in mode.made.items() if key not in offsets)
        pool.peak = max(pool.peak, before + mode.peak, pool.nbytes + mode.nbytes)
        for key, offset in offsets.items():
            for tensor in mode.made[key].tensors():
                start = offset // tensor.dtype.itemsize
                tensor.set_(storage, tensor.storage_offset() + start, tensor.size(), tensor.stride())
        for tape in self._tapes:
            tape.seal()
        mode.made.clear()
        if nbytes >= _TRIM_AFTER:
            _trim_heap()


class _TapeMode(TorchDispatchMode):
    """Writes every operator call to the open tape. The guard is above it: composite operators never come here.

    Instructions use tensors of the tape's own, which tells memory that the recorded code still holds from memory that
    only the tape holds. The latter is freed at once: nothing reads its values any more, and it gets a place in the pool
    at the end. So recording takes no more memory than an eager run.

    Attributes:
        tape: the segment being recorded.
        made: the memory that operators made, by the address of its storage, which stays for as long as the tape.
        nbytes: bytes of it that are there now.
        peak: the most that were there at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape: Tape | None = None
        self.made: dict[int, TapeMemory] = {}
        self.nbytes = 0
        self.peak = 0
        self._let_go: set[int] = set()
        self._given_back = 0
        self._own = WeakIdKeyDictionary()
        self._outside: list[torch.Tensor] = []
        self._last_use: dict[int, int] = {}
        self._position = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.tape is not None:
            self._give_back()
        result = func(*(_aliases(args) if hasattr(func, "bind") else args), **kwargs)
        if self.tape is not None:
            self._write(self.tape, func, args, kwargs, result)
        return result

    def _write(self, tape: Tape, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: object) -> None:
        known = {key_of(tensor) for tensor in tensors_in((args, kwargs))}
        if func._schema.is_mutable:
            self._follow(tensors_in((args, kwargs)))
        results: list[torch.Tensor | None] = []
        fresh, made = [], set[int]()
        for index, tensor in enumerate(_results(result)):
            if tensor is None:
                results.append(None)
                continue
            key = key_of(tensor)
            if key not in known:
                if key not in self.made:
                    self.made[key] = TapeMemory(self._position, tensor.untyped_storage().nbytes())
                    self.nbytes += self.made[key].nbytes
                fresh.append(index)
                made.add(key)
            results.append(self._owned(tensor))
        run = _instruction(func, self._owned_in(args), self._owned_in(kwargs), results, fresh)
        if run is not None:
            memory = frozenset(key for key in known | made if key in self.made)
            bind = getattr(func, "bind", None)
            bind = None if bind is None else partial(bind, *self._owned_in(args), **self._owned_in(kwargs))
            tape.instructions.append(Instruction(run, memory, bind))
            self._last_use.update(dict.fromkeys(memory, self._position))
            self._position += 1
        self.peak = max(self.peak, self.nbytes)

    def _give_back(self) -> None:
        """Free memory that the recorded code no longer holds."""
        for key in list(self._let_go):
            memory = self.made[key]
            if self._held(key):
                # Where a tensor over it is known, its end brings the key here again.
                if any(ref() is not None for ref in memory.theirs):
                    self._let_go.discard(key)
                continue
            self._let_go.discard(key)
            storage = memory.own[0].untyped_storage()
            if not memory.given_back and storage.resizable():
                storage.resize_(0)
                memory.given_back = True
                self.nbytes -= memory.nbytes
                self._given_back += memory.nbytes
        if self._given_back >= max(_TRIM_AFTER, self.peak // 2):
            self._given_back = 0
            _trim_heap()

    def _held(self, key: int) -> bool:
        """Return whether anything but the tape holds memory, and may read it again."""
        return users(key) > len(self.made[key].own)

    def _owned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tape's own tensor over the same memory: a graph knows memory, and keeps no object alive."""
        own: torch.Tensor | None = self._own.get(tensor)
        if own is None:
            own = self._own[tensor] = tensor.detach()
            key = key_of(tensor)
            if (memory := self.made.get(key)) is None:
                self._outside.append(own)
            else:
                memory.own.append(own)
                memory.theirs.append(weakref.ref(tensor, lambda _: self._let_go.add(key)))
        return own

    def _follow(self, tensors: Sequence[torch.Tensor]) -> None:
        """Follow tensors that an operator gave another shape, and with it more memory, in place."""
        for tensor in tensors:
            own, memory = self._own.get(tensor), self.made.get(key_of(tensor))
            if own is None or memory is None or (own.shape, own.stride()) == (tensor.shape, tensor.stride()):
                continue
            del self._own[tensor]
            nbytes = tensor.untyped_storage().nbytes()
            self.nbytes += nbytes - memory.nbytes
            memory.nbytes = nbytes

    def own_tensors(self) -> list[torch.Tensor]:
        """Return the tape's own tensors, those over memory from elsewhere too."""
        return [*self._outside, *(tensor for memory in self.made.values() for tensor in memory.own)]

    def _owned_in(self, tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return self._owned(tree)
        if isinstance(tree, (list, tuple)):
            return type(tree)(map(self._owned_in, tree))
        if isinstance(tree, dict):
            return {name: self._owned_in(leaf) for name, leaf in tree.items()}
        return tree

    def close(self) -> Tape:
        """End the open tape. Memory that Python holds now may be read before the next one, so it lives until then."""
        tape, self.tape = self.tape, None
        assert tape is not None
        self._give_back()
        held = [key for key in self.made if self._held(key)]
        self._last_use.update(dict.fromkeys(held, self._position))
        self._position += 1
        return tape

    def lifetimes(self) -> dict[int, Lifetime]:
        """Return the lifetime of all memory that can be moved, by its key.

        Memory of a tensor that no operator call returned (``tensor.data``) is not moved: that tensor could not follow.
        """
        return {
            key: Lifetime(memory.start, self._last_use.get(key, memory.start), memory.nbytes)
            for key, memory in self.made.items()
            if users(key) == len(memory.tensors())
        }


def _aliases(tree: Any) -> Any:
    """Return tensors with storages of their own over the same memory.

    An operator that binds takes arrays of its tensors, and the storage of a tensor that was an array can not be resized
    ever after: its memory could not be freed while recording.
    """
    if isinstance(tree, torch.Tensor):
        return from_dlpack(torch._C._to_dlpack(tree))
    return type(tree)(map(_aliases, tree)) if isinstance(tree, (list, tuple)) else tree


def _trim_heap() -> None:
    """Return free pages of the heap to the system, where its allocator offers that."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _instruction(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], results: list[torch.Tensor | None], fresh: list[int]
) -> Callable[[], object] | None:
    """Return the call that makes at replay what ``func(*args, **kwargs)`` made at capture; None where it is nothing.

    Args:
        results: the tensors that the call returned; None where one is undefined.
        fresh: which of them have memory of their own, which the replay writes.
    """
    if not fresh:
        changes_memory = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        return partial(func._op, *args, **kwargs) if changes_memory or not func._schema.returns else None
    if func.overloadpacket in _UNINITIALISED:
        return None
    tensors = [result for result in results if result is not None]
    if func is torch.ops.aten._to_copy.default:
        return partial(tensors[0].copy_, args[0])
    form = out_form(func, args, kwargs, tensors) if len(fresh) == len(results) == len(tensors) else None
    return form or partial(_run_and_copy, func, args, kwargs, results, set(fresh))


_UNINITIALISED = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


def _run_and_copy(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], results: Sequence[torch.Tensor | None], fresh: set[int]
) -> None:
    """Run an operator and copy what it made anew to where the graph keeps it.

    Raises:
        CaptureError: a result has another shape than at capture.
    """
    for index, (fixed, now) in enumerate(zip(results, _results(func._op(*args, **kwargs)), strict=True)):
        if index in fresh and fixed is not None and now is not None:
            if fixed.shape != now.shape:
                raise CaptureError(
                    f"a result of {func.name()} has shape {tuple(now.shape)}; at capture it had {tuple(fixed.shape)}. "
                    "Its shape depends on data: move the call into a function marked @outside_graph",
                    operator=func.name(),
                )
            fixed.copy_(now)


def _results(returned: object) -> list[torch.Tensor | None]:
    """Return what an operator returned, flat: tensors, and None for each that is undefined or no tensor."""
    if isinstance(returned, (list, tuple)):
        return [result for item in returned for result in _results(item)]
    return [returned if isinstance(returned, torch.Tensor) else None]


def plan_memory(lifetimes: Mapping[int, Lifetime]) -> tuple[dict[int, int], int]:
    """Place memory so that nothing overlaps while both must hold their values.

    Goes through the program in order; each allocation takes the smallest free gap that holds it (best fit), or grows
    the arena; gaps merge when their neighbours become free.

    Returns:
        The byte offset of each key, aligned to ``ALIGNMENT``, and the arena's size in bytes.
    """
    gaps: list[tuple[int, int]] = []  # (offset, size), by offset, never touching
    alive: list[tuple[int, int, int]] = []  # (end, offset, size)
    offsets: dict[int, int] = {}
    top = 0
    for key, lifetime in sorted(lifetimes.items(), key=lambda item: item[1].start):
        while alive and alive[0][0] < lifetime.start:
            _, offset, size = heappop(alive)
            _free(gaps, offset, size)
        size = -(-lifetime.nbytes // ALIGNMENT) * ALIGNMENT
        fitting = [gap for gap in gaps if gap[1] >= size]
        if fitting:
            gap = min(fitting, key=lambda gap: gap[1])
            gaps.remove(gap)
            offset = gap[0]
            if gap[1] > size:
                _free(gaps, offset + size, gap[1] - size)
        elif gaps and sum(gaps[-1]) == top:
            offset = gaps.pop()[0]
            top = offset + size
        else:
            offset, top = top, top + size
        offsets[key] = offset
        heappush(alive, (lifetime.end, offset, size))
    return offsets, top


def _free(gaps: list[tuple[int, int]], offset: int, size: int) -> None:
    """Add a gap to ``gaps``, merging it with those that touch it."""
    index = bisect_left(gaps, (offset, size))
    if index < len(gaps) and offset + size == gaps[index][0]:
        size += gaps.pop(index)[1]
    if index > 0 and sum(gaps[index - 1]) == offset:
        offset, before = gaps.pop(index - 1)
        size += before
        index -= 1
    gaps.insert(index, (offset, size))
