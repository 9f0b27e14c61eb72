"""What differs between the versions of transformers that graphmode supports, where code alone does not show it.

Elsewhere graphmode looks at what a module does, which is tried when a model is loaded, and not at names.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PretrainedConfig

# From `transformers` itself 5.17 gives it only where torchvision is installed, which most processors do without.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

__all__ = ["SPARSE_LAYER_TYPES", "AutoImageProcessor", "layers_that_forget", "post_expert_norm"]

# The type of layers whose keys an indexer picks: its name since 5.18, and before.
SPARSE_LAYER_TYPES = ("indexed_attention", "deepseek_sparse_attention")


def post_expert_norm(experts: Any) -> Any | None:
    """Return the norm of what each expert gives; None where there is none, as in all models of 5.17."""
    return experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None


def layers_that_forget(config: PretrainedConfig, layers: int) -> list[bool]:
    """Return which of a model's layers forget keys beyond a window, by the cache that transformers makes for it.

    Last layers that share the keys and values of earlier ones have no cache in older versions.
    """
    sliding: list[bool] = DynamicCache(config=config).is_sliding
    return sliding + [False] * (layers - len(sliding))
