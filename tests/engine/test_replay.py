"""A replayed step is bitwise the eager one of its bucket; padding and unowned memory play no part in it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from graphmode.engine.config import EngineOptions
from graphmode.engine.core import EngineCore
from graphmode.engine.llm import LLM
from graphmode.engine.sampler import SamplingLevel
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.sequence import Sequence
from graphmode.engine.step_inputs import StepInputs, step_inputs
from graphmode.engine.types import Batch, ScheduledSequence
from graphmode.engine.worker import StepRunner
from graphmode.graph import GraphKey, GraphRunner, Input
from graphmode.graph.trees import map_leaves

SEQS, TOKENS = 6, 32
BUCKETS = {"decode": [1, 2, 4, 6], "mixed": [1, 2, 4, 8, 16, 32]}
BLOCKS_A_SEQ = 8
LEVEL = SamplingLevel.VOCABULARY


class Harness:
    """An engine whose step returns logits beside tokens, and batches made by hand.

    Args:
        folder: the model's.
        device: where it runs.
        query_len: tokens of each sequence in a decode step.
        padding: what inputs hold beyond true sizes, where it is not what is declared.
    """

    def __init__(
        self, folder: Path, device: str, query_len: int = 1, padding: Mapping[str, int] = MappingProxyType({})
    ):
        options = EngineOptions(
            device=device, dtype="float32", max_num_seqs=SEQS, max_num_batched_tokens=TOKENS, max_model_len=128
        )
        self.engine = EngineCore(folder, options)
        self.query_len = query_len
        limits = replace(self.engine.limits, decode_query_len=query_len, decode_steps=1)
        backend = self.engine.runner.graphs.backend
        self.runner = runner = StepRunner(self.engine.loaded, self.engine.caches, backend, limits, None)
        sampler = runner.sampler
        sampler.admit(Batch("decode", (), 0), LEVEL)

        def fn(family: Any, step: StepInputs) -> Any:
            rows, scored = len(step.logits_indices), len(step.scored_indices)
            tokens = runner.forward(family, LEVEL, step)
            of_scored = slice(limits.max_logits, limits.max_logits + scored)
            made = [each[part] for each in (sampler.logits, sampler.reports) for part in (slice(rows), of_scored)]
            return tokens, *(each.clone() for each in made)

        self.graphs = GraphRunner(
            fn,
            {
                "step": map_leaves(
                    runner.inputs, Input, lambda spec: replace(spec, padding=padding.get(spec.name, spec.padding))
                )
            },
            {"decode": [query_len * size for size in BUCKETS["decode"]], "mixed": BUCKETS["mixed"]},
            axes={
                "seqs": lambda tokens: min(tokens, SEQS),
                "logits": lambda tokens: min(tokens, limits.max_logits),
                "scored": lambda tokens: min(tokens, SEQS),
                "new_blocks": runner.tables.room,
            },
            output_axes=[("logits",), *[("logits", None), ("scored", None)] * 2],
            backend=device,
            strict=True,
        )
        self.graphs.capture()
        self.generator = torch.Generator().manual_seed(0)

    @property
    def memory(self) -> torch.Tensor:
        """All of the KV cache: [layers, 2, blocks, 16, heads, dim]."""
        return torch.stack([torch.stack([each.keys, each.values]) for each in self.engine.caches])

    def start(self, batch: Batch) -> StepInputs:
        """Write the sequences' sampling parameters and histories; return the step's tensors."""
        self.runner.sampler.admit(batch, LEVEL)
        return step_inputs(batch, self.runner.tables)

    def random(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def batch(self, family: str, num_tokens: int) -> Batch:
        """A batch of ``num_tokens`` over sequences with random histories, in blocks of their own, canaries between."""
        if family == "decode":
            lengths = [self.query_len] * (num_tokens // self.query_len)
        else:
            count = self.random(1, min(SEQS, num_tokens) + 1)
            cuts = sorted(self.random(0, num_tokens - count + 1) for _ in range(count - 1))
            ends = zip([0, *cuts], [*cuts, num_tokens - count], strict=True)
            lengths = [after - before + 1 for before, after in ends]
        rows = []
        for index, length in enumerate(lengths):
            start = self.random(0, 40)
            tokens = torch.randint(0, 199, (start + length,), generator=self.generator).tolist()
            params = SamplingParams(
                temperature=0.0 if index % 2 else 0.8,
                top_k=index,
                top_p=1 - index / 10,
                repetition_penalty=1 + index % 3 / 4,
                frequency_penalty=index % 2 / 3,
                logit_bias={index: -1.5} if index % 2 else {},
                min_tokens=index % 4,
                stop_token_ids=[int(token) for token in range(index)],
                logprobs=index,
                prompt_logprobs=2 * index,
            )
            sequence = Sequence(str(index), tokens, params, seed=self.random(0, 9999))
            sequence.state_index = SEQS - index
            sequence.num_computed = start
            needed = -(-(start + length) // 16)
            sequence.block_tables = [[1 + index * (BLOCKS_A_SEQ - 1) + block for block in range(needed)]]
            scored = range(start, start + 1) if index % 2 else range(0)
            sequence.token_ids.append(7)  # the successor of the last, where that is scored
            sequence.prompt_token_ids.append(7)
            samples = min((0, 1, self.query_len)[index % 3], length)
            rows.append(ScheduledSequence(sequence, start, length, samples, scored))
        return Batch(family, tuple(rows), num_tokens, tuple(row.sequence for row in rows))  # type: ignore[arg-type]

    def fill_cache(self, batch: Batch) -> None:
        """History for the batch's sequences; everything that no sequence has reached yet holds NaN."""
        for each in self.engine.caches:
            for part in (each.keys, each.values):
                part.fill_(float("nan"))
                flat = part.flatten(0, 1)
                for row in batch.scheduled:
                    for at in range(row.start):
                        slot = row.sequence.block_tables[0][at // 16] * 16 + at % 16
                        flat[slot] = torch.randn(flat[slot].shape, generator=self.generator).to(flat.device)


def sizes(query_len: int) -> list[tuple[str, int]]:
    """Families, and tokens at and beside their buckets; of decode steps those of whole sequences."""
    cases = []
    for family, buckets in BUCKETS.items():
        for below, bucket in zip([0, *buckets], buckets, strict=False):
            unit = query_len if family == "decode" else 1
            cases += [(family, unit * size) for size in {below + 1, max(bucket - 1, 1), bucket} if below < size]
    return sorted(set(cases))


QUERY_LENS = [1, 2, 5]


@pytest.fixture(scope="module")
def harnesses(tiny: Path) -> Callable[[str, int], Harness]:
    return cache(lambda device, query_len: Harness(tiny, device, query_len))


@pytest.fixture(params=QUERY_LENS)
def harness(device: str, harnesses: Callable[[str, int], Harness], request: pytest.FixtureRequest) -> Harness:
    return harnesses(device, request.param)


def owned_slots(batch: Batch) -> set[int]:
    """The slots that the batch's new tokens go to."""
    return {
        row.sequence.block_tables[0][at // 16] * 16 + at % 16
        for row in batch.scheduled
        for at in range(row.start, row.start + row.num_tokens)
    }


def test_real_rows_are_bitwise_eager_and_nothing_else_is_written(harness: Harness) -> None:
    for family, size in sizes(harness.query_len) * (3 if harness.query_len == 1 else 1):
        batch = harness.batch(family, size)
        harness.fill_cache(batch)
        before = harness.memory
        step = harness.start(batch)
        key = harness.graphs.decide(size, family).key
        assert key is not None
        replayed = harness.graphs(family=family, own=True, step=step)
        after = harness.memory
        for cache_, old in zip(harness.engine.caches, before, strict=True):
            cache_.keys.copy_(old[0])
            cache_.values.copy_(old[1])
        eager = harness.graphs.run_eagerly(key, step=harness.start(batch))
        assert torch.isfinite(replayed[1]).all()
        assert all(torch.equal(one, other) for one, other in zip(replayed, eager, strict=True))
        assert torch.equal(after.view(torch.int32), harness.memory.view(torch.int32))
        changed = (after.view(torch.int32) != before.view(torch.int32)).flatten(2, 3).any(-1).any(-1)
        written = {int(slot) for slot in changed.any(0).any(0).nonzero().flatten()}
        assert written == owned_slots(batch), "a slot that is no new token's was written, or one was not"


def test_a_decode_step_samples_what_a_mixed_step_of_the_same_tokens_samples(harness: Harness) -> None:
    """Each row of logits by its own position, and the rest of the batch, and its padding, change no token."""
    for seqs in range(1, SEQS + 1):
        batch = harness.batch("decode", seqs * harness.query_len)
        for at, row in enumerate(batch.scheduled):
            row.samples, row.scored = 1 + at % harness.query_len, range(0)
        harness.fill_cache(batch)
        of_family = {}
        for family in ("decode", "mixed"):
            same = replace(batch, family=family)
            tokens, logits, *_ = harness.graphs(family=family, own=True, step=harness.start(same))
            rows = [
                row
                for its, part in zip(same.logits, same.scheduled, strict=True)
                for row in its[len(its) - part.samples :]
            ]
            of_family[family] = tokens[rows].tolist(), logits[rows]
        assert of_family["decode"][0] == of_family["mixed"][0]
        torch.testing.assert_close(of_family["decode"][1], of_family["mixed"][1], rtol=1e-4, atol=1e-4)


GARBAGE = {
    "token_ids": 198,
    "token_sources": SEQS,
    "positions": 127,
    "end_lens": 99,
    "new_blocks": 2**31 - 1,
    "logits_indices": 0,
    "scored_tokens": 198,
    "scored_state_indices": SEQS,
}


@pytest.mark.parametrize("query_len", QUERY_LENS)
def test_garbage_in_padding_changes_no_real_row(
    device: str, harnesses: Callable[[str, int], Harness], tiny: Path, query_len: int
) -> None:
    """All that padding may hold, NaN included; its slot -1, length 0 and state index 0 alone make it harmless."""
    clean, dirty = harnesses(device, query_len), Harness(tiny, device, query_len, GARBAGE)
    for family, size in sizes(query_len):
        batch = clean.batch(family, size)
        clean.fill_cache(batch)
        for cache_, source in zip(dirty.engine.caches, clean.engine.caches, strict=True):
            cache_.keys.copy_(source.keys)
            cache_.values.copy_(source.values)
        history, dirty_history = (each.runner.sampler.history for each in (clean, dirty))
        dirty_history.copy_(history)
        made, dirty_made = (each.graphs(family=family, own=True, step=each.start(batch)) for each in (clean, dirty))
        assert all(torch.equal(one, other) for one, other in zip(made, dirty_made, strict=True))
        assert torch.equal(history, dirty_history)
        assert torch.equal(clean.memory.view(torch.int32), dirty.memory.view(torch.int32))


def test_200_interleaved_replays_stay_right(device: str, harnesses: Callable[[str, int], Harness]) -> None:
    harness = harnesses(device, 1)
    cases = sizes(1)
    for number in range(200):
        family, size = cases[(number * 7) % len(cases)]
        batch = harness.batch(family, size)
        harness.fill_cache(batch)
        outputs = harness.graphs(family=family, own=True, step=harness.start(batch))
        key = harness.graphs.decide(size, family).key
        assert isinstance(key, GraphKey)
        eager = harness.graphs.run_eagerly(key, step=harness.start(batch))
        assert all(torch.equal(one, other) for one, other in zip(outputs, eager, strict=True))
    assert harness.graphs.stats.hit_rate == 1.0


@pytest.mark.parametrize("fuse", ["none", "layers"])
def test_capture_on_a_cpu_costs_no_more_for_longer_sequences(fuse: str) -> None:
    """What a capture holds follows the tokens of a step, not the length that a sequence may come to have."""
    sizes = {"graph_sizes": [16], "max_num_seqs": 4, "max_num_batched_tokens": 16, "device": "cpu"}
    stats = [LLM(max_model_len=length, fuse=fuse, **sizes).stats for length in (64, 1024)]
    for name in ("graph_bytes", "capture_peak_bytes"):
        short, long = (getattr(each, name) for each in stats)
        assert 0 < long <= 1.01 * short, name


@pytest.mark.parametrize("query_len", QUERY_LENS)
def test_a_launched_step_gives_each_sequence_its_tokens_and_their_log_probabilities(
    device: str, harnesses: Callable[[str, int], Harness], query_len: int
) -> None:
    harness = harnesses(device, query_len)
    limits = replace(harness.engine.limits, decode_query_len=query_len, decode_steps=1)
    backend, buckets = harness.runner.graphs.backend, {"decode": (4,), "mixed": (TOKENS,)}
    runner = StepRunner(harness.engine.loaded, harness.engine.caches, backend, limits, buckets, strict=True)
    batch = harness.batch("decode", 3 * query_len)
    for at, row in enumerate(batch.scheduled):
        row.samples, row.scored = 1 + at % query_len, range(0)
    results = []
    for family in ("decode", "mixed"):
        harness.generator.manual_seed(0)
        harness.fill_cache(batch)
        result = runner.launch(replace(batch, family=family)).result()
        assert [len(tokens) for tokens in result.tokens] == [row.samples for row in batch.scheduled]
        assert result.logprobs is not None
        for tokens, logprobs in zip(result.tokens, result.logprobs, strict=True):
            assert all(token in chosen for token, chosen in zip(tokens, logprobs, strict=True))
        results.append(result.tokens)
    assert results[0] == results[1]
    assert runner.graphs.stats.replays == 2
