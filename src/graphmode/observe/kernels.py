"""Which kernels a model's layers take on a device, read from the table of kernels: nothing runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch

from graphmode.ops.dispatch import TABLE, Case, Choice, Device, Heads, Shape, decide

# All numbers up to where choices change often, and some beyond.
_ROWS = (*range(1, 513), 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a model's layers.

    Attributes:
        hidden: elements of hidden states.
        q_heads: heads of queries.
        kv_heads: heads of keys and of values.
        head_dim: elements of a head.
        inner: elements between gate and down projection; 0 where there are experts.
        vocab: tokens that logits are made for.
    """

    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int


def shape_of(config: Any) -> LayerShape:
    """Return the sizes in a configuration of transformers."""
    text = config.get_text_config()
    q_heads = text.num_attention_heads
    experts = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    return LayerShape(
        text.hidden_size,
        q_heads,
        getattr(text, "num_key_value_heads", None) or q_heads,
        getattr(text, "head_dim", None) or text.hidden_size // q_heads,
        0 if experts else text.intermediate_size,
        text.vocab_size,
    )


class Range(NamedTuple):
    """What runs for some numbers of rows.

    Attributes:
        first: the least of them.
        last: the most of those looked at; None where it is the largest that was.
        kernel: what runs.
        others: what comes before it in the table, and why it does not run.
    """

    first: int
    last: int | None
    kernel: str
    others: dict[str, str]


def kernels_of(shape: LayerShape, device: Device, dtype: torch.dtype) -> dict[str, list[Range]]:
    """Return what a layer's operations run, by rows of a step.

    Heads are taken to be rotated whole, by halves; nothing that a layer adds to be normalised.
    """
    size = (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim
    qkv, output = (size, shape.hidden), (shape.hidden, shape.q_heads * shape.head_dim)
    gate_up, down = (2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)
    layer = (qkv, output, gate_up, down) if shape.inner else (qkv, output)
    heads = Heads(shape.q_heads, shape.kv_heads, shape.head_dim, whole=True)

    def ranges(operation: str, *weights: Shape, alone: bool = False) -> list[Range]:
        cases = ((rows, Case(device, dtype, rows, weights, weights if alone else layer, heads)) for rows in _ROWS)
        return _joined((rows, _resolved(operation, case)) for rows, case in cases)

    to_stream = ranges("residual", output, down) if shape.inner else ranges("linear_add", output)
    mlp = {"gate and up": ranges("norm_swiglu", gate_up), "down": to_stream} if shape.inner else {}
    return {
        "queries, keys, values of decode": ranges("norm_linear", qkv),
        "queries, keys, values of others": ranges("norm_heads", qkv),
        "attention of decode": ranges("rotate_and_attend", qkv),
        "output of attention": to_stream,
        **mlp,
        "logits": ranges("logits", (shape.vocab, shape.hidden), alone=True),
        **{operation: ranges(operation, (shape.hidden,)) for operation in _by_device_alone()},
    }


def _by_device_alone() -> list[str]:
    """Return the operations of which device and dtype alone decide."""
    others = {row.operation for row in TABLE if row.needs or row.rows != (0, None)}
    return list(dict.fromkeys(row.operation for row in TABLE if row.operation not in others))


_SKINNY = {
    "norm_linear": "skinny_norm_linear",
    "norm_swiglu": "skinny_norm_swiglu",
    "norm_heads": "skinny_norm_linear",
    "residual": "skinny_linear_add",
    "linear_add": "skinny_linear_add",
    "logits": "skinny_norm_linear",
}


def _resolved(operation: str, case: Case) -> Choice:
    """Return what runs of an operation, down to the implementation."""
    choice = decide(operation, case)
    if choice.implementation == "norm_linear":
        return Choice(decide("norm_linear", case).implementation, choice.others)
    if choice.implementation == "skinny":
        return Choice(f"skinny, {decide(_SKINNY[operation], case).implementation}", choice.others)
    return choice


def _joined(choices: Iterable[tuple[int, Choice]]) -> list[Range]:
    """Return choices of rows that follow each other as ranges."""
    joined = []
    for (kernel, others), group in groupby(
        ((rows, *_reasons(choice)) for rows, choice in choices), lambda each: each[1:]
    ):
        rows = [each[0] for each in group]
        joined.append(Range(rows[0], None if rows[-1] == _ROWS[-1] else rows[-1], kernel, dict(others)))
    return joined


def _reasons(choice: Choice) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return what runs, and of each other implementation all reasons why not: it may have several rows."""
    names = dict.fromkeys(name for name, _ in choice.others if name != choice.implementation.split(",")[0])
    reasons = ((name, dict.fromkeys(why for other, why in choice.others if other == name)) for name in names)
    return choice.implementation, tuple((name, " or ".join(why)) for name, why in reasons)


def as_text(kernels: dict[str, list[Range]]) -> str:
    """Return a table of them."""
    lines = []
    for operation, ranges in kernels.items():
        for number, each in enumerate(ranges):
            rows = str(each.first) if each.last == each.first else f"{each.first}-{each.last or ''}"
            why = "; ".join(f"{name} {reason}" for name, reason in each.others.items())
            lines.append(f"{'' if number else operation:32} {rows:10} {each.kernel:16} {why}".rstrip())
    return "\n".join(lines)
