from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graphmode.ops import PagedBatch, Scoring
from graphmode.ops import paged_attention as public_paged_attention
from graphmode.ops.attention.cpu import paged_attention_cpu
from graphmode.ops.attention.paged_reference import _choose_blocks, _find_blocks, _num_keys, paged_attention_reference
from graphmode.ops.attention.paged_triton import paged_attention_triton
from graphmode.ops.attention.split_kv import SplitKVPlan, plan_split_kv
from tests.ops.paged import PoisonedBatch, attend_one_by_one, make_batch

# A sink above all scores overflows in Triton's interpreter, and is meant to.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")

# Absolute and relative, for values of order 1. The interpreter multiplies bfloat16 matrices wrongly: on a GPU only.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def run(attend, batch: PoisonedBatch, **options) -> torch.Tensor:
    return attend(*batch.inputs(), **options)


def check(attend, batch: PoisonedBatch, **options) -> None:
    """Real rows are right although everything unused is poisoned; padding rows are zero."""
    output = run(attend, batch, **options)
    assert output.shape == (*batch.q.shape[:2], batch.v_cache.shape[3])
    assert output.dtype == batch.q.dtype
    real = batch.num_real_tokens
    expected = attend_one_by_one(batch)
    tolerance = TOLERANCE[batch.q.dtype]
    torch.testing.assert_close(output[:real].double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(output[real:], torch.zeros_like(output[real:]))


HEADS = {  # q_heads, kv_heads, head_dim
    "group 1": (2, 2, 32),
    "group 2": (4, 2, 64),
    "group 3, head_dim 80": (6, 2, 80),
    "group 5, head_dim 96": (5, 1, 96),
    "group 6": (6, 1, 32),
    "group 7": (14, 2, 64),
    "group 20": (20, 1, 32),
    "head_dim 256": (2, 1, 256),
}
BATCHES = {  # new tokens and lengths of real sequences, padded tokens, padded sequences
    "decode": ([1, 1, 1], [1, 70, 33], 3, 3),
    "decode with padding": ([1, 1], [64, 65], 4, 4),
    "prefill": ([19], [19], 19, 1),
    "chunked prefill": ([9], [75], 16, 1),
    "mixed": ([1, 12, 1, 5], [40, 12, 1, 66], 19, 4),
    "mixed with padding": ([7, 1], [7, 130], 13, 5),
    "mixed, one token each": ([1, 1], [20, 3], 7, 3),
}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
@pytest.mark.usefixtures("nan_memory")
def test_head_shapes(paged_attention, kernel_device: str, heads, lens) -> None:
    query_lens, kv_lens, tokens, seqs = lens
    q_heads, kv_heads, head_dim = heads
    shape = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    check(paged_attention, make_batch(query_lens, kv_lens, tokens=tokens, seqs=seqs, **shape, device=kernel_device))


SIZES = {  # of keys and values, and whether values are the first elements of keys
    "latents, 576 of which 512": {"head_dim": 576, "value_dim": 512, "values_in_keys": True},
    "latents, odd": {"head_dim": 44, "value_dim": 24, "values_in_keys": True},
    "latents with nothing beside": {"head_dim": 32, "value_dim": 32, "values_in_keys": True},
    "wider keys": {"head_dim": 192, "value_dim": 128},
    "much wider keys": {"head_dim": 96, "value_dim": 16},
    "wider values": {"head_dim": 16, "value_dim": 80},
}


@pytest.mark.parametrize("top_k", [None, 20], ids=["all keys", "twenty keys"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
def test_keys_and_values_of_different_size(paged_attention, kernel_device: str, sizes, lens, top_k) -> None:
    query_lens, kv_lens, tokens, seqs = lens
    batch = make_batch(
        query_lens,
        kv_lens,
        tokens=tokens,
        seqs=seqs,
        q_heads=6,
        kv_heads=1,
        top_k=top_k,
        max_len=200,
        device=kernel_device,
        **sizes,
    )
    check(paged_attention, batch)


@pytest.mark.parametrize("top_k", [None, 40], ids=["all keys", "forty keys"])
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
def test_more_query_heads_than_a_program_takes(kernel_device: str, lens, top_k) -> None:
    query_lens, kv_lens, tokens, seqs = lens
    sizes = {"head_dim": 576, "value_dim": 512, "values_in_keys": True, "q_heads": 70, "kv_heads": 1}
    batch = make_batch(
        query_lens, kv_lens, tokens=tokens, seqs=seqs, max_len=200, top_k=top_k, device=kernel_device, **sizes
    )
    check(paged_attention_triton, batch)


@pytest.mark.parametrize("extras", [{"kv_heads": 2, "soft_cap": 1.5, "with_sinks": True}, {"kv_heads": 4}])
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
def test_selected_keys(paged_attention, kernel_device: str, lens, extras) -> None:
    query_lens, kv_lens, tokens, seqs = lens
    batch = make_batch(
        query_lens, kv_lens, tokens=tokens, seqs=seqs, block_size=3, top_k=33, device=kernel_device, **extras
    )
    check(paged_attention, batch)


def split(batch: PoisonedBatch, spare: int) -> SplitKVPlan:
    window, selection = batch.options["window"], batch.options["selection"]
    top_k = None if selection is None else selection.shape[1]
    return plan_split_kv(batch.kv_lens, batch.k_cache.shape[2], window=window, top_k=top_k, spare=spare)


@pytest.mark.parametrize("spare", [1, 2, 8])
def test_selection_in_splits(kernel_device: str, spare: int) -> None:
    batch = make_batch([1, 1, 1], [1, 300, 150], top_k=200, head_dim=48, value_dim=32, device=kernel_device)
    check(paged_attention_triton, batch, plan=split(batch, spare))
    batch = make_batch([1, 7], [150, 260], tokens=10, seqs=3, top_k=200, device=kernel_device)
    check(paged_attention_triton, batch)


def test_selecting_every_key_is_attention_to_all(paged_attention, kernel_device: str) -> None:
    batch = make_batch([1, 12, 5], [40, 12, 66], top_k=66, device=kernel_device)
    selected = run(paged_attention, batch)
    batch.options["selection"] = None
    torch.testing.assert_close(selected, run(paged_attention, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 3, 4, 16, 128])
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
@pytest.mark.usefixtures("nan_memory")
def test_block_sizes(paged_attention, kernel_device: str, block_size: int, lens) -> None:
    query_lens, kv_lens, tokens, seqs = lens
    options = {"block_size": block_size, "max_len": 200, "device": kernel_device}
    check(paged_attention, make_batch(query_lens, kv_lens, tokens=tokens, seqs=seqs, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
@pytest.mark.usefixtures("nan_memory")
def test_half_precision(
    paged_attention, implementation_or_cpu: str, kernel_device: str, dtype: torch.dtype, lens
) -> None:
    if (implementation_or_cpu, kernel_device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    query_lens, kv_lens, tokens, seqs = lens
    batch = make_batch(query_lens, kv_lens, tokens=tokens, seqs=seqs, head_dim=64, dtype=dtype, device=kernel_device)
    check(paged_attention, batch)


def test_queries_may_be_strided(paged_attention, kernel_device: str) -> None:
    for query_lens, kv_lens in (([1, 1], [30, 5]), ([9, 1], [30, 5])):
        batch = make_batch(query_lens, kv_lens, device=kernel_device)
        expected = run(paged_attention, batch)
        batch.q = batch.q.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(run(paged_attention, batch), expected)


EXTRAS = {  # what models ask of attention beyond causality
    "plain": {},
    "window 1": {"window": 1},
    "window 5": {"window": 5},
    "window 64": {"window": 64},
    "window beyond every length": {"window": 10_000},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"with_sinks": True},
    "all": {"window": 21, "soft_cap": 3.0, "with_sinks": True},
    "all, window 1": {"window": 1, "soft_cap": 0.5, "with_sinks": True},
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
@pytest.mark.usefixtures("nan_memory")
def test_windows_soft_caps_and_sinks(paged_attention, kernel_device: str, lens, extras) -> None:
    """What no query of a sequence sees is poisoned too, table entries included."""
    query_lens, kv_lens, tokens, seqs = lens
    shape = {"q_heads": 6, "max_len": 200, "device": kernel_device}
    check(paged_attention, make_batch(query_lens, kv_lens, tokens=tokens, seqs=seqs, **shape, block_size=4, **extras))


@pytest.mark.parametrize("extras", [{}, {"window": 200}, EXTRAS["all"]], ids=["plain", "window", "all"])
@pytest.mark.parametrize("spare", [1, 3, 8, 32])
@pytest.mark.usefixtures("nan_memory")
def test_decode_in_splits(kernel_device: str, spare: int, extras) -> None:
    """Also where sequences have fewer tiles of keys than there may be splits, and for padding sequences."""
    shape = {"tokens": 6, "seqs": 6, "q_heads": 6, "device": kernel_device}
    batch = make_batch([1, 1, 1, 1], [700, 1, 129, 512], **shape, **extras)
    check(paged_attention_triton, batch, plan=split(batch, spare))


@pytest.mark.parametrize("window", [1, 100, 130, 400])
def test_windows_cross_tiles(paged_attention, kernel_device: str, window: int) -> None:
    """Several tiles of rows and of keys: whole ones, those that the window cuts and those that causality cuts."""
    options = {"tokens": 160, "seqs": 3, "device": kernel_device, "window": window}
    check(paged_attention, make_batch([150, 3], [500, 259], **options))


@pytest.mark.parametrize("sink", [-float("inf"), -1e4, 300.0, 1e4])
def test_sinks_far_from_every_score(paged_attention, kernel_device: str, sink: float) -> None:
    for query_lens, kv_lens in (([1, 1], [30, 5]), ([9, 1], [30, 5])):
        batch = make_batch(query_lens, kv_lens, seqs=3, tokens=sum(query_lens) + 1, device=kernel_device)
        batch.options["sinks"] = torch.full((4,), sink, device=kernel_device)
        check(paged_attention, batch)


def test_scores_far_beyond_the_soft_cap(paged_attention, kernel_device: str) -> None:
    for query_lens, kv_lens in (([1, 1], [30, 5]), ([9, 1], [30, 5])):
        batch = make_batch(query_lens, kv_lens, device=kernel_device, soft_cap=2.0)
        batch.q *= 1e4
        check(paged_attention, batch)


@pytest.mark.usefixtures("nan_memory")
def test_splits_by_default(kernel_device: str) -> None:
    check(paged_attention_triton, make_batch([1, 1], [1030, 3], max_len=1100, head_dim=64, device=kernel_device))


def test_long_contexts_and_many_rows_cross_tiles_and_chunks(paged_attention, kernel_device: str) -> None:
    check(paged_attention, make_batch([150, 3], [500, 259], tokens=160, seqs=3, device=kernel_device))


@pytest.mark.parametrize("extras", [EXTRAS["plain"], EXTRAS["all"]], ids=["plain", "all extras"])
def test_reference_in_chunks(monkeypatch: pytest.MonkeyPatch, extras) -> None:
    """The loop over query blocks and heads gives the same with any limit on its memory, down to one head a turn."""
    for query_lens, kv_lens in (([1] * 5, [3, 90, 41, 17, 64]), ([6, 1, 9], [60, 2, 33])):
        batch = make_batch(query_lens, kv_lens, q_heads=12, kv_heads=3, **extras)
        for limit in (1, 2 * 4 * 96 * 32, 5 * 4 * 96 * 32, 1 << 30):
            monkeypatch.setattr("graphmode.ops.attention.paged_reference._CHUNK_BYTES", limit)
            check(paged_attention_reference, batch)


@pytest.mark.parametrize("extras", [EXTRAS["plain"], EXTRAS["all"]], ids=["plain", "all extras"])
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
def test_padding_does_not_matter(paged_attention, kernel_device: str, lens, extras) -> None:
    """Bitwise: whatever padding queries, unseen slots and unused table entries hold."""
    query_lens, kv_lens, tokens, seqs = lens
    shape = {"head_dim": 64, "max_len": 150, "device": kernel_device}
    batch = make_batch(query_lens, kv_lens, tokens=tokens, seqs=seqs, **shape, **extras)
    expected = run(paged_attention, batch)
    assert not expected.isnan().any()
    for value, entry in ((0.0, 0), (1e30, -1), (float("inf"), -(2**31)), (-7.0, 1)):
        assert torch.equal(run(paged_attention, batch.with_unused(value, entry)), expected)


@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
def test_same_bits_every_time(paged_attention, kernel_device: str, lens) -> None:
    query_lens, kv_lens, tokens, seqs = lens
    batch = make_batch(query_lens, kv_lens, tokens=tokens, seqs=seqs, max_len=600, device=kernel_device)
    expected = run(paged_attention, batch)
    for _ in range(3 if kernel_device == "cuda" else 1):
        assert torch.equal(run(paged_attention, batch), expected)


def test_all_padding(paged_attention, kernel_device: str) -> None:
    for tokens, seqs in ((4, 4), (9, 4)):
        batch = make_batch([], [], tokens=tokens, seqs=seqs, device=kernel_device)
        output = run(paged_attention, batch)
        assert torch.equal(output, torch.zeros_like(output))


def test_follows_the_lengths_in_the_buffers(paged_attention, kernel_device: str) -> None:
    """As at replay: same tensors, new contents."""
    options = {"tokens": 12, "seqs": 4, "max_len": 96, "device": kernel_device}
    buffers = make_batch([9, 3], [90, 3], **options)
    for seed, (query_lens, kv_lens) in enumerate([([1, 2, 3], [7, 96, 3]), ([12], [12]), ([1, 1, 1, 1], [1, 2, 3, 4])]):
        batch = make_batch(query_lens, kv_lens, **options, seed=seed)
        buffers.query_lens = batch.query_lens
        buffers.k_cache, buffers.v_cache = batch.k_cache, batch.v_cache  # sized by the lengths here
        for name in ("q", "block_tables", "cu_query_lens", "kv_lens"):
            getattr(buffers, name).copy_(getattr(batch, name))
        check(paged_attention, buffers)


@st.composite
def ragged(draw: st.DrawFn, max_seqs: int, max_query_len: int, max_context: int) -> PoisonedBatch:
    query_lens = draw(st.lists(st.integers(1, max_query_len), min_size=1, max_size=max_seqs))
    kv_lens = [n + draw(st.integers(0, max_context)) for n in query_lens]
    kv_heads = draw(st.sampled_from([1, 2]))
    return make_batch(
        query_lens,
        kv_lens,
        tokens=sum(query_lens) + draw(st.integers(0, 9)),
        seqs=len(query_lens) + draw(st.integers(0, 3)),
        q_heads=kv_heads * draw(st.integers(1, 8)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([32, 48])),
        block_size=draw(st.sampled_from([1, 2, 4, 16, 32])),
        seed=draw(st.integers(0, 99)),
        window=draw(st.none() | st.integers(1, max_query_len + max_context)),
        soft_cap=draw(st.none() | st.sampled_from([0.5, 4.0])),
        with_sinks=draw(st.booleans()),
    )


@given(ragged(max_seqs=6, max_query_len=24, max_context=90))
def test_reference_on_any_lengths(batch: PoisonedBatch) -> None:
    check(paged_attention_reference, batch)


@given(ragged(max_seqs=4, max_query_len=12, max_context=50))
def test_triton_on_any_lengths(batch: PoisonedBatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for held in (vars(batch), batch.options):
        held.update({name: value.to(device) for name, value in held.items() if isinstance(value, torch.Tensor)})
    check(paged_attention_triton, batch)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    st.integers(0, 10),
    st.sampled_from([1, 2, 3, 8, 64]),
)
def test_every_real_token_has_a_row_of_its_own(query_lens: list[int], padding: int, block_q: int) -> None:
    cu_query_lens = torch.tensor([0, *query_lens]).cumsum(0)
    tokens, seqs = sum(query_lens) + padding, len(query_lens)
    num_blocks = tokens // block_q + seqs
    blocks = _find_blocks(cu_query_lens, torch.tensor(query_lens), tokens, block_q, num_blocks)
    real = tokens - padding
    rows = blocks.row_of_token[:real]
    assert rows.unique().numel() == real
    assert torch.equal(blocks.token.view(-1)[rows], torch.arange(real))
    of_seq = torch.arange(seqs).repeat_interleave(torch.tensor(query_lens))
    assert torch.equal(blocks.seq.repeat_interleave(block_q)[rows], of_seq)
    assert blocks.real_token.sum() == real


def test_query_blocks_are_chosen_by_cost() -> None:
    # One block for each sequence.
    assert _choose_blocks(tokens=32, seqs=8, group=2, max_query_len=4, window=None, max_len=64) == (4, 8)
    assert _choose_blocks(tokens=512, seqs=1, group=2, max_query_len=512, window=None, max_len=512) == (512, 1)
    assert _choose_blocks(tokens=256, seqs=16, group=2, max_query_len=256, window=None, max_len=256) == (8, 48)
    # A window makes large blocks dear: they gather more keys.
    assert _choose_blocks(tokens=512, seqs=1, group=2, max_query_len=512, window=64, max_len=512) == (16, 33)


def test_keys_of_a_query_block_are_those_its_window_can_see() -> None:
    assert _num_keys(block_q=1, window=None, max_len=512) == 512
    assert _num_keys(block_q=1, window=8, max_len=512) == 8
    assert _num_keys(block_q=4, window=8, max_len=512) == 11
    assert _num_keys(block_q=4, window=510, max_len=512) == 512


@pytest.mark.parametrize("max_query_len", [1, 4])
def test_reference_reads_nothing_on_the_host(max_query_len: int) -> None:
    q, k_cache, v_cache, batch, *_ = make_batch([1, 1], [30, 5]).inputs()
    tensors = [tensor.to("meta") for tensor in (q, k_cache, v_cache)]
    batch = PagedBatch(*(tensor.to("meta") for tensor in batch[:3]), max_query_len)
    scoring = Scoring(1.0, window=3, soft_cap=1.0, sinks=torch.zeros(4, device="meta"))
    assert paged_attention_reference(*tensors, batch, scoring).shape == q.shape


def test_public_function_takes_the_operator_on_cpu() -> None:
    for batch in (make_batch([1, 1], [30, 5]), make_batch([4, 1], [30, 5], tokens=8, **EXTRAS["all"])):
        assert torch.equal(run(public_paged_attention, batch), run(paged_attention_cpu, batch))


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [2, 1, 70]])
def test_on_a_cpu_room_for_longer_sequences_costs_nothing(query_lens: list[int], monkeypatch) -> None:
    """The operator's largest tensor follows the lengths that are there, and so does what it computes."""
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            largest[-1] = max([largest[-1], *(each.numel() for each in tree_leaves(result) if not is_view_of(each))])
            return result

    def is_view_of(tensor: torch.Tensor) -> bool:
        return tensor._is_view()

    for max_len in (128, 8192):
        batch = make_batch(query_lens, [90, 33, 80], max_len=max_len)
        out = torch.empty(*batch.q.shape)
        paged = batch.paged._replace(max_query_len=max(query_lens))
        arguments = (batch.q, batch.k_cache, batch.v_cache, *paged, *batch.scoring, None, out)
        call = torch.ops.graphmode.attend_on_cpu.default.bind(*arguments)
        largest.append(0)
        with Sizes():
            call()
    assert largest[0] == largest[1]


@pytest.mark.parametrize("lens", [[3000, 5, 4000], [0, 9000]])
def test_threads_change_nothing_on_a_cpu(lens: list[int]) -> None:
    batch = make_batch([1] * len(lens), lens, max_len=9008)
    threads = torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(run(paged_attention_cpu, batch))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.zeros(4, 64), r"q has shape \[4, 64\], expected \[any, any, any\]"),
        ("q", torch.zeros(4, 4, 16, dtype=torch.float64), "q is torch.float64, expected torch.float32 or"),
        ("q", torch.zeros(4, 3, 16), "q_heads is 3, expected a multiple of kv_heads, 2"),
        ("q", torch.zeros(5, 4, 16), "tokens is 5, expected 4, one for each sequence of a decode batch"),
        ("k_cache", torch.zeros(3, 8, 2, 32), r"k_cache has shape .*, expected \[any, any, any, 16\]"),
        ("v_cache", torch.zeros(3, 8, 1, 16), r"v_cache has shape .*, expected \[3, 8, 2, any\]"),
        ("v_cache", torch.zeros(3, 8, 2, 16, dtype=torch.float16), "v_cache is torch.float16, expected torch.float32"),
        ("v_cache", torch.zeros(3, 2, 8, 16).transpose(1, 2), "v_cache has strides .*, expected a contiguous tensor"),
        ("block_tables", torch.zeros(4, 2, dtype=torch.int64), "block_tables is torch.int64, expected torch.int32"),
        ("block_tables", torch.zeros(2, 4, dtype=torch.int32).T, r"block_tables.stride\(1\) is 4, expected 1"),
        ("cu_query_lens", torch.zeros(4, dtype=torch.int32), r"cu_query_lens has shape \[4\], expected \[5\]"),
        ("kv_lens", torch.zeros(5, dtype=torch.int32), r"kv_lens has shape \[5\], expected \[4\]"),
        ("kv_lens", torch.zeros(4, dtype=torch.int32, device="meta"), "kv_lens is on meta, expected cpu"),
        ("max_query_len", 0, "max_query_len is 0, expected 1 or more"),
        ("window", 0, "window is 0, expected 1 or more"),
        ("soft_cap", 0.0, r"soft_cap is 0\.0, expected more than 0"),
        ("sinks", torch.zeros(2), r"sinks has shape \[2\], expected \[4\]"),
        ("sinks", torch.zeros(4, dtype=torch.float64), "sinks is torch.float64, expected torch.float32 or"),
        ("sinks", torch.zeros(8)[::2], r"sinks.stride\(0\) is 2, expected 1"),
    ],
)
def test_refuses_what_does_not_fit(name: str, value: object, message: str) -> None:
    arguments = {
        "q": torch.zeros(4, 4, 16),
        "k_cache": torch.zeros(3, 8, 2, 16),
        "v_cache": torch.zeros(3, 8, 2, 16),
        "block_tables": torch.zeros(4, 2, dtype=torch.int32),
        "cu_query_lens": torch.zeros(5, dtype=torch.int32),
        "kv_lens": torch.zeros(4, dtype=torch.int32),
        "max_query_len": 1,
        "scale": 1.0,
        name: value,
    }
    batch = PagedBatch(**{field: arguments[field] for field in PagedBatch._fields})
    scoring = Scoring(**{field: arguments[field] for field in Scoring._fields if field in arguments})
    with pytest.raises(ValueError, match=message):
        public_paged_attention(arguments["q"], arguments["k_cache"], arguments["v_cache"], batch, scoring)


def realistic(query_lens: list[int], tokens: int, seqs: int, seed: int, extras: dict) -> PoisonedBatch:
    random = torch.Generator().manual_seed(seed)
    kv_lens = [n + int(torch.randint(0, 4096 - n + 1, (1,), generator=random)) for n in query_lens]
    options = {"q_heads": 16, "kv_heads": 8, "head_dim": 128, "max_len": 4096, "dtype": torch.bfloat16}
    return make_batch(query_lens, kv_lens, tokens=tokens, seqs=seqs, **options, **extras, device="cuda", seed=seed)


REALISTIC = {
    "64 decoding": ([1] * 64, 64, 64),
    "50 decoding in 64": ([1] * 50, 64, 64),
    "1 decoding": ([1], 1, 1),
    "mixed": ([1] * 40 + [300, 77, 1000, 5], 2048, 64),
    "prefill": ([2048], 2048, 1),
    "few tokens": ([3, 1, 1], 8, 8),
}
REALISTIC_EXTRAS = {
    "plain": {},
    "window": {"window": 1024},
    "all": {"window": 100, "soft_cap": 30.0, "with_sinks": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("extras", REALISTIC_EXTRAS.values(), ids=REALISTIC_EXTRAS)
@pytest.mark.parametrize("lens", REALISTIC.values(), ids=REALISTIC)
def test_realistic_sizes_on_a_gpu(lens, extras) -> None:
    query_lens, tokens, seqs = lens
    batch = realistic(query_lens, tokens, seqs, 1, extras)
    output = run(public_paged_attention, batch)
    expected = attend_one_by_one(batch, torch.float32)
    real = batch.num_real_tokens
    torch.testing.assert_close(output[:real].float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(output[real:], torch.zeros_like(output[real:]))


@pytest.mark.gpu
@pytest.mark.parametrize("extras", REALISTIC_EXTRAS.values(), ids=REALISTIC_EXTRAS)
@pytest.mark.parametrize("lens", REALISTIC.values(), ids=REALISTIC)
def test_replay_follows_new_lengths_on_a_gpu(lens, extras) -> None:
    """Captured with one batch's lengths, replayed with others': bitwise the eager result."""
    query_lens, tokens, seqs = lens
    first, second = (realistic(query_lens, tokens, seqs, seed, extras) for seed in (1, 2))
    second.options = first.options
    blocks = max(first.k_cache.shape[0], second.k_cache.shape[0])
    for batch in (first, second):
        more = blocks - batch.k_cache.shape[0]
        batch.k_cache = torch.nn.functional.pad(batch.k_cache, (0, 0, 0, 0, 0, 0, 0, more))
        batch.v_cache = torch.nn.functional.pad(batch.v_cache, (0, 0, 0, 0, 0, 0, 0, more))
    expected = run(public_paged_attention, second)
    run(public_paged_attention, first)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(public_paged_attention, first)
    for name in ("q", "k_cache", "v_cache", "block_tables", "cu_query_lens", "kv_lens"):
        getattr(first, name).copy_(getattr(second, name))
    for _ in range(3):
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(output, expected)


REALISTIC_SIZES = {  # query heads, and what else make_batch takes
    "GLM-4.7-Flash": {"q_heads": 20, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "values_in_keys": True},
    "DeepSeek-V3": {"q_heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "values_in_keys": True},
    "expanded latents": {"q_heads": 16, "kv_heads": 16, "head_dim": 192, "value_dim": 128},
    "Gemma 4": {"q_heads": 8, "kv_heads": 2, "head_dim": 512},
}


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [None, 512], ids=["all keys", "512 keys"])
@pytest.mark.parametrize("sizes", REALISTIC_SIZES.values(), ids=REALISTIC_SIZES)
@pytest.mark.parametrize("lens", REALISTIC.values(), ids=REALISTIC)
def test_realistic_keys_and_values_of_different_size_on_a_gpu(lens, sizes, top_k) -> None:
    query_lens, tokens, seqs = lens
    random = torch.Generator().manual_seed(0)
    kv_lens = [n + int(torch.randint(0, 1500, (), generator=random)) for n in query_lens]
    batch = make_batch(
        query_lens,
        kv_lens,
        tokens=tokens,
        seqs=seqs,
        max_len=4096,
        dtype=torch.bfloat16,
        device="cuda",
        top_k=top_k,
        **sizes,
    )
    output = run(public_paged_attention, batch)
    expected = attend_one_by_one(batch, torch.float32)
    real = batch.num_real_tokens
    torch.testing.assert_close(output[:real].float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(output[real:], torch.zeros_like(output[real:]))
