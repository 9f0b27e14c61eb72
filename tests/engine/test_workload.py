"""Hundreds of requests that come, go and are aborted, in a cache too small for them: each gets what it gets alone."""

import random
from functools import cache
from pathlib import Path

import pytest

from graphmode.engine.config import EngineOptions
from graphmode.engine.engine import Engine
from graphmode.engine.outputs import RequestOutput
from graphmode.engine.requests import Request
from graphmode.engine.sampler import SamplingLevel
from graphmode.engine.sampling_params import SamplingParams

BLOCK = (
    2 * 2 * 16 * 2 * 16 * 4
)  # bytes of a block of the tiny model: keys and values, layers, tokens, heads, dim, float32


def make_requests(rng: random.Random, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that often begin alike, greedy and sampled, short and long."""
    stems = [[rng.randrange(199) for _ in range(60)] for _ in range(4)]
    requests = []
    for number in range(count):
        stem = stems[rng.randrange(4)][: rng.randrange(50)]
        prompt = stem + [rng.randrange(199) for _ in range(rng.randrange(1, 12))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_k=rng.choice([0, 0, 0, 1, 20]),
            top_p=rng.choice([1.0, 1.0, 0.8]),
            min_p=rng.choice([0.0, 0.0, 0.1]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.8]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]),
            logit_bias=rng.choice([{}, {}, {}, {number % 199: 3.0, 5: -100.0}]),
            seed=number,
            max_tokens=(max_tokens := rng.randrange(1, 40)),
            min_tokens=rng.choice([0, 0, 0, max_tokens // 2]),
            logprobs=rng.choice([None, None, None, 0, 3]),
            prompt_logprobs=rng.choice([None, None, None, None, 2]),
            allowed_token_ids=range(number % 3, 199, 3) if number % 11 == 0 else None,
            stop_token_ids=[rng.randrange(199) for _ in range(rng.choice([0, 0, 5]))],
        )
        requests.append((prompt, params))
    return requests


def engine(folder: Path, device: str, **options: object) -> Engine:
    common = {"device": device, "dtype": "float32", "max_num_seqs": 6, "max_num_batched_tokens": 24}
    return Engine(folder, EngineOptions(**common, **options))


def run_alone(engine: Engine, prompt: list[int], params: SamplingParams) -> RequestOutput:
    engine.submit(Request(prompt, params, stream=False))
    outputs: list[RequestOutput] = []
    while engine.has_requests:
        outputs += engine.step()
    (output,) = outputs
    return output


@cache
def alone(folder: Path, device: str, count: int) -> list[RequestOutput]:
    """Each request by itself."""
    one = engine(folder, device, graph_mode="full", enable_prefix_caching=False, decode_steps=1)
    return [run_alone(one, prompt, params) for prompt, params in make_requests(random.Random(5), count)]


@pytest.mark.parametrize("count", [60, pytest.param(240, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mode", "decode_steps"), [("full", 1), ("full", 5), ("none", 3)])
def test_each_request_gets_what_it_gets_alone(
    tiny: Path, device: str, mode: str, decode_steps: int, count: int
) -> None:
    rng = random.Random(5)
    requests = make_requests(rng, count)
    busy = engine(tiny, device, graph_mode=mode, kv_cache_memory=11 * BLOCK, decode_steps=decode_steps)
    submitted: list[str] = []
    outputs: dict[str, RequestOutput] = {}
    while len(submitted) < count or busy.has_requests:
        for prompt, params in requests[len(submitted) : len(submitted) + rng.choice([0, 0, 1, 4])]:
            submitted.append(busy.submit(Request(prompt, params, stream=False)))
        if submitted and rng.random() < 0.05:
            busy.abort(rng.choice(submitted))
        for output in busy.step():
            assert output.finished
            assert output.request_id not in outputs
            outputs[output.request_id] = output
    stats = busy.core.stats
    if mode == "full":
        assert stats.replays == stats.steps
        # Graphs of more than plain sampling are captured when a size first needs one.
        keys = [key for key in busy.core.runner.graphs.keys if dict(key.variant)["level"] > SamplingLevel.PLAIN]
        assert stats.misses.keys() == {"not_captured_yet"}
        assert stats.misses["not_captured_yet"] <= len(keys)
    assert stats.preemptions > 0
    assert sum(output.num_cached_tokens > 0 for output in outputs.values()) > count / 10
    assert sum(output.outputs[0].finish_reason == "abort" for output in outputs.values()) > count / 50
    assert busy.core.scheduler.blocks.num_free == (11,)

    for request_id, (prompt, params), expected in zip(submitted, requests, alone(tiny, device, count), strict=True):
        output, (answer,), (whole,) = outputs[request_id], outputs[request_id].outputs, expected.outputs
        if answer.finish_reason == "abort":
            assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
            continue
        assert answer.token_ids == whole.token_ids
        assert answer.finish_reason == whole.finish_reason
        assert (answer.logprobs is None) == (params.logprobs is None)
        assert (output.prompt_logprobs is None) == (params.prompt_logprobs is None)
        assert len(answer.logprobs or answer.token_ids) == len(answer.token_ids)
        assert len(output.prompt_logprobs or prompt) == len(prompt)
        for one, other in ((answer.logprobs, whole.logprobs), (output.prompt_logprobs, expected.prompt_logprobs)):
            for here, there in zip(one or [], other or [], strict=True):
                assert (here or {}).keys() == (there or {}).keys()
                assert all(abs(here[token].logprob - there[token].logprob) < 1e-4 for token in here or {})
