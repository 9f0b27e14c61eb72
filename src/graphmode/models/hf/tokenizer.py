"""What graphmode must know and mend of transformers' tokenizers."""

from __future__ import annotations

from copy import copy

from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast


def decodes_as_its_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer decodes with the tokenizers library and adds nothing of its own."""
    plain = PreTrainedTokenizerFast
    return isinstance(tokenizer, plain) and all(
        getattr(type(tokenizer), name) is getattr(plain, name) for name in ("decode", "_decode")
    )


def backend_as_json(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the tokenizer of the tokenizers library behind a tokenizer, as JSON; None where there is none."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    backend = copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str())


def name_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Name the special tokens of a GGUF file's tokenizer, which the file gives by their ids."""
    for name in ("bos_token", "eos_token", "pad_token"):
        token = getattr(config, f"{name}_id", None)
        if isinstance(token, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))
