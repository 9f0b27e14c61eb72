"""Who holds a tensor's memory."""

from __future__ import annotations

from functools import cache

import torch
from torch.multiprocessing.reductions import StorageWeakRef


def key_of(tensor: torch.Tensor) -> int:
    """Return what names the storage of ``tensor`` for as long as anything refers to it, a weak reference included."""
    key: int = tensor.untyped_storage()._cdata
    return key


def users(key: int) -> int:
    """Return the number of tensors over the storage at ``key``, which Python has seen and something refers to."""
    count: int = torch._C._storage_Use_Count(key)
    return max(0, count - _counted_for_python())


def weakly(tensor: torch.Tensor) -> StorageWeakRef:
    """Return a weak reference to the storage of ``tensor``: its key names no other storage while that is there."""
    return StorageWeakRef(tensor.untyped_storage())


@cache
def _counted_for_python() -> int:
    """Return what being seen by Python adds to a storage's count of users; versions of torch differ in it."""
    tensor = torch.empty(1)
    count: int = torch._C._storage_Use_Count(key_of(tensor))
    return count - 1
