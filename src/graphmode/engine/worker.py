"""The step runner: a scheduled batch as inputs of a graph, and the graph's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from graphmode.cache.specs import LayerCache
from graphmode.engine.outputs import TokenLogprobs
from graphmode.engine.sampler import Sampler, SamplingLevel, level_of, unpacked
from graphmode.engine.step_inputs import INPUTS, VISION_INPUTS, scored_tokens, step_inputs
from graphmode.engine.types import Batch, Family, Limits
from graphmode.engine.vision_runner import VisionRunner
from graphmode.graph import CaptureFailure, GraphRunner, HostArguments
from graphmode.graph.backends.base import Backend
from graphmode.graph.inputs import all_padding
from graphmode.graph.staging import Event, StagingRing
from graphmode.layers.attention import PORTABLE_ATTENTION, AttentionBatch, DeviceAttention
from graphmode.models.hf.fuse import keeps_rows
from graphmode.models.loader import LoadedModel
from graphmode.ops.decode_state import DecodeRows, Handover, advance_decode, take_tokens


@dataclass(frozen=True)
class StepResult:
    """What a batch made.

    Attributes:
        tokens: of each of its steps, the sampled token of every row; of one that does not sample, anything.
        logprobs: of every row, where any row wants them.
        prompt_logprobs: of the scored tokens, in the order of the rows.
    """

    tokens: list[list[int]]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs]


@dataclass(frozen=True)
class StepInFlight:
    """A batch that the device computes.

    Attributes:
        batch: what was scheduled.
        tokens: where its sampled tokens arrive, int64 ``[steps, max_num_seqs]`` on the host.
        reports: the same for log-probabilities, int32 ``[rows + scored, columns]`` of ``Sampler.reports``; None where
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
        rows = len(self.batch.rows)
        tokens: list[list[int]] = self.tokens[:, :rows].tolist()
        if self.reports is None:
            return StepResult(tokens, None, [])
        chosen = tokens[0] + scored_tokens(self.batch)
        logprobs: list[TokenLogprobs] = [*unpacked(self.reports, chosen)]
        for at, logits in self.logits.items():
            logprobs[at] = logits.numpy()
        return StepResult(tokens, logprobs[:rows], logprobs[rows:])


