"""The vision tower: images and frames as embeddings that stand for tokens of a prompt.

transformers computes from the images' sizes, on the host, where patches lie and which attend to each other, and lets a
caller pass that in. So the tower is split: :meth:`VisionTower.host_inputs` computes it, and :meth:`VisionTower.forward`
is a function of tensors alone, which graphs can hold. A tower is accepted if, split, it gives what it gives whole on a
few random patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel, vision_utils

from graphmode.errors import ModelError
from graphmode.graph import Input
from graphmode.ops import segment_attention

# transformers passes cumulative lengths to an attention with "flash" in its name; for others it splits patches on the
# host.
VISION_ATTENTION_NAME = "graphmode_flash_segments"

_DOES_MORE = "its vision tower computes more from the images' sizes than graphmode knows"
_WITHOUT_EFFECT = frozenset({"dropout", "is_causal", "cu_seq_lens_k", "max_length_q", "max_length_k"})


def vision_attention_hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' vision towers call it.

    Args:
        module: the attention module.
        query: ``[1, heads, patches, head_dim]``, rotated.
        key: as ``query``.
        value: as ``query``.
        attention_mask: must be None.
        scaling: of the scores; default ``head_dim ** -0.5``.
        cu_seq_lens_q: int32 ``[segments + 1]``: which patches see each other.
        **kwargs: what has no effect here.

    Returns:
        ``[1, patches, heads, head_dim]``, and no attention weights.

    Raises:
        ModelError: the module asks for something else.
    """
    unknown = sorted(name for name in kwargs.keys() - _WITHOUT_EFFECT if kwargs[name] is not None)
    if attention_mask is not None or cu_seq_lens_q is None or kwargs.get("is_causal") or unknown:
        raise ModelError(f"{type(module).__name__} is not full attention within segments ({unknown})")
    output = segment_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens_q,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return output.unsqueeze(0), None


AttentionInterface.register(VISION_ATTENTION_NAME, vision_attention_hook)


