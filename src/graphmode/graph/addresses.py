"""Memory from outside of the function that graphs read: where it was at capture, and whether it is still there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from graphmode.errors import StaleAddressError
from graphmode.graph.paths import Change, Found, Node, address_of, layout_of, search


@dataclass(frozen=True)
class Read:
    """A tensor from outside that operators of a graph read or write.

    Attributes:
        tensor: the tensor.
        storage: its memory, kept alive so that a replay never reads freed memory.
        address: where its storage lay, in bytes.
        description: what it is, in words.
    """

    tensor: weakref.ref[torch.Tensor]
    storage: torch.UntypedStorage
    address: int
    description: str

    def problem(self) -> str | None:
        """Return what happened to it, or None if it is unchanged."""
        tensor = self.tensor()
        if tensor is None:
            return f"a {self.description} was freed"
        if tensor.untyped_storage().data_ptr() != self.address:
            return f"a {self.description} has moved"
        return None


class OutsideMemory:
    """Memory from outside of a function, noted when an operator reads or writes it."""

    def __init__(self) -> None:
        self._reads: dict[int, Read] = {}
        self._storages: set[int] = set()
        self._views: dict[int, weakref.ref[torch.Tensor]] = {}
        self._constants: list[torch.UntypedStorage] = []

    def __contains__(self, storage: int) -> bool:
        """Return whether a storage, by its ``_cdata``, is from outside."""
        return storage in self._storages

    def __iter__(self) -> Iterator[Read]:
        return iter(self._reads.values())

    def note(self, tensor: torch.Tensor, operator: str) -> None:
        """Note a tensor over memory from outside that ``operator`` takes."""
        name = id(tensor)
        if self._is(tensor, self._views.get(name)) or (
            name in self._reads and self._is(tensor, self._reads[name].tensor)
        ):
            return
        storage = tensor.untyped_storage()
        if operator.startswith("aten::lift_fresh"):  # a constant that the function has just made: torch.tensor(...)
            self._views[name] = weakref.ref(tensor)
            self._storages.add(storage._cdata)
            self._constants.append(storage)
            return
        description = f"{tensor.dtype} tensor of shape {tuple(tensor.shape)} that {operator} reads or writes"
        self._reads[name] = Read(weakref.ref(tensor), storage, storage.data_ptr(), description)
        self._storages.add(storage._cdata)

    def note_view(self, tensor: torch.Tensor) -> None:
        """Note a view of outside memory that an operator returned; the function makes a new one at each run."""
        read = self._reads.get(id(tensor))
        if read is None or not self._is(tensor, read.tensor):
            self._views[id(tensor)] = weakref.ref(tensor)

    @staticmethod
    def _is(tensor: torch.Tensor, reference: weakref.ref[torch.Tensor] | None) -> bool:
        return reference is not None and reference() is tensor


class Addresses:
    """What the graphs of a runner read from outside, and by which paths its function reaches that.

    Args:
        function: the runner's.
    """

    def __init__(self, function: object) -> None:
        self._function = function
        self._paths = Node(function)
        self._reads: dict[Node, Read] = {}
        self._without_path: list[Read] = []
        self._known: dict[int, weakref.ref[torch.Tensor]] = {}
        self._modes: dict[int, _TrainingMode] = {}
        self._searched = False

    def watch(self, memory: OutsideMemory, own: Sequence[torch.Tensor]) -> None:
        """Watch what a new graph reads from outside, except the tensors that the runner gave it (``own``)."""
        ours = {tensor.untyped_storage()._cdata for tensor in own}
        reads = {id(tensor): (tensor, read) for read in memory if (tensor := read.tensor()) is not None}
        reads = {name: pair for name, pair in reads.items() if pair[1].storage._cdata not in ours}
        # Some memory has no tensor any more: an operator's argument was temporary, such as weight.data.
        alive = {read.storage._cdata for _, read in reads.values()}
        others = {read.storage._cdata: read for read in memory if read.storage._cdata not in alive | ours}
        new = {name: tensor for name, (tensor, _) in reads.items() if not self._knows(tensor)}
        if self._searched and not new and not others:
            return
        found = search(self._function, new, others)
        self._searched = True
        self._known.update((name, weakref.ref(tensor)) for name, tensor in new.items())
        for place in found.tensors:
            self._reads[self._paths.add(place)] = reads[id(place.value)][1]
        for storage, place in found.others.items():
            self._reads[self._paths.add(place)] = others[storage]
        with_path = {id(place.value) for place in found.tensors}
        self._without_path += [reads[name][1] for name in new if name not in with_path]
        self._watch_modules(found)

    def _knows(self, tensor: torch.Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known() is tensor

    def _watch_modules(self, found: Found) -> None:
        """Watch the training mode of the modules on the paths, and of the modules in them that have no weights."""
        places = [*found.tensors, *found.others.values()]
        on_path = found.own | {id(before.value) for place in places for before, _ in place.steps()}
        for place in found.modules:
            module, parent = place.value, None if place.parent is None else id(place.parent[0].value)
            if id(module) not in on_path and parent in on_path and not _has_tensors(module):
                on_path.add(id(module))
            if id(module) in on_path:
                self._modes.setdefault(id(module), _TrainingMode(weakref.ref(module), module.training, place.path))
        for place in found.again:
            if id(place.value) in on_path:
                self._paths.add(place)

    def check(self) -> None:
        """Check that all that graphs read from outside is still what the function reaches, and where it was.

        Raises:
            StaleAddressError: naming the tensor that was replaced, moved or freed, or the module that was switched
                between training and evaluation, by its path from the function.
        """
        changes: list[Change] = []
        self._paths.follow(self._function, changes)
        problems = [problem for change in changes if (problem := self._problem(change)) is not None]
        problems += [problem for read in self._without_path if (problem := read.problem()) is not None]
        remedy = "Write new values into captured tensors (copy_, load_state_dict), or"
        if not problems:
            problems = [problem for mode in self._modes.values() if (problem := mode.problem()) is not None]
            remedy = "Switch it back, or"
        if problems:
            others = f" ({len(problems) - 1} more like this)" if len(problems) > 1 else ""
            raise StaleAddressError(
                f"the graphs cannot be replayed: {problems[0]} after capture{others}. {remedy} call recapture() of the "
                "runner"
            )

    def _problem(self, change: Change) -> str | None:
        """Return what is wrong with a path that leads elsewhere than at capture; None if graphs stay right."""
        node, now = change.node, change.now
        read = self._reads.get(node)
        if read is None:
            return f"module {node.path} was replaced" if change.replaced else None
        described = f"{node.path} ({read.description})"
        if isinstance(now, torch.Tensor):
            if node.held(now):
                return f"{described} has moved"
            same = node.address is not None and (address_of(now), layout_of(now)) == (node.address, node.layout)
            return None if same else f"{described} was replaced"
        if change.replaced:
            return f"{described} was replaced"
        if node.found is None:
            return f"{described} was freed"
        return f"{described} has moved" if address_of(node.found) != node.address else None


@dataclass(frozen=True)
class _TrainingMode:
    """Whether a module trained or evaluated when graphs were captured."""

    module: weakref.ref[torch.nn.Module]
    training: bool
    path: str

    def problem(self) -> str | None:
        module = self.module()
        if module is None or module.training == self.training:
            return None
        before, now = ("train()", "eval()") if self.training else ("eval()", "train()")
        return f"module {self.path} was switched from {before} to {now}"


def _has_tensors(module: torch.nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(), module.buffers()))
