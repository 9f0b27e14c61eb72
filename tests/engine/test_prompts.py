"""Prompts with images: raw ones go through transformers' processors, prepared ones as they are, bad ones nowhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graphmode import LLM, SamplingParams
from graphmode.engine import prompts
from graphmode.engine.multimodal import VisionItem, make_vision_prompt
from graphmode.graph import InputError
from graphmode.models.loader import LoadedModel, load_model
from tests.multimodal import IMAGE, PATCH, VIDEO, VISION_END, VISION_START, make_prompt, save_model

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters, with the placeholders."""
    special = {
        "<|image_pad|>": IMAGE,
        "<|video_pad|>": VIDEO,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
    }
    vocabulary = {chr(code): code - 31 for code in range(32, 127)} | {"<unk>": 0} | special
    vocabulary |= {f"<{token}>": token for token in range(200) if token not in vocabulary.values()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(special))
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    save_model("qwen2_5_vl", folder)
    save_tokenizer(folder)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"size": {"shortest_edge": 64, "longest_edge": 1024}}
    processor = {"image_processor_type": "Qwen2VLImageProcessor", **sizes, **limits}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 128}
    return LLM(folder, device="cpu", dtype="float32", enforce_eager=True, **options)


def test_raw_images_are_prepared_by_transformers_own_processor(llm: LLM) -> None:
    pil = pytest.importorskip("PIL.Image")
    from graphmode.models.transformers_versions import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(llm.engine.model)
    except ImportError as error:
        pytest.skip(f"this transformers prepares no image here: {error}")
    generator = torch.Generator().manual_seed(0)
    images = [
        pil.fromarray(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).numpy())
        for size in ((20, 30, 3), (40, 30, 3))
    ]
    text = f"see {PLACEHOLDER} and {PLACEHOLDER}. what?"
    (output,) = llm.generate({"prompt": text, "multi_modal_data": {"image": images}}, GREEDY)
    assert output.prompt == text
    prepared = processor(images=images, return_tensors="pt")
    units = (prepared["image_grid_thw"].prod(-1) // 4).tolist()
    assert [output.prompt_token_ids.count(token) for token in (IMAGE, VISION_START)] == [sum(units), 2]
    short = llm.engine.loaded.tokenizer(text)["input_ids"]  # type: ignore[misc]
    for prompt in (
        {"prompt_token_ids": short, "multi_modal_data": {"image": images}},
        {"prompt_token_ids": output.prompt_token_ids, "multi_modal_data": {"image": tuple(images)}},
        {"prompt_token_ids": output.prompt_token_ids, **prepared},
    ):
        (other,) = llm.generate(prompt, GREEDY)
        assert other.prompt_token_ids == output.prompt_token_ids
        assert other.outputs[0].token_ids == output.outputs[0].token_ids
    options = {"size": {"shortest_edge": 64, "longest_edge": 256}}
    one = {"prompt": PLACEHOLDER, "multi_modal_data": {"image": images[1]}}
    (small,) = llm.generate({**one, "mm_processor_kwargs": options}, GREEDY)
    assert len(small.prompt_token_ids) < len(llm.generate(one, GREEDY)[0].prompt_token_ids)


def test_images_are_parts_of_messages(llm: LLM) -> None:
    """A conversation with an image is the prompt that its template renders, with that image."""
    pil = pytest.importorskip("PIL.Image")
    image = pil.fromarray(torch.arange(20 * 30 * 3, dtype=torch.uint8).view(20, 30, 3).numpy())
    template = (
        "{% for part in messages[0].content %}"
        "{{ part.text if part.type == 'text' else '" + PLACEHOLDER + "' }}"
        "{% endfor %}"
    )
    content = [{"type": "text", "text": "see "}, {"type": "image", "image": image}, "what?"]
    (output,) = llm.chat([{"role": "user", "content": content}], GREEDY, chat_template=template)
    (expected,) = llm.generate({"prompt": f"see {PLACEHOLDER}what?", "multi_modal_data": {"image": image}}, GREEDY)
    assert output.prompt == expected.prompt
    assert output.prompt_token_ids == expected.prompt_token_ids
    assert output.outputs == expected.outputs


@pytest.mark.parametrize(("media", "package"), [("image", "PIL"), ("video", "torchvision")])
def test_what_is_not_installed_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch, media: str, package: str) -> None:
    found = prompts.importlib.util.find_spec
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda name: None if name == package else found("json"))
    reader = prompts.PromptReader(llm.engine.loaded)
    with pytest.raises(InputError, match=f"{package}, which is not installed; pip install"):
        reader.read({"prompt": PLACEHOLDER, "multi_modal_data": {media: [object()]}})


def changed(**changes: Any) -> dict[str, Any]:
    prompt = make_prompt("qwen2_5_vl", [3, ("image", [1, 4, 6]), 2], 0)
    return {name: value for name, value in {**prompt, **changes}.items() if value is not None}


