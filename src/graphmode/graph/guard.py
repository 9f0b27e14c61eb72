"""The guard: while a function is captured, it refuses what no graph can hold and notes what the graph reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphmode.errors import UnsupportedOpError
from graphmode.graph.addresses import OutsideMemory
from graphmode.graph.host_reads import refused
from graphmode.graph.locations import READS_VALUE, REMEDY


def tensors_in(tree: object) -> list[torch.Tensor]:
    """Return the tensors among the arguments or results of an operator, in order."""
    found: list[torch.Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: object, found: list[torch.Tensor]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for leaf in tree:
            _collect(leaf, found)
    elif isinstance(tree, dict):
        for leaf in tree.values():
            _collect(leaf, found)


_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@cache
def is_composite(func: Any, device_type: str) -> bool:
    """Return whether an operator is composed of others on a device, which a mode sees only if it decomposes it.

    torch's Python decompositions for its compiler do not count: eager code does not run them.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    own = "PrivateUse1" if device_type == torch._C._get_privateuse1_backend_name() else device_type.upper()
    return has_kernel(func.name(), _COMPOSITE) and not has_kernel(func.name(), own)


_LINALG = {torch.ops.aten.linalg_svdvals, torch.ops.aten.linalg_eigvals, torch.ops.aten.linalg_eigvalsh}


def _decides_by_modes(func: Any, args: Sequence[Any]) -> bool:
    """Return whether a composite operator takes another path below a mode, so that it must not be decomposed.

    It would compute vectors for gradients, or leave a batch of one out of a product. None of these reads values.
    """
    if func.overloadpacket is torch.ops.aten.matmul:
        one, other = args[0], args[1]
        return bool(one.dim() == other.dim() == 3 and one.shape[0] != other.shape[0])
    return func.overloadpacket in _LINALG


@cache
def _below_views(func: Any) -> bool:
    """Return whether a kernel for views is running when a mode sees a composite operator."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "ADInplaceOrView"))


@contextmanager
def _dispatch_where_called(func: Any) -> Iterator[None]:
    """Restore the dispatcher's state of the caller of a composite operator, which may choose its path by it."""
    with torch._C._RestorePythonTLSSnapshot():  # type: ignore[attr-defined]
        if _below_views(func):
            with torch._C._AutoDispatchBelowADInplaceOrView():
                yield
        else:
            yield


_MASKABLE = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


_SPARSE = "how much memory a sparse tensor has depends on data; use dense tensors (to_dense())"
_NESTED = (
    "the shapes of a nested tensor depend on data; use padded tensors and masks "
    "(nn.TransformerEncoder: enable_nested_tensor=False)"
)
_OPAQUE = "the memory of an mkldnn tensor cannot be seen; use dense tensors (to_dense())"
# Operators whose names begin like this, leading underscores aside, make such tensors.
_LAYOUTS = {"to_sparse": _SPARSE, "sparse_c": _SPARSE, "spdiags": _SPARSE, "nested_": _NESTED, "to_mkldnn": _OPAQUE}

# The numbers that these return follow from shapes and dtypes alone.
# fmt: off
_NUMBERS_OF_SHAPES = {
    "_cudnn_attention_forward", "_dimI", "_dimV", "_efficient_attention_forward", "_fused_sdp_choice",
    "_has_same_storage_numel", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention",
    "_use_miopen_ctc_loss", "_use_cudnn_ctc_loss", "_scaled_dot_product_fused_attention_overrideable", "dense_dim",
    "is_coalesced", "is_pinned", "is_same_size", "is_set_to", "qscheme", "q_per_channel_axis", "q_scale",
    "q_zero_point", "sparse_dim",
}
# fmt: on


@cache
def _reads_below(func: Any) -> str | None:
    """Return why no graph can hold an operator that reads values on the host where no mode sees it, or None."""
    namespace, _, name = func.overloadpacket._qualified_op_name.partition("::")
    if namespace == "aten":
        if name in ("_pack_padded_sequence", "_pad_packed_sequence"):
            return "its result's shape depends on data; use padded tensors"
        if name in ("lstm", "gru", "rnn_tanh", "rnn_relu") and func._overloadname == "data":
            return "it reads the lengths of packed sequences on the host; use padded tensors"
        if func in (torch.ops.aten.tensor_split.tensor_indices_or_sections, torch.ops.aten.ctc_loss.Tensor):
            return READS_VALUE
        for beginning, reason in _LAYOUTS.items():
            if name.lstrip("_").startswith(beginning):
                return reason
    return None


@cache
def _always_unsupported(func: Any) -> str | None:
    """Return why no graph can hold an operator whatever its arguments are, or None."""
    if func.overloadpacket in _MASKABLE:
        return None
    takes_tensors = any("Tensor" in str(argument.type) for argument in func._schema.arguments)
    returns_numbers = any("Tensor" not in str(returned.type) for returned in func._schema.returns)
    if takes_tensors and returns_numbers and func.overloadpacket.__name__ not in _NUMBERS_OF_SHAPES:
        return READS_VALUE
    if torch.Tag.data_dependent_output in func.tags:
        return READS_VALUE
    if torch.Tag.dynamic_output_shape in func.tags:
        return "its result's shape depends on data"
    return None


