from dataclasses import fields
from enum import Enum

import numpy as np
import pytest
import torch

from graphmode.engine.config import EngineOptions, resolve_buckets, resolve_limits
from graphmode.engine.types import Limits
from graphmode.graph import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, ["int8", "float32"]),
        ({"graph_mode": "half"}, ["half", "piecewise"]),
        ({"enforce_eager": True, "graph_mode": "full"}, ["enforce_eager", "full"]),
        ({"enforce_eager": True, "graph_sizes": [1]}, ["graph_sizes", "off"]),
        ({"graph_sizes": [1], "max_graph_tokens": 2}, ["graph_sizes", "max_graph_tokens"]),
        ({"max_padding_ratio": 1.5}, ["1.5", "0 to 1"]),
        ({"max_num_seqs": 0}, ["max_num_seqs", "0"]),
        ({"load_format": "pickle"}, ["pickle"]),
        ({"fuse": True}, ["True", "layers", "compile"]),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        EngineOptions(**options)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "options",
    [
        {"device": None},
        {"device": 5},
        {"device": ""},
        {"dtype": torch.float64},
        {"dtype": None},
        {"dtype": 16},
        {"enforce_eager": "no"},
        {"enable_graph": 1},
        {"enable_prefix_caching": "false"},
        {"strict": 1},
        {"graph_mode": ["full"]},
        {"graph_mode": ""},
        {"graph_sizes": 7},
        {"graph_sizes": ["a"]},
        {"graph_sizes": "1,2"},
        {"graph_sizes": [1.0]},
        {"graph_sizes": [True]},
        {"graph_sizes": [0]},
        {"graph_sizes": []},
        {"graph_sizes": {1: 2}},
        {"max_padding_ratio": float("nan")},
        {"max_padding_ratio": "0.5"},
        {"max_padding_ratio": True},
        {"max_num_seqs": "2"},
        {"max_num_seqs": True},
        {"max_num_seqs": 2.0},
        {"max_num_batched_tokens": float("inf")},
        {"max_model_len": -1},
        {"max_graph_tokens": [8]},
        {"kv_cache_memory": 1.5e9},
        {"memory_share": float("nan")},
        {"memory_share": "0.5"},
        {"memory_share": 1.5},
        {"decode_steps": 0},
        {"seed": 1.9},
        {"warmup_iterations": 0},
        {"warmup_iterations": None},
        {"on_capture_failure": "print"},
    ],
)
def test_values_of_another_type_or_size_are_refused_with_what_is_allowed(options: dict) -> None:
    [(name, value)] = options.items()
    with pytest.raises(InputError, match=r"is .*; it must be ") as error:
        EngineOptions(**options)
    assert name in str(error.value)
    shown = value[0] if isinstance(value, list) and name == "graph_sizes" and value else value
    assert repr(shown).removeprefix("torch.") in str(error.value)


def test_numbers_of_numpy_and_sizes_in_any_order_are_taken() -> None:
    options = EngineOptions(max_num_seqs=np.int64(4), max_padding_ratio=np.float32(0.5), graph_sizes=range(3, 0, -1))
    assert (options.max_num_seqs, options.max_padding_ratio, options.graph_sizes) == (4, 0.5, (1, 2, 3))
    assert type(options.max_num_seqs) is int


@pytest.mark.parametrize("name", [each.name for each in fields(EngineOptions) if each.default is None])
def test_none_leaves_the_choice_to_the_engine(name: str) -> None:
    assert EngineOptions(**{name: None}) == EngineOptions()


def test_none_is_taken_where_others_take_it() -> None:
    assert EngineOptions(seed=None, enable_prefix_caching=None) == EngineOptions()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("half", "float16"),
        ("float", "float32"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("auto", "auto"),
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16"),
        (torch.float32, "float32"),
    ],
)
def test_a_dtype_may_be_called_as_elsewhere(dtype: object, name: str) -> None:
    assert EngineOptions(dtype=dtype).dtype == name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, "full"),
        ({"enable_graph": True}, "full"),
        ({"enable_graph": False}, "none"),
        ({"enable_aclgraph": False}, "none"),
        ({"enable_aclgraph": True, "graph_mode": "piecewise"}, "piecewise"),
        ({"enforce_eager": True}, "none"),
        ({"enforce_eager": False}, "full"),
        ({"enforce_eager": None}, "full"),
        ({"enforce_eager": True, "enable_graph": False}, "none"),
        ({"enforce_eager": False, "enable_graph": True}, "full"),
        ({"enforce_eager": False, "graph_mode": "none"}, "none"),
        ({"enforce_eager": True, "graph_mode": "none"}, "none"),
    ],
)
def test_graphs_are_on_or_off_by_any_name(given: dict, mode: str) -> None:
    assert EngineOptions(**given).resolved_graph_mode == mode


@pytest.mark.parametrize(
    "given",
    [
        {"enable_graph": True, "enforce_eager": True},
        {"enable_graph": False, "enforce_eager": False},
        {"enable_graph": False, "graph_mode": "full"},
        {"enable_graph": True, "graph_mode": "none"},
        {"enable_graph": True, "compilation_config": {"cudagraph_mode": "NONE"}},
        {"enable_aclgraph": True, "enable_graph": False},
        {"enforce_eager": True, "compilation_config": {"cudagraph_mode": "FULL"}},
        {"graph_sizes": [1], "cudagraph_capture_sizes": [2]},
        {"kv_cache_memory": 1, "kv_cache_memory_bytes": 2},
        {"memory_share": 0.5, "gpu_memory_utilization": 0.6},
        {"graph_mode": "full", "cudagraph_mode": "PIECEWISE"},
    ],
)
def test_names_that_contradict_each_other_are_refused(given: dict) -> None:
    with pytest.raises(InputError, match="contradict"):
        EngineOptions(**given)


