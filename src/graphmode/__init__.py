"""graphmode: LLM inference in graph mode. Capture the device work of a step once, replay it ever after."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from graphmode.requirements import warn_of_untested_versions

if TYPE_CHECKING:
    from graphmode.engine.llm import LLM
    from graphmode.engine.outputs import CompletionOutput, RequestOutput
    from graphmode.engine.sampling_params import SamplingParams
    from graphmode.models.bundled_model import bundled_model

__version__ = version("graphmode")
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__", "bundled_model"]

_HOME = {
    "LLM": "graphmode.engine.llm",
    "CompletionOutput": "graphmode.engine.outputs",
    "RequestOutput": "graphmode.engine.outputs",
    "SamplingParams": "graphmode.engine.sampling_params",
    "bundled_model": "graphmode.models.bundled_model",
}

warn_of_untested_versions()


def __getattr__(name: str) -> Any:
    """Load the engine when it is first asked for: ``graphmode.graph`` alone needs neither it nor transformers."""
    if name not in _HOME:
        raise AttributeError(f"module 'graphmode' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
