"""Decode attention from the projections on for Hopper, in Gluon: keys are in flight before the projections are done.

The keys and values of earlier tokens do not depend on the kernel ahead. So a program starts to copy its first tiles of
them to shared memory before it waits for that kernel, and has them when the query arrives. Each warp has keys of its
own and a softmax of its own; they are merged at the end. Of many sequences few are split: the last of a sequence's
programs merges their partial results.
"""

# mypy: disable-error-code="assignment, var-annotated, has-type"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphmode.ops._device import fast_rms_factor, load_split, online_softmax, slot_in, softmax_average
from graphmode.ops._triton import (
    commit_group,
    constexpr,
    copy_async,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon_jit,
    mma_v2,
    wait_group,
)

_WARP_KEYS = 16  # of a tile: the inner dimension of a product
_FEW = 16  # sequences, whose splits have a multiprocessor each


@dataclass(frozen=True)
class Tiling:
    """How a program goes through its keys.

    Attributes:
        warps: of a program; a tile has 16 keys for each.
        stages: tiles in flight.
    """

    warps: int
    stages: int


def tiling(seqs: int, head_dim: int) -> Tiling:
    """Return how programs go through keys, for so many sequences.

    Of those tried these are the fastest, or nearly, for contexts of 192 and 1,000 tokens (H100). More keys in flight in
    a program leave less room for the programs of the kernels after it.
    """
    if seqs <= 8:
        warps, stages = 4, 1
    elif seqs <= _FEW:
        warps, stages = 8, 1
    elif seqs <= 48:
        warps, stages = 4, 2
    else:
        warps, stages = 2, 3
    return Tiling(warps, max(stages * 128 // head_dim, 1))


def choose(seqs: int, programs: int, kv_heads: int, head_dim: int) -> tuple[Any, tuple[int, int], dict[str, Any]]:
    """Return the kernel for so many sequences, with ``programs`` for each head, its grid and its constants."""
    tile = tiling(seqs, head_dim)
    # Of many sequences the longest splits come first: so all heads of one before those of the next.
    many = seqs > _FEW
    constants = {
        "head_dim": head_dim,
        "warp_keys": _WARP_KEYS,
        "stages": tile.stages,
        "many": many,
        "num_warps": tile.warps,
    }
    grid = (kv_heads, programs) if many else (programs, kv_heads)
    return _rotate_and_attend_kernel, grid, constants


@gluon_jit()
def _rotate_and_attend_kernel(  # type: ignore[no-untyped-def]
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
    block_tables,
    table_stride,
    splits,
    out,
    accs,
    tops,
    sums,
    finished,
    scale_log2,
    kv_heads: constexpr,
    group: constexpr,
    block_size: constexpr,
    head_dim: constexpr,
    warp_keys: constexpr,
    stages: constexpr,
    many: constexpr,
    early: constexpr,
):
    """Attend with the query heads of one key/value head of one sequence to all of its keys, or to a split of them.

    Then ``accs``, ``tops`` and ``sums`` take partial results, which are merged: those of ``many`` sequences here, those
    of few by :func:`~graphmode.ops.attention.split_kv.merge_splits`.
    """
    warps: constexpr = gl.num_warps()
    tile: constexpr = warps * warp_keys
    kind: constexpr = k_cache.dtype.element_ty
    step: constexpr = kv_heads * head_dim
    # Products are batched, a batch a warp.
    products: constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])
    keys_of: constexpr = gl.DotOperandLayout(1, products, 2)
    lanes: constexpr = head_dim // 8
    copies: constexpr = gl.BlockedLayout(
        [1, lanes * warp_keys // 32, 8], [1, 32 // lanes, lanes], [warps, 1, 1], [2, 1, 0]
    )
    shared: constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    heads: constexpr = gl.BlockedLayout([1, head_dim // 32], [1, 32], [warps, 1], [1, 0])

    number = gl.program_id(1 if many else 0)
    kv_head = gl.program_id(0 if many else 1)
    if early:
        gdc_launch_dependents()
    seq, start, end, count, newest = load_split(splits, number)
    if count == 0:
        return
    token = seq.to(gl.int64)
    group_rows: constexpr = 4 if group <= 4 else 16
    member = gl.arange(0, group_rows, layout=gl.SliceLayout(1, heads))
    mine = (member < group)[:, None]
    dim = gl.arange(0, head_dim, layout=gl.SliceLayout(0, heads))
    if (count == 1) & (start == end):
        if early:
            gdc_wait()
        nothing = gl.zeros([group_rows, head_dim], out.dtype.element_ty, layout=heads)
        padding = out + (token * (kv_heads * group) + kv_head * group + member)[:, None] * head_dim + dim[None, :]
        gl.store(padding, nothing, mask=mine)
        return
    # The newest key is not in the cache yet.
    has_new = newest > 0
    end -= newest

    k_ring = gl.allocate_shared_memory(kind, [stages, warps, warp_keys, head_dim], shared)
    v_ring = gl.allocate_shared_memory(kind, [stages, warps, warp_keys, head_dim], shared)
    table = block_tables + token * table_stride
    k_head = k_cache + kv_head * head_dim
    v_head = v_cache + kv_head * head_dim
    pages = ()
    for stage in gl.static_range(stages):
        pages += (_load_pages(table, start + stage * tile, end, block_size, warps, warp_keys, copies),)
    for stage in gl.static_range(stages):
        _copy_tile(
            k_head, v_head, k_ring.index(stage), v_ring.index(stage), pages[stage], start + stage * tile, end,
            step, block_size, warps, warp_keys, head_dim, copies,
        )  # fmt: skip
        commit_group()
    next_pages = _load_pages(table, start + stages * tile, end, block_size, warps, warp_keys, copies)

    half: constexpr = head_dim // 2
    partner = (dim + half) % head_dim
    position = gl.load(positions + token)
    cosine = gl.load(cos + position * half + dim % half)
    sine = gl.load(sin + position * half + dim % half)
    sine = gl.where(dim < half, -sine, sine)
    slot = gl.load(slot_mapping + token)
    if q_norm is not None:
        q_scale = gl.load(q_norm + dim).to(gl.float32)
        q_partner_scale = gl.load(q_norm + partner).to(gl.float32)
    if k_norm is not None:
        k_scale = gl.load(k_norm + dim).to(gl.float32)
        k_partner_scale = gl.load(k_norm + partner).to(gl.float32)
    if early:
        gdc_wait()

    row = qkv + token * ((group + 2) * step)
    query = row + (kv_head * group + member)[:, None] * head_dim
    a = gl.load(query + dim[None, :], mask=mine, other=0.0).to(gl.float32)
    b = gl.load(query + partner[None, :], mask=mine, other=0.0).to(gl.float32)
    key = row + (group * kv_heads + kv_head) * head_dim
    c = gl.load(key + dim).to(gl.float32)
    d = gl.load(key + partner).to(gl.float32)
    new_place = key + step
    value = gl.load(new_place + dim)
    wide: constexpr = gl.SliceLayout(0, gl.SliceLayout(1, products))
    new_value = gl.load(new_place + gl.arange(0, head_dim, layout=wide)).to(gl.float32)
    if q_norm is not None:
        factor = fast_rms_factor(gl.sum(a * a, 1), head_dim, eps)[:, None]
        a = a * factor * q_scale[None, :]
        b = b * factor * q_partner_scale[None, :]
    queries = (a * cosine[None, :] + b * sine[None, :]).to(kind)
    if k_norm is not None:
        factor = fast_rms_factor(gl.sum(c * c, 0), head_dim, eps)
        c = c * factor * k_scale
        d = d * factor * k_partner_scale
    new_key = (c * cosine + d * sine).to(kind)
    if has_new & (slot >= 0):
        gl.store(k_head + slot * step + dim, new_key)
        gl.store(v_head + slot * step + dim, value)

    # The first warp begins with the newest key.
    new = gl.sum(queries.to(gl.float32) * new_key.to(gl.float32)[None, :], 1) * scale_log2
    if group_rows == 4:
        # Products have 16 rows: the others hold anything.
        new = gl.reshape(gl.permute(gl.join(gl.join(new, new), gl.join(new, new)), [1, 2, 0]), [16])
        twice = gl.join(gl.join(queries, queries), gl.join(queries, queries))
        queries = gl.reshape(gl.permute(twice, [2, 3, 0, 1]), [16, head_dim])
    new = gl.convert_layout(new, gl.SliceLayout(0, gl.SliceLayout(2, products)))[None, :]
    warp = gl.arange(0, warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, products)))[:, None]
    begins = (warp == 0) & has_new
    top = gl.where(begins, new, -1e38)
    total = gl.where(begins, 1.0, gl.zeros([warps, 16], gl.float32, layout=gl.SliceLayout(2, products)))
    acc = gl.zeros([warps, 16, head_dim], gl.float32, layout=products)
    acc = acc + gl.where(gl.expand_dims(begins, 2), new_value[None, None, :], 0.0)
    query_of: constexpr = gl.DotOperandLayout(0, products, 2)
    query_tile = gl.allocate_shared_memory(kind, [1, 16, head_dim], shared)
    query_tile.store(gl.reshape(queries, [1, 16, head_dim]))
    queries = query_tile.load(query_of)
    queries = gl.broadcast(queries, gl.full([warps, 16, head_dim], 0, kind, layout=query_of))[0]

    number_of: constexpr = gl.SliceLayout(1, products)
    inner = gl.arange(0, warp_keys, layout=gl.SliceLayout(0, number_of))[None, :]
    outer = gl.arange(0, warps, layout=gl.SliceLayout(1, number_of))[:, None] * warp_keys
    turn = 0
    for first in range(start, end, tile):
        wait_group(stages - 1)
        keys = k_ring.index(turn).permute((0, 2, 1)).load(keys_of)
        scores = mma_v2(queries, keys, gl.zeros([warps, 16, warp_keys], gl.float32, layout=products)) * scale_log2
        seen = gl.expand_dims(first + outer + inner < end, 1)
        scores = gl.where(seen, scores, float("-inf"))
        weights, correction, top, total = online_softmax(scores, top, total, 2)
        values = v_ring.index(turn).load(keys_of)
        weights = gl.convert_layout(weights.to(kind), query_of)
        acc = mma_v2(weights, values, acc * gl.expand_dims(correction, 2))
        if first + stages * tile < end:
            _copy_tile(
                k_head, v_head, k_ring.index(turn), v_ring.index(turn), next_pages, first + stages * tile, end,
                step, block_size, warps, warp_keys, head_dim, copies,
            )  # fmt: skip
            next_pages = _load_pages(table, first + (stages + 1) * tile, end, block_size, warps, warp_keys, copies)
        commit_group()
        turn = gl.where(turn == stages - 1, 0, turn + 1)

    # A thread has what all warps have of its elements.
    rows: constexpr = 8 if group <= 8 else 16
    met: constexpr = gl.BlockedLayout([warps, 1, head_dim // 32], [1, 1, 32], [1, warps, 1], [2, 1, 0])
    top = gl.expand_dims(_meet(top, rows, warps, gl.SliceLayout(2, met)), 2)
    total = gl.expand_dims(_meet(total, rows, warps, gl.SliceLayout(2, met)), 2)
    if rows == 8:
        acc = gl.split(gl.permute(gl.reshape(acc, [warps, 2, 8, head_dim]), [0, 2, 3, 1]))[0]
    acc = gl.convert_layout(acc, met)
    top_of_all = gl.max(top, 0)
    weight = gl.exp2(top - gl.expand_dims(top_of_all, 0))
    total = gl.sum(total * weight, 0)
    acc = gl.sum(acc * weight, 0)

    result: constexpr = gl.SliceLayout(0, met)
    member = gl.arange(0, rows, layout=gl.SliceLayout(1, result))
    inside = (member < group)[:, None]
    head = (kv_head * group + member)[:, None]
    dim = gl.arange(0, head_dim, layout=gl.SliceLayout(0, result))[None, :]
    whole = out + (token * (kv_heads * group) + head) * head_dim + dim
    if count == 1:
        acc = softmax_average(acc, total)
        gl.store(whole, acc.to(out.dtype.element_ty), mask=inside)
    else:
        partial = number.to(gl.int64) * (kv_heads * group) + head
        gl.store(tops + partial, top_of_all, mask=inside)
        gl.store(sums + partial, total, mask=inside)
        gl.store(accs + partial * head_dim + dim, acc, mask=inside)
        if many:
            counter = finished + token * kv_heads + kv_head
            if _is_last(counter, count):
                gl.store(counter, 0)
                first_partial = partial - gl.load(splits + number * 6 + 5, cache_modifier=".cg") * (kv_heads * group)
                acc = _merge(accs, tops, sums, first_partial, count, kv_heads * group, inside, dim, head_dim)
                gl.store(whole, acc.to(out.dtype.element_ty), mask=inside)


@gluon_jit()
def _is_last(counter, count):  # type: ignore[no-untyped-def]
    """Return whether all other programs of a sequence's head have left their results; count this one, which has."""
    # A barrier of all warps, then a fence: whoever sees the count sees what any of them has stored.
    gl.inline_asm_elementwise(
        "barrier.sync 0; fence.acq_rel.gpu; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    return gl.atomic_add(counter, 1, sem="acq_rel") == count - 1


@gluon_jit()
def _merge(  # type: ignore[no-untyped-def]
    accs, tops, sums, first, count, step: constexpr, inside, dim, head_dim: constexpr
):
    """Merge the partial results of heads, ``count`` of each; from L2, where other multiprocessors put them."""
    top = gl.load(tops + first, mask=inside, other=-1e38, cache_modifier=".cg")
    total = gl.load(sums + first, mask=inside, other=0.0, cache_modifier=".cg")
    acc = gl.load(accs + first * head_dim + dim, mask=inside, other=0.0, cache_modifier=".cg")
    for split in range(1, count):
        at = first + split * step
        other_top = gl.load(tops + at, mask=inside, other=-1e38, cache_modifier=".cg")
        new_top = gl.maximum(top, other_top)
        old = gl.exp2(top - new_top)
        new = gl.exp2(other_top - new_top)
        total = total * old + gl.load(sums + at, mask=inside, other=0.0, cache_modifier=".cg") * new
        other = gl.load(accs + at * head_dim + dim, mask=inside, other=0.0, cache_modifier=".cg")
        acc = acc * old + other * new
        top = new_top
    return softmax_average(acc, total)


@gluon_jit()
def _load_pages(  # type: ignore[no-untyped-def]
    table, first, end, block_size: constexpr, warps: constexpr, warp_keys: constexpr, copies: constexpr
):
    """Load the block of each key of a tile from ``first`` on."""
    number = first + _key_numbers(warps, warp_keys, copies)
    return gl.load(table + number // block_size, mask=number < end, other=0)


@gluon_jit()
def _key_numbers(warps: constexpr, warp_keys: constexpr, copies: constexpr):  # type: ignore[no-untyped-def]
    outer = gl.arange(0, warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, copies)))[:, None]
    return outer * warp_keys + gl.arange(0, warp_keys, layout=gl.SliceLayout(0, gl.SliceLayout(2, copies)))[None, :]


@gluon_jit()
def _copy_tile(  # type: ignore[no-untyped-def]
    k_head,
    v_head,
    k_tile,
    v_tile,
    pages,
    first,
    end,
    step: constexpr,
    block_size: constexpr,
    warps: constexpr,
    warp_keys: constexpr,
    head_dim: constexpr,
    copies: constexpr,
):
    """Ask for the keys and values of a tile from ``first`` on; zeros at ``end`` and later."""
    number = first + _key_numbers(warps, warp_keys, copies)
    slot = slot_in(pages, number, block_size)
    dim = gl.arange(0, head_dim, layout=gl.SliceLayout(0, gl.SliceLayout(1, copies)))[None, None, :]
    place = gl.expand_dims(slot * step, 2) + dim
    inside = gl.expand_dims(number < end, 2)
    copy_async(k_tile, k_head + place, mask=inside)
    copy_async(v_tile, v_head + place, mask=inside)


@gluon_jit()
def _meet(values, rows: constexpr, warps: constexpr, layout: constexpr):  # type: ignore[no-untyped-def]
    """Return the first ``rows``, 8 or 16, of ``[warps, 16]``, in a layout of them."""
    if rows == 8:
        values = gl.split(gl.permute(gl.reshape(values, [warps, 2, 8]), [0, 2, 1]))[0]
    return gl.convert_layout(values, layout)
