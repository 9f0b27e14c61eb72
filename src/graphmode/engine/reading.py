"""What turns prompts into tokens, and tokens into text: of a model all but its weights."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

from graphmode.engine.config import EngineOptions, resolve_dtype
from graphmode.engine.media import MediaLimits
from graphmode.engine.prompts import PromptParts, PromptReader
from graphmode.engine.requests import Request
from graphmode.engine.sampling_params import SamplingParams, checkpoint_parameters
from graphmode.engine.text import Detokenizer
from graphmode.errors import InputError
from graphmode.graph import get_backend
from graphmode.models.loader import ModelFiles, read_model


class ModelText:
    """Prompts to requests, tokens to text. Any thread may use it.

    Args:
        files: the model's.
        options: what the user chose.

    Attributes:
        files: the model's.
        tokenizer: the model's; None where it comes without one. Then prompts must be token ids.
        detokenizer: makes text of tokens; None without a tokenizer.
        takes_images: whether prompts may have images and videos.
        vocab_size: tokens that the model has.
        eos_token_ids: tokens that end a text.

    Raises:
        ModelError: the tokenizer cannot be read, or texts cannot be made as its tokens come.
    """

    def __init__(self, files: ModelFiles, options: EngineOptions) -> None:
        self.files = files
        self.tokenizer = files.tokenizer
        self.detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer, files.checkpoint.name)
        self.takes_images, self.vocab_size, self.eos_token_ids = (
            files.takes_images,
            files.vocab_size,
            files.eos_token_ids,
        )
        self._reader = lru_cache(1)(partial(_reader, files, options))
        generation = None if options.generation_config == "vllm" else files.generation
        self._checkpoint_parameters = checkpoint_parameters(generation or {})
        self._lock = Lock()  # tokenizers and processors are not made for several threads

    def default_sampling_params(self, **others: Any) -> SamplingParams:
        """Return the parameters of requests that bring none: what the model's generation_config.json asks for.

        Args:
            **others: parameters where that file names none, by name; default: those of ``SamplingParams``.
        """
        return SamplingParams(**(others | self._checkpoint_parameters))

    def check(self, params: SamplingParams) -> None:
        """Check that answers can be made into the text that parameters ask for.

        Raises:
            InputError: they have stop texts, and the model no tokenizer.
        """
        if params.stop and self.detokenizer is None:
            raise InputError("the model comes without a tokenizer, so stop texts cannot be found; use stop_token_ids")

    def request(
        self,
        prompt: str | PromptParts,
        params: SamplingParams,
        max_model_len: int,
        *,
        request_id: str | None = None,
        stream: bool = True,
        priority: int = 0,
    ) -> Request:
        """Read a prompt and return the request for its answers.

        Args:
            prompt: a text, or with token ids or images :class:`~graphmode.engine.prompts.PromptParts`.
            params: how to sample. Their ``truncate_prompt_tokens`` cuts the prompt.
            max_model_len: tokens of a sequence, as the engine runs the model.
            request_id: as of :class:`~graphmode.engine.requests.Request`.
            stream: as of :class:`~graphmode.engine.requests.Request`.
            priority: as of :class:`~graphmode.engine.requests.Request`.

        Raises:
            InputError: the prompt or its parameters do not fit the model. The engine's own checks follow when the
                request is submitted.
        """
        self.check(params)
        most = max_model_len - 1  # there is room for an answer
        with self._lock:
            token_ids, vision = self._reader(most).read(prompt)
        if params.truncate_prompt_tokens is not None:
            if vision is not None:
                raise InputError(
                    "truncate_prompt_tokens would cut the prompt's images; leave it out and shorten the text"
                )
            token_ids = token_ids[-(most if params.truncate_prompt_tokens < 0 else params.truncate_prompt_tokens) :]
        text = prompt if isinstance(prompt, str) else prompt.get("prompt")
        return Request(token_ids, params, text, vision, request_id, stream, priority)


def _reader(files: ModelFiles, options: EngineOptions, tokens: int) -> PromptReader:
    """Return what reads prompts of at most so many tokens."""
    limits = MediaLimits(
        images=options.max_images_per_prompt,
        videos=options.max_videos_per_prompt,
        pixels=options.max_image_pixels,
        tokens=tokens,
    )
    return PromptReader(files, limits)


def read_files(model: str | Path, options: EngineOptions) -> ModelFiles:
    """Find a model's files, and read what comes before the weights.

    Raises:
        ModelError: it cannot be read, or graphmode cannot run it.
        BackendError: the device is not there.
    """
    return read_model(
        model,
        device=get_backend(options.device).device,
        dtype=resolve_dtype(options.dtype),
        load_format=options.load_format,
        trust_remote_code=options.trust_remote_code,
        generation_config=options.generation_folder,
    )


def load_text(model: str | Path, options: EngineOptions) -> ModelText:
    """Load of a model what turns prompts into tokens and tokens into text, without its weights.

    Raises:
        ModelError: it cannot be read, or graphmode cannot run it.
        BackendError: the device is not there.
    """
    return ModelText(read_files(model, options), options)
