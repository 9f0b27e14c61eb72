"""Prompts as users give them: texts or tokens, with images and videos raw or as the model's processor prepared them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray

from graphmode.engine import aliases, checks
from graphmode.engine.checks import shown
from graphmode.engine.media import (
    DEFAULT_LIMITS,
    PARTS,
    MediaLimits,
    check_whole_patches,
    estimated_tokens,
    processor_options,
    sorted_media,
)
from graphmode.engine.multimodal import Kind, VisionItem, VisionPrompt, make_item, make_vision_prompt
from graphmode.errors import InputError
from graphmode.models.loader import ModelFiles


class PromptParts(TypedDict, total=False):
    """A prompt given as token ids, or with images or videos.

    The text names each image by the model's placeholder, as its chat template does. Token ids may have one placeholder
    for an image or as many as it takes; with what is prepared already, as many as it takes.

    Attributes:
        prompt: the text; or
        prompt_token_ids: its tokens, which count where both are given.
        multi_modal_data: ``{"image": an image or a list, "video": a video or a list}``. An image is what
            :func:`~graphmode.engine.images.read_image` takes, a video a list of such frames.
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
    # A tensor of no dimension says that it can be iterated.
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, bytearray, Set)) or _is_number(prompts):
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


def _is_number(prompt: Any) -> bool:
    return isinstance(prompt, (np.ndarray, torch.Tensor)) and prompt.ndim == 0


def _is_tokens(prompt: Any) -> bool:
    """Return whether it is the tokens of one prompt: integers, in a list, a range or a tensor."""
    if isinstance(prompt, (np.ndarray, torch.Tensor)):
        return prompt.ndim == 1
    if isinstance(prompt, (list, tuple)):
        return bool(prompt) and all(map(checks.is_integer, prompt))
    return isinstance(prompt, range)


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts for one model, whose image processor is loaded when an image first comes.

    Attributes:
        files: the model's.
        limits: what a prompt may hold beside its text.
    """

    files: ModelFiles
    limits: MediaLimits = DEFAULT_LIMITS

    def read(self, prompt: str | PromptParts) -> tuple[Sequence[int], VisionPrompt | None]:
        """Return a prompt's tokens, placeholders repeated, and its images.

        Raises:
            InputError: it is none, or its images do not fit it or the model.
        """
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        token_ids, items = self._read(prompt)
        return token_ids, make_vision_prompt(self.files.vision, token_ids, items)

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
        media = sorted_media(prompt.get("multi_modal_data"))
        if not media:
            processor_options(prompt.get("mm_processor_kwargs"), None)
            items = [item for kind in _PREPARED for item in self._prepared(kind, prompt)]
            return token_ids, items
        if given := sorted(prompt.keys() & {name for names in _PREPARED.values() for name in names}):
            raise InputError(f"a prompt holds multi_modal_data and {given}; give images raw or prepared, not both")
        if self.files.vision is None:
            raise InputError(f"the prompt has {' and '.join(sorted(media))}, but the model takes text alone")
        for kind, entries in media.items():
            self.limits.check_count(kind, len(entries))
        if "video" in media:
            return self._process_videos(text, media, prompt.get("mm_processor_kwargs"))
        items = self._process_images(media["image"], prompt.get("mm_processor_kwargs"))
        return self._repeat_placeholders(token_ids, items), items

    def _process_images(self, sources: Sequence[Any], given: Any) -> list[VisionItem]:
        """Decode images and let the model's processor prepare each, so that a fault names its image."""
        processor, tower = self._image_processor, self.files.vision
        assert tower is not None
        options = processor_options(given, _known_options(processor))
        items: list[VisionItem] = []
        tokens = 0
        for number, image in enumerate(self._decoded(sources), 1):
            name, size = f"image {number}", (image.shape[1], image.shape[0])
            check_whole_patches(name, size, processor, options)
            self.limits.check_tokens(name, estimated_tokens(size, processor, options), tokens)
            name_and_size = f"{name} ({size[0]} x {size[1]})"
            prepared = _call(name_and_size, processor, images=_as_pil(image), return_tensors="pt", **options)
            items += self._prepared("image", prepared, before=items)
            tokens += tower.units(items[-1].pixels)
        return items

    def _decoded(self, sources: Sequence[Any]) -> Iterator[NDArray[np.uint8]]:
        from graphmode.engine.images import read_image

        return (read_image(source, f"image {at}", self.limits.pixels) for at, source in enumerate(sources, 1))

    def _process_videos(
        self, text: str | None, media: Mapping[Kind, list[Any]], given: Any
    ) -> tuple[list[int], list[VisionItem]]:
        """Let the model's whole processor do it: some write the time of each frame into the text."""
        if text is None:
            raise InputError(
                "a prompt of tokens holds a raw video, whose text the model's processor must write; give the prompt as "
                "text, or the video prepared, as pixel_values_videos and video_grid_thw"
            )
        processor = self._processor
        from graphmode.engine.images import read_video

        options = processor_options(given, _known_options(processor))
        videos = [
            # A file is read by the processor, which takes from it the frames that it wants.
            str(video) if isinstance(video, (str, Path)) else read_video(video, f"video {at}", self.limits.pixels)
            for at, video in enumerate(media["video"], 1)
        ]
        images = [_as_pil(image) for image in self._decoded(media.get("image", []))]
        prepared = _call(
            "the prompt with its videos",
            processor,
            text=[text],
            images=images or None,
            videos=videos,
            return_tensors="pt",
            **options,
        )
        items = [item for kind in _PREPARED for item in self._prepared(kind, prepared)]
        return prepared["input_ids"][0].tolist(), items

    def _prepared(self, kind: Kind, values: Mapping[str, Any], before: Sequence[VisionItem] = ()) -> list[VisionItem]:
        """Return the items of a kind that are prepared in ``values``: the prompt, or what a processor returned.

        Args:
            kind: which of the two.
            values: by the names of :class:`PromptParts`.
            before: the items of that kind which the prompt has before these.
        """
        pixels, grids = (values.get(name) for name in _PREPARED[kind])
        if pixels is None and grids is None:
            return []
        tower = self.files.vision
        if tower is None:
            raise InputError(f"the prompt has a {kind}, but the model takes text alone")
        names = _PREPARED[kind]
        if not isinstance(pixels, torch.Tensor) or pixels.layout != torch.strided or grids is None:
            raise InputError(
                f"prepared {kind}s are tensors of {' and '.join(names)}; the prompt holds {sorted(values)}"
            )
        if not pixels.is_floating_point():
            raise InputError(
                f"{names[0]} has dtype {pixels.dtype}; it must be floats, as the model's processor makes them"
            )
        grids = _grids(names[1], grids)
        if pixels.dim() != 2 or grids.dim() != 2 or grids.shape[1] != 3:
            raise InputError(
                f"{' and '.join(names)} have shapes {tuple(pixels.shape)} and {tuple(grids.shape)}; they must be "
                f"[patches, patch_size] and [{kind}s, 3]"
            )
        if (grids < 1).any():
            raise InputError(f"{names[1]} is {shown(grids.tolist())}; it must hold positive integers")
        patches = [prod(grid) for grid in grids.tolist()]
        if sum(patches) != len(pixels):
            raise InputError(
                f"{names[0]} holds {len(pixels)} patches; {names[1]} {shown(grids.tolist())} asks for {sum(patches)}"
            )
        self.limits.check_count(kind, len(before) + len(patches))
        seconds = values.get("second_per_grid_ts") if kind == "video" else None
        each = [None] * len(patches) if seconds is None else _seconds(seconds)
        if len(each) != len(patches):
            raise InputError(f"second_per_grid_ts holds {len(each)} numbers; there are {len(patches)} videos")
        items: list[VisionItem] = []
        tokens = sum(tower.units(item.pixels) for item in before)
        for part, grid, second in zip(pixels.split(patches), grids.tolist(), each, strict=True):
            name = f"{kind} {len(before) + len(items) + 1}"
            self.limits.check_tokens(name, tower.units(part), tokens)
            items.append(make_item(tower, name, kind, part, grid, second))
            tokens += tower.units(part)
        return items

    def _repeat_placeholders(self, token_ids: Sequence[int], items: Sequence[VisionItem]) -> Sequence[int]:
        """Repeat the placeholder of each image for each of its tokens; leave a prompt that has them all."""
        tower = self.files.vision
        assert tower is not None
        units = [tower.units(item.pixels) for item in items]
        if token_ids.count(tower.image_token_id) != len(items):
            return token_ids
        counts = iter(units)
        return [
            token for one in token_ids for token in ([one] * next(counts) if one == tower.image_token_id else [one])
        ]

    def _tokens(self, text: Any) -> list[int]:
        if self.files.tokenizer is None:
            raise InputError("the model comes without a tokenizer; give prompts as {'prompt_token_ids': [...]}")
        token_ids = self.files.tokenizer(checks.text("the prompt", text))["input_ids"]
        assert isinstance(token_ids, list)
        return token_ids

    @property
    def _image_processor(self) -> Any:
        _require("PIL", "images", "pip install 'graphmode[vision]'")
        return self.files.image_processor

    @property
    def _processor(self) -> Any:
        _require("PIL", "videos", "pip install 'graphmode[vision]'")
        _require(
            "torchvision", "videos", "pip install torchvision, in the version made for the torch that is installed"
        )
        return self.files.processor