def why_unsupported(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Return why this operator call can neither be in a graph nor between two, or None where it can."""
    if reason := _unusual_layout(tensors_in((args, kwargs))):
        return reason
    if reason := _always_unsupported(func):
        sized = func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None
        return None if sized else reason
    packet = func.overloadpacket
    if packet in (torch.ops.aten.resize_, torch.ops.aten.set_):
        # cuDNN's recurrent layers look at all their weights through a new tensor, which has no memory to exchange.
        new = packet is torch.ops.aten.set_ and args[0].device.type != "cpu" and not args[0].untyped_storage().nbytes()
        return None if new else "it exchanges a tensor's memory, which a replay would not do again"
    if packet is torch.ops.aten.index and has_mask(args[1]):
        return "a boolean mask selects a number of elements that depends on data"
    return None


def _unusual_layout(tensors: Sequence[torch.Tensor]) -> str | None:
    """Return why no graph can hold one of these tensors, or None."""
    for tensor in tensors:
        if tensor.is_nested:
            return _NESTED
        if tensor.layout is not torch.strided:
            return _OPAQUE if tensor.is_mkldnn else _SPARSE
    return None


def written_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that an operator call writes to in place."""
    if not func._schema.is_mutable:
        return []
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return tensors_in([named.get(argument.name) for argument in func._schema.arguments if argument.is_write])


def _resized(func: Any, written: Sequence[tuple[torch.Tensor, torch.Size]]) -> str | None:
    """Return why no graph can hold an operator that resized a tensor, or None. Empty tensors may be resized."""
    if torch.Tag.inplace_view in func.tags or all(t.shape == before or not before.numel() for t, before in written):
        return None
    return "it resizes a tensor that it writes, which a replay would not do again; give it one of the result's shape"


def has_mask(indices: Sequence[torch.Tensor | None]) -> bool:
    """Return whether one of the indices of an ``index`` operator is a mask."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class Guard:
    """Installed while a function is warmed up or captured.

    Composite operators are decomposed, so that a host read inside one is seen too; each operator is checked before it
    runs; and memory from outside of the function is noted, so that it can be checked before replays.

    Args:
        device: where the work is captured.
        generators: the random generators that warm-up used; None during warm-up.

    Attributes:
        device: where the work is captured.
        operator: the last operator that ran, for the message of a capture that fails inside one.
        generators: random generators other than the default one that operators used.
        reads: the memory from outside of the function that operators read or write.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] | None = None) -> None:
        self.operator: str | None = None
        self.generators: list[torch.Generator] = []
        self._states = None if generators is None else [(known, known.get_state()) for known in generators]
        self.device = device
        self.reads = OutsideMemory()
        self._outside = 0
        self._produced: set[int] = set()

    @contextmanager
    def installed(
        self,
        run: Callable[[Any, Sequence[Any], dict[str, Any]], Any],
        note_outside: Callable[[Any, Sequence[Any], dict[str, Any]], None],
    ) -> Iterator[Guard]:
        """Check every operator that runs inside.

        Args:
            run: runs an operator that was checked, given with its arguments.
            note_outside: is told of operators that run unchecked, while the guard is suspended.
        """
        with refused(lambda: self.active), _DispatchGuard(self, run, note_outside):
            yield self

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let everything run unchecked: a call outside the graph."""
        self._outside += 1
        try:
            yield
        finally:
            self._outside -= 1

    @property
    def active(self) -> bool:
        """Whether operators are being checked."""
        return self._outside == 0

    def note_arguments(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Note the memory and the generators that an operator call takes."""
        generator = kwargs.get("generator")
        if generator is not None and all(generator is not known for known in self.generators):
            self._check_generator(generator)
            self.generators.append(generator)
        for tensor in tensors_in((args, kwargs)):
            if tensor.device.type == self.device.type and tensor.untyped_storage()._cdata not in self._produced:
                self.reads.note(tensor, func.name())

    def _check_generator(self, generator: torch.Generator) -> None:
        """Refuse, at its first use in a capture, a generator that the function makes or seeds itself."""
        if self._states is None:
            return
        state = next((state for known, state in self._states if known is generator), None)
        # A device's generator tracks draws during a capture in its own way, and does not allow seeding there.
        if state is None or (generator.device.type == "cpu" and not torch.equal(state, generator.get_state())):
            raise UnsupportedOpError(
                "the function makes or seeds a random generator, which a replay would not do again; make and seed it "
                "once, outside of the function",
                operator=self.operator,
            )

    def note_results(self, results: object) -> None:
        """Note the memory that an operator call made."""
        for tensor in tensors_in(results):
            key = tensor.untyped_storage()._cdata
            if key in self.reads:
                self.reads.note_view(tensor)
            else:
                self._produced.add(key)


class _DispatchGuard(TorchDispatchMode):
    def __init__(
        self,
        guard: Guard,
        run: Callable[[Any, Sequence[Any], dict[str, Any]], Any],
        note_outside: Callable[[Any, Sequence[Any], dict[str, Any]], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._guard = guard
        self._run = run
        self._note_outside = note_outside

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        guard = self._guard
        if not guard.active:
            self._note_outside(func, args, kwargs)
            return func(*args, **kwargs)
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # a wrapper subclass: the operators on its parts come here
        composite = is_composite(func, guard.device.type) and not _decides_by_modes(func, args)
        if not composite:
            guard.operator = func.name()
        if reason := _reads_below(func) or (None if composite else why_unsupported(func, args, kwargs)):
            raise UnsupportedOpError(f"{func.name()} cannot be captured: {reason}; {REMEDY}", operator=func.name())
        if composite:
            with self, _dispatch_where_called(func):
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        guard.note_arguments(func, args, kwargs)
        written = [(tensor, tensor.shape) for tensor in written_by(func, args, kwargs)]
        with guard.suspended():  # a kernel may read what it likes: it runs again at each replay
            results = self._run(func, args, kwargs)
        if reason := _unusual_layout(tensors_in(results)) or (_resized(func, written) if written else None):
            raise UnsupportedOpError(f"{func.name()} cannot be captured: {reason}; {REMEDY}", operator=func.name())
        guard.note_results(results)
        return results
