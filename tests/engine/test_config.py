import pytest
import torch

from graphmode.engine.config import EngineOptions, resolve_buckets, resolve_limits
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.scheduler import Limits
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


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"max_tokens": 0},
        {"seed": 2**63},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"n": 0},
        {"stop": [""]},
    ],
)
def test_sampling_parameters_out_of_range_are_refused(params: dict) -> None:
    with pytest.raises(InputError):
        SamplingParams(**params)
