"""The vision tower as graphs: what transformers' own whole run gives, whatever padding holds."""

from pathlib import Path

import pytest
import torch

from graphmode.errors import ModelError
from graphmode.graph import GraphRunner, Input
from graphmode.models.hf.dry_run import check_features_apart
from graphmode.models.hf.vision import VISION_ATTENTION_NAME, VisionTower
from graphmode.models.loader import load_model, read_model
from tests.multimodal import GLM, PATCH, TYPES, make_model, save_model

pytestmark = pytest.mark.versions

GRIDS = torch.tensor([[1, 4, 6], [2, 8, 4], [1, 2, 10]])


def runner(tower: VisionTower, inputs: tuple[Input, ...], device: str = "cpu") -> GraphRunner:
    axes = {"patches": lambda units: units * tower.patches_per_unit}
    options = {"output_axes": [("units", None, None)], "backend": device, "strict": True}
    return GraphRunner(tower.forward, inputs, [30], axes=axes, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_replay_is_transformers_and_bitwise_eager_whatever_padding_holds(model_type: str, device: str) -> None:
    model = make_model(model_type).to(device)
    pixels = torch.randn(int(GRIDS.prod(-1).sum()), PATCH)
    grids = GRIDS
    if model_type in GLM:  # which hands its tower the frames of a video one by one
        grids = torch.tensor([[1, height, width] for frames, height, width in GRIDS.tolist() for _ in range(frames)])
    with torch.inference_mode():
        whole = model.base_model.visual(pixels.to(device), grid_thw=grids.to(device), return_dict=True)
    levels = torch.stack([whole.pooler_output, *(getattr(whole, "deepstack_features", None) or ())], 1)
    tower = VisionTower(model)
    values = tower.host_inputs(pixels, GRIDS)
    results = []
    # What tells padding apart, the lengths 0 and the index -1, is its contract; the rest may be anything.
    for garbage in ({}, {"pixels": float("nan"), "position_ids": 10**6, "interp_weights": float("inf")}):
        inputs = tuple(Input(i.name, i.dtype, i.shape, garbage.get(i.name, i.padding)) for i in tower.inputs)
        graphs = runner(tower, inputs, device)
        features = graphs(own=True, **values)
        assert torch.equal(features, graphs.run_eagerly(graphs.keys[0], **values))
        results.append(features)
    assert torch.equal(*results)
    tolerance = 1e-4 if device == "cpu" else 2e-3
    torch.testing.assert_close(results[0], levels, rtol=tolerance, atol=tolerance)
    assert levels.shape[1] == tower.levels == (3 if model_type.startswith("qwen3") else 1)


def test_a_tower_that_does_more_than_is_known_is_refused() -> None:
    """One that adds to features by the images' sizes gives other features when it runs split."""
    model = make_model("qwen3_vl")
    original = model.base_model.visual.merger.forward
    sizes: list[int] = []
    model.base_model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(0 if kwargs["grid_thw"] is None else 1), with_kwargs=True
    )
    model.base_model.visual.merger.forward = lambda x: original(x) + sizes[-1]
    with pytest.raises(ModelError, match="more from the images' sizes"):
        VisionTower(model)


def test_a_tower_whose_code_fails_is_refused_with_the_reason_and_not_the_error_alone() -> None:
    """One that reads the images' sizes where graphmode hands it none; and one that transformers itself cannot run."""
    model = make_model("qwen2_5_vl")
    blocks = model.base_model.visual.blocks
    model.base_model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: blocks.__setattr__("sizes", kwargs["grid_thw"]), with_kwargs=True
    )
    hook = blocks[0].register_forward_pre_hook(lambda module, args: (args[0] + blocks.sizes.shape[1],))
    with pytest.raises(
        ModelError, match=r"more from the images' sizes than graphmode knows \(AttributeError: 'NoneType'"
    ):
        VisionTower(model)
    hook.remove()
    blocks[0].register_forward_pre_hook(lambda module, args: (args[0][:, 1:],))
    with pytest.raises(ModelError, match=r"transformers cannot run its vision tower on packed patches \(RuntimeError"):
        VisionTower(model)


def test_features_that_reach_other_tokens_are_refused() -> None:
    model = make_model("qwen2_5_vl")
    tower = VisionTower(model)
    arguments = tower.embed(*tower.spoiled_features())
    model.set_attn_implementation("eager")
    check_features_apart(model, arguments)
    model.base_model.language_model.layers[0].register_forward_pre_hook(lambda _, args: (args[0].cumsum(1),))
    with pytest.raises(ModelError, match="reach tokens that do not stand for it"):
        check_features_apart(model, arguments)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_loaded_model_has_its_tower_and_our_attention(tmp_path: Path, model_type: str) -> None:
    save_model(model_type, tmp_path)
    loaded = load_model(read_model(tmp_path, device=torch.device("cpu"), dtype="auto"))
    assert loaded.vision is not None
    assert loaded.vision.patch_size == PATCH
    assert loaded.model.base_model.visual.config._attn_implementation == VISION_ATTENTION_NAME
    assert loaded.model.base_model.language_model.config._attn_implementation == "graphmode"
    assert (
        load_model(read_model(tmp_path, device=torch.device("cpu"), dtype=torch.bfloat16)).vision.dtype
        == torch.bfloat16
    )
