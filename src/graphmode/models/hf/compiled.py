"""Layers that are not fused, compiled one by one by ``torch.compile`` (Inductor).

A layer is traced once, for any number of tokens, with its weights as inputs and attention cut out. What it asks of
attention and what follows from the answer become two programs; attention runs between them as it does in any layer. So
it may break a graph, and nothing that it reads is a constant of compiled code. Layers whose programs have the same text
share one compilation. A program is called by an operator: no mode is active inside of it, so the compiler never meets
the guard of a capture, and the guard, or the tape of the CPU, sees one call with all memory that it reads.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental import _config as shape_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from graphmode.cache.specs import LayerCache
from graphmode.errors import ModelError
from graphmode.layers.attention import AttentionBatch
from graphmode.models.hf.experts import real_rows
from graphmode.models.hf.fuse import close
from graphmode.models.hf.grid_positions import has_grid_positions
from graphmode.ops import Scoring

log = logging.getLogger(__name__)

# Tokens of the traced call. A size that differs in a call of one token is a number of tokens.
_TOKENS = 61

# The dispatcher's state in which programs are compiled and run, whatever modes are active around the operator, and
# whether their inputs were made in inference mode or not.
with torch.inference_mode(), torch._C._AutoDispatchBelowADInplaceOrView():
    _DISPATCH = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

# The compiled programs of this process, and where each is, by its text and the shapes of its inputs.
_programs: list[Callable[..., Sequence[torch.Tensor]]] = []
_places: dict[object, int] = {}

torch.library.define("graphmode::compiled", "(int program, Tensor[] inputs) -> Tensor[]")


@torch.library.impl("graphmode::compiled", "default")
def _run(program: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch._C._ForceDispatchKeyGuard(*_DISPATCH):
        # A graph refers to weights by plain tensors of its own, for which the compiler would compile again.
        plain = [tensor.detach() if isinstance(tensor, torch.nn.Parameter) else tensor for tensor in inputs]
        return list(_programs[program](*plain))


@dataclass(frozen=True)
class _Call:
    """A call of a layer: its arguments, flat, their structure, and what it returned."""

    leaves: list[Any]
    spec: TreeSpec
    output: Any = None

    @property
    def batch(self) -> AttentionBatch:
        return next(leaf for leaf in self.leaves if isinstance(leaf, AttentionBatch))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What a layer may read beside its weights and the cache."""
        return [*(leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)), *self.batch.slot_mapping]

    def is_like(self, other: _Call) -> bool:
        """Return whether all that is no tensor and no batch is the same."""
        return self.spec == other.spec and all(
            type(mine) is type(theirs) and (isinstance(mine, (torch.Tensor, AttentionBatch)) or mine == theirs)
            for mine, theirs in zip(self.leaves, other.leaves, strict=True)
        )

    def with_tensors(self, tensors: Sequence[torch.Tensor], attend: Callable[..., torch.Tensor]) -> Any:
        """Return ``(args, kwargs)`` with other tensors and another attention."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        batch = replace(self.batch, slot_mapping=tuple(rest), attend=attend)
        return tree_unflatten([batch if isinstance(leaf, AttentionBatch) else leaf for leaf in leaves], self.spec)


@dataclass(frozen=True)
class _Program:
    """One half of a layer: the place of its compiled code, and the names of what it takes and makes."""

    place: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(self, values: dict[str, torch.Tensor]) -> None:
        results = torch.ops.graphmode.compiled(self.place, [values[name] for name in self.inputs])
        values.update(zip(self.outputs, results, strict=True))


@dataclass(frozen=True)
class CompiledLayer:
    """A decoder layer as two programs and attention between them; called as the layer is.

    Attributes:
        own: the layer's own code, for calls that differ from the traced one in more than tensors.
        call: the traced one.
        weights: parameters and buffers.
        names: of the weights, then of the tensors of a call.
        before: the program up to attention.
        cache: the index of its cache.
        asked: what attention takes beside cache and batch, three tensors and options; of tensors the names.
        answer: the name of what attention returns.
        after: the program from there on, which makes the result alone.
    """

    own: Callable[..., Any]
    call: _Call
    weights: list[torch.Tensor]
    names: list[str]
    before: _Program
    cache: int
    asked: list[Any]
    answer: str
    after: _Program

    @property
    def places(self) -> tuple[int, int]:
        """Where its programs are: the same of layers that share them."""
        return self.before.place, self.after.place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer."""
        call = _Call(*tree_flatten((args, kwargs)))
        if not call.is_like(self.call):
            return self.own(*args, **kwargs)
        batch = call.batch
        values = dict(zip(self.names, [*self.weights, *call.tensors], strict=True))
        self.before(values)
        asked: list[Any] = [values[each] if isinstance(each, str) else each for each in self.asked]
        query, key, value, *scoring, selection = asked
        cache = batch.caches[self.cache]
        values[self.answer] = batch.attention(query, key, value, cache, batch, Scoring(*scoring), selection)
        self.after(values)
        [result] = self.after.outputs
        return values[result]


