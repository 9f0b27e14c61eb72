"""Prompts with images and videos give what transformers gives, however they are batched, cut, preempted and cached."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graphmode import LLM, SamplingParams
from graphmode.engine.prompts import PromptReader
from graphmode.engine.sequence import Sequence
from graphmode.engine.step_inputs import StepInputs, VisionStepInputs
from graphmode.engine.types import Batch, ScheduledSequence
from graphmode.graph import GraphRunner, Input
from graphmode.graph.trees import map_leaves
from tests import steps
from tests.multimodal import GLM, IMAGE, TYPES, generate_greedily, make_prompt, save_model

NEW_TOKENS = 10
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
# Longer than a step's 32 tokens among them, so that a chunk ends within an image.
LAYOUTS: dict[str, list[Any]] = {
    "image": [5, ("image", [1, 4, 6]), 7],
    "two images": [3, ("image", [1, 8, 16]), 2, ("image", [1, 4, 4]), 4],
    "video": [6, ("video", [3, 4, 4]), 5],
    "image and video": [2, ("image", [1, 6, 4]), 3, ("video", [2, 4, 6]), 3],
    "text": [9],
    "longer text": [30],
}
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 128,
}
GRAPHS: dict[str, Any] = {**OPTIONS, "graph_sizes": [4, 32], "strict": True}
EAGER: dict[str, Any] = {**OPTIONS, "enforce_eager": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of each type."""
    folders = {model_type: tmp_path_factory.mktemp(model_type) for model_type in TYPES}
    for model_type, path in folders.items():
        save_model(model_type, path)
    return folders


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def first_logits(llm: LLM, prompt: dict[str, Any]) -> torch.Tensor:
    """The logits after a prompt that is one step, eagerly."""
    engine = llm.engine.core
    token_ids, vision = PromptReader(engine.loaded.files).read(prompt)  # type: ignore[arg-type]
    sequence = Sequence("0", token_ids, GREEDY, 0, vision, state_index=1)
    engine.scheduler.blocks.begin(sequence, read_prefix=False)
    engine.scheduler.blocks.extend([(sequence, len(token_ids))])
    part = ScheduledSequence(sequence, 0, len(token_ids), samples=1)
    logits = steps.logits(engine.runner, Batch("mixed", (part,), len(token_ids), (sequence,)))
    engine.scheduler.blocks.release(sequence)
    return logits[0].cpu()