class VisionLayout:
    """How images are cut for a vision tower, and which tokens stand for them. The weights may be missing.

    A *unit* is what stands for one token of the language model: ``patches_per_unit`` patches, merged.

    Attributes:
        model: whose tower it is.
        dtype: of pixels, features and embeddings.
        patches_per_unit: patches that are merged into one token.
        merge_size: their number along each side.
        patch_size: numbers that a patch holds.
        image_token_id: the placeholder of images.
        video_token_id: the placeholder of videos.
        video_bounds: the tokens between which the placeholder of images stands for a video, where the model writes
            videos so (GLM-4.5V); else None.

    Raises:
        ModelError: it is no tower over packed patches.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        base: Any = model.base_model
        visual: Any = getattr(base, "visual", None)
        if visual is None or not hasattr(visual, "patch_embed") or not hasattr(base, "language_model"):
            raise ModelError("its vision part is not a tower over packed patches, as that of Qwen2-VL")
        self.model = model
        self._visual = visual
        self.dtype: torch.dtype = visual.dtype
        self.merge_size: int = visual.spatial_merge_size
        self.patches_per_unit: int = self.merge_size**2
        self.patch_size: int = visual.patch_embed.proj.weight[0].numel()
        self.image_token_id: int = model.config.image_token_id
        self.video_token_id: int = model.config.video_token_id
        start, end = (getattr(model.config, f"video_{end}_token_id", None) for end in ("start", "end"))
        self.video_bounds: tuple[int, int] | None = None if start is None or end is None else (start, end)

    def units(self, pixels: torch.Tensor) -> int:
        """Return for how many tokens pixels ``[patches, patch_size]`` stand."""
        return len(pixels) // self.patches_per_unit


class VisionTower(VisionLayout):
    """The vision part of a model, as a function of tensors.

    Attributes:
        hidden_size: of an embedding.
        levels: embeddings of a unit: the one that stands for the token, and those that the first layers add (Qwen3-VL's
            DeepStack).
        inputs: what :meth:`forward` takes. The bucketed axis is ``units``.

    Raises:
        ModelError: the tower does something that the split does not; why, in words that follow the model's name.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        base: Any = model.base_model
        visual = self._visual
        self._embed = model.get_input_embeddings()
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self._windows = hasattr(visual, "window_size")
        self._interpolates = hasattr(visual, "num_grid_per_side")
        self._reads_sizes = hasattr(visual, "embeddings")
        self.inputs = tuple(self._inputs())
        self.levels = self._check()
        if self.levels > 1:
            base.language_model.register_forward_pre_hook(_add_levels, with_kwargs=True)

    def _inputs(self) -> list[Input]:
        # A padding patch belongs to no segment, so that none sees it; a padding unit stays where it is.
        inputs = [
            Input("pixels", self.dtype, ("patches", self.patch_size), padding=0.0),
            Input("position_ids", torch.int64, ("patches", 2), padding=0),
            Input("segment_lens", torch.int32, ("units",), padding=0),
        ]
        if self._windows:
            inputs += [
                Input("window_index", torch.int64, ("units",), padding=-1),
                Input("window_lens", torch.int32, ("units",), padding=0),
            ]
        if self._interpolates:
            inputs += [
                Input("interp_indices", torch.int64, ("patches", 4), padding=0),
                Input("interp_weights", torch.float32, ("patches", 4), padding=0.0),
            ]
        if self._reads_sizes:
            inputs.append(Input("frame_grids", torch.int64, ("units", 3), padding=1))
        return inputs

    def host_inputs(self, pixels: torch.Tensor, grids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the inputs of :meth:`forward`, on the host.

        Args:
            pixels: ``[patches, patch_size]`` in ``dtype``, as the model's processor makes them.
            grids: int64 ``[images, 3]``: patches of each image or video in time, height and width.
        """
        units = self.units(pixels)
        visual = self._visual
        values = {
            "pixels": pixels,
            "position_ids": vision_utils.get_vision_position_ids(grids, self.merge_size),
            "segment_lens": _lengths(vision_utils.get_vision_cu_seqlens(grids), units),
        }
        if self._windows:
            index, bounds = vision_utils.get_vision_window_index(
                grids, self.merge_size, visual.window_size, visual.patch_size
            )
            values |= {"window_index": index, "window_lens": _lengths(bounds, units)}
        if self._interpolates:
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grids,
                visual.num_grid_per_side,
                mode=visual.interpolation_mode,
                align_corners=visual.interpolation_align_corners,
                spatial_merge_size=self.merge_size,
            )
            values |= {"interp_indices": indices, "interp_weights": weights}
        if self._reads_sizes:
            frames = _frames(grids)
            values["frame_grids"] = pad(frames, (0, 0, 0, units - len(frames)), value=1)
        return values

    def forward(
        self,
        pixels: torch.Tensor,
        position_ids: torch.Tensor,
        segment_lens: torch.Tensor,
        window_index: torch.Tensor | None = None,
        window_lens: torch.Tensor | None = None,
        interp_indices: torch.Tensor | None = None,
        interp_weights: torch.Tensor | None = None,
        frame_grids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the features of patches: the function that is captured. Shapes as in ``inputs``.

        Returns:
            ``[units, levels, hidden_size]`` in ``dtype``; what padding units hold is undefined.
        """
        known: dict[str, Any] = {"position_ids": position_ids, "cu_seqlens": _bounds(segment_lens)}
        known["max_seqlen"] = len(pixels)
        if window_index is not None and window_lens is not None:
            here = torch.arange(len(window_index), device=window_index.device)
            known["window_index"] = torch.where(window_index < 0, here, window_index)
            known["cu_window_seqlens"] = _bounds(window_lens)
            known["max_window_seqlen"] = len(pixels)
        if interp_indices is not None:
            known |= {"interp_indices": interp_indices, "interp_weights": interp_weights}
        if frame_grids is not None:
            # The tower finds a patch's frame by counting those that end before it: a padding patch is beyond the last.
            frame_grids = pad(frame_grids, (0, 0, 0, 1), value=1)
        return _levels(self._visual(pixels, grid_thw=frame_grids, return_dict=True, **known))

    def embed(self, token_ids: torch.Tensor, features: torch.Tensor, visual: torch.Tensor) -> dict[str, Any]:
        """Return what the model takes in place of token ids, where some tokens stand for images.

        Args:
            token_ids: int64 ``[tokens]``.
            features: ``[tokens, levels, hidden_size]``; anything where a token is text.
            visual: bool ``[tokens]``: whether a token stands for a part of an image.
        """
        chosen = visual.unsqueeze(1)
        embeddings = torch.where(chosen, features[:, 0], self._embed(token_ids))
        arguments: dict[str, Any] = {"inputs_embeds": embeddings.unsqueeze(0)}
        if self.levels > 1:
            arguments["feature_levels"] = [
                torch.where(chosen, features[:, level], 0).unsqueeze(0) for level in range(1, self.levels)
            ]
        return arguments

    def spoiled_features(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return arguments of :meth:`embed` for three tokens, of which the second stands for an image that is NaN."""
        device = self._visual.device
        features = torch.zeros((3, self.levels, self.hidden_size), dtype=self.dtype, device=device)
        features[1] = torch.nan
        visual = torch.tensor([False, True, False], device=device)
        return torch.tensor([1, self.image_token_id, 3], device=device), features, visual

    def _check(self) -> int:
        """Run the tower whole and split, on two random grids, and return its levels.

        Raises:
            ModelError: the results differ, or it cannot run.
        """
        side, device = self.merge_size, self._visual.device
        grids = torch.tensor([[1, 6 * side, 5 * side], [2, 2 * side, 3 * side]])
        patches = int(grids.prod(-1).sum())
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(patches, self.patch_size, generator=generator).to(self.dtype)
        # A tower that looks up sizes takes the frames of a video as images of their own.
        of_whole = _frames(grids) if self._reads_sizes else grids
        self._visual.set_attn_implementation("eager")
        with torch.inference_mode(), _refusal("transformers cannot run its vision tower on packed patches"):
            whole = _levels(self._visual(pixels.to(device), grid_thw=of_whole.to(device), return_dict=True))
        # Not by set_attn_implementation, which would look for flash attention's own kernels.
        self._visual.config._attn_implementation = VISION_ATTENTION_NAME
        with torch.inference_mode(), _refusal(_DOES_MORE):
            values = self.host_inputs(pixels, grids)
            split = self.forward(**{name: value.to(device) for name, value in values.items()})
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        if split.shape != whole.shape or not (split - whole).float().norm() <= tolerance * whole.float().norm():
            raise ModelError(_DOES_MORE)
        return whole.shape[1]


@contextmanager
def _refusal(reason: str) -> Iterator[None]:
    """Give the reason why a tower is refused whose code fails."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise ModelError(f"{reason} ({type(error).__name__}: {error})") from error


def _frames(grids: torch.Tensor) -> torch.Tensor:
    """Return the grid of each frame, ``[frames, 3]``, of grids ``[images, 3]``."""
    frames = grids.repeat_interleave(grids[:, 0], 0)
    frames[:, 0] = 1
    return frames


def _levels(output: Any) -> torch.Tensor:
    return torch.stack([output.pooler_output, *(getattr(output, "deepstack_features", None) or ())], 1)


def _lengths(bounds: torch.Tensor, units: int) -> torch.Tensor:
    """Return the lengths between ``bounds``, and zeros up to ``units``, which no number of segments exceeds."""
    lengths = bounds.diff().to(torch.int32)
    return pad(lengths, (0, units - len(lengths)))


def _bounds(lengths: torch.Tensor) -> torch.Tensor:
    return pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))


def _add_levels(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let the first layers add features, by the language model's own arguments for it.

    It picks tokens by a mask, whose count is data. An index of the one batch row picks all of them, and the features of
    text are zero.
    """
    levels = kwargs.pop("feature_levels", None)
    if levels is not None:
        row = torch.zeros(1, dtype=torch.int64, device=levels[0].device)
        kwargs |= {"visual_pos_masks": row, "deepstack_visual_embeds": levels}
    return args, kwargs
