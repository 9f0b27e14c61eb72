"""A replayed step is bitwise the eager one of its bucket; padding and unowned memory play no part in it."""

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from graphmode.engine.config import EngineOptions
from graphmode.engine.engine import Engine
from graphmode.engine.llm import LLM
from graphmode.engine.sampler import SamplingLevel
from graphmode.engine.sampling_params import SamplingParams
from graphmode.engine.sequence import Sequence
from graphmode.engine.step_inputs import INPUTS, step_inputs
from graphmode.engine.types import Batch, ScheduledSequence
from graphmode.graph import GraphKey, GraphRunner, Input

SEQS, TOKENS = 6, 24
BUCKETS = {"decode": [1, 2, 4, 6], "mixed": [1, 2, 4, 8, 16, 24]}
BLOCKS_A_SEQ = 8


class Harness:
    """An engine whose step returns logits beside tokens, and batches made by hand."""

    def __init__(self, folder: Path, device: str, inputs: tuple[Input, ...] = INPUTS) -> None:
        options = EngineOptions(device=device, dtype="float32", max_num_seqs=SEQS, max_num_batched_tokens=TOKENS)
        self.engine = Engine(folder, options)
        step = self.engine.runner
        step.sampler.admit(Batch("decode", (), 0), SamplingLevel.SCORED)
        reports = step.sampler.reports

        def fn(family: str, **inputs: torch.Tensor) -> Any:
            tokens = step.forward(family=family, level=SamplingLevel.SCORED, **inputs)
            read = {name: inputs[name] for name in signature(step.logits).parameters if name in inputs}
            logits = step.logits(family=family, **read)
            scored = len(inputs["scored_rows"])
            return tokens, logits, reports[: len(tokens)].clone(), reports[SEQS : SEQS + scored].clone()

        self.graphs = GraphRunner(
            fn,
            inputs,
            BUCKETS,
            axes={
                "seqs": lambda tokens: min(tokens, SEQS),
                "scored": lambda tokens: min(tokens, SEQS),
                "blocks": BLOCKS_A_SEQ,
            },
            output_axes=[("seqs",), ("seqs", None), ("seqs", None), ("scored", None)],
            backend=device,
            strict=True,
        )
        self.graphs.capture()
        self.generator = torch.Generator().manual_seed(0)

    @property
    def memory(self) -> torch.Tensor:
        """All of the KV cache: [layers, 2, blocks, 16, heads, dim]."""
        return torch.stack([torch.stack([cache.keys, cache.values]) for cache in self.engine.caches])

    def start(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Write the sequences' sampling parameters and histories; return the step's inputs."""
        self.engine.runner.sampler.admit(batch, SamplingLevel.SCORED)
        return step_inputs(batch, BLOCKS_A_SEQ)

    def random(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def batch(self, family: str, num_tokens: int) -> Batch:
        """A batch of ``num_tokens`` over sequences with random histories, in blocks of their own, canaries between."""
        count = num_tokens if family == "decode" else self.random(1, min(SEQS, num_tokens) + 1)
        cuts = sorted(self.random(0, num_tokens - count + 1) for _ in range(count - 1))
        lengths = [after - before + 1 for before, after in zip([0, *cuts], [*cuts, num_tokens - count], strict=True)]
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
            sequence.slot = SEQS - index
            sequence.num_computed = start
            needed = -(-(start + length) // 16)
            sequence.block_tables = [[1 + index * (BLOCKS_A_SEQ - 1) + block for block in range(needed)]]
            scored = range(start, start + 1) if index % 2 else range(0)
            sequence.token_ids.append(7)  # the successor of the last, where that is scored
            sequence.prompt_token_ids.append(7)
            rows.append(ScheduledSequence(sequence, start, length, samples=bool(index % 3), scored=scored))
        return Batch(family, tuple(rows), num_tokens, tuple(row.sequence for row in rows))  # type: ignore[arg-type]

    def fill_cache(self, batch: Batch) -> None:
        """History for the batch's sequences; everything that no sequence has reached yet holds NaN."""
        for cache in self.engine.caches:
            for part in (cache.keys, cache.values):
                part.fill_(float("nan"))
                flat = part.flatten(0, 1)
                for row in batch.rows:
                    for at in range(row.start):
                        slot = row.sequence.block_tables[0][at // 16] * 16 + at % 16
                        flat[slot] = torch.randn(flat[slot].shape, generator=self.generator).to(flat.device)


def sizes() -> list[tuple[str, int]]:
    cases = []
    for family, buckets in BUCKETS.items():
        for below, bucket in zip([0, *buckets], buckets, strict=False):
            cases += [(family, size) for size in {below + 1, max(bucket - 1, 1), bucket} if below < size]
    return sorted(set(cases))


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def harness(request: pytest.FixtureRequest, tiny: Path) -> Harness:
    return Harness(tiny, request.param)


def owned_slots(batch: Batch) -> set[int]:
    """The slots that the batch's new tokens go to."""
    return {
        row.sequence.block_tables[0][at // 16] * 16 + at % 16
        for row in batch.rows
        for at in range(row.start, row.start + row.num_tokens)
    }


@pytest.mark.parametrize(("family", "size"), sizes())
def test_real_rows_are_bitwise_eager_and_nothing_else_is_written(harness: Harness, family: str, size: int) -> None:
    for _ in range(3):
        batch = harness.batch(family, size)
        harness.fill_cache(batch)
        before = harness.memory
        values = harness.start(batch)
        key = harness.graphs.decide(size, family).key
        assert key is not None
        tokens, logits, *reports = harness.graphs(family=family, own=True, **values)
        after = harness.memory
        for cache, old in zip(harness.engine.caches, before, strict=True):
            cache.keys.copy_(old[0])
            cache.values.copy_(old[1])
        harness.start(batch)
        eager_tokens, eager_logits, *eager_reports = harness.graphs.run_eagerly(key, **values)
        assert all(torch.equal(one, other) for one, other in zip(reports, eager_reports, strict=True))
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, eager_logits)
        assert torch.equal(tokens, eager_tokens)
        assert torch.equal(after.view(torch.int32), harness.memory.view(torch.int32))
        changed = (after.view(torch.int32) != before.view(torch.int32)).flatten(2, 3).any(-1).any(-1)
        written = {int(slot) for slot in changed.any(0).any(0).nonzero().flatten()}
        assert written == owned_slots(batch), "a slot that is no new token's was written, or one was not"


GARBAGE = {
    "token_ids": 198,
    "token_sources": SEQS - 1,
    "positions": 127,
    "logits_indices": 0,
    "scored_tokens": 198,
    "scored_slots": SEQS,
    "block_tables": 2**31 - 1,
}


@pytest.mark.parametrize("family", ["decode", "mixed"])
def test_garbage_in_padding_rows_changes_no_real_row(harness: Harness, tiny: Path, family: str) -> None:
    """All that a padding row may hold, NaN included; its slot -1 and length 0 alone make it harmless."""
    device = harness.engine.device.type
    dirty_inputs = tuple(replace(spec, padding=GARBAGE.get(spec.name, spec.padding)) for spec in INPUTS)
    dirty = Harness(tiny, device, dirty_inputs)
    for case, size in sizes():
        if case != family:
            continue
        batch = harness.batch(family, size)
        harness.fill_cache(batch)
        for cache, source in zip(dirty.engine.caches, harness.engine.caches, strict=True):
            cache.keys.copy_(source.keys)
            cache.values.copy_(source.values)
        history, dirty_history = (each.engine.runner.sampler.history for each in (harness, dirty))
        dirty_history.copy_(history)
        values = harness.start(batch)
        dirty.start(batch)
        clean = harness.graphs(family=family, own=True, **values)
        result = dirty.graphs(family=family, own=True, **values)
        assert all(torch.equal(one, other) for one, other in zip(clean, result, strict=True))
        assert torch.equal(history, dirty_history)
        assert torch.equal(harness.memory.view(torch.int32), dirty.memory.view(torch.int32))


def test_200_interleaved_replays_stay_right(harness: Harness) -> None:
    cases = sizes()
    for step in range(200):
        family, size = cases[(step * 7) % len(cases)]
        batch = harness.batch(family, size)
        harness.fill_cache(batch)
        values = harness.start(batch)
        outputs = harness.graphs(family=family, own=True, **values)
        key = harness.graphs.decide(size, family).key
        assert isinstance(key, GraphKey)
        harness.start(batch)
        eager = harness.graphs.run_eagerly(key, **values)
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