@pytest.mark.parametrize("model_type", TYPES)
def test_prompts_with_images_are_token_for_token_transformers(tmp_path: Path, model_type: str) -> None:
    model = save_model(model_type, tmp_path)
    # Where a video is written as images, transformers takes no prompt that has both.
    layouts = [parts for name, parts in LAYOUTS.items() if model_type not in GLM or name != "image and video"]
    prompts = [make_prompt(model_type, parts, seed) for seed, parts in enumerate(layouts)]
    expected = [generate_greedily(model, prompt, NEW_TOKENS) for prompt in prompts]
    assert len({token for made, _ in expected for token in made}) > 10, "the largest logits say little here"
    for graph_mode in ("none", "piecewise", "full"):
        llm = LLM(tmp_path, graph_mode=graph_mode, **(OPTIONS if graph_mode == "none" else GRAPHS))
        assert tokens(llm.generate(prompts, GREEDY)) == [made for made, _ in expected]
        assert llm.stats.vision_runs == sum(isinstance(part, tuple) for parts in layouts for part in parts)
    assert llm.stats.misses.keys() | llm.stats.vision_misses.keys() == {"not_captured_yet"}
    assert llm.stats.eager_steps == 0
    roomy = LLM(tmp_path, **{**EAGER, "max_num_batched_tokens": 128})
    for prompt, (_, logits) in zip(prompts, expected, strict=True):
        torch.testing.assert_close(first_logits(roomy, prompt), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_images_are_seen(folder: dict[str, Path], model_type: str) -> None:
    """The same tokens with other images give other logits; were they equal, the tests here would show little."""
    llm = LLM(folder[model_type], **EAGER)
    prompt = make_prompt(model_type, LAYOUTS["image"], 0)
    other = {**prompt, "pixel_values": prompt["pixel_values"].flip(0)}
    assert (first_logits(llm, prompt) - first_logits(llm, other)).abs().max() > 0.1


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_a_second_run_is_all_hits_and_text_reads_no_features(folder: dict[str, Path], model_type: str) -> None:
    llm = LLM(folder[model_type], **GRAPHS, enable_prefix_caching=False)
    texts = [make_prompt(model_type, [length], length) for length in (9, 30, 41)]
    llm.generate(texts, GREEDY)
    assert llm.stats.hit_rate == 1.0, "text alone needs no graph that is not there from the start"
    prompts = [make_prompt(model_type, parts, seed) for seed, parts in enumerate(LAYOUTS.values())]
    first = tokens(llm.generate(prompts, GREEDY))
    llm.engine.core.reset_stats()
    assert tokens(llm.generate(prompts, GREEDY)) == first
    assert llm.stats.hit_rate == 1.0
    assert llm.stats.vision_runs == 0, "the features of the first run are still there"
    vision = llm.engine.core.runner.vision
    assert vision is not None
    vision._kept.clear()
    llm.generate(prompts, GREEDY)
    assert llm.stats.vision_runs == 6
    assert llm.stats.vision_misses == {}


@pytest.mark.parametrize(("model_type", "sizes"), [("qwen2_5_vl", None), ("qwen3_vl", [4])])
def test_chunks_of_any_size_cut_an_image_without_a_trace(
    folder: dict[str, Path], model_type: str, sizes: list[int] | None
) -> None:
    prompt = make_prompt(model_type, LAYOUTS["two images"], 1)
    made = []
    for budget in (5, 16, 128):
        graphs = EAGER if sizes is None else {**GRAPHS, "graph_sizes": [*sizes, budget]}
        options = {**graphs, "max_num_batched_tokens": budget}
        llm = LLM(folder[model_type], **options)
        made.append(tokens(llm.generate([prompt], GREEDY)))
        assert llm.stats.vision_runs == 2, "an image is computed once, whatever the chunks"
    assert made.count(made[0]) == 3


@pytest.mark.parametrize("budget", [1, 32])
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_a_burst_never_repeats_an_image(tmp_path: Path, enforce_eager: bool, budget: int) -> None:
    """A step that computes nothing but a prompt's last token, an image's part, is a decode step for its length alone.

    So it is where the rest of the prompt is cached, and where chunks are of one token.
    """
    model = save_model("qwen2_5_vl", tmp_path)
    ends = make_prompt("qwen2_5_vl", [15, ("image", [1, 2, 2])], 0)
    ends["prompt_token_ids"].pop()  # the end of the image, so that the image is the prompt's
    middle = make_prompt("qwen2_5_vl", [3, ("image", [1, 2, 4]), 2, ("image", [1, 4, 2]), 7], 1)
    larger = make_prompt("qwen2_5_vl", [11, ("image", [1, 4, 4]), 1, ("image", [1, 4, 4])], 2)
    larger["prompt_token_ids"].pop()
    prompts = [ends, middle, larger]
    assert len(ends["prompt_token_ids"]) == 17, "a block, and one token that is the image"
    expected = [generate_greedily(model, prompt, NEW_TOKENS)[0] for prompt in prompts]
    rows = min(budget, 4)
    sizes = {} if enforce_eager else {"graph_sizes": sorted({rows, budget}), "strict": True}
    options = {"max_num_seqs": rows, "max_num_batched_tokens": budget, "decode_steps": 8, **sizes}
    llm = LLM(tmp_path, enforce_eager=enforce_eager, **{**OPTIONS, **options})
    scheduler = llm.engine.core.scheduler
    for decode_steps in (8, *range(1, 9)):  # the first run finds nothing cached
        scheduler.limits = replace(scheduler.limits, decode_steps=decode_steps)
        made = tokens(llm.generate(prompts, GREEDY)) + tokens(llm.generate(ends, GREEDY))
        assert made == [*expected, expected[0]], decode_steps


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_preemption_and_eviction_change_no_token(folder: dict[str, Path], kept_bytes: int) -> None:
    """Sequences give up their blocks and are computed again, their features kept or computed again too."""
    prompts = [make_prompt("qwen3_vl", LAYOUTS["image and video"], seed) for seed in range(4)]
    prompts += [make_prompt("qwen3_vl", [8, ("image", [1, 4, 4]), 3], seed) for seed in range(4, 8)]
    params = SamplingParams(temperature=0, max_tokens=30)
    each = 3 * 2 * 16 * 2 * 16 * 4  # layers, keys and values, tokens, heads, head_dim, bytes
    llm = LLM(folder["qwen3_vl"], kv_cache_memory=9 * each, **{**GRAPHS, "max_model_len": 96})
    assert llm.engine.core.runner.vision is not None
    llm.engine.core.runner.vision._max_bytes = kept_bytes
    roomy = LLM(folder["qwen3_vl"], enable_prefix_caching=False, **{**EAGER, "max_model_len": 96})
    alone = [tokens(roomy.generate([prompt], params))[0] for prompt in prompts]
    assert tokens(llm.generate(prompts, params)) == alone
    assert llm.stats.preemptions > 0
    assert llm.engine.core.scheduler.blocks.num_free == (9,)


def test_generated_placeholders_are_text(folder: dict[str, Path]) -> None:
    """A token that the model makes stands for itself, whatever its number, when it is computed again as well."""
    llm = LLM(folder["qwen3_vl"], **GRAPHS)
    sequence = Sequence("0", [1, 2, 3], GREEDY, 0)
    sequence.token_ids.append(IMAGE)
    llm.engine.core.scheduler.add(iter([sequence]))
    batch = llm.engine.core.scheduler.schedule()
    assert batch is not None
    assert batch.num_tokens == 4
    assert llm.engine.core.runner.vision is not None
    step = steps.host_step(llm.engine.core.runner, batch)
    assert isinstance(step, VisionStepInputs)
    assert step.visual is None


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_cached_prefixes_tell_images_apart(folder: dict[str, Path], model_type: str) -> None:
    """Same tokens and other images share what lies before the images; the same image again is not computed again."""
    prompt = make_prompt(model_type, [20, ("image", [1, 8, 12]), 9], 0)
    other = {**prompt, "pixel_values": prompt["pixel_values"].flip(0)}
    shape = {**prompt, "image_grid_thw": torch.tensor([[1, 12, 8]])}
    cached = LLM(folder[model_type], **GRAPHS)
    plain = LLM(folder[model_type], enable_prefix_caching=False, **EAGER)
    computed = []
    for each in (prompt, other, prompt, shape, other):
        before = cached.engine.core.runner.graphs.stats.rows
        assert tokens(cached.generate([each], GREEDY)) == tokens(plain.generate([each], GREEDY))
        computed.append(cached.engine.core.runner.graphs.stats.rows - before)
    length = len(prompt["prompt_token_ids"])
    # One step more than the tokens is computed for what ends a sequence known a step late; 16 tokens are a block.
    full, shared = computed[0], length // 16 * 16
    assert computed[1] == computed[3] == full - 16
    assert computed[2] == computed[4] == full - shared
    assert cached.stats.vision_runs == 3
    assert plain.stats.vision_runs == 3


def test_completions_of_a_prompt_share_its_images(folder: dict[str, Path]) -> None:
    llm = LLM(folder["qwen3_vl"], enable_prefix_caching=False, **EAGER)
    prompt = make_prompt("qwen3_vl", LAYOUTS["image"], 0)
    many = llm.generate([prompt], SamplingParams(seed=3, max_tokens=8, n=5))[0]
    assert llm.stats.vision_runs == 1
    one = llm.generate([prompt], SamplingParams(seed=3, max_tokens=8))[0]
    assert many.outputs[0].token_ids == one.outputs[0].token_ids
    assert len({tuple(completion.token_ids) for completion in many.outputs}) == 5


def test_streams_take_images_and_leave_nothing_behind(folder: dict[str, Path]) -> None:
    llm = LLM(folder["qwen2_5_vl"], **GRAPHS)
    prompt = make_prompt("qwen2_5_vl", LAYOUTS["video"], 2)
    (whole,) = llm.generate([prompt], GREEDY)
    *_, last = llm.stream(prompt, GREEDY)
    assert last.outputs[0].token_ids == whole.outputs[0].token_ids
    assert last.prompt_token_ids == prompt["prompt_token_ids"]
    assert last.prompt is None
    assert llm.engine.core.scheduler.blocks.num_free == llm.engine.core.num_blocks


def test_images_larger_than_any_graph_run_eagerly_and_are_counted(folder: dict[str, Path]) -> None:
    prompt = make_prompt("qwen3_vl", [3, ("image", [1, 16, 16]), 2], 0)
    llm = LLM(folder["qwen3_vl"], **GRAPHS)
    roomy = LLM(folder["qwen3_vl"], **{**GRAPHS, "max_num_batched_tokens": 128})
    assert tokens(llm.generate([prompt], GREEDY)) == tokens(roomy.generate([prompt], GREEDY))
    assert llm.stats.vision_misses == {"above_threshold": 1}
    assert roomy.stats.vision_misses == {"not_captured_yet": 1}


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_what_padding_holds_changes_no_bit_of_a_step_with_images(folder: dict[str, Path], model_type: str) -> None:
    """Padding tokens may claim to stand for images, whose rows hold NaN; a replay is bitwise the eager run."""
    llm = LLM(folder[model_type], **GRAPHS)
    engine, runner = llm.engine.core, llm.engine.core.runner
    assert runner.vision is not None
    token_ids, vision = PromptReader(engine.loaded.files).read(make_prompt(model_type, LAYOUTS["image"], 0))
    sequence = Sequence("0", token_ids, GREEDY, 0, vision, state_index=1)
    sequence.block_tables = [[1, 2]]
    part = ScheduledSequence(sequence, 0, len(token_ids), samples=1)
    runner.vision.features.fill_(float("nan"))
    values = steps.host_step(runner, Batch("mixed", (part,), len(token_ids), (sequence,)))
    garbage = {"token_ids": 199, "positions": 255, "visual": True, "new_blocks": 2**31 - 1}
    results = []
    for padding in ({}, garbage):
        inputs = map_leaves(
            runner.inputs,
            Input,
            lambda spec: replace(spec, padding=padding.get(spec.name, spec.padding)),  # noqa: B023
        )

        def fn(family: Any, step: StepInputs) -> torch.Tensor:
            return runner.logits(family, step, True, step.logits_indices)

        graphs = GraphRunner(
            fn,
            {"step": inputs},
            {"mixed": [32]},
            axes={"seqs": 4, "logits": 4, "scored": 4, "new_blocks": 8},
            output_axes=[("logits", None)],
            backend="cpu",
            strict=True,
        )
        replayed = graphs(family="mixed", own=True, step=values)
        eager = graphs.run_eagerly(graphs.keys[0], step=values)
        assert torch.isfinite(replayed).all()
        assert torch.equal(replayed, eager)
        results.append(replayed)
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_images_on_a_gpu_are_as_exact_as_transformers_bf16(tmp_path: Path, model_type: str) -> None:
    """Logits are about as far from float32 as those of transformers in bf16 are, and no steady step waits."""
    exact = save_model(model_type, tmp_path).cuda()
    theirs = save_model(model_type, tmp_path).to("cuda", torch.bfloat16)
    prompts = [make_prompt(model_type, parts, seed) for seed, parts in enumerate(LAYOUTS.values())]
    options = {**GRAPHS, "device": "cuda", "dtype": "bfloat16", "max_num_batched_tokens": 128, "graph_sizes": [4, 128]}
    llm = LLM(tmp_path, enable_prefix_caching=False, **options)
    for prompt in prompts:
        reference = generate_greedily(exact, prompt, 1)[1].float().cpu()
        bf16 = generate_greedily(theirs, prompt, 1)[1].float().cpu()
        ours = first_logits(llm, prompt).float()
        error, their_error = (float((logits - reference).norm() / reference.norm()) for logits in (ours, bf16))
        print(f"relative error to float32: ours {error}, transformers' bf16 {their_error}")
        assert error <= 2 * their_error + 0.01
    first = tokens(llm.generate(prompts, GREEDY))
    llm.engine.core.reset_stats()
    llm.engine.core.runner.vision._kept.clear()  # type: ignore[union-attr]
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert tokens(llm.generate(prompts, GREEDY)) == first
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert llm.stats.hit_rate == 1.0
    assert llm.stats.vision_runs == 6
    assert llm.stats.vision_misses == {}
