"""The step runner: a scheduled batch as inputs of a graph, and the graph's function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from graphmode.engine.scheduler import Batch, Family, Limits
from graphmode.graph import GraphRunner, HostArguments, Input
from graphmode.graph.backends.base import Backend
from graphmode.graph.staging import Event, StagingRing
from graphmode.kernels import Filters, sample
from graphmode.models.attention import PORTABLE_ATTENTION, AttentionBatch, DeviceAttention, LayerCache
from graphmode.models.loader import LoadedModel

# A padding token has slot -1 and a padding sequence length 0: they write no KV and read none.
INPUTS = (
    Input("token_ids", torch.int64, ("tokens",), padding=0),
    Input("token_sources", torch.int64, ("tokens",), padding=-1),
    Input("positions", torch.int64, ("tokens",), padding=0),
    Input("slot_mapping", torch.int64, ("tokens",), padding=-1),
    Input("query_lens", torch.int32, ("seqs",), padding=0),
    Input("kv_lens", torch.int32, ("seqs",), padding=0),
    Input("logits_rows", torch.int64, ("seqs",), padding=0),
    Input("temperature", torch.float32, ("seqs",), padding=0.0),
    Input("seeds", torch.int64, ("seqs",), padding=0),
    Input("top_k", torch.int32, ("seqs",), padding=0),
    Input("top_p", torch.float32, ("seqs",), padding=1.0),
    Input("min_p", torch.float32, ("seqs",), padding=0.0),
    Input("block_tables", torch.int32, ("seqs", "blocks"), padding=0),
)


@dataclass(frozen=True)
class StepUnderWay:
    """A step that the device computes.

    Attributes:
        batch: what was scheduled.
        on_host: where its sampled tokens arrive, int64 ``[rows]``.
        event: when they have.
    """

    batch: Batch
    on_host: torch.Tensor
    event: Event

    def tokens(self) -> list[int]:
        """Wait for the step and return the sampled token of every row; of one that does not sample, anything.

        To be called before two more steps are launched.
        """
        self.event.synchronize()
        tokens: list[int] = self.on_host.tolist()
        return tokens


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
    ) -> None:
        self._model = loaded.model
        self._caches = caches
        self._piecewise = piecewise
        self._attention = attention
        self._host_arguments = None
        if attention.host_lengths is not None:
            self._host_arguments = HostArguments(partial(attention.host_lengths, limits.max_model_len))
        self._max_blocks = -(-limits.max_model_len // attention.block_size)
        self._sampled = torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=backend.device)
        # Two steps are under way at most: one being read, one computed.
        self._results = StagingRing(8 * limits.max_num_seqs, 3, backend.host_buffer, backend.event)
        self.graphs = GraphRunner(
            self.forward,
            INPUTS,
            buckets or {"decode": limits.max_num_seqs, "mixed": limits.max_num_batched_tokens},
            axes={"seqs": lambda tokens: min(tokens, limits.max_num_seqs), "blocks": self._max_blocks},
            output_axes=[("seqs",)],
            static={"filtered": (False, True)},
            host_arguments=self._host_arguments,
            backend=backend,
            enabled=buckets is not None,
            max_padding_ratio=max_padding_ratio,
            strict=strict,
        )

    def probe(self) -> None:
        """Run one padding token eagerly, so that a model that cannot run says so before any capture.

        Raises:
            ModelError: the model asks its attention for something that is not supported.
        """
        device = self.graphs.backend.device
        sizes = {"tokens": 1, "seqs": 1, "blocks": self._max_blocks}
        inputs = {
            spec.name: torch.full(
                [sizes[str(axis)] for axis in spec.shape], spec.padding, dtype=spec.dtype, device=device
            )
            for spec in INPUTS
        }
        if self._host_arguments is not None:
            self._host_arguments.set("mixed", sizes, {})
        with torch.inference_mode():
            self.forward("mixed", False, **inputs)

    def launch(self, batch: Batch) -> StepUnderWay:
        """Put one step on the device and return without waiting for it."""
        inputs: dict[str, Any] = step_inputs(batch, self._max_blocks, self._attention.block_size)
        tokens = self.graphs(family=batch.family, filtered=is_filtered(batch), **inputs)
        assert isinstance(tokens, torch.Tensor)
        slot = self._results.acquire()
        on_host = slot.memory.view(torch.int64)[: len(batch.rows)]
        on_host.copy_(tokens, non_blocking=True)
        self._results.release(slot)
        return StepUnderWay(batch, on_host, slot.event)

    def capture(self, *, progress: bool) -> None:
        """Capture the graphs of all sizes; those of steps that filter what is sampled are captured at first use."""
        self.graphs.capture(progress=progress, filtered=False)

    def forward(
        self,
        family: Family,
        filtered: bool,
        token_ids: torch.Tensor,
        token_sources: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        query_lens: torch.Tensor,
        kv_lens: torch.Tensor,
        logits_rows: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        block_tables: torch.Tensor,
    ) -> torch.Tensor:
        """Compute a step: the function that is captured. Shapes as in ``INPUTS``.

        Where no row is ``filtered``, the search for what top-k, top-p and min-p leave is not in the graph; a row
        without them gets the same token either way.

        A token whose value the host does not know yet is taken from the row of the step before that sampled it
        (``token_sources``); the tokens sampled here are left for the next step.

        Returns:
            The sampled tokens, int64 ``[seqs]``.
        """
        token_ids = torch.where(token_sources < 0, token_ids, self._sampled[token_sources.clamp(min=0)])
        logits = self.logits(family, token_ids, positions, slot_mapping, query_lens, kv_lens, logits_rows, block_tables)
        filters = Filters(top_k, top_p, min_p) if filtered else None
        sampled: torch.Tensor = sample(logits, temperature, seeds, kv_lens.to(torch.int64), filters)
        # Padding rows keep what is there: a capture between two steps must not touch what the one left for the other.
        kept = self._sampled[: len(sampled)]
        kept.copy_(torch.where(kv_lens > 0, sampled, kept))
        return sampled

    def logits(
        self,
        family: Family,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        query_lens: torch.Tensor,
        kv_lens: torch.Tensor,
        logits_rows: torch.Tensor,
        block_tables: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the logits of ``logits_rows``, ``[seqs, vocab]`` in the model's dtype."""
        cu_query_lens = torch.nn.functional.pad(torch.cumsum(query_lens, 0, dtype=torch.int32), (1, 0))
        batch = AttentionBatch(
            slot_mapping=slot_mapping,
            block_tables=block_tables,
            cu_query_lens=cu_query_lens,
            kv_lens=kv_lens,
            max_query_len=1 if family == "decode" else token_ids.shape[0],
            caches=self._caches,
            piecewise=family in self._piecewise,
            attend=self._attention.attend,
            host_arguments={} if self._host_arguments is None else self._host_arguments.current,
        )
        output = self._model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=logits_rows,
            attention_batch=batch,
        )
        logits = output.logits
        assert isinstance(logits, torch.Tensor)
        return logits[0]


