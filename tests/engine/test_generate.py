"""The engine gives what transformers gives, token for token, however requests are batched."""

import gc
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graphmode import LLM, SamplingParams
from graphmode.engine.core import _Submitted
from graphmode.engine.requests import Request
from graphmode.errors import InputError
from tests.engine.conftest import PASSAGE

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def prompts(bundled: Path) -> list[list[int]]:
    """64 prompts of 1 to 200 tokens."""
    tokens = AutoTokenizer.from_pretrained(bundled)(PASSAGE)["input_ids"]
    lengths = torch.linspace(1, 200, 64).long().tolist()
    starts = [7 * index % (len(tokens) - length) for index, length in enumerate(lengths)]
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def most_likely(bundled: Path) -> Callable[[tuple[int, ...], tuple[int, ...]], list[int]]:
    """What transformers finds most likely after a prompt and after each but the last of some tokens behind it."""
    model = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32).eval()

    @cache
    def ask(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> list[int]:
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits
        return logits[0, len(prompt) - 1 :].argmax(1).tolist()

    return ask


@pytest.mark.parametrize("mode", ["full", "piecewise", "full_decode_only", "full_and_piecewise", "none"])
def test_64_prompts_together_are_token_for_token_transformers_one_by_one(
    bundled: Path, device: str, prompts: list[list[int]], most_likely: Callable[..., list[int]], mode: str
) -> None:
    llm = LLM(bundled, device=device, dtype="float32", graph_mode=mode, strict=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY)
    for output, prompt in zip(outputs, prompts, strict=True):
        tokens = output.outputs[0].token_ids
        assert output.prompt_token_ids == prompt
        # Each is the most likely one behind those before it, so transformers would have chosen the same.
        assert tokens == most_likely(tuple(prompt), tuple(tokens))
        assert len(tokens) == GREEDY.max_tokens
    stats = llm.stats
    if mode == "none":
        assert stats.misses == {"disabled": stats.steps}
        assert stats.graphs == 0
    elif mode == "full_decode_only":
        assert stats.misses.keys() == {"disabled"}
        assert stats.replays == stats.steps - stats.misses["disabled"] > 0
    else:
        assert stats.hit_rate == 1.0
        assert stats.eager_steps == 0
        decode, mixed = (len(llm.engine.core.runner.graphs.policy.buckets[name]) for name in ("decode", "mixed"))
        pieces = 1 + len(llm.engine.core.loaded.shape.caches)
        assert stats.graphs == (
            decode * (pieces if mode == "piecewise" else 1) + mixed * (1 if mode == "full" else pieces)
        )
    assert llm.engine.core.scheduler.blocks.num_free == llm.engine.core.num_blocks


@pytest.mark.parametrize("options", [{"graph_sizes": [1, 5]}, {"max_graph_tokens": 9}, {"max_padding_ratio": 0.1}])
def test_steps_that_no_graph_serves_run_eagerly_counted_with_the_same_tokens(
    tiny: Path, device: str, options: dict
) -> None:
    prompts = [{"prompt_token_ids": [token % 199 for token in range(3, 3 + 5 * n)]} for n in range(1, 8)]
    params = SamplingParams(temperature=0, max_tokens=12)
    reference = LLM(tiny, device=device, dtype="float32", enforce_eager=True).generate(prompts, params)
    llm = LLM(tiny, device=device, dtype="float32", max_num_seqs=4, max_num_batched_tokens=24, **options)
    outputs = llm.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in reference]
    stats = llm.stats
    reason = "padding_ratio" if "max_padding_ratio" in options else "above_threshold"
    assert stats.misses.keys() == {reason}
    assert 0 < stats.misses[reason] == stats.eager_steps < stats.steps
    assert stats.replays == stats.steps - stats.eager_steps


