"""What sampling parameters say is what comes out, each row by its own, in one graph with the others."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from graphmode import LLM, SamplingParams
from graphmode.engine.outputs import RequestOutput, VocabularyLogprobs
from graphmode.graph import InputError
from graphmode.graph.memory import in_words
from tests.ops.distributions import check_drawn_from

PROMPTS = [[5, 9, 5, 17, 30, 5], [1, 2, 3], list(range(40)), [7] * 20]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
ADJUSTED = [
    replace(GREEDY, repetition_penalty=1.5),
    replace(GREEDY, presence_penalty=1.7, frequency_penalty=0.9),
    replace(GREEDY, frequency_penalty=-2.0),
    replace(GREEDY, logit_bias={3: 4.0, 11: -100.0, 198: 2.5}),
    replace(GREEDY, repetition_penalty=0.7, presence_penalty=-1.0, logit_bias={8: 6.0}),
    GREEDY,
]


@pytest.fixture(scope="module")
def model(tiny: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def logits_after(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double()


def adjusted(logits: torch.Tensor, prompt: list[int], answer: list[int], params: SamplingParams) -> torch.Tensor:
    """Bias, repetition, frequency and presence penalties, one token at a time."""
    logits = logits.clone()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in {*prompt, *answer}:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(answer):
        logits[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    return logits


def reference(model: torch.nn.Module, prompt: list[int], params: SamplingParams) -> list[int]:
    answer: list[int] = []
    while len(answer) < params.max_tokens:
        logits = logits_after(model, prompt + answer)[-1]
        answer.append(int(adjusted(logits, prompt, answer, params).argmax()))
    return answer


def run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(("mode", "steps"), [("full", 1), ("full", 4), ("piecewise", 3), ("none", 3)])
def test_penalties_and_biases_of_many_rows_at_once(
    tiny: Path, device: str, model: torch.nn.Module, mode: str, steps: int
) -> None:
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "decode_steps": steps}
    llm = LLM(tiny, device=device, dtype="float32", graph_mode=mode, **limits)
    cases = [(prompt, params) for prompt in PROMPTS for params in ADJUSTED]
    outputs = run(llm, [prompt for prompt, _ in cases], [params for _, params in cases])
    expected = [reference(model, prompt, params) for prompt, params in cases]
    assert tokens_of(outputs) == expected
    plain = [reference(model, prompt, GREEDY) for prompt, _ in cases]
    assert sum(one != other for one, other in zip(expected, plain, strict=True)) > len(cases) / 2


def test_penalties_survive_preemption_and_prefix_caching(tiny: Path, device: str, model: torch.nn.Module) -> None:
    block = 2 * 2 * 16 * 2 * 16 * 4
    llm = LLM(
        tiny, device=device, dtype="float32", max_num_seqs=8, max_num_batched_tokens=32, kv_cache_memory=9 * block
    )
    prompts = [PROMPTS[2] + [number] for number in range(6)] * 2
    params = [replace(ADJUSTED[number % len(ADJUSTED)], max_tokens=30) for number in range(12)]
    outputs = run(llm, prompts, params)
    assert llm.stats.preemptions > 0
    assert tokens_of(outputs) == [reference(model, *case) for case in zip(prompts, params, strict=True)]


def test_no_end_before_the_minimum_of_tokens(tiny: Path, bundled: Path, device: str) -> None:
    """Stop tokens are not drawn before, though a bias makes them certain; at the minimum they are."""
    llm = LLM(tiny, device=device, dtype="float32", max_num_seqs=4)
    params = SamplingParams(temperature=1, seed=3, max_tokens=20, logit_bias={4: 100.0, 6: 99.0}, stop_token_ids=[4, 6])
    outputs = run(llm, [[1, 2, 3]] * 3, [replace(params, min_tokens=count) for count in (0, 1, 9)])
    assert [len(tokens) for tokens in tokens_of(outputs)] == [1, 2, 10]
    assert all(tokens[-1] in (4, 6) and not {4, 6} & set(tokens[:-1]) for tokens in tokens_of(outputs))

    llm = LLM(bundled, device=device, max_num_seqs=4, decode_steps=7)
    free = llm.generate("ROMEO.", replace(GREEDY, max_tokens=60)).pop().outputs[0]
    stop = free.text[10:12]
    late = llm.generate("ROMEO.", replace(GREEDY, max_tokens=60, stop=[stop], min_tokens=30)).pop().outputs[0]
    assert len(late.token_ids) > 30
    assert free.text.startswith(late.text)
    assert stop in late.text


@pytest.mark.parametrize("mode", ["full", "none"])
def test_logprobs_are_the_models_own(tiny: Path, device: str, model: torch.nn.Module, mode: str) -> None:
    """Of every token and of the most likely ones, by the model's logits; prompts in chunks, beside others."""
    llm = LLM(tiny, device=device, dtype="float32", max_num_seqs=4, max_num_batched_tokens=16, graph_mode=mode)
    params = [
        replace(GREEDY, logprobs=2, prompt_logprobs=0),
        SamplingParams(temperature=1.5, seed=1, max_tokens=9, logprobs=0, prompt_logprobs=20, repetition_penalty=1.2),
        replace(GREEDY, prompt_logprobs=3),
        SamplingParams(temperature=1.0, seed=2, max_tokens=5, logprobs=20),
        GREEDY,
    ]
    prompts = [*PROMPTS, PROMPTS[2]]
    outputs = run(llm, prompts, params)
    assert tokens_of(outputs)[0] == reference(model, prompts[0], GREEDY)
    for output, prompt, each in zip(outputs, prompts, params, strict=True):
        answer = output.outputs[0]
        logs = logits_after(model, prompt + answer.token_ids).log_softmax(1)
        cases = [
            (each.prompt_logprobs, (output.prompt_logprobs or [None])[1:], prompt[1:], logs[: len(prompt) - 1]),
            (each.logprobs, answer.logprobs or [], answer.token_ids, logs[len(prompt) - 1 : -1]),
        ]
        assert (output.prompt_logprobs is None) == (each.prompt_logprobs is None)
        assert (answer.logprobs is None) == (each.logprobs is None) == (answer.cumulative_logprob is None)
        for wanted, got, tokens, rows in cases:
            if wanted is None:
                continue
            for entry, token, row in zip(got, tokens, rows, strict=True):
                assert entry is not None
                top = row.topk(wanted).indices.tolist()
                assert entry.keys() == {token, *top}
                for other, logprob in entry.items():
                    assert abs(logprob.logprob - float(row[other])) < 1e-4
                    assert logprob.rank == int((row > row[other]).sum()) + 1
        if answer.logprobs is not None:
            total = sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(answer.token_ids))
            assert answer.cumulative_logprob == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("mode", ["full", "none"])
