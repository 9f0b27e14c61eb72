"""graphmode: LLM inference in graph mode. Capture the device work of a step once, replay it ever after."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphmode.engine.llm import LLM
    from graphmode.engine.outputs import CompletionOutput, RequestOutput
    from graphmode.engine.sampling_params import SamplingParams
    from graphmode.engine.structured_outputs import StructuredOutputs
    from graphmode.models.bundled_model import bundled_model

    __version__: str
    """The version of the installed package."""

__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
    "bundled_model",
]

_HOME = {
    "LLM": "graphmode.engine.llm",
    "CompletionOutput": "graphmode.engine.outputs",
    "RequestOutput": "graphmode.engine.outputs",
    "SamplingParams": "graphmode.engine.sampling_params",
    "StructuredOutputs": "graphmode.engine.structured_outputs",
    "bundled_model": "graphmode.models.bundled_model",
}


def __getattr__(name: str) -> Any:
    """Load the engine when it is first asked for: ``graphmode.graph`` alone needs neither it nor transformers."""
    if name == "__version__":
        from importlib.metadata import version  # takes a while

        return version("graphmode")
    if name not in _HOME:
        raise AttributeError(f"module 'graphmode' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
