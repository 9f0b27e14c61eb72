"""The images and videos of a prompt, sorted and counted, and the options that the model's processor may get."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphmode.engine.checks import flag, integer, shown, unfit
from graphmode.engine.multimodal import TOKEN_TYPES, Kind
from graphmode.errors import InputError

# What is settled before the processor sees an image, and why a user need not say it.
_SETTLED: Mapping[str, str] = {
    **dict.fromkeys(
        ("images", "videos", "text"), "it is the prompt's own: put images and videos into multi_modal_data"
    ),
    **dict.fromkeys(("return_tensors", "device"), "the engine takes tensors on the host"),
    **dict.fromkeys(("input_data_format", "data_format", "do_convert_rgb"), "images are decoded to RGB before"),
    "do_rescale": "images are decoded to 8 bits, floats from 0 to 1 as well, and scaled by the processor once",
}
# Of a processor of text, images and videos: options of its parts.
PARTS = ("images_kwargs", "videos_kwargs", "text_kwargs", "common_kwargs")


@dataclass(frozen=True)
class MediaLimits:
    """The limits of a prompt's images and videos.

    Attributes:
        images: how many images.
        videos: how many videos.
        pixels: of an image, or of a frame.
        tokens: that the prompt may have; None where nothing limits them.
    """

    images: int = 64
    videos: int = 8
    pixels: int = 2**26
    tokens: int | None = None

    def check_count(self, kind: Kind, count: int) -> None:
        """Check how many images or videos a prompt has.

        Raises:
            InputError: too many.
        """
        most = self.images if kind == "image" else self.videos
        if count > most:
            raise InputError(
                f"the prompt has {count} {kind}s; it may have {most}. Give fewer, or raise max_{kind}s_per_prompt"
            )

    def check_tokens(self, name: str, tokens: int, before: int) -> None:
        """Check that an image's tokens fit into the model's context with those of the images ``before``.

        Raises:
            InputError: they do not.
        """
        if self.tokens is not None and before + tokens > self.tokens:
            raise InputError(
                f"{name} stands for {tokens} tokens{f', beside {before} of those before it' if before else ''}; with "
                f"max_model_len={self.tokens + 1} a prompt may have {self.tokens}. Scale it down, for example by "
                "mm_processor_kwargs={'size': {...}}, or raise max_model_len if the model allows it"
            )


DEFAULT_LIMITS = MediaLimits()


def sorted_media(data: Any) -> dict[Kind, list[Any]]:
    """Return the images and videos of ``multi_modal_data``, each kind that has any as a list.

    A list under ``"image"`` holds images. One under ``"video"`` holds videos where all of it are lists, arrays of
    frames or files; else it is the frames of one.

    Raises:
        InputError: it is no mapping, or holds something else.
    """
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise unfit("multi_modal_data", data, "a dict such as {'image': image} or {'image': [image, image]}")
    if unknown := sorted(shown(name) for name in data if name not in TOKEN_TYPES):
        raise InputError(f"multi_modal_data holds {', '.join(unknown)}; it may hold image and video")
    media: dict[Kind, list[Any]] = {}
    for kind in TOKEN_TYPES:
        entries = data.get(kind)
        if entries is None:
            continue
        one = 3 if kind == "image" else 4
        if len(getattr(entries, "shape", ())) == one + 1:  # an array of them
            entries = list(entries)
        elif not isinstance(entries, (list, tuple)) or (kind == "video" and not all(map(_is_video, entries))):
            entries = [entries]
        if len(entries):
            media[kind] = list(entries)
    return media


def _is_video(entry: Any) -> bool:
    """Return whether an entry of a list is a video by itself, not a frame."""
    return isinstance(entry, (str, Path, list, tuple)) or len(getattr(entry, "shape", ())) == 4


def processor_options(options: Any, known: Collection[str] | None) -> dict[str, Any]:
    """Return ``mm_processor_kwargs``, checked.

    Args:
        options: as given.
        known: what the model's processor knows; None where it does not say.

    Raises:
        InputError: they are no mapping, or hold what is settled already or not known.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise unfit("mm_processor_kwargs", options, "a dict such as {'size': {...}}, or None")
    for name in options:
        if reason := _SETTLED.get(name) if isinstance(name, str) else None:
            raise InputError(f"mm_processor_kwargs holds {name}={shown(options[name])}, but {reason}; leave it out")
        if not isinstance(name, str) or (known is not None and name not in known):
            allowed = sorted(set(known or ()) - _SETTLED.keys())
            raise InputError(
                f"mm_processor_kwargs holds {shown(name)}, which the model's processor does not know; it may hold "
                f"{', '.join(allowed) or 'names of its options'}"
            )
    return dict(options)


def check_whole_patches(name: str, size: tuple[int, int], processor: Any, options: Mapping[str, Any]) -> None:
    """Check that an image which is not resized is cut into whole patches.

    Args:
        name: of the image, for errors.
        size: width and height.
        processor: the model's, of images.
        options: ``mm_processor_kwargs``.

    Raises:
        InputError: it would not be.
    """
    if _is_resized(processor, options):
        return
    patch, merged = (
        integer(of, options.get(of, getattr(processor, of, 1)), least=1) for of in ("patch_size", "merge_size")
    )
    if any(side % (patch * merged) for side in size):
        raise InputError(
            f"{name} is {size[0]} x {size[1]} and is not resized; its sides must be multiples of {patch * merged}, "
            f"{merged} patches of {patch} pixels. Scale it, or leave do_resize out"
        )


def _is_resized(processor: Any, options: Mapping[str, Any]) -> bool:
    if "do_resize" in options:
        return flag("do_resize", options["do_resize"])
    return bool(getattr(processor, "do_resize", True))


def estimated_tokens(size: tuple[int, int], processor: Any, options: Mapping[str, Any]) -> int:
    """Return how many tokens an image will stand for, 0 where the processor does not tell before it works.

    Arguments as of :func:`check_whole_patches`.
    """
    count = getattr(processor, "get_number_of_image_patches", None)
    if count is None or not _is_resized(processor, options):
        return 0
    limits = options.get("size")
    given = dict(options)
    if isinstance(limits, Mapping):
        names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
        given |= {ours: limits[theirs] for theirs, ours in names.items() if theirs in limits}
    try:
        return int(count(size[1], size[0], given) // options.get("merge_size", processor.merge_size) ** 2)
    except Exception:  # what is wrong with the options or the size the processor itself says, when it is called
        return 0
