"""Steps made by hand, for tests of the worker."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from graphmode.engine.step_inputs import StepInputs, VisionStepInputs, step_inputs
from graphmode.engine.types import Batch
from graphmode.engine.worker import StepRunner
from graphmode.graph.inputs import shape_at


def host_step(runner: StepRunner, batch: Batch) -> StepInputs:
    """A batch as the host fills it, with its images."""
    step = step_inputs(batch, runner.tables)
    return step if runner.vision is None else runner.vision.step_inputs(batch, step)


def as_tensors(step: StepInputs) -> StepInputs:
    """The same as tensors on the host."""
    return replace(step, **{name: torch.as_tensor(value) for name, value in vars(step).items() if value is not None})


def logits(runner: StepRunner, batch: Batch, sizes: Mapping[str, int] | None = None) -> torch.Tensor:
    """The logits that a batch samples from, computed without a graph, with padding up to the axis ``sizes``."""
    step = as_tensors(host_step(runner, batch))
    images = isinstance(step, VisionStepInputs) and step.visual is not None
    on_device = {}
    for name, value in vars(step).items():
        if value is not None:
            spec = getattr(runner.inputs, name)
            shape = value.shape if sizes is None else shape_at(spec, sizes)
            on_device[name] = torch.full(shape, spec.padding, dtype=spec.dtype, device=runner.graphs.backend.device)
            on_device[name][tuple(map(slice, value.shape))].copy_(value)
    padded = replace(step, **on_device)
    with torch.inference_mode():
        return runner.logits(batch.family, padded, images, padded.logits_indices[: len(step.logits_indices)])
