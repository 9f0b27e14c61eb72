"""What lies between the projection of queries, keys and values and attention: norms of heads, rotation, the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from graphmode.ops._checks import FLOATS, require, require_cache, require_contiguous, require_tensor
from graphmode.ops._cpu import cpu_operator, loops, runs_on_host
from graphmode.ops._device import overlap, rms_factor
from graphmode.ops._triton import constexpr, jit, launch_options, next_power_of_2, runs_triton, tl
from graphmode.ops.dispatch import Heads
from graphmode.ops.kv_cache import write_kv_reference


class Rotation(NamedTuple):
    """Rotary position embeddings (RoFormer, arXiv 2104.09864).

    Attributes:
        cos: float32 ``[positions, half]``: of each position, for each rotated pair; scaling of lengths included.
        sin: as ``cos``.
        interleaved: whether elements ``2 i`` and ``2 i + 1`` are a pair; else ``i`` and ``half + i``. The elements of
            a head beyond ``2 * half`` are not rotated.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


class HeadInputs(NamedTuple):
    """What projections to queries, keys and values meet: norms of heads, rotation, and the cache.

    Attributes:
        q_norm: ``[head_dim]``: weight of the RMS norm of each query head; None for no norm. In the projections' dtype.
        k_norm: the same for keys; None exactly where ``q_norm`` is.
        eps: of the norms.
        rotation: of queries and keys, after the norms.
        positions: int64 ``[tokens]``, inside the rotation's table.
        k_cache: ``[num_blocks, block_size, kv_heads, head_dim]`` in the projections' dtype, contiguous.
        v_cache: as ``k_cache``.
        slot_mapping: int64 ``[tokens]``: where each token's key and value go; -1 writes nothing.
    """

    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    rotation: Rotation
    positions: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slot_mapping: torch.Tensor

    @property
    def pointers(self) -> tuple[object, ...]:
        """The same as kernels take it: the rotation as its tables of cosines and sines."""
        return (*self[:3], self.rotation.cos, self.rotation.sin, *self[4:])

    def sizes(self, size: int) -> tuple[int, int, int]:
        """Return the query heads, the key/value heads and the elements of a head, of ``size`` projected elements."""
        kv_heads, head_dim = self.k_cache.shape[2:]
        return size // head_dim - 2 * kv_heads, kv_heads, head_dim

    def kind(self, size: int) -> Heads:
        """Return what the choice of a kernel depends on, for ``size`` projected elements of a token."""
        q_heads, kv_heads, head_dim = self.sizes(size)
        by_halves = not self.rotation.interleaved and 2 * self.rotation.cos.shape[1] == head_dim
        return Heads(q_heads, kv_heads, head_dim, by_halves and self.k_cache.shape == self.v_cache.shape)

    def require(self, x: torch.Tensor, size: int) -> None:
        """Check them for tokens like ``x`` with ``size`` projected elements each.

        Raises:
            ValueError: a shape, dtype, layout or device does not fit.
        """
        q_norm, k_norm, _, rotation, positions, k_cache, v_cache, slot_mapping = self
        require_cache("k_cache", k_cache, shape=(None, None, None, None), like=x)
        require_cache("v_cache", v_cache, shape=k_cache.shape, like=x)
        tokens, (kv_heads, head_dim) = x.shape[0], k_cache.shape[2:]
        require_tensor("positions", positions, shape=(tokens,), dtypes=(torch.int64,), like=x)
        require_tensor("slot_mapping", slot_mapping, shape=(tokens,), dtypes=(torch.int64,), like=x)
        require_tensor("cos", rotation.cos, shape=(None, None), dtypes=(torch.float32,), like=x)
        require_tensor("sin", rotation.sin, shape=rotation.cos.shape, dtypes=(torch.float32,), like=x)
        half = rotation.cos.shape[1]
        require(2 * half <= head_dim, "cos", f"for {half} pairs", f"at most half of head_dim={head_dim}")
        q_size = size - 2 * kv_heads * head_dim
        expected = f"whole heads of {head_dim} beside {kv_heads} of keys and of values"
        require(q_size > 0 and q_size % head_dim == 0, "the size of queries, keys and values", size, expected)
        require((q_norm is None) == (k_norm is None), "k_norm", k_norm, "a weight exactly where q_norm is one")
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm is not None:
                require_tensor(name, norm, shape=(head_dim,), dtypes=(x.dtype,), like=x)


