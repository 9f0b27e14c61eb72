"""Who holds a tensor's memory."""

from __future__ import annotations

from functools import cache

import torch
from torch.multiprocessing.reductions import StorageWeakRef


def key_of(tensor: torch.Tensor) -> int:
    """Return a key of the storage of ``tensor``, valid as long as anything refers to the storage, even weakly."""
    key: int = tensor.untyped_storage()._cdata
    return key


def users(key: int) -> int:
    """Return the number of tensors over the storage of ``key``, which must be alive and known to Python."""
    count: int = torch._C._storage_Use_Count(key)
    return max(0, count - _counted_for_python())


def weakly(tensor: torch.Tensor) -> StorageWeakRef:
    """Return a weak reference to the storage of ``tensor``: its key names no other storage while that is there."""
    return StorageWeakRef(tensor.untyped_storage())


@cache
def _counted_for_python() -> int:
    """Return by how much Python's own reference raises a storage's count of users; versions of torch differ."""
    tensor = torch.empty(1)
    count: int = torch._C._storage_Use_Count(key_of(tensor))
    return count - 1
