"""The worker: puts scheduled batches on the device. Its :meth:`~StepRunner.forward` is what graphs hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from graphmode.cache.specs import LayerCache
from graphmode.engine.block_tables import BlockTables
from graphmode.engine.outputs import TokenLogprobs
from graphmode.engine.sampler import Sampler, SamplingLevel, level_of, unpacked
from graphmode.engine.step_inputs import StepInputs, VisionStepInputs, step_inputs
from graphmode.engine.types import Batch, Family, Limits
from graphmode.engine.vision_runner import VisionRunner
from graphmode.graph import CaptureFailure, GraphRunner, HostArguments, Input
from graphmode.graph.backends.base import Backend
from graphmode.graph.inputs import all_padding
from graphmode.graph.staging import Event, StagingRing
from graphmode.graph.trees import map_leaves
from graphmode.layers.attention import PORTABLE_ATTENTION, AttentionBatch, DeviceAttention
from graphmode.models.hf.fuse import keeps_rows
from graphmode.models.loader import LoadedModel
from graphmode.ops.begin_step import TableUpdate, begin_step
from graphmode.ops.decode_state import SampledTokens, advance_decode


@dataclass(frozen=True)
class StepResult:
    """What a batch made.

    Attributes:
        tokens: those that each of its sequences sampled, in order.
        logprobs: the same for log-probabilities, where any sequence wants them.
        prompt_logprobs: of the scored tokens, in the order of the sequences.
    """

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs]] | None
    prompt_logprobs: list[TokenLogprobs]


@dataclass(frozen=True)
class StepInFlight:
    """A batch that the device computes.

    Attributes:
        batch: what was scheduled.
        tokens: where its sampled tokens arrive, int64 ``[steps, max_logits]`` on the host.
        reports: the same for log-probabilities, int32 ``[logits + scored, columns]`` of ``Sampler.reports``; None where
            none are wanted.
        logits: float32 ``[vocab]`` of those that want the log-probabilities of all tokens, by their place in
            ``reports``.
        event: when they have.
    """

    batch: Batch
    tokens: torch.Tensor
    reports: torch.Tensor | None
    logits: Mapping[int, torch.Tensor]
    event: Event

    def result(self) -> StepResult:
        """Wait for the batch and return what it made. To be called before two more are launched."""
        self.event.synchronize()
        of_steps: list[list[int]] = self.tokens[:, : self.batch.logits[-1].stop].tolist()
        rows = [
            rows[len(rows) - each.samples :] for each, rows in zip(self.batch.scheduled, self.batch.logits, strict=True)
        ]
        tokens = [
            [of_step[row] for of_step in of_steps[: each.steps] for row in its]
            for each, its in zip(self.batch.scheduled, rows, strict=True)
        ]
        if self.reports is None:
            return StepResult(tokens, None, [])
        scored = self.batch.scored_tokens
        logits = len(self.reports) - len(scored)
        logprobs: list[TokenLogprobs] = [*unpacked(self.reports, of_steps[0][:logits] + scored)]
        for at, values in self.logits.items():
            logprobs[at] = values.numpy().tobytes()
        return StepResult(tokens, [[logprobs[row] for row in its] for its in rows], logprobs[logits:])


class StepRunner:
    """Runs scheduled batches through the model, by graphs keyed by the number of tokens alone.

    Args:
        loaded: the model.
        caches: the KV cache of each layer.
        backend: the device.
        limits: what a step may hold.
        buckets: sizes of the ``decode`` family in sequences and of the ``mixed`` family in tokens; None runs everything
            eagerly.
        attention: the device's.
        piecewise: the families whose attention runs outside their graphs.
        max_padding_ratio: as of :class:`~graphmode.graph.GraphRunner`.
        strict: as of :class:`~graphmode.graph.GraphRunner`.
        on_capture_failure: as of :class:`~graphmode.graph.GraphRunner`.
        warmup_iterations: as of :class:`~graphmode.graph.GraphRunner`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        caches: Sequence[LayerCache],
        backend: Backend,
        limits: Limits,
        buckets: Mapping[str, tuple[int, ...]] | None,
        *,
        attention: DeviceAttention = PORTABLE_ATTENTION,
        piecewise: frozenset[Family] = frozenset(),
        max_padding_ratio: float | None = None,
        strict: bool = False,
        on_capture_failure: Callable[[CaptureFailure], object] | None = None,
        warmup_iterations: int = 1,
    ) -> None:
        self._model = loaded.model
        self._keeps_rows = keeps_rows(loaded.model)
        self._caches = caches
        self._piecewise = piecewise
        self._limits = limits
        self._attention = attention
        self._host_arguments = None
        if attention.host_lengths is not None:
            lengths = partial(attention.host_lengths, limits.max_model_len, limits.decode_query_len)
            self._host_arguments = HostArguments(lengths)
        device, seqs = backend.device, limits.max_num_seqs
        block_sizes = {cache.group: cache.keys.shape[1] for cache in caches}
        self.tables = BlockTables(backend, limits, [block_sizes[group] for group in sorted(block_sizes)])
        self._last_tokens = torch.zeros(seqs + 1, dtype=torch.int64, device=device)
        self._log = torch.zeros(limits.decode_steps, limits.max_logits, dtype=torch.int64, device=device)
        query_len = limits.decode_query_len
        self._cu_decode = torch.arange(0, (seqs + 1) * query_len, query_len, dtype=torch.int32, device=device)
        shape = loaded.shape
        self.sampler = Sampler(backend, limits, shape.vocab_size, shape.eos_token_ids, loaded.files.tokenizer)
        # Two batches are in flight at most: one being read, one computed.
        report_bytes = self.sampler.max_reports * self.sampler.reports.shape[1] * 4
        self._results = StagingRing(self._log.nbytes + report_bytes, 3, backend.host_buffer, backend.event)
        self._logs_on_host = [
            buffer.memory[: self._log.nbytes].view(torch.int64).view(self._log.shape)
            for buffer in self._results.buffers
        ]
        self.vision: VisionRunner | None = None
        if loaded.vision is not None:
            self.vision = VisionRunner(
                loaded.vision,
                backend,
                limits,
                enabled=buckets is not None,
                strict=strict,
                on_capture_failure=on_capture_failure,
                warmup_iterations=warmup_iterations,
            )
        self.inputs = (StepInputs if self.vision is None else VisionStepInputs).declared(len(self.tables.block_sizes))
        sizes = buckets or {"decode": (seqs,), "mixed": (limits.max_num_batched_tokens,)}
        self.graphs = GraphRunner(
            self.forward,
            {"step": self.inputs},
            {**sizes, "decode": tuple(size * query_len for size in sizes["decode"])},
            axes={
                "seqs": lambda tokens: min(tokens, seqs),
                "logits": lambda tokens: min(tokens, limits.max_logits),
                "scored": lambda tokens: min(tokens, seqs),
                "new_blocks": self.tables.room,
            },
            output_axes=[("logits",)],
            static={"level": tuple(SamplingLevel), **({} if self.vision is None else {"images": (False, True)})},
            host_arguments=self._host_arguments,
            backend=backend,
            enabled=buckets is not None,
            max_padding_ratio=max_padding_ratio,
            strict=strict,
            on_capture_failure=on_capture_failure,
            warmup_iterations=warmup_iterations,
        )

    def probe(self) -> None:
        """Run one padding token eagerly, so that a model that cannot run says so before any capture.

        Raises:
            ModelError: the model asks its attention for something that is not supported.
        """
        sizes = {"tokens": 1, "seqs": 1, "logits": 1, "scored": 1, "new_blocks": 1}
        if self._host_arguments is not None:
            self._host_arguments.set("mixed", sizes, {})
        with torch.inference_mode():
            self.forward("mixed", SamplingLevel.PLAIN, self.padding(sizes))

    def padding(self, sizes: Mapping[str, int]) -> StepInputs:
        """Return the tensors of a step that holds nothing but padding, at the axis ``sizes``, on the device."""
        device = self.graphs.backend.device
        step: StepInputs = map_leaves(self.inputs, Input, lambda spec: all_padding(spec, sizes, device))
        return step

    def launch(self, batch: Batch) -> StepInFlight:
        """Put one batch on the device and return without waiting for it."""
        level = max(level_of(each) for each in batch.scheduled)
        self.sampler.admit(batch, level)
        if level >= SamplingLevel.RESTRICTED:
            self.sampler.mask(batch)
        step, images = step_inputs(batch, self.tables), {}
        if self.vision is not None:
            step = self.vision.step_inputs(batch, step)
            images = {"images": step.visual is not None}
        self.graphs(family=batch.family, level=level, repeats=batch.steps, step=step, **images)
        logits, scored = len(step.logits_indices), len(batch.scored_tokens)
        staged = self._results.acquire()
        tokens = self._logs_on_host[staged.index][: batch.steps]
        tokens.copy_(self._log[: batch.steps], non_blocking=True)
        reports = None
        if scored or any(each.sequence.params.logprobs is not None for each in batch.scheduled):
            source = self.sampler.reports
            width = source.shape[1]
            start = self._log.nbytes
            reports = staged.memory[start : start + 4 * (logits + scored) * width].view(torch.int32).view(-1, width)
            reports[:logits].copy_(source[:logits], non_blocking=True)
            first = self._limits.max_logits
            reports[logits:].copy_(source[first : first + scored], non_blocking=True)
        self._results.release(staged)
        all_logits = self._logits(batch, logits) if level is SamplingLevel.VOCABULARY else {}
        return StepInFlight(batch, tokens, reports, all_logits, staged.event)

    def _logits(self, batch: Batch, logits: int) -> dict[int, torch.Tensor]:
        """Wait for a step and return the logits of :class:`StepInFlight`: they are too many to be held for two."""
        places = {
            row: row
            for each, rows in zip(batch.scheduled, batch.logits, strict=True)
            if each.sequence.params.logprobs == -1
            for row in rows[len(rows) - each.samples :]
        }
        owners = [each.sequence for each in batch.scheduled for _ in each.scored]
        places |= {
            logits + at: self._limits.max_logits + at
            for at, sequence in enumerate(owners)
            if sequence.params.prompt_logprobs == -1
        }
        return {at: self.sampler.logits[place].to("cpu", copy=True) for at, place in places.items()}

    def capture(self, *, progress: bool, on_capture: Callable[[int, int], object] | None = None) -> None:
        """Capture the graphs of all sizes; those that read images or do more than plain sampling wait for their use."""
        images = {} if self.vision is None else {"images": False}
        self.graphs.capture(progress=progress, on_capture=on_capture, level=SamplingLevel.PLAIN, **images)

    def forward(self, family: Family, level: SamplingLevel, step: StepInputs, images: bool = False) -> torch.Tensor:
        """Compute a step: the function that is captured.

        Sampled tokens are left for the next step to take (``token_sources``), and a decode step of one token a sequence
        leaves its inputs as the next one needs them. Where no token stands for a part of an image, ``images`` is False
        and the graph reads no features.

        Returns:
            The sampled tokens, int64 ``[logits]``.
        """
        if family == "decode":
            step = step.first_seqs(len(step.token_ids) // self._limits.decode_query_len)
        sampled = self.sampler(partial(self.logits, family, step, images), level, step)
        # Padding leaves nothing: a capture between two steps must not touch what the one left for the other.
        advance_decode(
            sampled,
            step.logits_state_indices,
            SampledTokens(self._last_tokens, self._log, step.burst_step),
            step if family == "decode" and self._limits.decode_query_len == 1 else None,
            self.tables.step_tables[:, : len(step.state_indices)],
            self.tables.block_sizes,
        )
        return sampled

    def logits(self, family: Family, step: StepInputs, images: bool, logits_indices: torch.Tensor) -> torch.Tensor:
        """Compute the logits of some tokens of a step, int64 ``[some]``: ``[some, vocab]`` in the model's dtype."""
        tables = self.tables.step_tables[:, : len(step.state_indices)]
        update = TableUpdate(self.tables.tables, tables, step.state_indices, step.table_changes, step.new_blocks)
        token_ids = begin_step(step.token_ids, step.token_sources, self._last_tokens, update)
        decode = family == "decode"
        if decode:
            cu_query_lens = self._cu_decode[: len(step.kv_lens) + 1]
        else:
            cu_query_lens = torch.nn.functional.pad(torch.cumsum(step.query_lens, 0, dtype=torch.int32), (1, 0))
        # Of a decode step every token has a row of logits. Of a long step few have: the last layer may stop at those.
        every = decode and len(logits_indices) == len(token_ids)
        kept = logits_indices if self._keeps_rows and 2 * len(logits_indices) <= len(token_ids) else None
        batch = AttentionBatch(
            slot_mapping=tuple(step.slot_mapping),
            block_tables=tuple(tables),
            cu_query_lens=cu_query_lens,
            kv_lens=step.kv_lens,
            max_query_len=self._limits.decode_query_len if decode else len(token_ids),
            caches=self._caches,
            piecewise=family in self._piecewise,
            attend=self._attention.attend,
            host_arguments={} if self._host_arguments is None else self._host_arguments.current,
            kept=kept,
        )
        tokens: dict[str, Any] = {"input_ids": token_ids.unsqueeze(0)}
        if images and self.vision is not None and isinstance(step, VisionStepInputs):
            tokens = self.vision.embed(token_ids, step.visual)
        positions = step.positions
        output = self._model(
            **tokens,
            position_ids=positions.unsqueeze(0) if positions.dim() == 1 else positions.t().unsqueeze(1),
            use_cache=False,
            logits_to_keep=0 if every or kept is not None else logits_indices,  # 0 keeps all, without a copy
            attention_batch=batch,
        )
        logits = output.logits
        assert isinstance(logits, torch.Tensor)
        return logits[0]
