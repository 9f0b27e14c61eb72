"""Linear layers: all products of a decoder with its weights, each by the kernel that the table of kernels says.

What changes how a weight is stored or multiplied belongs here, and no decoder sees it:

- a weight in another format (quantised) is another dtype in the table, with its scales beside ``Linear.weight``;
- a shard of a weight is a smaller ``weight``. Shards of outputs need nothing else, as attention and SwiGLU take heads
  and halves as they come; shards of inputs leave sums for all ranks to add up, in :mod:`graphmode.layers.residual`;
- an adapter adds its product to the result. Where a kernel ends with SwiGLU or rotation, that comes before them, so the
  kernels of a layer with an adapter are those for a product alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from graphmode.layers.residual import Norm, Residual
from graphmode.ops import (
    HeadInputs,
    prefill_heads,
    prefill_swiglu,
    rotate_and_cache,
    silu_mul,
    skinny_linear,
    skinny_linear_add,
    skinny_norm_linear,
    small_batch_linear,
    split_k_linear,
)
from graphmode.ops.dispatch import NO_HEADS, Heads, Shape, choose


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        weight: ``[out, in]``, float32, bfloat16 or float16, contiguous.
        bias: ``[out]``; None for none.
        layer: shapes of all weights of the decoder layer it is in: skinny GEMMs are taken for all of them or for none.
            Empty where it stands alone.
        residual: the weights of the layer's projections to the residual stream, where all of them may reach it in
            split-K parts; else empty.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    layer: tuple[Shape, ...] = ()
    residual: tuple[torch.Tensor, ...] = ()

    def __call__(self, h: torch.Tensor, lens: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``h @ weight.T + bias``, ``[rows, out]``; a row whose length in ``lens`` is 0 is padding."""
        if self._kernel("linear", h) == "skinny":
            return skinny_linear(h, self.weight, self.bias, lens)
        return linear(h, self.weight, self.bias)

    def of_norm(self, x: Residual, norm: Norm, operation: str = "norm_linear") -> torch.Tensor:
        """Return the product with the norm of the residual stream, ``[rows, out]``."""
        kernel = self._kernel(operation, x.rows)
        if kernel == "skinny":
            return skinny_norm_linear(x.rows, norm.weight, self.weight, self.bias, norm.eps, lens=x.lens)
        product = small_batch_linear if kernel == "small_batch" else linear
        return product(x.normed(norm), self.weight, self.bias)

    def swiglu_of_norm(self, x: Residual, norm: Norm) -> torch.Tensor:
        """Return SwiGLU of that, of a weight that has gate before up: ``[rows, out / 2]``."""
        kernel = self._kernel("norm_swiglu", x.rows)
        if kernel == "skinny":
            return skinny_norm_linear(x.rows, norm.weight, self.weight, self.bias, norm.eps, gated=True, lens=x.lens)
        h = x.normed(norm)
        if kernel == "small_batch":
            return small_batch_linear(h, self.weight, self.bias, gated=True)
        if kernel == "prefill" and self.bias is None:
            return prefill_swiglu(h, self.weight)
        return silu_mul(linear(h, self.weight, self.bias))

    def heads_of_norm(self, x: Residual, norm: Norm, inputs: HeadInputs) -> torch.Tensor:
        """Cache the keys and values of the norm, and return the queries; as :func:`~graphmode.ops.rotate_and_cache`."""
        if self._kernel("norm_heads", x.rows, inputs.kind(len(self.weight))) == "prefill":
            return prefill_heads(x.normed(norm), self.weight, self.bias, inputs)
        return rotate_and_cache(self.of_norm(x, norm), inputs)

    def add_to(self, x: Residual, h: torch.Tensor, norm: Norm | None) -> None:
        """Add ``h @ weight.T``, or its norm, to the residual stream. There is no bias."""
        if norm is not None:
            x.add(self(h, x.lens), norm)
        elif self.residual and choose("residual", len(h), *self.residual, layer=self.layer) == "split_k":
            x.add_later(split_k_linear(h, self.weight))
        elif self._kernel("linear_add", h) == "skinny":
            skinny_linear_add(x.rows, h, self.weight, x.lens)
        else:
            x.rows.addmm_(h, self.weight.T)

    def _kernel(self, operation: str, rows: torch.Tensor, heads: Heads = NO_HEADS) -> str:
        return choose(operation, len(rows), self.weight, layer=self.layer, heads=heads)
