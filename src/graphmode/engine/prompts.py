"""Prompts as users give them: texts or tokens, with images and videos raw or as the model's processor prepared them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, TypedDict, cast

import numpy as np
import torch
from transformers import AutoProcessor

from graphmode.engine import aliases, checks
from graphmode.engine.multimodal import Kind, VisionItem, VisionPrompt, make_item, make_vision_prompt
from graphmode.graph.errors import InputError
from graphmode.models.loader import LoadedModel
from graphmode.models.transformers_versions import AutoImageProcessor


class PromptParts(TypedDict, total=False):
    """A prompt given as token ids, or with images or videos.

    The text names each image by the model's placeholder, as its chat template does. Token ids may have one placeholder
    for an image or as many as it takes; beside what is prepared already, as many as it takes.

    Attributes:
        prompt: the text; or
        prompt_token_ids: its tokens, which count where both are given.
        multi_modal_data: ``{"image": an image or a list, "video": a video or a list}``: what transformers' processors
            take, such as PIL images and, for a video, a list of frames.
        mm_processor_kwargs: for the model's processor, for example ``{"size": {...}}``.
        pixel_values: what the processor makes of all images, ``[patches, patch_size]``.
        image_grid_thw: integers ``[images, 3]``.
        pixel_values_videos: of all videos.
        video_grid_thw: integers ``[videos, 3]``.
        second_per_grid_ts: ``[videos]``, where the model's processor gives it.
    """

    prompt: str
    prompt_token_ids: Sequence[int]
    multi_modal_data: Mapping[str, Any]
    mm_processor_kwargs: Mapping[str, Any]
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    pixel_values_videos: torch.Tensor
    video_grid_thw: torch.Tensor
    second_per_grid_ts: Sequence[float]


Prompt = str | PromptParts | Sequence[int]
"""A text, a prompt in parts, or token ids."""

_KINDS = "a text, a list of token ids, or {'prompt': text} or {'prompt_token_ids': [...]} with images"

_PREPARED: Mapping[Kind, tuple[str, str]] = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


def as_prompts(prompts: object) -> list[str | PromptParts]:
    """Return one prompt or several as a list of texts and prompts in parts.

    Raises:
        InputError: a prompt is none of these.
    """
    if isinstance(prompts, (str, Mapping)) or _is_tokens(prompts):
        return [_as_prompt("the prompt", prompts)]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, bytearray, Set)):
        raise checks.unfit("prompts", prompts, f"a prompt or a list of prompts: {_KINDS}")
    return [_as_prompt(f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)]


def _as_prompt(name: str, prompt: Any) -> str | PromptParts:
    if isinstance(prompt, str):
        return checks.text(name, prompt)
    if isinstance(prompt, Mapping):
        return cast("PromptParts", aliases.named("a prompt", prompt, list(PromptParts.__annotations__), aliases.PROMPT))
    if isinstance(prompt, (list, tuple)) or _is_tokens(prompt):
        return {"prompt_token_ids": checks.token_ids(name, prompt)}
    raise checks.unfit(name, prompt, _KINDS)


def _is_tokens(prompt: Any) -> bool:
    """Return whether it is the tokens of one prompt: integers, in a list, a range or a tensor."""
    if isinstance(prompt, (np.ndarray, torch.Tensor)):
        return prompt.ndim == 1
    if isinstance(prompt, (list, tuple)):
        return bool(prompt) and all(map(checks.is_integer, prompt))
    return isinstance(prompt, range)


class PromptReader:
    """Reads prompts for one model, whose image processor is loaded when an image first comes."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def read(self, prompt: str | PromptParts) -> tuple[Sequence[int], VisionPrompt | None]:
        """Return a prompt's tokens, placeholders repeated, and its images.

        Raises:
            InputError: it is none, or its images do not fit it or the model.
        """
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        token_ids, items = self._read(prompt)
        return token_ids, make_vision_prompt(self._loaded, token_ids, items)

    def _read(self, prompt: PromptParts) -> tuple[Sequence[int], list[VisionItem]]:
        token_ids: Sequence[int]
        text = prompt.get("prompt")
        if prompt.get("prompt_token_ids") is not None:
            token_ids, text = checks.token_ids("prompt_token_ids", prompt["prompt_token_ids"]), None
        elif text is not None:
            token_ids = self._tokens(text)
        else:
            raise InputError(
                f"a prompt holds {sorted(prompt)}; give a text as 'prompt' or tokens as 'prompt_token_ids'"
            )
        if len(prompt) == 1:
            return token_ids, []
        media = {kind: _as_list(media) for kind, media in (prompt.get("multi_modal_data") or {}).items()}
        if unknown := sorted(media.keys() - _PREPARED.keys()):
            raise InputError(f"multi_modal_data holds {unknown}; it may hold image and video")
        media = {kind: entries for kind, entries in media.items() if entries}
        if not media:
            items = [item for kind in _PREPARED for item in self._prepared(kind, prompt)]
            return token_ids, items
        if given := sorted(prompt.keys() & {name for names in _PREPARED.values() for name in names}):
            raise InputError(f"a prompt holds multi_modal_data and {given}; give images raw or prepared, not both")
        if self._loaded.vision is None:
            raise InputError(f"the prompt has {' and '.join(sorted(media))}, but the model takes text alone")
        options = prompt.get("mm_processor_kwargs") or {}
        if "video" in media:
            return self._process_videos(text, media, options)
        prepared = _call(self._image_processor, images=media["image"], return_tensors="pt", **options)
        items = self._prepared("image", prepared)
        return self._repeat_placeholders(token_ids, items), items

    def _process_videos(
        self, text: str | None, media: Mapping[str, list[Any]], options: Mapping[str, Any]
    ) -> tuple[list[int], list[VisionItem]]:
        """Let the model's whole processor do it: some write the time of each frame into the text."""
        if text is None:
            raise InputError(
                "a prompt of tokens holds a raw video, whose text the model's processor must write; give the prompt as "
                "text, or the video prepared, as pixel_values_videos and video_grid_thw"
            )
        prepared = _call(
            self._processor,
            text=[text],
            images=media.get("image"),
            videos=media["video"],
            return_tensors="pt",
            **options,
        )
        items = [item for kind in _PREPARED for item in self._prepared(kind, prepared)]
        return prepared["input_ids"][0].tolist(), items

    def _prepared(self, kind: Kind, values: Mapping[str, Any]) -> list[VisionItem]:
        """Return the items of a kind that are prepared in ``values``: the prompt, or what a processor returned."""
        pixels, grids = (values.get(name) for name in _PREPARED[kind])
        if pixels is None and grids is None:
            return []
        if self._loaded.vision is None:
            raise InputError(f"the prompt has a {kind}, but the model takes text alone")
        names = " and ".join(_PREPARED[kind])
        if not isinstance(pixels, torch.Tensor) or grids is None:
            raise InputError(f"prepared {kind}s are tensors of {names}; the prompt holds {sorted(values)}")
        grids = torch.as_tensor(grids)
        if pixels.dim() != 2 or grids.dim() != 2 or grids.shape[1] != 3:
            raise InputError(
                f"{names} have shapes {tuple(pixels.shape)} and {tuple(grids.shape)}; they must be [patches, "
                f"patch_size] and [{kind}s, 3]"
            )
        if grids.is_floating_point() or (grids < 1).any():
            raise InputError(f"{names.split()[-1]} is {grids.tolist()}; it must hold positive integers")
        patches = grids.prod(-1).tolist()
        if sum(patches) != len(pixels):
            raise InputError(
                f"{names.split()[0]} holds {len(pixels)} patches; {names.split()[-1]} {grids.tolist()} asks for "
                f"{sum(patches)}"
            )
        seconds = values.get("second_per_grid_ts") if kind == "video" else None
        each = [None] * len(patches) if seconds is None else [float(value) for value in seconds]
        if len(each) != len(patches):
            raise InputError(f"second_per_grid_ts holds {len(each)} numbers; there are {len(patches)} videos")
        return [
            make_item(self._loaded.vision, kind, part, grid, second)
            for part, grid, second in zip(pixels.split(patches), grids.tolist(), each, strict=True)
        ]

    def _repeat_placeholders(self, token_ids: Sequence[int], items: Sequence[VisionItem]) -> Sequence[int]:
        """Repeat the placeholder of each image for each of its tokens; leave a prompt that has them all."""
        tower = self._loaded.vision
        assert tower is not None
        units = [len(item.pixels) // tower.patches_per_unit for item in items]
        if token_ids.count(tower.image_token_id) != len(items):
            return token_ids
        counts = iter(units)
        return [
            token for one in token_ids for token in ([one] * next(counts) if one == tower.image_token_id else [one])
        ]

    def _tokens(self, text: Any) -> list[int]:
        if self._loaded.tokenizer is None:
            raise InputError("the model comes without a tokenizer; give prompts as {'prompt_token_ids': [...]}")
        token_ids = self._loaded.tokenizer(checks.text("the prompt", text))["input_ids"]
        assert isinstance(token_ids, list)
        return token_ids

    @cached_property
    def _image_processor(self) -> Any:
        _require("PIL", "images", "pip install 'graphmode[vision]'")
        return self._loaded.checkpoint.read(AutoImageProcessor.from_pretrained, "the processor of images")

    @cached_property
    def _processor(self) -> Any:
        _require("PIL", "videos", "pip install 'graphmode[vision]'")
        _require(
            "torchvision", "videos", "pip install torchvision, in the version made for the torch that is installed"
        )
        return self._loaded.checkpoint.read(AutoProcessor.from_pretrained, "the processor of videos")


def _as_list(media: Any) -> list[Any]:
    """Return a list of images or videos; one alone may be given as it is."""
    if media is None:
        return []
    return list(media) if isinstance(media, (list, tuple)) else [media]


def _require(package: str, what: str, install: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"transformers prepares {what} with {package}, which is not installed; {install}, or give them "
            "prepared (pixel_values and image_grid_thw, or those of videos)"
        )


def _call(processor: Any, **arguments: Any) -> Mapping[str, Any]:
    try:
        prepared: Mapping[str, Any] = processor(**arguments)
    except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
        raise InputError(f"the model's processor cannot prepare them: {type(error).__name__}: {error}") from error
    return prepared
