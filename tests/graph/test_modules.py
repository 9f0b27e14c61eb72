"""Modules and callables as people pass them: proven against ``run_eagerly`` and the unpadded call, state included."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from graphmode.graph import GraphRunner, Input

F32 = torch.float32
X = Input("x", F32, ("n", 8))
Case = tuple[Callable[..., Any], Any, Any, dict[str, Any]]


def attention(device: str) -> Case:
    """The module itself, by the names of its ``forward``; it returns weights too."""
    inputs = [Input(name, F32, ("n", 6, 8)) for name in ("query", "key", "value")]
    x = torch.randn(3, 6, 8)
    return (
        nn.MultiheadAttention(8, 2, batch_first=True).to(device).eval(),
        inputs,
        [4],
        dict.fromkeys(("query", "key", "value"), x),
    )


def sequences(device: str) -> Case:
    """An encoder and a decoder with masks, batch and both lengths bucketed."""
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).to(device).eval()
    model.encoder.enable_nested_tensor = model.encoder.use_nested_tensor = False

    def run(source: torch.Tensor, target: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        return model(source, target, tgt_mask=causal, tgt_is_causal=True, **masks)  # else it reads the mask to find out

    inputs = [
        Input("source", F32, ("n", "s", 8)),
        Input("target", F32, ("n", "t", 8)),
        Input("padding", torch.bool, ("n", "s"), padding=True),
    ]
    values = {"source": torch.randn(3, 5, 8), "target": torch.randn(3, 2, 8), "padding": torch.zeros(3, 5).bool()}
    return run, inputs, {"n": [4], "s": [8], "t": [4]}, values


def lstm(device: str) -> Case:
    """Hidden and cell state, a tuple of carried inputs."""
    model = nn.LSTM(8, 5, num_layers=2, batch_first=True).to(device)

    def step(x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out, after = model(x, tuple(each.contiguous() for each in state))
        for kept, new in zip(state, after, strict=True):
            kept.copy_(new)
        return out

    state = tuple(Input(name, F32, (2, "n", 5), carried=True) for name in ("hidden", "cell"))
    return step, {"x": Input("x", F32, ("n", 3, 8)), "state": state}, [1, 4], {"x": torch.randn(3, 3, 8)}


def streaming_convolution(device: str) -> Case:
    """The last frames of the chunk before, carried."""
    model = nn.Conv1d(4, 6, 5).to(device)

    def step(x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([past, x], 2)
        past.copy_(whole[:, :, -4:])
        return model(whole)

    inputs = [Input("x", F32, ("n", 4, 8)), Input("past", F32, ("n", 4, 4), carried=True)]
    return step, inputs, [1, 4], {"x": torch.randn(3, 4, 8)}


def cached_keys(device: str) -> Case:
    """Attention of one token to all before it, in a carried cache with a position for each row."""
    model = nn.MultiheadAttention(8, 2, batch_first=True).to(device).eval()

    def step(x: torch.Tensor, cache: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        cache[torch.arange(len(x), device=x.device), position] = x
        later = torch.arange(cache.shape[1], device=x.device) > position[:, None]
        out = model(x[:, None], cache, cache, key_padding_mask=later, need_weights=False)[0][:, 0]
        position.add_(1)
        return out

    cache = Input("cache", F32, ("n", 16, 8), carried=True)
    return step, [X, cache, Input("position", torch.int64, ("n",), carried=True)], [1, 4], {"x": torch.randn(3, 8)}


def batch_norm_in_evaluation(device: str) -> Case:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(device).eval()
    return model, [Input("input", F32, ("n", 3, 6, 6))], [4], {"input": torch.randn(3, 3, 6, 6)}


def dropout_in_training(device: str) -> Case:
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5)).to(device).train()
    return model, [Input("input", F32, ("n", 8))], [4], {"input": torch.randn(3, 8)}


def hooked(device: str) -> Case:
    model = nn.Linear(8, 4).to(device)
    model.register_forward_hook(lambda _, __, out: out * 2)
    return model, [Input("input", F32, ("n", 8))], [4], {"input": torch.randn(3, 8)}


def product(x: torch.Tensor, weight: torch.Tensor, *, scale: float) -> torch.Tensor:
    return (x @ weight * scale).T


def part_of_a_function(device: str) -> Case:
    """And its output has the bucketed axis last."""
    return partial(product, weight=torch.randn(8, 3, device=device), scale=2.0), [X], [4], {"x": torch.randn(3, 8)}


def bound_method(device: str) -> Case:
    return nn.Linear(8, 4).to(device).forward, [Input("input", F32, ("n", 8))], [4], {"input": torch.randn(3, 8)}


def numbers_of_eight_bits(device: str) -> Case:
    kinds = {"small": torch.int8, "flag": torch.bool, "wide": torch.float64, "eighth": torch.float8_e4m3fn}
    inputs = [Input(name, dtype, ("n", 8)) for name, dtype in kinds.items()]

    def mix(small: torch.Tensor, flag: torch.Tensor, wide: torch.Tensor, eighth: torch.Tensor) -> torch.Tensor:
        return torch.where(flag, small.double() * wide, eighth.to(F32).double())

    return mix, inputs, [4], {name: (3 * torch.randn(3, 8)).to(dtype) for name, dtype in kinds.items()}


CASES = [
    attention,
    sequences,
    lstm,
    streaming_convolution,
    cached_keys,
    batch_norm_in_evaluation,
    dropout_in_training,
    hooked,
    part_of_a_function,
    bound_method,
    numbers_of_eight_bits,
]


@pytest.mark.parametrize("case", CASES)
def test_it_is_proven(case: Callable[[str], Case], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fn, inputs, buckets, values = case(device)
    runner = GraphRunner(fn, inputs, buckets, backend=device, strict=True)
    for _ in range(2):
        found = runner.verify(**values)
        assert found.replay.passed, found
        assert found.unpadded.passed is not False, found
        assert set(found.padding.inputs) <= {"padding"}, "only a mask is known by the value of its padding"
        runner(**values)  # moves what is carried on
    assert runner.stats.hit_rate == 1