def test_logprobs_of_the_whole_vocabulary(tiny: Path, device: str, model: torch.nn.Module, mode: str) -> None:
    """Of answers and prompts, whole and in chunks, beside rows that want few or none; the tokens stay the same."""
    llm = LLM(tiny, device=device, dtype="float32", max_num_seqs=4, max_num_batched_tokens=16, graph_mode=mode)
    params = [
        replace(GREEDY, logprobs=-1),
        replace(GREEDY, logprobs=3, prompt_logprobs=1),
        SamplingParams(temperature=1.2, seed=1, max_tokens=6, logprobs=-1, prompt_logprobs=-1, frequency_penalty=0.3),
        replace(GREEDY, prompt_logprobs=-1, logprobs=0),
        GREEDY,
    ]
    prompts = [*PROMPTS, PROMPTS[0]]
    outputs = run(llm, prompts, params)
    plain = [replace(each, logprobs=None, prompt_logprobs=None) for each in params]
    assert tokens_of(outputs) == tokens_of(run(llm, prompts, plain))
    for output, prompt, each in zip(outputs, prompts, params, strict=True):
        answer = output.outputs[0]
        logs = logits_after(model, prompt + answer.token_ids).log_softmax(1)
        got = [
            (each.logprobs, answer.logprobs, answer.token_ids, logs[len(prompt) - 1 : -1]),
            (each.prompt_logprobs, (output.prompt_logprobs or [])[1:], prompt[1:], logs[: len(prompt) - 1]),
        ]
        for wanted, entries, tokens, rows in got:
            if wanted != -1:
                assert all(entry is not None and len(entry) <= 4 for entry in entries or [])
                continue
            for entry, token, row in zip(entries or [], tokens, rows, strict=True):
                assert entry is not None
                assert entry.keys() == set(range(199))
                assert [each.rank for each in entry.values()] == list(range(1, 200))
                found = torch.tensor([entry[other].logprob for other in range(199)], dtype=torch.float64)
                torch.testing.assert_close(found, row, rtol=0, atol=1e-4)
                assert entry[token].rank == int((row > row[token]).sum()) + 1
        if each.logprobs == -1:
            total = sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(answer.token_ids))
            assert answer.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_logprobs_of_all_tokens_are_a_mapping_in_order() -> None:
    logits = np.array([1.0, -np.inf, np.nan, 1.0, 3.0], dtype=np.float32)
    logprobs = VocabularyLogprobs(logits, str)
    assert list(logprobs) == [4, 0, 3, 1, 2]  # among equals, lower ids come first
    assert [each.rank for each in logprobs.values()] == [1, 2, 3, 4, 5]
    assert sum(math.exp(each.logprob) for each in logprobs.values()) == pytest.approx(1)
    assert logprobs[3].decoded_token == "3"
    assert all(other not in logprobs for other in (-1, 5, "3", None))