def rotate_and_cache(qkv: torch.Tensor, inputs: HeadInputs) -> torch.Tensor:
    """Normalise and rotate queries and keys, write keys and values into the paged cache, return the queries.

    Args:
        qkv: ``[tokens, (q_heads + 2 * kv_heads) * head_dim]``: queries, keys and values; contiguous.
        inputs: what they meet.

    Returns:
        ``[tokens, q_heads, head_dim]``.

    Raises:
        ValueError: a shape, dtype, layout or device does not fit.
    """
    require_tensor("qkv", qkv, shape=(None, None), dtypes=FLOATS, like=qkv)
    require_contiguous(qkv=qkv)
    inputs.require(qkv, qkv.shape[1])
    on_host = runs_on_host(qkv)
    run = (
        rotate_and_cache_triton if runs_triton(qkv) else rotate_and_cache_cpu if on_host else rotate_and_cache_reference
    )
    return run(qkv, inputs)


def rotate_and_cache_reference(qkv: torch.Tensor, inputs: HeadInputs) -> torch.Tensor:
    """Run :func:`rotate_and_cache` in PyTorch."""
    q_norm, k_norm, eps, rotation, positions, k_cache, v_cache, slot_mapping = inputs
    tokens, (q_heads, kv_heads, head_dim) = len(qkv), inputs.sizes(qkv.shape[1])
    heads = qkv.view(tokens, q_heads + 2 * kv_heads, head_dim)
    cos = rotation.cos.index_select(0, positions).unsqueeze(1)
    sin = rotation.sin.index_select(0, positions).unsqueeze(1)

    def finish(given: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        values = given.float()
        if norm is not None:
            values = values * values.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_() * norm.float()
        return _rotate(values, cos, sin, rotation.interleaved).to(given.dtype)

    queries = finish(heads[:, :q_heads], q_norm)
    keys = finish(heads[:, q_heads : q_heads + kv_heads], k_norm)
    values = heads[:, q_heads + kv_heads :]
    write_kv_reference(keys.to(k_cache.dtype), values.to(v_cache.dtype), k_cache, v_cache, slot_mapping)
    return queries


@cpu_operator(
    "rotate_and_cache_on_cpu(Tensor qkv, Tensor? q_norm, Tensor? k_norm, float eps, Tensor cos, Tensor sin, "
    "bool interleaved, Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor(c!) out)"
)
def _rotate_and_cache_on_cpu(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    out: torch.Tensor,
) -> Callable[[], object]:
    none = np.empty(0, np.float32)
    return partial(
        loops().rotate_and_cache,
        qkv.view(len(qkv), -1, out.shape[2]).numpy(),
        none if q_norm is None else q_norm.numpy(),
        none if k_norm is None else k_norm.numpy(),
        eps,
        cos.numpy(),
        sin.numpy(),
        interleaved,
        positions.numpy(),
        k_cache.flatten(0, 1).numpy(),
        v_cache.flatten(0, 1).numpy(),
        slot_mapping.numpy(),
        out.numpy(),
    )


def rotate_and_cache_cpu(qkv: torch.Tensor, inputs: HeadInputs) -> torch.Tensor:
    """Run :func:`rotate_and_cache` by a loop on the CPU, in float32."""
    q_heads, _, head_dim = inputs.sizes(qkv.shape[1])
    out = torch.empty(len(qkv), q_heads, head_dim)
    _rotate_and_cache_on_cpu(qkv, *inputs[:3], *inputs.rotation, *inputs[4:], out)
    return out


def _rotate(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the pairs of float32 heads ``[tokens, heads, head_dim]``."""
    half = cos.shape[2]
    rotated, rest = values[..., : 2 * half], values[..., 2 * half :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    pairs = [first * cos - second * sin, second * cos + first * sin]
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([turned, rest], dim=-1)


def rotate_and_cache_triton(qkv: torch.Tensor, inputs: HeadInputs) -> torch.Tensor:
    """Run :func:`rotate_and_cache` in Triton: programs of one token and some of its heads."""
    tokens, (q_heads, kv_heads, head_dim) = len(qkv), inputs.sizes(qkv.shape[1])
    out = torch.empty((tokens, q_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return out
    half = inputs.rotation.cos.shape[1]
    # Many small programs fill the device with few tokens; larger ones cost less each with many.
    block_h = next_power_of_2(min(kv_heads, 8 if tokens > 256 else 2))
    _rotate_and_cache_kernel[(tokens, -(-q_heads // block_h) + -(-kv_heads // block_h))](
        qkv,
        *inputs.pointers,
        out,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        half=half,
        interleaved=inputs.rotation.interleaved,
        block_h=block_h,
        block_half=next_power_of_2(half),
        block_rest=next_power_of_2(max(head_dim - 2 * half, 1)),
        block_d=next_power_of_2(head_dim),
        num_warps=2 if block_h > 2 else 1,
        **launch_options(qkv.device),
    )
    return out


@jit()
def _rotate_and_cache_kernel(  # type: ignore[no-untyped-def]
    qkv,
    q_norm,
    k_norm,
    eps,
    cos,
    sin,
    positions,
    k_cache,
    v_cache,
    slot_mapping,
    out,
    q_heads: constexpr,
    kv_heads: constexpr,
    head_dim: constexpr,
    half: constexpr,
    interleaved: constexpr,
    block_h: constexpr,
    block_half: constexpr,
    block_rest: constexpr,
    block_d: constexpr,
    early: constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head_block = tl.program_id(1)
    q_blocks = (q_heads + block_h - 1) // block_h
    overlap(early)
    position = tl.load(positions + token)
    row = qkv + token * ((q_heads + 2 * kv_heads) * head_dim)
    if head_block < q_blocks:
        head = head_block * block_h + tl.arange(0, block_h)
        target = out + token * (q_heads * head_dim)
        _finish_heads(
            row, target, head, head < q_heads, q_norm, eps, cos, sin, position,
            head_dim, half, interleaved, block_half, block_rest,
        )  # fmt: skip
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            head = (head_block - q_blocks) * block_h + tl.arange(0, block_h)
            inside = head < kv_heads
            place = slot * (kv_heads * head_dim)
            _finish_heads(
                row + q_heads * head_dim, k_cache + place, head, inside, k_norm, eps, cos, sin, position,
                head_dim, half, interleaved, block_half, block_rest,
            )  # fmt: skip
            dim = tl.arange(0, block_d)
            at = head[:, None] * head_dim + dim[None, :]
            both = inside[:, None] & (dim < head_dim)[None, :]
            values = tl.load(row + (q_heads + kv_heads) * head_dim + at, mask=both)
            tl.store(v_cache + place + at, values, mask=both)


@jit()
def _finish_heads(  # type: ignore[no-untyped-def]
    source,
    target,
    head,
    inside,
    norm,
    eps,
    cos,
    sin,
    position,
    head_dim: constexpr,
    half: constexpr,
    interleaved: constexpr,
    block_half: constexpr,
    block_rest: constexpr,
):
    """Normalise and rotate the heads ``head`` of one token, side by side in ``source``, into ``target``."""
    pair = tl.arange(0, block_half)
    first = 2 * pair if interleaved else pair
    second = first + 1 if interleaved else pair + half
    start = head[:, None] * head_dim
    real = inside[:, None] & (pair < half)[None, :]
    a = tl.load(source + start + first[None, :], mask=real, other=0.0).to(tl.float32)
    b = tl.load(source + start + second[None, :], mask=real, other=0.0).to(tl.float32)
    rest = 2 * half + tl.arange(0, block_rest)
    real_rest = inside[:, None] & (rest < head_dim)[None, :]
    if head_dim > 2 * half:
        c = tl.load(source + start + rest[None, :], mask=real_rest, other=0.0).to(tl.float32)
    if norm is not None:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if head_dim > 2 * half:
            squares += tl.sum(c * c, 1)
        scale = rms_factor(squares, head_dim, eps)[:, None]
        a = a * scale * tl.load(norm + first, mask=pair < half, other=0.0).to(tl.float32)[None, :]
        b = b * scale * tl.load(norm + second, mask=pair < half, other=0.0).to(tl.float32)[None, :]
        if head_dim > 2 * half:
            c = c * scale * tl.load(norm + rest, mask=rest < head_dim, other=0.0).to(tl.float32)[None, :]
    cosine = tl.load(cos + position * half + pair, mask=pair < half, other=0.0)[None, :]
    sine = tl.load(sin + position * half + pair, mask=pair < half, other=0.0)[None, :]
    kind = target.dtype.element_ty
    tl.store(target + start + first[None, :], (a * cosine - b * sine).to(kind), mask=real)
    tl.store(target + start + second[None, :], (b * cosine + a * sine).to(kind), mask=real)
    if head_dim > 2 * half:
        tl.store(target + start + rest[None, :], c.to(kind), mask=real_rest)
