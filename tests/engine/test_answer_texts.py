"""What generate and stream make of an answer's tokens: one text, whatever looks at it and however its tokens come."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, ByT5Tokenizer, Qwen3Config

from graphmode import LLM, SamplingParams
from graphmode.engine.outputs import CompletionOutput
from graphmode.errors import ModelError
from graphmode.graph import InputError
from tests.engine.test_text import TWO_EMOJI, byte_fallback, ctrl

EOS, SEPARATOR = "</s>", "<|sep|>"
Script = dict[tuple[int, ...], list[int]]


class Scripted:
    """An engine whose answers are given: the model runs, and its tokens are replaced as the host reads them."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        torch.manual_seed(0)
        config = Qwen3Config(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=32,
            vocab_size=400,
            max_position_embeddings=128,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        options = {"enforce_eager": True, "max_num_seqs": 4, "max_num_batched_tokens": 32, "decode_steps": 8}
        self.llm = LLM(folder, device="cpu", **options)
        self.tokenizer = self.llm.engine.text.tokenizer
        self.script: Script = {}
        scheduler = self.llm.engine.core.scheduler
        update = scheduler.update

        def scripted(batch: Any, tokens: list[list[int]], eos_token_ids: frozenset[int]) -> Any:
            made = []
            for row, sampled in zip(batch.scheduled, tokens, strict=True):
                rest = self.script[tuple(row.sequence.prompt_token_ids)][len(row.sequence.output_token_ids) :]
                rest = rest[: len(sampled)]
                made.append([*rest, *sampled[len(rest) :]])
            return update(batch, made, eos_token_ids)

        scheduler.update = scripted  # type: ignore[method-assign]

    def ids(self, *pieces: str) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(piece) for piece in pieces]  # type: ignore[union-attr]

    def answer(self, prompt: list[int], tokens: list[int], decode_steps: int = 1, **options: Any) -> CompletionOutput:
        """Return what generate gives, which is what stream ends with."""
        self.script = {tuple(prompt): tokens}
        scheduler = self.llm.engine.core.scheduler
        scheduler.limits = replace(scheduler.limits, decode_steps=decode_steps)
        params = SamplingParams(temperature=0, **{"max_tokens": len(tokens), **options})
        (generated,) = self.llm.generate([{"prompt_token_ids": prompt}], params)
        streamed = [output.outputs[0] for output in self.llm.stream({"prompt_token_ids": prompt}, params)]
        assert streamed[-1] == generated.outputs[0]
        assert all(streamed[-1].text.startswith(each.text) for each in streamed)
        assert not scheduler.has_work
        return generated.outputs[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Scripted:
    return Scripted(tmp_path_factory.mktemp("llama"), byte_fallback())


@pytest.mark.parametrize("stop", [[], ["zzz"]])
def test_bytes_that_are_no_character_harm_their_own_row_alone(llama: Scripted, stop: list[str]) -> None:
    prompts = [llama.ids("▁The"), llama.ids("▁is"), llama.ids("b")]
    answers = [llama.ids("<0x41>", "<0xE2>", "b"), llama.ids("▁true", "b", "b"), llama.ids(*["<0xFF>"] * 3)]
    llama.script = {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}
    params = SamplingParams(temperature=0, max_tokens=3, stop=stop)
    outputs = llama.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    assert [output.outputs[0].text for output in outputs] == ["A\ufffdb", " truebb", "\ufffd" * 3]


@pytest.mark.parametrize("stop", [None, "zzz"])
@pytest.mark.parametrize("decode_steps", [1, 4, 8])
def test_an_answer_that_ends_within_a_character_keeps_those_before(
    llama: Scripted, decode_steps: int, stop: str | None
) -> None:
    answer, prompt = llama.ids(*TWO_EMOJI), llama.ids("▁The")
    assert llama.answer(prompt, answer, decode_steps, max_tokens=6, stop=stop).text == "😀\ufffd"
    assert llama.answer(prompt, answer, decode_steps, stop=stop).text == "😀😃"


def test_the_answer_is_what_follows_the_text_of_the_prompt(llama: Scripted) -> None:
    prompt, answer = llama.ids("▁The"), llama.ids("▁is", "▁true")
    assert llama.answer(prompt, answer).text == " is true"
    stopped = llama.answer(prompt, answer, stop=" is")
    assert (stopped.text, stopped.token_ids, stopped.stop_reason) == ("", answer[:1], " is")


@pytest.mark.parametrize("decode_steps", range(1, 9))
def test_a_stop_text_gives_the_same_tokens_in_any_bursts(llama: Scripted, decode_steps: int) -> None:
    prompt = llama.ids("▁The")
    answer = llama.ids("b", "st", "op", "<0xE2>", "<0x82>", "b", "st", "op", "b", "b", "b", "b")
    stopped = llama.answer(prompt, answer, decode_steps, stop=["stop"])
    assert (stopped.text, stopped.token_ids, stopped.finish_reason) == ("b", answer[:3], "stop")
    later = llama.answer(prompt, answer, decode_steps, stop=["stop"], min_tokens=3)
    assert (later.text, later.token_ids) == ("bstop\ufffdb", answer[:8])
    kept = llama.answer(prompt, answer, decode_steps, stop=["sto"], include_stop_str_in_output=True)
    assert (kept.text, kept.token_ids, kept.stop_reason) == ("bsto", answer[:3], "sto")


@pytest.mark.parametrize("decode_steps", [1, 8])
def test_a_stop_text_that_the_token_after_the_minimum_completes_is_found(llama: Scripted, decode_steps: int) -> None:
    answer = llama.ids("b", "b", "st", "op", "b", "b")
    stopped = llama.answer(llama.ids("▁The"), answer, decode_steps, stop=["stop"], min_tokens=3)
    assert (stopped.text, stopped.token_ids) == ("bb", answer[:4])


@pytest.mark.parametrize("decode_steps", [1, 8])
def test_the_token_that_ends_an_answer_is_in_its_tokens_and_not_in_its_text(llama: Scripted, decode_steps: int) -> None:
    prompt = llama.ids("▁The")
    answer = llama.ids("▁is", "▁true", EOS, "b")
    (true, eos) = answer[1:3]

    def ended(**options: Any) -> tuple[str, list[int], int | str | None, str | None]:
        output = llama.answer(prompt, answer, decode_steps, **options)
        return output.text, output.token_ids, output.stop_reason, output.finish_reason

    assert ended(stop_token_ids=[true]) == (" is", answer[:2], true, "stop")
    assert ended(stop_token_ids=[true], include_stop_str_in_output=True) == (" is true", answer[:2], true, "stop")
    assert ended() == (" is true", answer[:3], None, "stop")
    assert ended(skip_special_tokens=False) == (" is true", answer[:3], None, "stop")
    whole = ended(skip_special_tokens=False, include_stop_str_in_output=True)
    assert whole == (" is true</s>", answer[:3], None, "stop")
    assert ended(stop_token_ids=[eos]) == (" is true", answer[:3], None, "stop")
    assert ended(stop_token_ids=[eos], ignore_eos=True) == (" is true", answer[:3], eos, "stop")
    assert ended(ignore_eos=True) == (" is trueb", answer, None, "length")
    assert ended(ignore_eos=True, skip_special_tokens=False) == (" is true</s>b", answer, None, "length")
    assert ended(detokenize=False) == ("", answer[:3], None, "stop")


@pytest.mark.parametrize("decode_steps", [1, 3, 8])
def test_a_special_token_is_found_as_a_stop_text(llama: Scripted, decode_steps: int) -> None:
    answer = llama.ids("▁is", SEPARATOR, "b", "b")
    stopped = llama.answer(llama.ids("▁The"), answer, decode_steps, stop=["zzz", SEPARATOR])
    assert (stopped.text, stopped.token_ids, stopped.stop_reason) == (" is", answer[:2], SEPARATOR)
    stopped = llama.answer(llama.ids("▁The"), answer, decode_steps, stop=SEPARATOR, skip_special_tokens=False)
    assert (stopped.text, stopped.token_ids, stopped.stop_reason) == (" is", answer[:2], SEPARATOR)


def test_stop_texts_need_a_text() -> None:
    with pytest.raises(InputError, match="detokenize=False"):
        SamplingParams(stop=["a"], detokenize=False)
    for name in ("detokenize", "skip_special_tokens", "include_stop_str_in_output"):
        with pytest.raises(InputError, match=f"{name} is 1; it must be True or False"):
            SamplingParams(**{name: 1})


@pytest.mark.parametrize(
    ("make", "pieces", "text", "rest"),
    [
        (ctrl, ["hel@@", "lo", "world", "a", "a"], " hello world a a", " hello"),
        (ByT5Tokenizer, "stop a", "stop a", "st"),
    ],
)
def test_tokenizers_in_python_stream_and_stop(
    make: Callable[[], Any], pieces: list[str], text: str, rest: str, tmp_path: Path
) -> None:
    python = Scripted(tmp_path, make())
    prompt, answer = python.ids("a"), python.ids(*pieces)
    for decode_steps in (1, 8):
        assert python.answer(prompt, answer, decode_steps).text == text
        assert python.answer(prompt, answer, decode_steps, stop=[text.removeprefix(rest)]).text == rest


def test_a_tokenizer_whose_texts_cannot_be_made_in_steps_is_refused_at_load(tmp_path: Path) -> None:
    """One that changes the text as a whole, after its tokens' texts are put together."""
    tokenizer = byte_fallback()
    whole = [tokenizer.backend_tokenizer.decoder, decoders.Fuse(), decoders.Replace("two lines", "2 lines")]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(whole)
    with pytest.raises(ModelError, match=f"{tmp_path}: .*cannot be made as tokens come"):
        Scripted(tmp_path, tokenizer)