def test_logprobs_of_the_whole_vocabulary_take_memory_that_is_there(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny, device="cpu", enforce_eager=True, max_num_seqs=4)
    # 2 rows of 4 sequences for prompts and answers, 4 bytes a token; then 20 bytes a token of 16384 answers.
    for module, free in (("sampler", 2 * 4 * 199 * 4 - 1), ("llm", 20 * 199 * 16384 * 5 - 1)):
        monkeypatch.setattr(f"graphmode.engine.{module}.free_memory", lambda device, free=free: free)
        with pytest.raises(
            InputError, match=rf"of all (199 )?tokens .*need .*{in_words(free)} free. Ask for 20 at most"
        ):
            llm.generate([[1], [2]], [GREEDY, SamplingParams(logprobs=-1, max_tokens=5, n=16384)])
        monkeypatch.undo()
    assert llm.stats.steps == 0


def test_logprobs_name_their_tokens_and_come_with_each_token_of_a_stream(bundled: Path) -> None:
    llm = LLM(bundled, device="cpu", max_num_seqs=4)
    seen = 0
    for output in llm.stream("ROMEO.", replace(GREEDY, logprobs=2, prompt_logprobs=1, n=2)):
        answer = output.outputs[0]
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        seen = len(answer.token_ids)
    assert seen == 12
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert entry[token].rank == 1
        assert all(each.decoded_token for each in entry.values())


def test_draws_follow_the_adjusted_and_filtered_distribution(tiny: Path, device: str, model: torch.nn.Module) -> None:
    llm = LLM(tiny, device=device, dtype="float32", max_num_seqs=64, max_num_batched_tokens=256)
    prompt = PROMPTS[0]
    params = SamplingParams(
        temperature=1.4, top_k=12, repetition_penalty=1.3, logit_bias={3: 1.0}, seed=11, max_tokens=1, n=2000
    )
    drawn = [each.token_ids[0] for each in llm.generate({"prompt_token_ids": prompt}, params).pop().outputs]
    logits = adjusted(logits_after(model, prompt)[-1], prompt, [], params)
    logits[logits < logits.topk(12).values[-1]] = -float("inf")
    check_drawn_from((logits / 1.4).softmax(0), torch.tensor(drawn))


def test_what_the_model_does_not_have_is_refused(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", enforce_eager=True)
    with pytest.raises(InputError, match="logit_bias names token 199; the model's ids are 0 to 198"):
        run(llm, [[1]], [SamplingParams(logit_bias={199: 1.0})])
    with pytest.raises(InputError, match="min_tokens=1 bars 100 tokens"):
        run(llm, [[1]], [SamplingParams(min_tokens=1, stop_token_ids=range(100))])