def is_filtered(batch: Batch) -> bool:
    """Return whether any row samples from a part of the vocabulary."""
    return any(row.sequence.params.filters for row in batch.rows)


def step_inputs(
    batch: Batch, max_blocks: int, block_size: int = PORTABLE_ATTENTION.block_size
) -> dict[str, torch.Tensor]:
    """Return the inputs of a step at their true sizes, on the host."""
    token_ids: list[int] = []
    sources: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    tables = torch.zeros(len(batch.rows), max_blocks, dtype=torch.int32)
    for index, row in enumerate(batch.rows):
        sequence, end = row.sequence, row.start + row.num_tokens
        known = sequence.token_ids[row.start : end]
        token_ids += known
        sources += [-1] * len(known)
        if row.source >= 0:
            token_ids.append(0)
            sources.append(row.source)
        positions += range(row.start, end)
        blocks = sequence.blocks
        slots += [blocks[at // block_size] * block_size + at % block_size for at in range(row.start, end)]
        tables[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    query_lens = torch.tensor([row.num_tokens for row in batch.rows], dtype=torch.int32)
    return {
        "token_ids": torch.tensor(token_ids),
        "token_sources": torch.tensor(sources),
        "positions": torch.tensor(positions),
        "slot_mapping": torch.tensor(slots),
        "query_lens": query_lens,
        "kv_lens": torch.tensor([row.start + row.num_tokens for row in batch.rows], dtype=torch.int32),
        "logits_rows": torch.cumsum(query_lens, 0) - 1,
        "temperature": torch.tensor([row.sequence.params.temperature for row in batch.rows], dtype=torch.float32),
        "seeds": torch.tensor([row.sequence.seed for row in batch.rows]),
        "top_k": torch.tensor([row.sequence.params.top_k for row in batch.rows], dtype=torch.int32),
        "top_p": torch.tensor([row.sequence.params.top_p for row in batch.rows], dtype=torch.float32),
        "min_p": torch.tensor([row.sequence.params.min_p for row in batch.rows], dtype=torch.float32),
        "block_tables": tables,
    }
