"""Allowed tokens and bad words hold for each row by its own, in graphs and bursts, beside rows without."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from graphmode import LLM, SamplingParams
from graphmode.graph import InputError

PROMPTS = [[5, 9, 5, 17, 30, 5], [71, 72, 73], list(range(40, 80)), [87] * 20]
GREEDY = SamplingParams(temperature=0, max_tokens=14)


@pytest.fixture(scope="module")
def spelled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer in which a token is a character, token 1 the space."""
    folder = tmp_path_factory.mktemp("spelled")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    vocabulary = {letter(token): token for token in range(199)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=letter(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def letter(token: int) -> str:
    return " " if token == 1 else chr(0x4E00 + token)


def spell(tokens: list[int]) -> str:
    return "".join(map(letter, tokens))


@pytest.fixture(scope="module")
def model(tiny: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def expected(model: torch.nn.Module, prompt: list[int], params: SamplingParams, words: list[list[int]]) -> list[int]:
    """The most likely tokens that neither set nor words forbid, looking at the whole answer."""
    answer: list[int] = []
    allowed = range(199) if params.allowed_token_ids is None else params.allowed_token_ids
    for _ in range(params.max_tokens or 0):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, -1]
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        forbidden = set(range(199)) - set(allowed)
        for word in words:
            before = word[:-1]
            if len(before) <= len(answer) and answer[len(answer) - len(before) :] == before:
                forbidden.add(word[-1])
        logits[list(forbidden)] = -float("inf")
        answer.append(int(logits.argmax()))
    return answer


def cases(model: torch.nn.Module) -> list[tuple[list[int], SamplingParams, list[list[int]]]]:
    """Of each prompt: some tokens allowed, words of its own free answer, both, and neither."""
    made = []
    for prompt in PROMPTS:
        free = expected(model, prompt, GREEDY, [])
        words = [free[2:4], free[5:8], free[:1], [*prompt[-1:], free[0]], free[1:14]]
        some = [*range(0, 199, 3), *free[:3]]
        biased = {free[2]: 5.0, 2: 3.0}
        banned = replace(GREEDY, bad_words=[spell(word) for word in words])
        made += [
            (prompt, replace(GREEDY, allowed_token_ids=some), []),
            (prompt, banned, words),
            (prompt, replace(banned, allowed_token_ids=some, logit_bias=biased), words),
            (prompt, GREEDY, []),
        ]
    return made


@pytest.mark.parametrize(("mode", "steps"), [("full", 1), ("full", 4), ("piecewise", 3), ("none", 3)])
def test_what_is_forbidden_is_not_drawn(
    spelled: Path, device: str, model: torch.nn.Module, mode: str, steps: int
) -> None:
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "decode_steps": steps}
    llm = LLM(spelled, device=device, dtype="float32", graph_mode=mode, **limits)
    given = cases(model)
    outputs = llm.generate([prompt for prompt, _, _ in given], [params for _, params, _ in given])
    wanted = [expected(model, *case) for case in given]
    assert [output.outputs[0].token_ids for output in outputs] == wanted
    free = [expected(model, prompt, GREEDY, []) for prompt, _, _ in given]
    assert sum(one != other for one, other in zip(wanted, free, strict=True)) > len(given) / 2


def test_restrictions_survive_preemption(spelled: Path, device: str, model: torch.nn.Module) -> None:
    block = 2 * 2 * 16 * 2 * 16 * 4
    llm = LLM(
        spelled, device=device, dtype="float32", max_num_seqs=8, max_num_batched_tokens=32, kv_cache_memory=9 * block
    )
    given = [(prompt, replace(params, max_tokens=25), words) for prompt, params, words in cases(model)]
    outputs = llm.generate([prompt for prompt, _, _ in given], [params for _, params, _ in given])
    assert llm.stats.preemptions > 0
    assert [output.outputs[0].token_ids for output in outputs] == [expected(model, *case) for case in given]


def test_bad_words_do_not_come_with_or_without_a_space(bundled: Path) -> None:
    llm = LLM(bundled, device="cpu", enforce_eager=True, max_num_seqs=16, decode_steps=4)
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=40, n=16)
    words = ["the", "you", "my lord", "king", "love", "and", "ROMEO", "not"]
    free = [answer.text for answer in llm.generate("JULIET.\n", params)[0].outputs]
    assert sum(f" {word}" in text for text in free for word in words) > 10
    tokenizer = llm.get_tokenizer()
    spaced = [text for word in words for text in (word, f" {word}")]
    spelled_out = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in spaced]
    for answer in llm.generate("JULIET.\n", replace(params, bad_words=words))[0].outputs:
        made = answer.token_ids
        for tokens in spelled_out:
            assert all(made[at : at + len(tokens)] != tokens for at in range(len(made)))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"allowed_token_ids": [3, 199]}, "allowed_token_ids names token 199; the model's ids are 0 to 198"),
        ({"allowed_token_ids": [3], "bad_words": letter(3)}, "together may leave no token to draw"),
        ({"allowed_token_ids": [3], "bad_words": [spell([3, 3])]}, "together may leave no token to draw"),
        ({"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 1}, "together may leave no token to draw"),
        ({"bad_words": [spell([4] * 18)]}, "which is 18 tokens; a word may have 17. Give a shorter part"),
        ({"bad_words": [spell([a, b]) for a in range(2, 20) for b in range(2, 20)]}, "there is room for 256"),
    ],
)
def test_restrictions_that_cannot_be_kept_are_refused(spelled: Path, params: dict[str, Any], words: str) -> None:
    llm = LLM(spelled, device="cpu", enforce_eager=True, max_num_seqs=2)
    with pytest.raises(InputError, match=words):
        llm.generate([[1, 2], [3]], [GREEDY, SamplingParams(**params)])


def test_bad_words_need_a_tokenizer(tiny: Path) -> None:
    llm = LLM(tiny, device="cpu", enforce_eager=True, max_num_seqs=2)
    with pytest.raises(InputError, match="without a tokenizer, so bad_words cannot be told"):
        llm.generate([1, 2], SamplingParams(bad_words=["a"]))
    assert llm.generate([1, 2], SamplingParams(allowed_token_ids=[7], max_tokens=3))[0].outputs[0].token_ids == [7] * 3