def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(tiny: Path, device: str) -> None:
    llm = LLM(tiny, device=device, dtype="float32", max_num_seqs=5, max_num_batched_tokens=32)
    prompts = [{"prompt_token_ids": list(range(1, 2 + 3 * n))} for n in range(9)]
    params = [SamplingParams(temperature=0.5 + 0.2 * n, seed=n, max_tokens=10) for n in range(9)]
    together = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    alone = [llm.generate(p, s)[0].outputs[0].token_ids for p, s in zip(prompts, params, strict=True)]
    backwards = [o.outputs[0].token_ids for o in llm.generate(prompts[::-1], params[::-1])][::-1]
    assert together == alone == backwards
    other = llm.generate(prompts[4], SamplingParams(temperature=1.3, seed=99, max_tokens=10))
    assert other[0].outputs[0].token_ids != together[4]


def test_requests_without_a_seed_differ_and_repeat_from_run_to_run(tiny: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=10)
    prompts = [{"prompt_token_ids": [5, 6]}] * 4
    runs = [
        [o.outputs[0].token_ids for o in LLM(tiny, device="cpu", seed=seed).generate(prompts, params)]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(tokens) for tokens in runs[0]}) == 4


@pytest.mark.parametrize("decode_steps", [1, 6])
def test_texts_stream_in_whole_characters_and_end_as_generate_gives_them(bundled: Path, decode_steps: int) -> None:
    llm = LLM(bundled, device="cpu", max_num_seqs=2, decode_steps=decode_steps)
    params = SamplingParams(temperature=0, max_tokens=30)
    whole = llm.generate("JULIET.\nO Romeo, Romeo", params)[0].outputs[0]
    parts = [output.outputs[0] for output in llm.stream("JULIET.\nO Romeo, Romeo", params)]
    assert parts[-1].text == whole.text != ""
    assert parts[-1].token_ids == whole.token_ids
    assert parts[-1].finish_reason == whole.finish_reason == "length"
    for before, after in pairwise(parts):
        assert after.text.startswith(before.text)
        assert len(after.token_ids) == len(before.token_ids) + 1


