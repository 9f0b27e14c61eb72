"""What transformers makes of a configuration: the class of its model, and what the model warns of."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from graphmode.errors import ModelError
from graphmode.models.hf.dry_run import check_class


def auto_class(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """Return what makes the model: with its vision part where its positions are those of a grid, as in Qwen2-VL.

    Raises:
        ModelError: its class is none that graphmode can run; why, in words that follow the model's name.
    """
    own_code = AutoModelForCausalLM.__name__ in (getattr(config, "auto_map", None) or {})
    if own_code and trust_remote_code:
        return AutoModelForCausalLM  # its class is known, and checked, once it is loaded
    base: Any = AutoModel._model_mapping.get(type(config), None)
    vision = AutoModelForImageTextToText._model_mapping.get(type(config), None)
    auto = AutoModelForImageTextToText if vision and hasattr(base, "get_rope_index") else AutoModelForCausalLM
    cls: Any = auto._model_mapping.get(type(config), None)
    if cls is None and vision:
        raise ModelError("it is a model of images and text, of a kind that graphmode does not run")
    if cls is None and own_code:
        raise ModelError(
            "transformers has no causal language model of its type, and Python code that comes with the model "
            "(auto_map) is not run unasked. Read it, and if you trust it give trust_remote_code=True "
            "(--trust-remote-code)"
        )
    if cls is None:
        raise ModelError("transformers has no causal language model of its type")
    check_class(cls, config)
    return auto


def silence_padding_warnings(model: PreTrainedModel) -> None:
    """Keep a model from reading tokens on the host to warn about padding: padding tokens of a step have no slot."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = _no_warning  # type: ignore[method-assign]


def _no_warning(*args: object, **kwargs: object) -> None:
    pass
