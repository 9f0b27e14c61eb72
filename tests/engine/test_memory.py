"""Memory is counted before it is taken: defaults follow the machine, what cannot fit is refused with the numbers."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode import LLM
from graphmode.cache.allocate import make_cache
from graphmode.cache.specs import CacheGroup, CacheShape, group_layers
from graphmode.engine.config import EngineOptions, resolve_buckets
from graphmode.engine.memory import (
    CacheMemory,
    buffers_needed,
    cache_memory,
    check_buffers,
    fit_cache,
)
from graphmode.engine.types import Limits
from graphmode.graph import InputError
from graphmode.graph.buckets import powers_of_two

GIB = 1 << 30
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GROUP = CacheGroup("full", (0,), torch.float32, 16, 1600)
LIMITS = Limits(max_num_seqs=32, max_num_batched_tokens=256, max_model_len=1024)


@pytest.mark.parametrize(
    ("options", "lowered"),
    [
        ({"max_num_seqs": 10**9}, "max_num_seqs"),
        ({"max_num_batched_tokens": 10**9}, "max_num_batched_tokens"),
        ({"max_model_len": 10**12}, "max_model_len"),
        ({"decode_steps": 10**9}, "decode_steps"),
        ({"max_num_seqs": 10**6, "max_model_len": 10**6}, "max_num_seqs|max_model_len"),
    ],
)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
def test_absurd_limits_are_refused_with_what_they_need(options: dict, lowered: str, device: torch.device) -> None:
    with pytest.raises(InputError, match=rf"Lower ({lowered})$") as error:
        check_buffers(replace(LIMITS, **options), device, 80 * GIB, 100 * GIB, block_sizes=[16], hidden_size=4096)
    needed, there = re.search(r"need ([0-9.]+ [TPG]iB).*where ([0-9.]+ GiB) are free", str(error.value)).groups()
    assert there in ("80.0 GiB", "100.0 GiB")
    assert needed != there
    assert all(str(value) in str(error.value) for value in options.values())


@given(
    st.integers(1, 10**10),
    st.integers(1, 10**10),
    st.integers(2, 10**10),
    st.integers(1, 10**10),
    st.integers(0, 2**50),
    st.booleans(),
)
def test_limits_pass_where_their_buffers_fit_and_nowhere_else(
    seqs: int, tokens: int, length: int, steps: int, free: int, on_cpu: bool
) -> None:
    limits = Limits(seqs, tokens, length, steps)
    device, host = buffers_needed(limits, block_sizes=[16]).total(on_host=on_cpu)
    try:
        taken = check_buffers(limits, CPU if on_cpu else CUDA, free, free, block_sizes=[16])
    except InputError:
        assert max(device, host) > free
    else:
        assert taken == device <= free
        assert host <= free


def test_what_is_counted_is_what_an_engine_allocates(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", graph_sizes=[32], max_num_seqs=32, max_num_batched_tokens=32)
    runner, needed = llm.engine.core.runner, buffers_needed(llm.engine.core.limits, block_sizes=[16])
    assert runner.graphs._buffers.arena.nbytes == pytest.approx(needed.device["a step's inputs"], rel=0.2, abs=4096)
    assert runner._log.nbytes == needed.device["sampled tokens"]
    assert runner.sampler._on_device.nbytes == needed.device["sampling parameters"]
    assert runner.tables.tables.nbytes + runner.tables.step_tables.nbytes == needed.device["block tables"]
    assert runner._results.nbytes * 3 <= needed.host["results"]


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 10**9, "max_num_batched_tokens": 10**9},
        {"max_num_batched_tokens": 10**12},
        {"decode_steps": 10**11},
        {"max_model_len": 10**14},
        {"graph_sizes": [10**9]},
        {"max_graph_tokens": 10**9},
        {"max_num_seqs": 10**9},
    ],
)
def test_an_engine_refuses_absurd_limits_before_it_loads_a_model(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphmode.engine.core.load_model", lambda *args, **kwargs: pytest.fail("it loads the model"))
    with pytest.raises(InputError, match=r"Lower|lower"):
        LLM(device="cpu", **options)


def test_the_cache_takes_its_share_less_weights_and_room() -> None:
    gpu = cache_memory(CUDA, free=64 * GIB, weights=16 * GIB, buffers=GIB, share=None, given=None)
    assert gpu.nbytes == pytest.approx(0.9 * 80 * GIB - 16 * GIB - 4 * GIB, abs=16)
    half = cache_memory(CUDA, free=64 * GIB, weights=16 * GIB, buffers=6 * GIB, share=0.5, given=None)
    assert half.nbytes == 40 * GIB - 16 * GIB - 6 * GIB
    cpu = cache_memory(CPU, free=10 * GIB, weights=0, buffers=0, share=None, given=None)
    assert cpu.nbytes == pytest.approx(0.65 * 10 * GIB, abs=16)
    assert cache_memory(CPU, 10 * GIB, 0, 0, None, given=GIB).nbytes == GIB


def test_memory_that_is_not_there_is_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match=r"kv_cache_memory is 2147483648 \(2\.0 GiB\); 1\.0 GiB are free on cpu"):
        cache_memory(CPU, GIB, 0, 0, None, given=2 * GIB)
    with pytest.raises(InputError, match=r"memory_share=0\.2 of 10\.0 GiB on cuda, less 8\.0 GiB of weights"):
        cache_memory(CUDA, 2 * GIB, 8 * GIB, 0, 0.2, given=None)


def test_a_length_that_the_user_gave_and_that_cannot_fit_is_refused_with_the_largest_that_would() -> None:
    memory = CacheMemory(10 * 1600, "the test's")
    with pytest.raises(InputError, match=r"1024 tokens needs 100\.0 KiB .*15\.6 KiB.*max_model_len=160 would fit"):
        fit_cache(LIMITS, memory, [GROUP], lower=False)
    limits, blocks = fit_cache(replace(LIMITS, max_model_len=160), memory, [GROUP], lower=False)
    assert (limits.max_model_len, blocks) == (160, (10,))
    with pytest.raises(InputError, match="not even one block"):
        fit_cache(LIMITS, CacheMemory(1599, "the test's"), [GROUP], lower=True)


@given(st.integers(1, 10**7), st.integers(2, 10**6), st.integers(1, 5000))
def test_lowered_lengths_fit_and_others_stay(nbytes: int, length: int, block: int) -> None:
    limits = replace(LIMITS, max_model_len=length)
    try:
        lowered, (blocks,) = fit_cache(limits, CacheMemory(nbytes, ""), [replace(GROUP, block_bytes=block)], lower=True)
    except InputError:
        assert nbytes < block
        return
    assert blocks * block <= nbytes
    assert 16 * blocks >= lowered.max_model_len
    assert lowered.max_model_len == length or lowered.max_model_len == 16 * (nbytes // block) < length
    assert blocks <= -(-length // 16) * limits.max_num_seqs


def test_an_engine_lowers_its_length_and_says_so_once(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    block = 16 * 2 * 2 * 32 * 4  # tokens, layers, heads, key and value, float32
    options = {"device": "cpu", "kv_cache_memory": 3 * block, "enforce_eager": True, "dtype": "float32"}
    with caplog.at_level(logging.WARNING):
        llm = LLM(tiny, **options)
    assert llm.engine.core.limits.max_model_len == 48
    [said] = [record.getMessage() for record in caplog.records if "max_model_len" in record.getMessage()]
    assert "lowered to 48" in said
    assert "KV cache" in said
    with pytest.raises(InputError, match="max_model_len=48 would fit"):
        LLM(tiny, **options, max_model_len=64)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the kernel does not tell resident memory")
def test_a_large_cache_takes_no_memory_of_the_host_before_it_is_used() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    shapes = [CacheShape(4, 128, 128)] * 4
    before = resident()
    caches = make_cache(group_layers(shapes, torch.float32, 16), shapes, [2048], CPU)
    assert sum(cache.keys.nbytes + cache.values.nbytes for cache in caches) == GIB // 2
    assert resident() - before < 32 << 20
    assert not any(cache.keys[::512].any() or cache.values[::512].any() for cache in caches)
    caches[0].keys[:8].fill_(1)
    assert resident() - before < 64 << 20


def test_a_cpu_has_few_buckets_and_all_steps_fit_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphmode.engine.config.powers_of_two", powers_of_two)  # tests have fewer
    buckets = resolve_buckets(EngineOptions(), LIMITS, few=True)
    assert buckets == {"decode": (1, 2, 4, 8, 16, 32), "mixed": (1, 2, 4, 8, 16, 32, 64, 128, 256)}
    assert resolve_buckets(EngineOptions(max_graph_tokens=20), LIMITS, few=True)["mixed"] == (1, 2, 4, 8, 16, 20)