def test_a_stream_that_is_left_gives_its_blocks_back(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", max_num_seqs=2)
    stream = llm.stream({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=50))
    next(stream)
    stream.close()
    (last,) = llm.engine.step()
    assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")
    assert not llm.engine.has_requests
    assert not llm.engine.core.scheduler.has_work
    assert llm.engine.core.scheduler.blocks.num_free == llm.engine.core.num_blocks


def test_what_exists_is_out_of_the_collectors_way_while_tokens_are_made_and_no_longer(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", max_num_seqs=2)
    prompt, params = {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=5)
    assert gc.get_freeze_count() == 0
    stream = llm.stream(prompt, params)
    next(stream)
    assert gc.get_freeze_count() > 0
    stream.close()
    assert gc.get_freeze_count() == 0
    llm.generate(prompt, params)
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        llm.generate(prompt, params)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_limits_end_a_sequence_with_its_reason(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", max_model_len=20, max_num_seqs=2, max_num_batched_tokens=8)
    long = {"prompt_token_ids": list(range(15))}
    (output,) = llm.generate(long, SamplingParams(temperature=0, max_tokens=100))
    assert len(output.outputs[0].token_ids) == 5
    assert output.outputs[0].finish_reason == "length"
    token = output.outputs[0].token_ids[2]
    llm.engine.core.loaded.__dict__["shape"] = type(llm.engine.core.loaded.shape)(
        **{**vars(llm.engine.core.loaded.shape), "eos_token_ids": frozenset({token})}
    )
    (stopped,) = llm.generate(long, SamplingParams(temperature=0, max_tokens=100))
    first = output.outputs[0].token_ids.index(token)
    assert stopped.outputs[0].token_ids == output.outputs[0].token_ids[: first + 1]
    assert stopped.outputs[0].finish_reason == "stop"
    (ignored,) = llm.generate(long, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    assert ignored.outputs[0].token_ids == output.outputs[0].token_ids


def test_steps_start_before_the_last_request_is_queued_and_give_what_all_queued_at_once_give(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"device": "cpu", "max_num_seqs": 4, "max_num_batched_tokens": 16}
    prompts = [{"prompt_token_ids": list(range(n, n + 6 + n % 5))} for n in range(20)]
    params = [SamplingParams(seed=n if n % 3 else None, max_tokens=1 + n % 7, n=1 + n % 2) for n in range(20)]
    engine = LLM(tiny, **options).engine
    for prompt, each in zip(prompts, params, strict=True):
        engine.submit(Request(prompt["prompt_token_ids"], each))
    for request in engine.core._active.values():
        engine.core.scheduler.waiting.update(dict.fromkeys(request.begin()))
    engine.core.scheduler._arrived.clear()
    queued = {}
    while engine.has_requests:
        queued |= {output.request_id: output.outputs for output in engine.step()}
    llm = LLM(tiny, **options)
    make, steps_before = _Submitted.make, []

    def made(request: _Submitted) -> None:
        if not request.sequences:
            steps_before.append(llm.stats.steps)
        make(request)

    monkeypatch.setattr(_Submitted, "make", made)
    outputs = llm.generate(prompts, params)
    assert [output.request_id for output in outputs] == list(map(str, range(20)))
    assert {output.request_id: output.outputs for output in outputs} == queued
    assert steps_before[0] == 0
    assert steps_before == sorted(steps_before)
    assert len(set(steps_before)) > 5


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_generate_that_is_interrupted_leaves_nothing_behind(tiny: Path, steps: int) -> None:
    """Neither what runs or waits nor what was not handed over yet: the next call gets what a new engine gives."""
    options = {"device": "cpu", "max_num_seqs": 4, "max_num_batched_tokens": 16}
    prompts = [{"prompt_token_ids": list(range(n, n + 6))} for n in range(20)]
    params = SamplingParams(temperature=0, max_tokens=5)
    llm = LLM(tiny, **options)
    step, left = llm.engine.step, iter(range(steps))

    def interrupted() -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step()

    llm.engine.step = interrupted  # type: ignore[assignment,method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, params)
    llm.engine.step = step  # type: ignore[method-assign]
    assert all(output.outputs[0].finish_reason == "abort" for output in llm.engine.step())
    assert not llm.engine.has_requests
    assert not llm.engine.core.scheduler.has_work
    assert llm.engine.core.scheduler.blocks.num_free == llm.engine.core.num_blocks
    again = llm.generate(prompts[::-1], params)
    expected = LLM(tiny, enforce_eager=True, **options).generate(prompts[::-1], params)
    assert [output.outputs[0].token_ids for output in again] == [output.outputs[0].token_ids for output in expected]


def test_a_cache_too_small_for_a_request_says_so_and_a_small_one_serves_in_turns(tiny: Path) -> None:
    with pytest.raises(InputError, match="kv_cache_memory"):
        LLM(tiny, device="cpu", kv_cache_memory=8_000)  # less than one block
    each = 2 * 2 * 16 * 2 * 16 * 4
    llm = LLM(tiny, device="cpu", kv_cache_memory=9 * each, max_num_seqs=8)
    prompts = [{"prompt_token_ids": list(range(n, n + 40))} for n in range(10)]
    params = SamplingParams(temperature=0, max_tokens=20)
    roomy = LLM(tiny, device="cpu", enforce_eager=True).generate(prompts, params)
    outputs = llm.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in roomy]


@pytest.mark.parametrize("decode_steps", [1, 4])
def test_preemption_and_eviction_change_no_token(tiny: Path, device: str, decode_steps: int) -> None:
    """A cache so small that sequences are preempted and cached prefixes evicted gives what each request gives alone."""
    each = 2 * 2 * 16 * 2 * 16 * 4
    common = {"device": device, "dtype": "float32", "max_num_seqs": 6, "max_num_batched_tokens": 24}
    llm = LLM(tiny, kv_cache_memory=12 * each, decode_steps=decode_steps, **common)
    torch.manual_seed(1)
    shared = torch.randint(0, 199, (40,)).tolist()
    lengths = torch.randint(1, 45, (40,)).tolist()
    prompts = [
        {"prompt_token_ids": shared[:length] if n % 3 else shared[::-1][:length]} for n, length in enumerate(lengths)
    ]
    params = [SamplingParams(temperature=0.9 * (n % 2), seed=n, max_tokens=1 + 7 * n % 50) for n in range(40)]
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    roomy = LLM(tiny, enforce_eager=True, enable_prefix_caching=False, **common)
    alone = [roomy.generate(p, s)[0].outputs[0].token_ids for p, s in zip(prompts, params, strict=True)]
    assert together == alone
    assert llm.stats.preemptions > 0
    assert llm.stats.hit_rate == 1.0
    assert llm.engine.core.scheduler.blocks.num_free == (12,)


def test_a_chat_with_its_prefix_cached_equals_the_uncached_one(bundled: Path, device: str) -> None:
    """Each turn's prompt is all that was said before: the cached run computes only what is new."""
    answers, computed = {}, {}
    for caching in (True, False):
        llm = LLM(bundled, device=device, dtype="float32", max_num_seqs=2, enable_prefix_caching=caching)
        said, answers[caching] = PASSAGE[:400], []
        for turn in ("\n\nOPHELIA.\n", "\n\nHAMLET.\n", "\n\nHORATIO.\n", "\n\nKING.\n"):
            (output,) = llm.generate(said + turn, SamplingParams(temperature=0, max_tokens=40))
            answers[caching].append(output.outputs[0].token_ids)
            said += turn + output.outputs[0].text
        computed[caching] = llm.engine.core.runner.graphs.stats.rows
    assert answers[True] == answers[False]
    assert computed[True] < computed[False] / 2


@pytest.mark.gpu
def test_no_call_of_a_steady_step_waits_for_the_device(tiny: Path) -> None:
    """The host waits for a step's event alone: torch's sync debug mode raises at any other wait."""
    llm = LLM(tiny, device="cuda", max_num_seqs=4, max_num_batched_tokens=24)
    prompts = [{"prompt_token_ids": list(range(1, 2 + 9 * n))} for n in range(6)]
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=20)
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = llm.generate(prompts, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.parametrize("decode_steps", [1, 6])
def test_stop_texts_cut_the_answer_before_them_and_are_never_shown(bundled: Path, decode_steps: int) -> None:
    llm = LLM(bundled, device="cpu", max_num_seqs=2, decode_steps=decode_steps)
    prompt, plain = "JULIET.\nO Romeo, Romeo", SamplingParams(temperature=0, max_tokens=40)
    whole = llm.generate(prompt, plain)[0].outputs[0]
    text, tokenizer = whole.text, llm.engine.text.tokenizer
    assert tokenizer is not None
    for stop in (text[10:13], text[17], text[5:25]):
        at = text.index(stop)
        params = SamplingParams(temperature=0, max_tokens=25, stop=["never said", stop])
        (output,) = llm.generate(prompt, params)
        assert output.outputs[0].text == text[:at]
        assert output.outputs[0].finish_reason == "stop"
        made = output.outputs[0].token_ids
        assert made == whole.token_ids[: len(made)]
        assert stop in tokenizer.decode(made)
        assert stop not in tokenizer.decode(made[:-1])
        streamed = [output.outputs[0].text for output in llm.stream(prompt, params)]
        assert streamed[-1] == text[:at]
        assert all(text[:at].startswith(part) for part in streamed)
    assert llm.engine.core.scheduler.blocks.num_free == llm.engine.core.num_blocks


def test_a_burst_ends_at_the_token_that_one_step_at_a_time_ends_at(bundled: Path) -> None:
    """Texts of many tokens are decoded and searched together; tokens, text and reason are those of single ones."""
    single, burst = (LLM(bundled, device="cpu", max_num_seqs=8, decode_steps=steps) for steps in (1, 7))
    text = single.generate("KING.\n", SamplingParams(temperature=0, max_tokens=25))[0].outputs[0].text
    params = [
        SamplingParams(temperature=0, max_tokens=25, stop=[text[at : at + size], "never said"], min_tokens=least)
        for at, size in ((3, 1), (11, 4), (30, 17), (len(text) - 2, 2))
        for least in (0, 13, 25)
    ]
    expected, outputs = (llm.generate(["KING.\n"] * len(params), params) for llm in (single, burst))
    assert [output.outputs for output in outputs] == [output.outputs for output in expected]
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop", "length"}
    for output, each in zip(outputs, params, strict=True):
        (*streamed,) = burst.stream("KING.\n", each)
        assert streamed[-1].outputs == output.outputs


def test_stop_tokens_end_the_answer_and_stay_in_it(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", max_num_seqs=2)
    prompt = {"prompt_token_ids": [5, 6, 7]}
    tokens = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[tokens[4]], ignore_eos=True)
    (output,) = llm.generate(prompt, params)
    assert output.outputs[0].token_ids == tokens[: tokens.index(tokens[4]) + 1]
    assert output.outputs[0].finish_reason == "stop"
    with pytest.raises(InputError, match="stop_token_ids"):
        llm.generate(prompt, SamplingParams(stop=["a"]))


def test_n_completions_differ_and_the_first_is_that_of_the_seed(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", max_num_seqs=4)
    prompt = {"prompt_token_ids": [5, 6, 7]}
    one = llm.generate(prompt, SamplingParams(seed=3, max_tokens=12))[0]
    many = llm.generate(prompt, SamplingParams(seed=3, max_tokens=12, n=6))[0]
    assert [completion.index for completion in many.outputs] == list(range(6))
    assert many.outputs[0].token_ids == one.outputs[0].token_ids
    assert len({tuple(completion.token_ids) for completion in many.outputs}) == 6
    assert many.finished


def test_filtered_rows_stand_beside_plain_ones_and_change_none(tiny: Path, device: str) -> None:
    """A batch with filters runs another graph than one without; a plain request gets the same tokens from both."""
    llm = LLM(tiny, device=device, dtype="float32", max_num_seqs=4, max_num_batched_tokens=24)
    prompts = [{"prompt_token_ids": list(range(n + 1, n + 8))} for n in range(8)]
    plain = [SamplingParams(temperature=0.9 * (n % 2), seed=n, max_tokens=15) for n in range(8)]
    alone = [llm.generate(p, s)[0].outputs[0].token_ids for p, s in zip(prompts, plain, strict=True)]
    assert llm.stats.hit_rate == 1.0
    greedy = [o.outputs[0].token_ids for o in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=15))]
    mixed = [SamplingParams(temperature=2, seed=n, top_k=1, max_tokens=15) if n % 3 else plain[n] for n in range(8)]
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, mixed)]
    assert together == [greedy[n] if n % 3 else alone[n] for n in range(8)], "top_k=1 is greedy"
    assert llm.stats.misses.keys() == {"not_captured_yet"}
    llm.engine.core.reset_stats()
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, mixed)] == together
    assert llm.stats.hit_rate == 1.0


def test_top_k_top_p_and_min_p_leave_what_they_say(tiny: Path) -> None:
    """Thousands of draws of a first token stay within the set that the logits give, and reach all of it."""
    llm = LLM(tiny, device="cpu", dtype="float32", max_num_seqs=64, max_num_batched_tokens=256)
    prompt = [3, 1, 4, 1, 5]
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        probabilities = (model(torch.tensor([prompt])).logits[0, -1] / 2).softmax(-1)
    order = probabilities.argsort(descending=True)
    reach = int((probabilities[order].cumsum(0) < 0.6).sum()) + 1
    share = int((probabilities >= 0.3 * probabilities.max()).sum())
    for filters, size in (({"top_k": 5}, 5), ({"top_p": 0.6}, reach), ({"min_p": 0.3}, share)):
        params = SamplingParams(temperature=2, seed=1, max_tokens=1, n=500, **filters)
        (output,) = llm.generate({"prompt_token_ids": prompt}, params)
        drawn = {completion.token_ids[0] for completion in output.outputs}
        assert drawn <= set(order[:size].tolist())
        likely = {int(token) for token in order[:size] if probabilities[token] > 0.02}
        assert likely <= drawn
