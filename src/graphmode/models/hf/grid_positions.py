"""Positions of three coordinates, where a token stands in time, height and width, by the model's ``get_rope_index``.

Text advances all three together. The tokens of an image lie on a grid, so text after an image has positions less than
the number of tokens before it. Generated tokens continue from the prompt's last one, as in transformers' ``generate``.
(M-RoPE: Wang et al., Qwen2-VL, https://arxiv.org/abs/2409.12191, section 2.1.)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from graphmode.errors import InputError


def has_grid_positions(model: PreTrainedModel) -> bool:
    """Return whether the model's positions have three coordinates: it takes ``position_ids`` ``[3, 1, tokens]``."""
    return hasattr(model.base_model, "get_rope_index")


def grid_positions(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    token_types: Sequence[int],
    image_grids: torch.Tensor | None,
    video_grids: torch.Tensor | None,
    seconds_per_grid: Sequence[float] | None,
) -> torch.Tensor:
    """Return the positions of a prompt's tokens, int64 ``[tokens, 3]`` on the host.

    Args:
        model: one that :func:`has_grid_positions`.
        token_ids: the prompt, every image's placeholder repeated for each of its tokens.
        token_types: of each token: 0 text, 1 image, 2 video.
        image_grids: int64 ``[images, 3]``: patches in time, height and width; None where there is none.
        video_grids: of the videos.
        seconds_per_grid: between two steps in time of each video, where the model tells videos' speeds apart.

    Raises:
        InputError: the runs of placeholders are not as long as the grids say.
    """
    rope_index: Any = model.base_model.get_rope_index
    known = inspect.signature(rope_index).parameters
    options = {} if seconds_per_grid is None else {"second_per_grid_ts": torch.tensor(seconds_per_grid)}
    try:
        with torch.device("cpu"):
            positions, _ = rope_index(
                input_ids=torch.tensor([token_ids]),
                mm_token_type_ids=torch.tensor([token_types]),
                image_grid_thw=image_grids,
                video_grid_thw=video_grids,
                **{name: value for name, value in options.items() if name in known},
            )
    # What next() and a copy to a slice of another length raise.
    except (StopIteration, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            "the prompt's placeholders do not lie as its images and videos need: each one's run of placeholders must "
            f"stand alone between other tokens, as the model's processor puts it ({type(error).__name__}: {error})"
        ) from error
    return torch.as_tensor(positions)[:, 0].t().contiguous()
