"""The vision runner: computes the features of images before the step that needs them, and hands them to it.

The tower has graphs of its own, one image or video a replay, by the number of tokens that it stands for. Features stay
on the device, the least recently used are forgotten first; a step's own are copied to one buffer, row by token, that
the language graphs read. Nothing here waits for the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from graphmode.engine.multimodal import VisionItem
from graphmode.engine.step_inputs import StepInputs, VisionStepInputs
from graphmode.engine.types import Batch, Limits
from graphmode.graph import CaptureFailure, GraphRunner
from graphmode.graph.backends.base import Backend
from graphmode.models.hf.vision import VisionTower

# Features that are kept beyond the step that reads them: a prompt's next chunk, its other completions, its
# recomputation and prompts with the same image find them.
_KEPT_BYTES = {"cpu": 64 << 20}
_KEPT_BYTES_ELSEWHERE = 512 << 20


class VisionRunner:
    """Runs a vision tower for the steps of an engine.

    Args:
        tower: the model's.
        backend: the device.
        limits: what a step may hold; images of more tokens than a step run eagerly.
        enabled: whether the tower runs by graphs. Each is captured when an image first needs it.
        strict: as of :class:`~graphmode.graph.GraphRunner`.
        on_capture_failure: as of :class:`~graphmode.graph.GraphRunner`.
        warmup_iterations: as of :class:`~graphmode.graph.GraphRunner`.
    """

    def __init__(
        self,
        tower: VisionTower,
        backend: Backend,
        limits: Limits,
        *,
        enabled: bool,
        strict: bool,
        on_capture_failure: Callable[[CaptureFailure], object] | None = None,
        warmup_iterations: int = 1,
    ) -> None:
        self.tower = tower
        self.features = torch.zeros(
            (limits.max_num_batched_tokens, tower.levels, tower.hidden_size), dtype=tower.dtype, device=backend.device
        )
        self.graphs = GraphRunner(
            tower.forward,
            tower.inputs,
            limits.max_num_batched_tokens,
            axes={"patches": lambda units: units * tower.patches_per_unit},
            output_axes=[("units", None, None)],
            backend=backend,
            enabled=enabled,
            strict=strict,
            on_capture_failure=on_capture_failure,
            warmup_iterations=warmup_iterations,
        )
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._kept_bytes = 0
        self._max_bytes = _KEPT_BYTES.get(backend.device.type, _KEPT_BYTES_ELSEWHERE)

    def step_inputs(self, batch: Batch, step: StepInputs) -> VisionStepInputs:
        """Put the features of a step's tokens into ``features``, and return the step with what depends on images.

        Args:
            batch: the step.
            step: its tensors, on the host.
        """
        deltas: list[tuple[int, ...]] = []
        for row in batch.scheduled:
            deltas += [row.sequence.vision.delta if row.sequence.vision else (0, 0, 0)] * row.num_tokens
        positions = np.asarray(step.positions)[:, np.newaxis] + np.array(deltas)
        visual = np.zeros(batch.num_tokens, dtype=np.bool_)
        first = 0
        for row in batch.scheduled:
            prompt, start, end = row.sequence.vision, row.start, row.start + row.num_tokens
            if prompt is not None and start < len(prompt.positions):
                of_prompt = prompt.positions[start:end]
                positions[first : first + len(of_prompt)] = of_prompt
                for span in prompt.spans_in(start, end):
                    low, high = max(span.start, start), min(span.end, end)
                    unit = span.first_unit + low - span.start
                    tokens = slice(first + low - start, first + high - start)
                    self.features[tokens].copy_(self._features_of(span.item)[unit : unit + high - low])
                    visual[tokens] = True
            first += row.num_tokens
        return VisionStepInputs(**{**vars(step), "positions": positions, "visual": visual if visual.any() else None})

    def embed(self, token_ids: torch.Tensor, visual: torch.Tensor) -> dict[str, Any]:
        """Return what the model takes in place of token ids, with ``features`` where a token is ``visual``."""
        return self.tower.embed(token_ids, self.features[: len(token_ids)], visual)

    def _features_of(self, item: VisionItem) -> torch.Tensor:
        """Return an item's features, ``[units, levels, hidden_size]``, computing them if they are not kept."""
        features = self._kept.pop(item.digest, None)
        if features is None:
            inputs: dict[str, Any] = self.tower.host_inputs(item.pixels, torch.tensor([item.grid]))
            features = self.graphs(own=True, **inputs)
            assert isinstance(features, torch.Tensor)
            self._kept_bytes += features.nbytes
        self._kept[item.digest] = features
        while self._kept_bytes > self._max_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.nbytes
        return features
