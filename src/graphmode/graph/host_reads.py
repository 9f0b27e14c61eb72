"""Traps for what reads or writes tensors' memory on the host without an operator that a dispatch mode would see.

They are in place while a function is warmed up or captured, and act in that thread alone. A function mode sees methods
of tensors, even if bound before; what it does not see (storages, DLPack) is replaced where Python looks it up.
If ``has_torch_function`` reported this mode, modules of torch would leave their fast paths, so it does not.

Reads by address (``ctypes`` at ``data_ptr()``) and by C extensions that access tensors themselves are not seen.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from graphmode.errors import UnsupportedOpError
from graphmode.graph.locations import READS_VALUE, REMEDY
from graphmode.graph.training import refuse_training

_SHARES = "it hands a tensor's memory to code whose reads and writes a replay would not repeat"
_CALLS = "it calls Python for each element, which a replay would not do again"
_MOVES = "it moves a tensor's memory, which a replay would not do again"

_METHODS: dict[Callable[..., Any], tuple[str, str]] = {
    torch.Tensor.tolist: ("Tensor.tolist", READS_VALUE),
    torch.Tensor.__repr__: ("Tensor.__repr__", READS_VALUE),
    torch.Tensor.__format__: ("Tensor.__format__", READS_VALUE),
    torch.Tensor.numpy: ("Tensor.numpy", READS_VALUE),
    torch.Tensor.__array__: ("Tensor.__array__", READS_VALUE),
    torch.Tensor.__dlpack__: ("Tensor.__dlpack__", _SHARES),
    torch.Tensor.__deepcopy__: ("copy.deepcopy of a tensor", "it copies memory without an operator; use clone()"),
    torch.Tensor.share_memory_: ("Tensor.share_memory_", _MOVES),
    torch.Tensor.apply_: ("Tensor.apply_", _CALLS),
    torch.Tensor.map_: ("Tensor.map_", _CALLS),
    torch.Tensor.map2_: ("Tensor.map2_", _CALLS),
    torch.Tensor.__float__: ("float() of a tensor", READS_VALUE),
    torch.Tensor.__int__: ("int() of a tensor", READS_VALUE),
    torch.Tensor.__index__: ("a tensor taken as an index of Python", READS_VALUE),
    torch.Tensor.__complex__: ("complex() of a tensor", READS_VALUE),
}

# These read each tensor in a list on the host; a single tensor they copy by an operator.
_FROM_LISTS: dict[Callable[..., Any], str] = {
    torch.tensor: "torch.tensor",
    torch.as_tensor: "torch.as_tensor",
    torch.asarray: "torch.asarray",
    torch.sparse_coo_tensor: "torch.sparse_coo_tensor",
    torch.Tensor.new: "Tensor.new",
    torch.Tensor.new_tensor: "Tensor.new_tensor",
}

# fmt: off
_STORAGE_READS = [
    "__getitem__", "__iter__", "__repr__", "__str__", "__copy__", "__deepcopy__", "__reduce__", "__setitem__",
    "_getitem", "_setitem", "tolist", "clone", "cpu", "cuda", "to", "hpu", "copy_", "fill_", "byteswap",
    "share_memory_", "_share_fd_cpu_", "_share_filename_cpu_", "_share_cuda_", "_write_file", "bfloat16", "bool",
    "byte", "char", "complex_double", "complex_float", "double", "float", "half", "int", "long", "short",
]
# fmt: on

_SEEDS = "it sets the state of a random generator, which a replay would not do again; seed before the call"
# Functions, the names that modules hold them by, and what is wrong with them.
_FUNCTIONS: list[tuple[str, Callable[..., Any], str]] = [
    ("to_dlpack", torch._C._to_dlpack, _SHARES),
    ("_to_dlpack", torch._C._to_dlpack, _SHARES),
    ("_to_dlpack_versioned", torch._C._to_dlpack_versioned, _SHARES),
    ("manual_seed", torch.manual_seed, _SEEDS),
    ("seed", torch.seed, _SEEDS),
    ("set_rng_state", torch.set_rng_state, _SEEDS),
    ("manual_seed", torch.cuda.manual_seed, _SEEDS),
    ("manual_seed_all", torch.cuda.manual_seed_all, _SEEDS),
    ("set_rng_state", torch.cuda.set_rng_state, _SEEDS),
]
_QUESTIONS: dict[str, Callable[..., Any]] = {
    "has_torch_function": torch.overrides.has_torch_function,
    "has_torch_function_unary": torch.overrides.has_torch_function_unary,
    "has_torch_function_variadic": torch.overrides.has_torch_function_variadic,
}

_active: ContextVar[Callable[[], bool] | None] = ContextVar("active", default=None)
_lock = threading.Lock()
_captures = 0
_replaced = ExitStack()


@contextmanager
def refused(active: Callable[[], bool]) -> Iterator[None]:
    """Refuse host reads inside, in this thread, while ``active()``.

    Raises:
        UnsupportedOpError: from the call that reads.
    """
    global _captures
    with _lock:
        _captures += 1
        if _captures == 1:
            _replace_all()
    token = _active.set(active)
    try:
        with _FunctionTraps():
            yield
    finally:
        _active.reset(token)
        with _lock:
            _captures -= 1
            if not _captures:
                _replaced.close()


class _FunctionTraps(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_active():
            refuse_training(func, args, kwargs)
        if func in _METHODS:
            _refuse(*_METHODS[func])
        elif func in _FROM_LISTS and any(_lists_tensors(value) for value in (*args, *kwargs.values())):
            _refuse(f"{_FROM_LISTS[func]} of tensors in a list", f"{READS_VALUE} (use torch.stack)")
        return func(*args, **kwargs)


def _lists_tensors(value: object) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) or _lists_tensors(v) for v in value)


def _is_active() -> bool:
    active = _active.get()
    return active is not None and active()


def _refuse(name: str, reason: str) -> None:
    if _is_active():
        raise UnsupportedOpError(f"{name} cannot be captured: {reason}; {REMEDY}", operator=name)


def _trap(original: Callable[..., Any], name: str, reason: str) -> Callable[..., Any]:
    @wraps(original)
    def trap(*args: Any, **kwargs: Any) -> Any:
        _refuse(name, reason)
        return original(*args, **kwargs)

    return trap


def _without_traps(question: Callable[..., bool]) -> Callable[..., bool]:
    """Return a function like ``has_torch_function`` that answers as it would without the mode of the traps."""

    @wraps(question)
    def ask(*args: Any) -> bool:
        if torch._C._len_torch_function_stack() == 1 and isinstance(torch._C._get_function_stack_at(0), _FunctionTraps):
            with torch.overrides._pop_mode_temporarily():
                return question(*args)
        return question(*args)

    return ask


def _replace_all() -> None:
    pickle = _trap(torch.Tensor._reduce_ex_internal, "pickle or copy.copy of a tensor", READS_VALUE)
    _replaced.enter_context(patch.object(torch.Tensor, "_reduce_ex_internal", pickle))
    for kind in (torch.UntypedStorage, torch.TypedStorage):
        for name in _STORAGE_READS:
            if hasattr(kind, name):
                trap = _trap(getattr(kind, name), f"{kind.__name__}.{name}", _SHARES)
                _replaced.enter_context(patch.object(kind, name, trap))
    for module, name, replacement in _replacements(len(sys.modules)):
        _replaced.enter_context(patch.object(module, name, replacement))


@lru_cache(maxsize=1)
def _replacements(modules: int) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return what to replace: the module, the name in it, and the replacement.

    Of the questions, those of modules of torch other than ``torch.overrides`` stay: they choose no path.

    Args:
        modules: the number of loaded modules, so that a new one is searched too.
    """
    traps = [(name, held, _trap(held, name, reason)) for name, held, reason in _FUNCTIONS]
    answers = [(name, held, _without_traps(held)) for name, held in _QUESTIONS.items()]
    found = []
    for path, module in list(sys.modules.items()):
        attributes = getattr(module, "__dict__", {})
        asks = path == "torch.overrides" or path.partition(".")[0] != "torch"
        for name, held, replacement in traps + answers if asks else traps:
            if attributes.get(name) is held:
                found.append((module, name, replacement))
    return found
