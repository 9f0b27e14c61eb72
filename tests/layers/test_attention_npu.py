"""The NPU's attention over a fake of its operator: lengths, padding, and what it leaves to the reference."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.cache.specs import LayerCache
from graphmode.layers.attention import AttentionBatch, cached_attention
from graphmode.layers.attention_npu import NPU_ATTENTION, host_lengths, npu_attention
from graphmode.ops import Scoring
from tests.devices.fake_npu_attention import NAME

MAX_LEN, BLOCK, HEADS, KV_HEADS, DIM = 256, NPU_ATTENTION.block_size, 4, 2, 16


@st.composite
def steps(draw: st.DrawFn) -> tuple[str, int, dict[str, int], dict[str, torch.Tensor]]:
    """A step of either family, the queries of a sequence in a decode step, and the sizes of a graph that holds it."""
    family, length = draw(st.sampled_from(["decode", "mixed"])), draw(st.sampled_from([1, 2, 5]))
    lengths = st.just(length) if family == "decode" else st.integers(1, 40)
    queries = draw(st.lists(lengths, min_size=1, max_size=8))
    keys = [each + draw(st.integers(0, MAX_LEN - each)) for each in queries]
    tokens = sum(queries) + draw(st.integers(0, 20)) * (length if family == "decode" else 1)
    # A decode graph holds whole sequences, whatever the axis says.
    seqs = tokens if family == "decode" else len(queries) + draw(st.integers(0, tokens - len(queries)))
    values = {"query_lens": torch.tensor(queries, dtype=torch.int32), "kv_lens": torch.tensor(keys, dtype=torch.int32)}
    return family, length, {"tokens": tokens, "seqs": seqs}, values


@given(steps())
def test_lengths_are_those_of_the_step_and_every_token_has_a_sequence(step: Any) -> None:
    family, length, sizes, values = step
    lengths = host_lengths(MAX_LEN, length, family, sizes, values)
    seqs = sizes["tokens"] // length if family == "decode" else sizes["seqs"]
    ends, keys = lengths["actual_seq_lengths"], lengths["actual_seq_lengths_kv"]
    real = len(values["kv_lens"])
    assert ends[:real] == values["query_lens"].cumsum(0).tolist()
    assert keys[:real] == values["kv_lens"].tolist()
    assert ends[-1] == sizes["tokens"]
    assert all(low <= high for low, high in pairwise(ends))
    assert not any(keys[real:])
    assert len(ends) == len(keys) == seqs + (family != "decode")
    if family == "decode":
        assert ends == list(range(length, sizes["tokens"] + 1, length)), "padding must be whole sequences"


@given(steps())
def test_a_graph_is_captured_with_as_many_lengths_as_long_as_they_can_be(step: Any) -> None:
    family, length, sizes, values = step
    at_capture, now = (host_lengths(MAX_LEN, length, family, sizes, given) for given in ({}, values))
    for name in now:
        assert len(at_capture[name]) == len(now[name])
    assert max(now["actual_seq_lengths_kv"]) <= max(at_capture["actual_seq_lengths_kv"]) == MAX_LEN
    assert at_capture["actual_seq_lengths"][-1] == sizes["tokens"]
    longest = max(high - low for low, high in pairwise([0, *at_capture["actual_seq_lengths"]]))
    assert longest == (length if family == "decode" else min(sizes["tokens"], MAX_LEN))


def batch_of(family: str, length: int, sizes: dict[str, int], values: dict[str, torch.Tensor]) -> AttentionBatch:
    tokens, real = sizes["tokens"], len(values["kv_lens"])
    seqs = tokens // length if family == "decode" else sizes["seqs"]
    pad = torch.zeros(seqs - real, dtype=torch.int32)
    queries = torch.cat([values["query_lens"], pad + length if family == "decode" else pad])
    keys = torch.cat([values["kv_lens"], pad])
    tables = torch.arange(seqs * 2, dtype=torch.int32).view(seqs, 2)
    slots = torch.full((tokens,), -1)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), queries.cumsum(0, dtype=torch.int32)])
    for row in range(real):
        for index in range(int(queries[row])):
            at = int(keys[row] - queries[row]) + index
            slots[int(starts[row]) + index] = int(tables[row, at // BLOCK]) * BLOCK + at % BLOCK
    return AttentionBatch(
        slot_mapping=(slots,),
        block_tables=(tables,),
        cu_query_lens=starts,
        kv_lens=keys,
        max_query_len=length if family == "decode" else tokens,
        caches=[],
        host_arguments=host_lengths(MAX_LEN, length, family, sizes, values),
    )


def run(attend: Any, batch: AttentionBatch, dtype: torch.dtype, **asked: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, seqs = len(batch.slot_mapping[0]), len(batch.kv_lens)
    memory = torch.randn(2, seqs * 2, BLOCK, KV_HEADS, DIM, generator=generator).to(dtype)
    query = torch.randn(tokens, HEADS, DIM, generator=generator).to(dtype)
    key, value = torch.randn(2, tokens, KV_HEADS, DIM, generator=generator).to(dtype)
    output = attend(query, key, value, LayerCache(memory[0], memory[1]), batch, Scoring(0.25, **asked), None)
    # Rows of padding may hold anything.
    real = int((batch.slot_mapping[0] >= 0).sum())
    return output[:real], memory


@given(steps())
def test_it_attends_and_writes_as_the_reference_does(step: Any) -> None:
    batch = batch_of(*step)
    output, memory = run(npu_attention, batch, torch.bfloat16)
    expected, written = run(cached_attention, batch, torch.bfloat16)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(memory, written)


@pytest.mark.parametrize(
    ("dtype", "asked"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"window": 3}),
        (torch.bfloat16, {"soft_cap": 5.0}),
        (torch.bfloat16, {"sinks": torch.zeros(HEADS)}),
    ],
)
def test_what_the_operator_is_not_known_to_do_takes_the_reference(
    dtype: torch.dtype, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.ops.npu, NAME)
    lens = torch.tensor([2, 3], dtype=torch.int32)
    batch = batch_of("mixed", 1, {"tokens": 6, "seqs": 3}, {"query_lens": lens, "kv_lens": lens})
    output, _ = run(npu_attention, batch, dtype, **asked)
    assert torch.equal(output, run(cached_attention, batch, dtype, **asked)[0])
