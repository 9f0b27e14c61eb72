"""Prompts with images: raw ones go through transformers' processors, prepared ones as they are, bad ones nowhere."""

import base64
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoImageProcessor

from graphmode import LLM, SamplingParams
from graphmode.engine import prompts
from graphmode.engine.multimodal import VisionItem, make_vision_prompt
from graphmode.graph import InputError
from graphmode.models.loader import ModelFiles, read_model
from tests.multimodal import IMAGE, PATCH, VIDEO, VISION_END, VISION_START, make_prompt, save_model, save_processors

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    save_model("qwen2_5_vl", folder)
    save_processors(folder)
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 128}
    return LLM(folder, device="cpu", dtype="float32", enforce_eager=True, **options)


def test_raw_images_are_prepared_by_transformers_own_processor(llm: LLM) -> None:
    pil = pytest.importorskip("PIL.Image")
    processor = AutoImageProcessor.from_pretrained(llm.engine.text.files.checkpoint.folder)
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
    short = llm.engine.text.tokenizer(text)["input_ids"]  # type: ignore[misc]
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
    image.save(file := BytesIO(), "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content[1] = {"type": "image_url", "image_url": {"url": url}}
    assert llm.chat([{"role": "user", "content": content}], GREEDY, chat_template=template)[0].outputs == output.outputs


def test_a_picture_gives_the_same_answer_in_any_form(llm: LLM, tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    pil.fromarray(pixels).save(tmp_path / "picture.png")
    forms = [pixels, pixels / 255, torch.from_numpy(pixels).permute(2, 0, 1) / 255, tmp_path / "picture.png"]
    with pil.open(tmp_path / "picture.png") as opened:
        outputs = llm.generate([raw(each) for each in (*forms, opened, pixels[None])], GREEDY)
    answers = [output.outputs[0].token_ids for output in outputs]
    assert answers == [answers[0]] * 6
    assert llm.generate(raw(255 - pixels), GREEDY)[0].outputs[0].token_ids != answers[0]
    for resize in (False, True):  # 24 x 40 are whole patches
        (kept,) = llm.generate(raw(pixels[:, :24], do_resize=resize), GREEDY)
        assert kept.prompt_token_ids.count(IMAGE) == 5 * 3


def test_frames_reach_the_processor_as_one_array_of_rgb(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey frames as well; and of a list, what are videos of their own is told from frames."""
    pytest.importorskip("PIL")
    reader = prompts.PromptReader(replace(llm.engine.text.files))
    seen: list[Any] = []

    def processor(text: list[str], images: Any, videos: list[Any], return_tensors: str, **options: Any) -> Any:
        seen.append((videos, options))
        tokens = [VISION_START, *[VIDEO] * 6 * len(videos), VISION_END]
        pixels = torch.zeros(24 * len(videos), PATCH)
        grids = torch.tensor([[1, 4, 6]] * len(videos))
        return {"input_ids": torch.tensor([tokens]), "pixel_values_videos": pixels, "video_grid_thw": grids}

    reader.files.__dict__["processor"] = processor
    monkeypatch.setattr(prompts, "_require", lambda package, what, install: None)
    grey = np.full((16, 24), 7, np.uint8)
    frames = np.full((2, 16, 24, 3), 7, np.uint8)
    for video, count in (([grey, grey], 1), (frames, 1), ([frames], 1), ([list(frames)], 1)):
        prompt: Any = {"prompt": "a", "multi_modal_data": {"video": video}, "mm_processor_kwargs": {"fps": 2}}
        _, vision = reader.read(prompt)
        assert vision is not None
        videos, options = seen.pop()
        assert [each.shape for each in videos] == [(2, 3, 16, 24)] * count
        assert all((each == 7).all() for each in videos)
        assert options == {"fps": 2}
    reader.read({"prompt": "a", "multi_modal_data": {"video": "clip.mp4"}})
    assert seen.pop()[0] == ["clip.mp4"], "a file is the processor's to read"


def test_limits_of_media_are_options_of_the_engine(llm: LLM) -> None:
    limits = {"limit_mm_per_prompt": {"image": 1, "video": {"count": 0}, "audio": 0}, "max_image_pixels": 600}
    folder = llm.engine.text.files.checkpoint.folder
    strict = LLM(folder, device="cpu", enforce_eager=True, max_num_seqs=2, max_model_len=64, **limits)
    options = strict.engine.core.options
    assert (options.max_images_per_prompt, options.max_videos_per_prompt) == (1, 0)
    assert strict.generate(raw(ARRAY), GREEDY)[0].finished
    for prompt, words in (
        (raw([ARRAY, ARRAY]), "2 images; it may have 1"),
        (raw(np.zeros((20, 31, 3), np.uint8)), "31 x 20, 620 pixels; it may have 600"),
        (make_prompt("qwen2_5_vl", [("video", [1, 2, 2])], 0), "1 videos; it may have 0"),
        (make_prompt("qwen2_5_vl", [("image", [1, 16, 16])], 0), "64 tokens; with max_model_len=64"),
    ):
        with pytest.raises(InputError, match=words):
            strict.generate(prompt, GREEDY)
    for name, value in (
        ("limit_mm_per_prompt", 3),
        ("limit_mm_per_prompt", {"audio": 1}),
        ("limit_mm_per_prompt", {"image": -1}),
        ("max_images_per_prompt", 1.5),
        ("max_image_pixels", 0),
    ):
        with pytest.raises(InputError, match=r"limit_mm_per_prompt|max_images_per_prompt|max_image_pixels"):
            LLM(llm.engine.text.files.checkpoint.folder, **{name: value})


@pytest.mark.parametrize(("media", "package"), [("image", "PIL"), ("video", "torchvision")])
def test_what_is_not_installed_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch, media: str, package: str) -> None:
    found = prompts.importlib.util.find_spec
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda name: None if name == package else found("json"))
    reader = prompts.PromptReader(llm.engine.text.files)
    with pytest.raises(InputError, match=f"{package}, which is not installed; pip install"):
        reader.read({"prompt": PLACEHOLDER, "multi_modal_data": {media: [object()]}})


def changed(**changes: Any) -> dict[str, Any]:
    prompt = make_prompt("qwen2_5_vl", [3, ("image", [1, 4, 6]), 2], 0)
    return {name: value for name, value in {**prompt, **changes}.items() if value is not None}


def raw(images: Any, options: Any = None, **named: Any) -> dict[str, Any]:
    kwargs = {"mm_processor_kwargs": options or named} if options or named else {}
    return {"prompt": PLACEHOLDER, "multi_modal_data": {"image": images}, **kwargs}


PIXELS = torch.zeros(24, PATCH)
ARRAY = np.zeros((20, 30, 3), np.uint8)
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
    "longer than a sequence": (
        make_prompt("qwen2_5_vl", [("image", [1, 24, 24])], 0),
        "image 1 stands for 144 tokens; with max_model_len=128 a prompt may have 127",
    ),
    "together longer than a sequence": (
        make_prompt("qwen2_5_vl", [("image", [1, 16, 16]), ("image", [1, 16, 18])], 0),
        "image 2 stands for 72 tokens, beside 64 of those before it",
    ),
    "more images than the limit": (
        make_prompt("qwen2_5_vl", [("image", [1, 2, 2])] * 65, 0),
        "65 images; it may have 64.*max_images_per_prompt",
    ),
    "NaN among the pixels": (
        changed(pixel_values=torch.cat([PIXELS[:23], torch.full((1, PATCH), torch.nan)])),
        "pixels of image 1 hold NaN",
    ),
    "pixels beyond the dtype": (changed(pixel_values=PIXELS.double() + 1e300), "infinity in torch.float32"),
    "integer pixels": (changed(pixel_values=PIXELS.int()), "pixel_values has dtype torch.int32; it must be floats"),
    "pixels in a list": (changed(pixel_values=PIXELS.tolist()), "are tensors of pixel_values"),
    "a ragged grid": (changed(image_grid_thw=[[1, 4, 6], [1, 4]]), "image_grid_thw is .*integers in rows of three"),
    "a grid of texts": (changed(image_grid_thw=["a"]), "integers in rows of three"),
    "a grid of floats": (changed(image_grid_thw=torch.tensor([[1.0, 4.0, 6.0]])), "dtype torch.float32"),
    "a grid of bools": (changed(image_grid_thw=torch.ones(1, 3, dtype=torch.bool)), "dtype torch.bool"),
    "a grid that overflows": (
        changed(pixel_values=PIXELS[:0], image_grid_thw=torch.tensor([[1 << 20, 1 << 30, 1 << 30]])),
        "holds 0 patches.*asks for 1208925819614629174706176",
    ),
    "seconds that are texts": (
        {**make_prompt("qwen2_5_vl", [("video", [2, 4, 4])], 0), "second_per_grid_ts": ["a"]},
        r"second_per_grid_ts is \['a'\]; it must be a list of numbers",
    ),
    "seconds that are none": (
        {**make_prompt("qwen2_5_vl", [("video", [2, 4, 4])], 0), "second_per_grid_ts": [float("nan")]},
        "each must be a positive number",
    ),
    "media as text": ({"prompt": PLACEHOLDER, "multi_modal_data": "x"}, "multi_modal_data is 'x'; it must be a dict"),
    "media as an array": ({"prompt": PLACEHOLDER, "multi_modal_data": torch.zeros(3)}, "it must be a dict"),
    "media of a number": ({"prompt": PLACEHOLDER, "multi_modal_data": {3: 1, "audio": 1}}, "holds 'audio', 3; it may"),
    "an image that is a number": (raw(5), "image 1 is int 5; give a path"),
    "a second image that is a text": (raw([ARRAY, "nowhere.png"]), "image 2 .'nowhere.png'. is not there"),
    "an array of 0 x 0": (raw(np.zeros((0, 0, 3))), "image 1 is 0 x 0"),
    "too many raw images": (raw([ARRAY] * 65), "65 images; it may have 64"),
    "too many raw videos": ({"prompt": "a", "multi_modal_data": {"video": [[ARRAY]] * 9}}, "9 videos; it may have 8"),
    "an image of no width": (
        raw([ARRAY, np.zeros((1, 400, 3), np.uint8)]),
        r"image 2 \(400 x 1\): the model's processor cannot prepare it.*aspect ratio",
    ),
    "parts of patches": (
        raw([ARRAY, np.zeros((17, 25, 3), np.uint8)], do_resize=False),
        r"image 1 is 30 x 20 and is not resized; its sides must be multiples of 8, 2 patches of 4 pixels",
    ),
    "patches of no size": (raw(ARRAY, do_resize=False, patch_size=0), "patch_size is 0; it must be an integer"),
    "resizing that is neither on nor off": (raw(ARRAY, do_resize=None), "do_resize is None; it must be True or False"),
    "an image scaled up beyond the context": (
        raw(ARRAY, size={"shortest_edge": 10**12, "longest_edge": 10**13}),
        "image 1 stands for .* tokens; with max_model_len=128",
    ),
    "options as text": (raw(ARRAY, options="x"), "mm_processor_kwargs is 'x'; it must be a dict"),
    "options as text beside text": ({"prompt": "a", "mm_processor_kwargs": "x"}, "mm_processor_kwargs is 'x'"),
    "sparse pixels": (changed(pixel_values=PIXELS.to_sparse()), "are tensors of pixel_values"),
    "an option that is settled": (raw(ARRAY, return_tensors="np"), "return_tensors='np', but the engine takes tensors"),
    "images among the options": (
        raw(ARRAY, {"images": [1]}),
        "holds images=.*put images and videos into multi_modal_data",
    ),
    "scaling": (raw(ARRAY, do_rescale=False), "do_rescale=False, but images are decoded to 8 bits"),
    "an option that is not known": (raw(ARRAY, sizes=3), "'sizes', which the model's processor does not know; it may"),
    "an option without a name": (raw(ARRAY, options={3: 4}), "mm_processor_kwargs holds 3, which"),
    "an option of another type": (raw(ARRAY, size="large"), "image 1 .30 x 20.: the model's processor cannot prepare"),
    "patches of another model": (raw(ARRAY, patch_size=2), "pixels of image 1 have shape"),
    "a deviation of 0": (raw(ARRAY, image_std=[0.0, 0.0, 0.0]), "pixels of image 1 hold NaN or infinity"),
}


@pytest.mark.parametrize(("prompt", "words"), BAD.values(), ids=BAD)
def test_a_bad_prompt_is_refused_before_any_work(llm: LLM, prompt: dict[str, Any], words: str) -> None:
    llm.engine.core.reset_stats()
    with pytest.raises(InputError, match=words):
        llm.generate([{"prompt_token_ids": [1]}, prompt], GREEDY)
    assert llm.stats.steps == llm.stats.vision_runs == 0
    assert not llm.engine.core.scheduler.has_work


def test_a_text_model_refuses_images(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", max_num_seqs=2, enforce_eager=True)
    for prompt in (changed(), {"prompt_token_ids": [1], "multi_modal_data": {"image": [object()]}}):
        with pytest.raises(InputError, match="takes text alone"):
            llm.generate(prompt)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("qwen3_vl")
    save_model("qwen3_vl", folder)
    return read_model(folder, device=torch.device("cpu"), dtype="auto")


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@given(st.lists(st.integers(0, 5) | st.tuples(st.sampled_from(["image", "video"]), SIZES), max_size=6))
def test_every_placeholder_stands_for_one_part_in_order(files: ModelFiles, layout: list[Any]) -> None:
    """Spans cover the placeholders and nothing else; the parts of each image follow each other from first to last."""
    parts = [
        part
        if isinstance(part, int)
        else (part[0], [part[1][0] if part[0] == "video" else 1, *(2 * n for n in part[1][1:])])
        for part in layout
    ]
    prompt = make_prompt("qwen3_vl", [1, *parts], 0)
    token_ids = prompt["prompt_token_ids"]
    reader = prompts.PromptReader(files)
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
        assert make_vision_prompt(files.vision, token_ids, list(seen)) is not None
