"""Hundreds of requests that come, go and are aborted, in a cache too small for them: each gets what it gets alone."""

import random
from functools import cache
from pathlib import Path

import pytest

from graphmode.engine.config import EngineOptions
from graphmode.engine.engine import Engine
from graphmode.engine.sampler import SamplingLevel
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.sequence import Sequence

REQUESTS = 240
BLOCK = (
    2 * 2 * 16 * 2 * 16 * 4
)  # bytes of a block of the tiny model: keys and values, layers, tokens, heads, dim, float32


def make_requests(rng: random.Random) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that often begin alike, greedy and sampled, short and long."""
    stems = [[rng.randrange(199) for _ in range(60)] for _ in range(4)]
    requests = []
    for number in range(REQUESTS):
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


def run_alone(engine: Engine, prompt: list[int], params: SamplingParams) -> Sequence:
    (sequence,) = engine.add(prompt, params)
    while sequence.finish_reason is None:
        engine.step()
    return sequence


@cache
def alone(folder: Path, device: str) -> list[Sequence]:
    """Each request by itself."""
    one = engine(folder, device, graph_mode="full", enable_prefix_caching=False, decode_steps=1)
    return [run_alone(one, prompt, params) for prompt, params in make_requests(random.Random(5))]


@pytest.mark.parametrize(("mode", "decode_steps"), [("full", 1), ("full", 5), ("none", 3)])
def test_each_request_gets_what_it_gets_alone(tiny: Path, device: str, mode: str, decode_steps: int) -> None:
    rng = random.Random(5)
    requests = make_requests(rng)
    busy = engine(tiny, device, graph_mode=mode, kv_cache_memory=11 * BLOCK, decode_steps=decode_steps)
    sequences: list[Sequence] = []
    aborted: set[int] = set()
    while len(sequences) < REQUESTS or busy.scheduler.has_work:
        for prompt, params in requests[len(sequences) : len(sequences) + rng.choice([0, 0, 1, 4])]:
            sequences += busy.add(prompt, params)
        if sequences and rng.random() < 0.05:
            victim = rng.choice(sequences)
            if victim.finish_reason is None:
                busy.scheduler.abort(victim)
                aborted.add(victim.request_id)
        busy.step()
    stats = busy.stats
    if mode == "full":
        assert stats.replays == stats.steps
        # Graphs of more than plain sampling are captured when a size first needs one.
        keys = [key for key in busy.runner.graphs.keys if dict(key.variant)["level"] > SamplingLevel.PLAIN]
        assert stats.misses.keys() == {"not_captured_yet"}
        assert stats.misses["not_captured_yet"] <= len(keys)
    assert stats.preemptions > 0
    assert sum(sequence.num_cached > 0 for sequence in sequences) > REQUESTS / 10
    assert len(aborted) > 5
    assert busy.scheduler.pool.num_free == 11

    for sequence, (prompt, params), expected in zip(sequences, requests, alone(tiny, device), strict=True):
        if sequence.request_id in aborted:
            made = sequence.output_token_ids
            assert made == expected.output_token_ids[: len(made)]
        else:
            assert sequence.output_token_ids == expected.output_token_ids
            assert sequence.finish_reason == expected.finish_reason
            assert len(sequence.logprobs) == (0 if params.logprobs is None else len(sequence.output_token_ids))
            assert len(sequence.prompt_logprobs) == (0 if params.prompt_logprobs is None else len(prompt) - 1)
            for one, other in (
                (sequence.logprobs, expected.logprobs),
                (sequence.prompt_logprobs, expected.prompt_logprobs),
            ):
                for here, there in zip(one, other, strict=True):
                    assert here.keys() == there.keys()
                    assert all(abs(here[token][0] - there[token][0]) < 1e-4 for token in here)