class CudaGraphMode(Enum):
    """As an enum of vLLM's, whose values are its own."""

    FULL_DECODE_ONLY = (2, 0)


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"kv_cache_memory_bytes": 1 << 30}, {"kv_cache_memory": 1 << 30}),
        ({"gpu_memory_utilization": 0.5}, {"memory_share": 0.5}),
        ({"max_memory_utilization": 0.5, "devices": "cpu"}, {"memory_share": 0.5, "device": "cpu"}),
        ({"cudagraph_capture_sizes": [4, 1]}, {"graph_sizes": [1, 4]}),
        ({"compilation_config": None}, {}),
        ({"compilation_config": {}}, {}),
        ({"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}, {"graph_mode": "full_and_piecewise"}),
        ({"compilation_config": {"cudagraph_mode": "NONE"}}, {"graph_mode": "none"}),
        (
            {"compilation_config": {"cudagraph_mode": CudaGraphMode.FULL_DECODE_ONLY, "mode": 0}},
            {"graph_mode": "full_decode_only"},
        ),
        ({"compilation_config": {"cudagraph_capture_sizes": [1, 8]}}, {"graph_sizes": [1, 8]}),
        ({"compilation_config": {"max_cudagraph_capture_size": 64}}, {"max_graph_tokens": 64}),
        ({"compilation_config": {"cudagraph_num_of_warmups": 2}}, {"warmup_iterations": 2}),
        ({"compilation_config": {"use_cudagraph": False}}, {"enable_graph": False}),
        ({"max_seqs_per_batch": 4, "max_tokens_per_batch": 64}, {"max_num_seqs": 4, "max_num_batched_tokens": 64}),
        # What asks for nothing.
        ({"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "enable_chunked_prefill": True}, {}),
        ({"quantization": None, "speculative_config": None, "enable_lora": False, "kv_cache_dtype": "auto"}, {}),
        ({"swap_space": 0, "cpu_offload_gb": 0.0, "disable_log_stats": True}, {}),
    ],
)
def test_names_from_elsewhere_mean_ours(given: dict, ours: dict) -> None:
    assert EngineOptions(**given) == EngineOptions(**ours)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quantization": "awq"}, ["quantization='awq'", "to come", "bfloat16"]),
        ({"quantization": "fp8"}, ["quantization='fp8'", "to come"]),
        ({"tensor_parallel_size": 2}, ["tensor_parallel_size=2", "one device"]),
        ({"pipeline_parallel_size": 4}, ["pipeline_parallel_size=4", "one device"]),
        ({"speculative_config": {"num_speculative_tokens": 3}}, ["speculative_config", "no speculative decoding"]),
        ({"enable_lora": True}, ["enable_lora=True", "merge the adapter"]),
        ({"enable_chunked_prefill": False}, ["enable_chunked_prefill=False", "max_num_batched_tokens"]),
        ({"max_seq_len_to_capture": 8192}, ["max_seq_len_to_capture=8192", "every length"]),
        ({"optimization_level": 3}, ["optimization_level=3", "compile"]),
        ({"compilation_config": {"level": 3}}, ["level=3", "compile"]),
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype='fp8'"]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name_with_what_to_do(given: dict, words: list[str]) -> None:
    with pytest.raises(InputError, match=r"cannot be honoured: \w") as error:
        EngineOptions(**given)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"compilation_config": 3}, ["compilation_config is 3", "cudagraph_mode", "fuse='compile'"]),
        ({"compilation_config": {"cudagraph_mode": "SOME"}}, ["'SOME'", "PIECEWISE"]),
        ({"compilation_config": {"cudagraph_modes": "FULL"}}, ["cudagraph_modes", "did you mean cudagraph_mode?"]),
        ({"max_seqs": 3}, ["LLM has no max_seqs", "did you mean max_num_seqs?", "device, dtype"]),
        ({"quantisation": "awq"}, ["did you mean quantization?"]),
        ({"colour": "blue"}, ["LLM has no colour; it has device"]),
    ],
)
def test_other_values_and_names_are_refused(given: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        EngineOptions(**given)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_model_len": 2000}, ["2000", "1024"]),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, ["32", "64"]),
        ({"max_model_len": 1}, ["1", "2"]),
    ],
)
def test_limits_that_contradict_are_refused(options: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        resolve_limits(EngineOptions(**options), 1024, CPU)
    assert all(word in str(error.value) for word in words)


def test_every_step_that_a_scheduler_can_make_has_a_bucket() -> None:
    for seqs, tokens in ((1, 1), (3, 3), (7, 100), (32, 256), (256, 2048)):
        buckets = resolve_buckets(EngineOptions(), Limits(seqs, tokens, 1024))
        assert buckets["decode"][-1] == seqs
        assert buckets["mixed"][-1] == tokens


def test_a_lower_threshold_holds_for_both_families() -> None:
    limits = Limits(32, 256, 1024)
    buckets = resolve_buckets(EngineOptions(max_graph_tokens=20), limits)
    assert buckets["decode"][-1] == buckets["mixed"][-1] == 20
    assert resolve_buckets(EngineOptions(graph_sizes=[4, 2]), limits) == {"decode": (2, 4), "mixed": (2, 4)}
    with pytest.raises(InputError, match="257"):
        resolve_buckets(EngineOptions(graph_sizes=[257]), limits)