PIXELS = torch.zeros(24, PATCH)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no image": (changed(pixel_values=None, image_grid_thw=None), "6 placeholders of images.*0 images need 0"),
    "an image too many": (
        changed(pixel_values=torch.zeros(48, PATCH), image_grid_thw=torch.tensor([[1, 4, 6]] * 2)),
        r"6 placeholders of images \(token 190\); its 2 images need 12, \[6, 6\]",
    ),
    "an image without a placeholder": (changed(prompt_token_ids=[1, 2]), "0 placeholders of images.*1 images need 6"),
    "a video's placeholder": (changed(prompt_token_ids=[1, VIDEO]), "0 placeholders of images"),
    "pixels that are not the grid's": (changed(pixel_values=PIXELS[:20]), "holds 20 patches.*asks for 24"),
    "patches of another size": (changed(pixel_values=PIXELS[:, 1:]), rf"\(24, {PATCH - 1}\).*\(24, {PATCH}\)"),
    "a grid that cannot be merged": (changed(image_grid_thw=torch.tensor([[1, 3, 8]])), r"\[1, 3, 8\].*multiples of 2"),
    "a grid without a height": (changed(image_grid_thw=torch.tensor([[4, 6]])), r"\[images, 3\]"),
    "a grid that is not positive": (changed(image_grid_thw=torch.tensor([[1, -4, -6]])), "positive integers"),
    "no grid": (changed(image_grid_thw=None), "image_grid_thw"),
    "images that touch": (
        changed(
            prompt_token_ids=[1, *[IMAGE] * 12, 2],
            pixel_values=torch.zeros(48, PATCH),
            image_grid_thw=torch.tensor([[1, 4, 6]] * 2),
        ),
        "must stand alone",
    ),
    "raw and prepared": (changed(multi_modal_data={"image": [1]}), "raw or prepared"),
    "sound": (changed(multi_modal_data={"audio": [1]}), "audio"),
    "a name that is not known": (changed(pixels=1), "no pixels;.* It has prompt"),
    "a raw video beside tokens": ({"prompt_token_ids": [1], "multi_modal_data": {"video": [1]}}, "give the prompt as"),
    "longer than a sequence": (make_prompt("qwen2_5_vl", [("image", [1, 24, 24])], 0), "146 tokens.*max_model_len=128"),
}


@pytest.mark.parametrize(("prompt", "words"), BAD.values(), ids=BAD)
def test_a_bad_prompt_is_refused_before_any_work(llm: LLM, prompt: dict[str, Any], words: str) -> None:
    llm.engine.reset_stats()
    with pytest.raises(InputError, match=words):
        llm.generate([{"prompt_token_ids": [1]}, prompt], GREEDY)
    assert llm.stats.steps == llm.stats.vision_runs == 0
    assert not llm.engine.scheduler.has_work


def test_a_text_model_refuses_images(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", max_num_seqs=2, enforce_eager=True)
    for prompt in (changed(), {"prompt_token_ids": [1], "multi_modal_data": {"image": [object()]}}):
        with pytest.raises(InputError, match="takes text alone"):
            llm.generate(prompt)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("qwen3_vl")
    save_model("qwen3_vl", folder)
    return load_model(folder, device=torch.device("cpu"), dtype="auto")


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@given(st.lists(st.integers(0, 5) | st.tuples(st.sampled_from(["image", "video"]), SIZES), max_size=6))
def test_every_placeholder_stands_for_one_part_in_order(loaded: LoadedModel, layout: list[Any]) -> None:
    """Spans cover the placeholders and nothing else; the parts of each image follow each other from first to last."""
    parts = [
        part
        if isinstance(part, int)
        else (part[0], [part[1][0] if part[0] == "video" else 1, *(2 * n for n in part[1][1:])])
        for part in layout
    ]
    prompt = make_prompt("qwen3_vl", [1, *parts], 0)
    token_ids = prompt["prompt_token_ids"]
    reader = prompts.PromptReader(loaded)
    _, vision = reader.read(prompt)  # type: ignore[arg-type]
    covered = [token for span in vision.spans for token in range(span.start, span.end)] if vision else []
    assert covered == [at for at, token in enumerate(token_ids) if token in (IMAGE, VIDEO)]
    seen: dict[VisionItem, list[int]] = {}
    for span in vision.spans if vision else ():
        seen.setdefault(span.item, []).extend(range(span.first_unit, span.first_unit + span.end - span.start))
    for item, units in seen.items():
        assert units == list(range(len(item.pixels) // 4))
    assert len(seen) == sum(not isinstance(part, int) for part in parts)
    if vision:
        assert vision.positions.shape == (len(token_ids), 3)
        assert make_vision_prompt(loaded, token_ids, list(seen)) is not None
