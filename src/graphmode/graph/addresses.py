"""What graphs read from outside of their function: where it lay at capture, and whether it still lies there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from graphmode.graph.errors import StaleAddressError


@dataclass(frozen=True)
class Read:
    """A tensor from outside that operators of a graph read or write.

    Attributes:
        tensor: the tensor.
        storage: its memory. Held, so that what the user gives up is never read after it was freed.
        address: where its storage lay, in bytes.
        description: what it is, in words.
    """

    tensor: weakref.ref[torch.Tensor]
    storage: torch.UntypedStorage
    address: int
    description: str


class OutsideMemory:
    """The memory from outside of a function that operators read or write, noted as they take it."""

    def __init__(self) -> None:
        self._reads: dict[int, Read] = {}
        self._storages: set[int] = set()
        self._views: dict[int, weakref.ref[torch.Tensor]] = {}

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
        description = f"{tensor.dtype} tensor of shape {tuple(tensor.shape)} that {operator} reads or writes"
        self._reads[name] = Read(weakref.ref(tensor), storage, storage.data_ptr(), description)
        self._storages.add(storage._cdata)

    def note_view(self, tensor: torch.Tensor) -> None:
        """Note a tensor over memory from outside that an operator returned: the function makes it anew at each run."""
        read = self._reads.get(id(tensor))
        if read is None or not self._is(tensor, read.tensor):
            self._views[id(tensor)] = weakref.ref(tensor)

    @staticmethod
    def _is(tensor: torch.Tensor, reference: weakref.ref[torch.Tensor] | None) -> bool:
        return reference is not None and reference() is tensor


class Addresses:
    """What the graphs of a runner read from outside."""

    def __init__(self) -> None:
        self._reads: list[Read] = []
        self._known: dict[int, weakref.ref[torch.Tensor]] = {}

    def watch(self, memory: OutsideMemory, own: Sequence[torch.Tensor]) -> None:
        """Watch what a new graph reads from outside, except the tensors that the runner gave it (``own``)."""
        ours = {tensor.untyped_storage()._cdata for tensor in own}
        for read in memory:
            tensor = read.tensor()
            if tensor is None or read.storage._cdata in ours:
                continue
            known = self._known.get(id(tensor))
            if known is None or known() is not tensor:
                self._known[id(tensor)] = read.tensor
                self._reads.append(read)

    def check(self) -> None:
        """Check that everything is still where it was.

        Raises:
            StaleAddressError: naming the tensor that was freed or moved.
        """
        for read in self._reads:
            tensor = read.tensor()
            if tensor is None:
                problem = "was freed"
            elif tensor.untyped_storage().data_ptr() != read.address:
                problem = "has moved"
            else:
                continue
            raise StaleAddressError(
                f"the graphs cannot be replayed: the {read.description} {problem} after capture. Write new values into "
                "captured tensors (copy_, load_state_dict), or call recapture() of the runner"
            )