def compile_layers(model: PreTrainedModel, caches: Sequence[LayerCache], max_model_len: int) -> int:
    """Compile the decoder layers of a model, for one token and for any number; log which are not and why.

    A layer is replaced where the compiled programs give what its own code gives of the tokens of a short text, and of
    its first token alone.

    Args:
        model: a decoder of transformers, on its device, with graphmode's attention.
        caches: of its layers, with room for a sequence. What their first blocks hold is overwritten.
        max_model_len: tokens of a sequence, at least 2.

    Returns:
        How many layers are compiled.
    """
    start, known = time.perf_counter(), len(_programs)
    problems: Counter[str] = Counter()
    failed: dict[tuple[int, int], Exception] = {}
    compiled: list[tuple[Any, CompiledLayer]] = []
    with torch.inference_mode():
        of_one, of_many = _calls(model, caches, 1), _calls(model, caches, min(_TOKENS, max_model_len))
        for layer, calls in of_many.items():
            parts = None
            try:
                if len(calls) != 1:
                    raise ModelError(f"it runs {len(calls)} times in a step")
                parts = _compile(layer, of_one[layer][0], calls[0])
                if error := failed.get(parts.places):
                    raise error
                # One token first: then the compiler knows which sizes vary.
                for call in (of_one[layer][0], calls[0]):
                    args, kwargs = tree_unflatten(call.leaves, call.spec)
                    if not close(call.output, parts(*args, **kwargs)):
                        raise ModelError("it gives other results when it is")
            except Exception as error:  # whatever the compiler raises: the layer's own code is right too, and slower
                problems[f"{type(error).__name__}: {error}"] += 1
                if parts is not None:
                    failed[parts.places] = error
            else:
                compiled.append((layer, parts))
    for layer, parts in compiled:
        layer.forward = parts
    for problem, count in problems.items():
        log.warning("%d layers are not compiled: %s", count, problem)
    seconds = time.perf_counter() - start
    log.info("%d layers are compiled to %d programs in %.1f s", len(compiled), len(_programs) - known, seconds)
    return len(compiled)


