"""Operators that no graph holds although the shapes of their results are fixed: the graph breaks around them.

Such an operator reads values on the host, or waits for the device, in the middle of its work. Its result decides
neither what Python does next nor a shape, so it can run between two graphs at every replay.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphmode.graph.guard import has_mask, is_composite, why_unsupported

log = logging.getLogger(__name__)

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
# What operators of these namespaces do is known, from their tags and from the tables here.
_KNOWN_NAMESPACES = ("aten", "prim", "prims", "graphmode")


class Breaks:
    """Operators that the graphs of a runner break around, learned from running them.

    Attributes:
        reasons: why, by operator.
    """

    def __init__(self) -> None:
        self.reasons: dict[Any, str] = {}
        self._told: set[str] = set()

    def learn(self, func: Any, reason: str) -> None:
        """Break around an operator from now on."""
        self.reasons.setdefault(func, reason)

    def reason(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device) -> str | None:
        """Return why the graph must break around this call, or None if it can hold it."""
        return self.reasons.get(func) or why_outside(func, args, kwargs, device)

    def probe(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device) -> Any:
        """Run an operator as it is, and learn whether its code reads values on the host or waits for the device."""
        key = None if func.namespace in _KNOWN_NAMESPACES or func in self.reasons else _kernel_key(func, device.type)
        if key is None:
            return func(*args, **kwargs)
        with _Probe(self, func, device):
            return func._op_dk(key, *args, **kwargs)

    def tell(self, program: Counter[str], reasons: dict[str, str]) -> None:
        """Log which operators a program breaks around, each only once."""
        for name in program:
            if name not in self._told:
                self._told.add(name)
                log.warning("graphs break around %s: %s", name, reasons[name])


def why_outside(func: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device) -> str | None:
    """Return why an operator call whose results have fixed shapes must run outside the graph, or None."""
    packet = func.overloadpacket
    if packet in (torch.ops.aten.index_put, torch.ops.aten.index_put_):
        counted = has_mask(args[1]) and args[2].numel() != 1
        return "a mask selects how many elements it writes, which the host counts" if counted else None
    if packet is torch.ops.aten._linalg_check_errors:
        return "it reads on the host whether the computation before it failed"
    if func in _COPIES:
        return _why_copy_outside(func, args, kwargs, device)
    return None


def _why_copy_outside(func: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device) -> str | None:
    if func is torch.ops.aten.copy_.default:
        target, source = args[0].device, args[1].device
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    else:
        source = args[0].device
        target = torch.device(kwargs.get("device") or source)
        non_blocking = kwargs.get("non_blocking", False)
    if source.type == target.type or device.type not in (source.type, target.type):
        return None
    if target.type == "cpu":
        return "it copies to the host and waits for the device"
    return None if non_blocking else "it copies from the host and waits for the device"


@cache
def _kernel_key(func: Any, device_type: str) -> Any:
    """Return the dispatch key of the kernel that runs ``func`` on a device, or None where it has none of its own."""
    own = getattr(torch._C.DispatchKey, torch._C._dispatch_key_for_device(device_type))
    for key in (own, torch._C.DispatchKey.CompositeExplicitAutograd):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
            return key
    return None


class _Probe(TorchDispatchMode):
    """Sees the operators that the kernel of another one calls."""

    def __init__(self, breaks: Breaks, func: Any, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._breaks = breaks
        self._func = func
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func, self._device.type):
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if why_unsupported(func, args, kwargs) or why_outside(func, args, kwargs, self._device):
            self._breaks.learn(self._func, f"{func.name()} inside it reads values on the host")
        key = None if func.namespace in _KNOWN_NAMESPACES else _kernel_key(func, self._device.type)
        if key is None:
            return func(*args, **kwargs)
        with self:
            return func._op_dk(key, *args, **kwargs)