def _grids(name: str, given: Any) -> torch.Tensor:
    try:
        grids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is {shown(given)}; it must be integers in rows of three ({error})") from error
    if grids.is_floating_point() or grids.is_complex() or grids.dtype == torch.bool:
        raise InputError(f"{name} has dtype {grids.dtype}; it must hold positive integers")
    return grids.to("cpu", torch.int64)


def _seconds(seconds: Any) -> list[float]:
    try:
        given = [float(value) for value in seconds]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"second_per_grid_ts is {shown(seconds)}; it must be a list of numbers ({error})") from error
    if not all(0 < value < inf for value in given):
        raise InputError(f"second_per_grid_ts is {shown(seconds)}; each must be a positive number of seconds")
    return given


def _as_pil(image: NDArray[np.uint8]) -> Any:
    """Return 8-bit RGB as what no processor takes for another layout, whatever its size."""
    from PIL import Image

    return Image.fromarray(image)


def _known_options(processor: Any) -> set[str] | None:
    """Return the options that a processor knows; None where it does not say."""
    parts = [getattr(processor, part, None) for part in ("image_processor", "video_processor")]
    known = [getattr(part, "valid_kwargs", None) for part in (processor, *parts)]
    names = {name for each in known if each is not None for name in each.__annotations__}
    return names | (set(PARTS) if any(parts) else set()) or None


def _require(package: str, what: str, install: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"transformers prepares {what} with {package}, which is not installed; {install}, or give them "
            "prepared (pixel_values and image_grid_thw, or those of videos)"
        )


def _call(name: str, processor: Any, **arguments: Any) -> Mapping[str, Any]:
    """Let a processor prepare an image or a prompt. What it raises for one that it cannot take is not told anywhere."""
    try:
        prepared: Mapping[str, Any] = processor(**arguments)
    except Exception as error:
        raise InputError(f"{name}: the model's processor cannot prepare it: {type(error).__name__}: {error}") from error
    return prepared
