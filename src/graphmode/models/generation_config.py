"""What a checkpoint says of generation: the tokens that end a text, and how its makers would sample."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from graphmode.errors import ModelError
from graphmode.models.checkpoint import Checkpoint, read_json

GENERATION_CONFIG = "generation_config.json"

log = logging.getLogger(__name__)


def read_generation_config(folder: Path) -> Mapping[str, Any] | None:
    """Return what a folder's generation_config.json holds; None where there is none. A damaged one is reported."""
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return None
    try:
        return read_json(file)
    except ModelError as error:
        log.warning("%s; it is left out", error)
        return {}


def end_tokens(
    checkpoint: Checkpoint, config: PretrainedConfig, generation: Mapping[str, Any] | None, vocab_size: int
) -> frozenset[int]:
    """Return the tokens that end a text: those that config.json names and those that generation_config.json names.

    What a model's class has as a default counts only where neither file is there to say otherwise, as in transformers.
    Values that are no tokens of the model are reported and left out.
    """
    name = "eos_token_id"
    settings: Mapping[str, Any] = {} if checkpoint.gguf_file else read_json(checkpoint.folder / "config.json")
    parts = (settings, settings.get("text_config"), generation)
    named = [part[name] for part in parts if isinstance(part, Mapping) and name in part]
    if not named and generation is None:
        named = [getattr(config.get_text_config(), name, None)]
    tokens: set[int] = set()
    for value in named:
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size:
                tokens.add(token)
            elif token is not None:
                log.warning(
                    "%s: %s is %r; it must be a token from 0 to %d or a list of them. It is left out",
                    checkpoint.name,
                    name,
                    token,
                    vocab_size - 1,
                )
    return frozenset(tokens)
