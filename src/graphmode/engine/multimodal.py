"""The images and videos of a prompt: which tokens stand for which of their parts, and where these tokens lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Literal

import torch

from graphmode.errors import InputError
from graphmode.models.hf.grid_positions import grid_positions
from graphmode.models.hf.vision import VisionLayout

Kind = Literal["image", "video"]
# Of the tokens that stand for them, as transformers numbers them; text is 0.
TOKEN_TYPES: Mapping[Kind, int] = {"image": 1, "video": 2}


@dataclass(frozen=True, eq=False)
class VisionItem:
    """An image or a video, as the model's processor prepared it.

    Attributes:
        kind: which of the two.
        pixels: ``[patches, patch_size]`` on the host, in the tower's dtype.
        grid: patches in time, height and width.
        seconds_per_grid: time between two steps of the grid in time; None where the model does not ask for it.
        digest: of all of the above.
    """

    kind: Kind
    pixels: torch.Tensor
    grid: tuple[int, int, int]
    seconds_per_grid: float | None = None
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(repr((self.kind, self.grid, self.seconds_per_grid)).encode(), digest_size=16)
        digest.update(self.pixels.contiguous().view(torch.uint8).numpy().data)
        object.__setattr__(self, "digest", digest.digest())


@dataclass(frozen=True)
class Span:
    """Tokens in a row that stand for parts of one item.

    Attributes:
        start: the first of them in the prompt.
        end: the one after the last.
        item: what they stand for.
        first_unit: the part that the first of them stands for; the others follow.
    """

    start: int
    end: int
    item: VisionItem
    first_unit: int


@dataclass(frozen=True, eq=False)
class VisionPrompt:
    """The images of a prompt, and the positions of its tokens.

    Attributes:
        spans: in the order of the tokens.
        positions: int64 ``[prompt tokens, 3]``, on the host.
    """

    spans: tuple[Span, ...]
    positions: torch.Tensor

    @cached_property
    def delta(self) -> tuple[int, ...]:
        """What a generated token's position is beyond its index, in each coordinate."""
        return tuple((self.positions[-1] + 1 - len(self.positions)).tolist())

    @cached_property
    def contents(self) -> list[tuple[int, int, bytes]]:
        """What the tokens of each span stand for, by digest: ``(start, end, digest)``."""
        return [(span.start, span.end, span.item.digest) for span in self.spans]

    def spans_in(self, start: int, end: int) -> list[Span]:
        """Return the spans that have tokens from ``start`` to ``end - 1``."""
        return [span for span in self.spans if span.start < end and start < span.end]


def make_item(
    layout: VisionLayout,
    name: str,
    kind: Kind,
    pixels: torch.Tensor,
    grid: Sequence[int],
    seconds_per_grid: float | None = None,
) -> VisionItem:
    """Return an item.

    Args:
        layout: the model's.
        name: of the item, for errors: ``"image 2"``.
        kind: image or video.
        pixels: ``[patches, patch_size]``, floats.
        grid: patches in time, height and width, positive.
        seconds_per_grid: as of :class:`VisionItem`.

    Raises:
        InputError: pixels and grid do not fit each other or the tower, or a pixel is no number.
    """
    frames, height, width = (int(size) for size in grid)
    if height % layout.merge_size or width % layout.merge_size:
        raise InputError(
            f"the grid of {name} is {[frames, height, width]}; its height and width must be multiples of "
            f"{layout.merge_size}, the side of the patches that are merged"
        )
    if tuple(pixels.shape) != (frames * height * width, layout.patch_size):
        raise InputError(
            f"the pixels of {name} have shape {tuple(pixels.shape)}; its grid {[frames, height, width]} asks for "
            f"{(frames * height * width, layout.patch_size)}"
        )
    pixels = pixels.detach().to("cpu", layout.dtype)
    if not pixels.isfinite().all():
        raise InputError(f"the pixels of {name} hold NaN or infinity in {layout.dtype}; give finite numbers")
    return VisionItem(kind, pixels, (frames, height, width), seconds_per_grid)


def make_vision_prompt(
    layout: VisionLayout | None, token_ids: Sequence[int], items: Sequence[VisionItem]
) -> VisionPrompt | None:
    """Find the items' tokens in a prompt. None where it has no items and no placeholders.

    Args:
        layout: the model's; None where it takes text alone.
        token_ids: the prompt, every item's placeholder repeated for each of its tokens.
        items: images in the order of their placeholders, and videos in the order of theirs.

    Raises:
        InputError: items and placeholders do not fit each other, or the model takes no images.
    """
    if layout is None:
        if items:
            raise InputError(f"the prompt has an {items[0].kind}, but the model takes text alone")
        return None
    types = token_types(layout, token_ids)
    of_kind: dict[Kind, list[VisionItem]] = {
        kind: [item for item in items if item.kind == kind] for kind in TOKEN_TYPES
    }
    spans: list[Span] = []
    for kind, token_type in TOKEN_TYPES.items():
        units = [layout.units(item.pixels) for item in of_kind[kind]]
        found = types.count(token_type)
        if found != sum(units):
            token = layout.image_token_id if kind == "image" else layout.video_token_id
            raise InputError(
                f"the prompt has {found} placeholders of {kind}s (token {token}); its {len(units)} {kind}s need "
                f"{sum(units)}, {units or 'none'}. Give as many {kind}s as the prompt names"
            )
        spans += _spans(types, token_type, of_kind[kind], units)
    if not spans:
        return None
    seconds = [item.seconds_per_grid for item in of_kind["video"]]
    positions = grid_positions(
        layout.model,
        token_ids,
        types,
        _grids(of_kind["image"]),
        _grids(of_kind["video"]),
        None if None in seconds else [float(value) for value in seconds if value is not None] or None,
    )
    return VisionPrompt(tuple(sorted(spans, key=lambda span: span.start)), positions)


def token_types(layout: VisionLayout, token_ids: Sequence[int]) -> list[int]:
    """Return what each token stands for, as in ``TOKEN_TYPES``; 0 is text."""
    placeholders = {layout.image_token_id: 1, layout.video_token_id: 2}
    types = [placeholders.get(token, 0) for token in token_ids]
    if layout.video_bounds is not None:
        start, end = layout.video_bounds
        in_video = False
        for at, token in enumerate(token_ids):
            in_video = token == start or (in_video and token != end)
            if in_video and types[at] == 1:
                types[at] = 2
    return types


def _spans(types: Sequence[int], token_type: int, items: Sequence[VisionItem], units: Sequence[int]) -> list[Span]:
    """Cut the runs of placeholders where an item ends, and say which parts they stand for."""
    spans: list[Span] = []
    index = done = 0
    for is_run, tokens in groupby(range(len(types)), lambda token: types[token] == token_type):
        run = list(tokens)
        at, end = run[0], run[-1] + 1
        while is_run and at < end:
            count = min(end - at, units[index] - done)
            spans.append(Span(at, at + count, items[index], done))
            at, done = at + count, done + count
            if done == units[index]:
                index, done = index + 1, 0
    return spans


def _grids(items: Sequence[VisionItem]) -> torch.Tensor | None:
    return torch.tensor([item.grid for item in items]) if items else None