class StepRunner:
    """Runs scheduled batches through the model, by graphs keyed by the number of tokens alone.

    Args:
        loaded: the model.
        caches: the KV cache of each layer.
        backend: the device.
        limits: what a step may hold.
        buckets: sizes of the ``decode`` and the ``mixed`` family; None runs everything eagerly.
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
        self._max_seqs = limits.max_num_seqs
        self._attention = attention
        self._host_arguments = None
        if attention.host_lengths is not None:
            self._host_arguments = HostArguments(partial(attention.host_lengths, limits.max_model_len))
        self._max_blocks = -(-limits.max_model_len // attention.block_size)
        self._sampled = torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=backend.device)
        self._one_each = torch.arange(limits.max_num_seqs + 1, dtype=torch.int32, device=backend.device)
        self._log = torch.zeros(limits.decode_steps, limits.max_num_seqs, dtype=torch.int64, device=backend.device)
        shape = loaded.shape
        self.sampler = Sampler(backend, limits, shape.vocab_size, shape.eos_token_ids, loaded.tokenizer)
        # Two batches are under way at most: one being read, one computed.
        report_bytes = 2 * limits.max_num_seqs * self.sampler.reports.shape[1] * 4
        self._results = StagingRing(self._log.nbytes + report_bytes, 3, backend.host_buffer, backend.event)
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
        self._inputs = INPUTS if self.vision is None else VISION_INPUTS
        self.graphs = GraphRunner(
            self.forward,
            self._inputs,
            buckets or {"decode": limits.max_num_seqs, "mixed": limits.max_num_batched_tokens},
            axes={
                "seqs": lambda tokens: min(tokens, limits.max_num_seqs),
                "scored": lambda tokens: min(tokens, limits.max_num_seqs),
                "blocks": self._max_blocks,
            },
            output_axes=[("seqs",)],
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
        device = self.graphs.backend.device
        sizes = {"tokens": 1, "seqs": 1, "scored": 1, "blocks": self._max_blocks}
        inputs: dict[str, Any] = {spec.name: all_padding(spec, sizes, device) for spec in self._inputs}
        if self._host_arguments is not None:
            self._host_arguments.set("mixed", sizes, {})
        with torch.inference_mode():
            self.forward("mixed", SamplingLevel.PLAIN, **inputs)

    def launch(self, batch: Batch) -> StepInFlight:
        """Put one batch on the device and return without waiting for it."""
        level = max(level_of(row) for row in batch.rows)
        self.sampler.admit(batch, level)
        inputs: dict[str, Any] = step_inputs(batch, self._max_blocks, self._attention.block_size)
        if self.vision is not None:
            inputs |= self.vision.step_inputs(batch, inputs["positions"])
            inputs["images"] = "visual" in inputs
        self.graphs(family=batch.family, level=level, repeats=batch.steps, **inputs)
        slot = self._results.acquire()
        rows, scored = len(batch.rows), len(scored_tokens(batch))
        tokens = slot.memory[: self._log.nbytes].view(torch.int64).view(self._log.shape)[: batch.steps]
        tokens.copy_(self._log[: batch.steps], non_blocking=True)
        reports = None
        if scored or any(row.sequence.params.logprobs is not None for row in batch.rows):
            source = self.sampler.reports
            width = source.shape[1]
            start = self._log.nbytes
            reports = slot.memory[start : start + 4 * (rows + scored) * width].view(torch.int32).view(-1, width)
            reports[:rows].copy_(source[:rows], non_blocking=True)
            reports[rows:].copy_(source[self._max_seqs : self._max_seqs + scored], non_blocking=True)
        self._results.release(slot)
        logits = self._logits(batch) if level is SamplingLevel.VOCABULARY else {}
        return StepInFlight(batch, tokens, reports, logits, slot.event)

    def _logits(self, batch: Batch) -> dict[int, torch.Tensor]:
        """Wait for a step and return the logits of :class:`StepInFlight`: they are too many to be held for two."""
        rows, source = len(batch.rows), self.sampler.logits
        places = {at: at for at, row in enumerate(batch.rows) if row.samples and row.sequence.params.logprobs == -1}
        owners = [row.sequence for row in batch.rows for _ in row.scored]
        places |= {
            rows + at: self._max_seqs + at
            for at, sequence in enumerate(owners)
            if sequence.params.prompt_logprobs == -1
        }
        return {at: source[place].to("cpu", copy=True) for at, place in places.items()}

    def capture(self, *, progress: bool) -> None:
        """Capture the graphs of all sizes; those that read images or do more than plain sampling wait for their use."""
        images = {} if self.vision is None else {"images": False}
        self.graphs.capture(progress=progress, level=SamplingLevel.PLAIN, **images)

    def forward(
        self,
        family: Family,
        level: SamplingLevel,
        token_ids: torch.Tensor,
        token_sources: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        query_lens: torch.Tensor,
        kv_lens: torch.Tensor,
        logits_indices: torch.Tensor,
        slots: torch.Tensor,
        limits: torch.Tensor,
        step: torch.Tensor,
        scored_rows: torch.Tensor,
        scored_tokens: torch.Tensor,
        scored_slots: torch.Tensor,
        block_tables: torch.Tensor,
        visual: torch.Tensor | None = None,
        images: bool = False,
    ) -> torch.Tensor:
        """Compute a step: the function that is captured. Shapes as in ``INPUTS``.

        A token whose value the host does not know yet is taken from the row of the step before that sampled it
        (``token_sources``); the tokens sampled here are left for the next step, and a decode step leaves its inputs as
        the next one needs them. Where no token stands for a part of an image (``images``), the graph reads no features.

        Returns:
            The sampled tokens, int64 ``[seqs]``.
        """
        token_ids = take_tokens(token_ids, token_sources, self._sampled)

        def logits_of(rows: torch.Tensor) -> torch.Tensor:
            return self.logits(
                family,
                token_ids,
                positions,
                slot_mapping,
                query_lens,
                kv_lens,
                rows,
                block_tables,
                visual if images else None,
            )

        sampled = self.sampler(
            logits_of, level, slots, kv_lens, logits_indices, scored_rows, scored_tokens, scored_slots
        )
        decode = None
        if family == "decode":
            decode = DecodeRows(token_sources, positions, slot_mapping, kv_lens, slots, limits, block_tables)
        # Padding rows hand nothing on: a capture between two steps must not touch what the one left for the other.
        advance_decode(sampled, kv_lens, Handover(self._sampled, self._log, step), decode, self._attention.block_size)
        return sampled

    def logits(
        self,
        family: Family,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        query_lens: torch.Tensor,
        kv_lens: torch.Tensor,
        logits_indices: torch.Tensor,
        block_tables: torch.Tensor,
        visual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the logits of ``logits_indices``, ``[seqs, vocab]`` in the model's dtype."""
        if family == "decode":
            cu_query_lens = self._one_each[: len(query_lens) + 1]
        else:
            cu_query_lens = torch.nn.functional.pad(torch.cumsum(query_lens, 0, dtype=torch.int32), (1, 0))
        # Of a decode step every token has a row of logits. Of a long step few have: the last layer may stop at those.
        every = family == "decode" and len(logits_indices) == len(token_ids)
        kept = logits_indices if self._keeps_rows and 2 * len(logits_indices) <= len(token_ids) else None
        batch = AttentionBatch(
            slot_mapping=(slot_mapping,),
            block_tables=(block_tables,),
            cu_query_lens=cu_query_lens,
            kv_lens=kv_lens,
            max_query_len=1 if family == "decode" else token_ids.shape[0],
            caches=self._caches,
            piecewise=family in self._piecewise,
            attend=self._attention.attend,
            host_arguments={} if self._host_arguments is None else self._host_arguments.current,
            kept=kept,
        )
        tokens: dict[str, Any] = {"input_ids": token_ids.unsqueeze(0)}
        if self.vision is not None and visual is not None:
            tokens = self.vision.embed(token_ids, visual)
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