def _calls(model: PreTrainedModel, caches: Sequence[LayerCache], tokens: int) -> dict[Any, list[_Call]]:
    """Run the model on a sequence of some tokens and return the calls of its decoder layers."""
    device = model.device
    positions = torch.arange(tokens, device=device)
    blocks = torch.arange(-(-tokens // caches[0].keys.shape[1]), dtype=torch.int32, device=device).unsqueeze(0)
    groups = 1 + max(cache.group for cache in caches)
    batch = AttentionBatch(
        slot_mapping=(positions,) * groups,
        block_tables=(blocks,) * groups,
        cu_query_lens=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        kv_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
        max_query_len=tokens,
        caches=caches,
    )
    calls: dict[Any, list[_Call]] = defaultdict(list)

    def note_arguments(layer: Any, args: Any, kwargs: Any) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        if any(leaf is batch for leaf in leaves):
            calls[layer].append(_Call(tree_map_only(torch.Tensor, torch.clone, leaves), spec))

    def note_output(layer: Any, args: Any, output: object) -> None:
        if layer in calls:
            calls[layer].append(replace(calls[layer].pop(), output=tree_map_only(torch.Tensor, torch.clone, output)))

    hooks = []
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # what transformers' decoder layers are
            hooks.append(layer.register_forward_pre_hook(note_arguments, with_kwargs=True))
            hooks.append(layer.register_forward_hook(note_output))
    position_ids = positions.unsqueeze(0)
    try:
        model(
            input_ids=position_ids % model.config.get_text_config().vocab_size,
            position_ids=position_ids.expand(3, 1, tokens) if has_grid_positions(model) else position_ids,
            use_cache=False,
            logits_to_keep=1,
            attention_batch=batch,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _compile(layer: torch.nn.Module, one: _Call, many: _Call) -> CompiledLayer:
    """Return a layer as programs that compile when they are first called.

    Args:
        layer: the layer.
        one: its call of one token.
        many: its call of more, in other respects the same.

    Raises:
        ModelError: its code cannot be cut at attention, or is not the same for any number of tokens.
        Exception: whatever the layer's own code raises when it is traced.
    """
    if any(hasattr(module, "indexer") for module in layer.modules()):
        raise ModelError("an indexer picks its keys")
    if others := [type(leaf).__name__ for leaf in many.leaves if not _is_known(leaf)]:
        raise ModelError(f"it takes what it may change: {', '.join(others)}")
    weights = dict(layer.named_parameters()) | dict(layer.named_buffers())
    graph, cache, asked = _trace(layer, weights, one, many)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    outputs: Any = graph.output_node().args[0]
    *questions, answer, result = outputs
    names = iter(questions)
    asked = [next(names).name if isinstance(each, torch.Tensor) else each for each in asked]
    before = _needed(graph, questions, placeholders)
    if answer in before:
        raise ModelError("it asks attention for what depends on the answer")
    # Where a view is used it is made again.
    computed = {node for node in before if isinstance(node.meta["val"], torch.Tensor) and not _is_view(node)}
    inputs = {*placeholders, *computed, answer}
    after = _needed(graph, [result], inputs)
    crossing = {*questions, *(computed & {*after})} - {*placeholders}
    return CompiledLayer(
        own=layer.forward,
        # Of its tensors nothing is kept.
        call=_Call(tree_map_only(torch.Tensor, lambda tensor: tensor.new_empty(0), many.leaves), many.spec),
        weights=list(weights.values()),
        names=[node.name for node in placeholders],
        before=_program(before, placeholders, [node for node in before if node in crossing]),
        cache=next(index for index, each in enumerate(many.batch.caches) if each is cache),
        asked=asked,
        answer=answer.name,
        after=_program(after, inputs, [result]),
    )


def _is_known(leaf: object) -> bool:
    """Return whether an argument is a tensor, the batch, or something that is the same as long as it is equal."""
    empty = isinstance(leaf, Mapping) and not leaf
    return empty or isinstance(leaf, (torch.Tensor, AttentionBatch, bool, int, float, str, NoneType))


def _trace(
    layer: torch.nn.Module, weights: dict[str, torch.Tensor], one: _Call, many: _Call
) -> tuple[Graph, LayerCache, list[Any]]:
    """Trace a layer for any number of tokens.

    Returns:
        The graph, of which the inputs are the weights and the call's tensors, and the outputs the tensors that
        attention is asked with, its answer, which stands for an input, and the layer's result; the layer's cache; and
        what attention is asked with.
    """
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        sizes = zip(tensor.shape, other.shape, strict=True)
        dynamic = [DimDynamic.STATIC if size == its else DimDynamic.DUCK for size, its in sizes]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))

    asked: list[tuple[LayerCache, list[Any], torch.Tensor]] = []

    def ask(
        query: Any, key: Any, value: Any, cache: LayerCache, batch: object, scoring: Scoring, selection: Any
    ) -> torch.Tensor:
        answer: torch.Tensor = query.new_empty(*query.shape[:2], value.shape[2])
        asked.append((cache, [query, key, value, *scoring, selection], answer))
        return answer

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        args, kwargs = many.with_tensors(tensors[len(weights) :], ask)
        with real_rows(layer, kwargs["attention_batch"]):
            result = functional_call(layer, dict(zip(weights, tensors, strict=False)), args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if spec != many.spec or not all(map(_is_known, leaves)):
            raise ModelError("it changes its arguments")
        if len(asked) != 1:
            raise ModelError(f"it calls attention {len(asked)} times")
        if not isinstance(result, torch.Tensor):
            raise ModelError(f"it returns a {type(result).__name__}")
        _, question, answer = asked[0]
        return [*(each for each in question if isinstance(each, torch.Tensor)), answer, result]

    tensors = [fake(each, each) for each in weights.values()]
    tensors += [fake(each, other) for each, other in zip(many.tensors, one.tensors, strict=True)]
    with mode, torch.no_grad(), shape_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        # Taken apart first: where composite operators are functionalized, sizes become constants.
        flat = make_fx(run, _allow_non_fake_inputs=True)(*tensors)
        graph: Graph = make_fx(functionalize(flat))(*tensors).graph
    if shapes.guards:
        raise ModelError(f"its code depends on the number of tokens: {', '.join(str(g.expr) for g in shapes.guards)}")
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            raise ModelError(f"it changes what it is given, by {node.target.name()}")
    cache, question, _ = asked[0]
    return graph, cache, question


def _needed(graph: Graph, outputs: Sequence[Node], inputs: Collection[Node]) -> list[Node]:
    """Return the nodes that outputs are computed from, those among the inputs and the outputs included, in order."""
    needed = set(outputs)
    for node in reversed(graph.nodes):
        if node in needed and node not in inputs:
            needed.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]


def _is_view(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and any(each.alias_info for each in node.target._schema.returns)


def _program(nodes: Sequence[Node], inputs: Collection[Node], outputs: Sequence[Node]) -> _Program:
    """Return a part of a graph as a program.

    Args:
        nodes: of the part, in order.
        inputs: those of them that it does not compute, and maybe others.
        outputs: those of them that it returns.

    Raises:
        ModelError: it holds what a program cannot.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in nodes:
        if node.op == "get_attr":
            raise ModelError("it uses tensors that are neither weights nor arguments")
        copies[node] = graph.placeholder(node.name) if node in inputs else graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    module = GraphModule({}, graph)
    taken = [node for node in nodes if node in inputs]
    kind = module.code, tuple(_kind(node.meta["val"]) for node in taken)
    if kind not in _places:
        _places[kind] = len(_programs)
        _programs.append(torch.compile(module))
    return _Program(_places[kind], tuple(node.name for node in taken), tuple(node.name for node in outputs))


def _kind(tensor: torch.Tensor) -> object:
    """Return what tells tensors apart that programs are compiled for."""
    return tensor.device, tensor.dtype, tuple(size if isinstance(size, int) else None for size in tensor.shape)
