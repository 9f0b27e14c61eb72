"""What generate, stream and chat take, and what they refuse before any work."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from graphmode import LLM, SamplingParams
from graphmode.errors import GraphModeError
from graphmode.graph import InputError

GREEDY = SamplingParams(temperature=0, max_tokens=4)
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ message.role | upper }}.\n{{ message.content }}\n{% endfor %}"
    "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}"
    "{% if add_generation_prompt %}{{ speaker or 'ROMEO' }}.\n{% endif %}"
)


@pytest.fixture(scope="module")
def llm(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The bundled model with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(bundled, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return LLM(folder, device="cpu", enforce_eager=True, max_num_seqs=4, max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def without_text(tiny: Path) -> LLM:
    """A model without a tokenizer, of 199 tokens."""
    return LLM(tiny, device="cpu", enforce_eager=True, max_num_seqs=4, max_model_len=64)


GOOD = [1, 2, 3]
BAD_PROMPTS: list[tuple[Any, str]] = [
    (5, "prompts is 5; it must be a prompt or a list of prompts: a text, a list of token ids"),
    (None, "prompts is None; it must be"),
    (2.5, "prompts is 2.5"),
    (b"abc", "prompts is b'abc'"),
    ({1, 2}, "prompts is {1, 2}"),
    (np.array(5), r"prompts is array\(5\)"),
    (torch.tensor(5), r"prompts is tensor\(5\)"),
    (torch.zeros(1, 1, 1, dtype=torch.int64), r"prompts\[0\] is tensor"),
    ([GOOD, None], r"prompts\[1\] is None; it must be a text, a list of token ids"),
    ([GOOD, 7], r"prompts\[1\] is 7"),
    ([1, 2, None], r"prompts\[0\] is 1"),
    ([GOOD, [1, 2.5]], r"prompts\[1\] holds 2.5; it must be a list of token ids, integers"),
    ([GOOD, [True]], r"prompts\[1\] holds True"),
    ([GOOD, [None]], r"prompts\[1\] holds None"),
    ([GOOD, []], r"prompts\[1\]: the prompt has no tokens; give at least one"),
    ([GOOD, {"prompt_token_ids": []}], r"prompts\[1\]: the prompt has no tokens"),
    ([GOOD, {"prompt_token_ids": 5}], r"prompts\[1\]: prompt_token_ids is 5; it must be a list of token ids"),
    ([GOOD, {"prompt_token_ids": np.array(5)}], r"prompt_token_ids is array\(5\)"),
    ([GOOD, {"prompt_token_ids": "abc"}], "prompt_token_ids is 'abc'"),
    ([GOOD, {"prompt_token_ids": ["a"]}], "prompt_token_ids holds 'a'"),
    ([GOOD, {"prompt_token_ids": [[1]]}], r"prompt_token_ids holds \[1\]"),
    ([GOOD, {"prompt_token_ids": [-1]}], "prompt_token_ids holds -1; token ids are 0 or more"),
    ([GOOD, [199]], r"prompts\[1\]: the prompt holds token id 199; the model's ids are 0 to 198"),
    ([GOOD, [10**30]], "the prompt holds token id 1000000000000000000000000000000"),
    ([GOOD, {}], r"prompts\[1\]: a prompt holds \[\]; give a text as 'prompt' or tokens as 'prompt_token_ids'"),
    ([GOOD, {"prompt": None}], "give a text as 'prompt' or tokens"),
    ([GOOD, {"promt": "a"}], r"a prompt has no promt; did you mean prompt\? It has prompt, prompt_token_ids"),
    ([GOOD, {7: "a"}], "a prompt has no 7; it has prompt"),
    ([GOOD, {"prompt_embeds": torch.zeros(1)}], "prompt_embeds=.* cannot be honoured: a prompt is made of tokens"),
    ([GOOD, {"prompt": GOOD}], "the model comes without a tokenizer"),
    ([GOOD, np.zeros(3)], r"prompts\[1\] holds 0.0"),
    ([GOOD, list(range(64))], "the prompt has 64 tokens; with max_model_len=64 it may have 63"),
]


@pytest.mark.parametrize(("prompts", "words"), BAD_PROMPTS)
def test_prompts_that_are_none_are_refused_before_any_work(without_text: LLM, prompts: Any, words: str) -> None:
    without_text.engine.core.reset_stats()
    with pytest.raises(InputError, match=words):
        without_text.generate(prompts, GREEDY)
    with pytest.raises(InputError):  # at once, not when the first output is asked for
        without_text.stream(prompts, GREEDY)
    assert without_text.stats.steps == 0
    assert not without_text.engine.core.scheduler.has_work


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("\ud800", "the prompt holds '.ud800' at character 0, half of a surrogate pair"),
        (["ROMEO.", "ab\udfff"], r"prompts\[1\] holds '.udfff' at character 2"),
        ({"prompt": "a\ud800"}, "the prompt holds '.ud800' at character 1"),
        ({"prompt": 5}, "the prompt is 5; it must be a text"),
        ({"prompt": b"abc"}, "the prompt is b'abc'; it must be a text"),
        ("", "the prompt has no tokens"),
        (["ROMEO.", ""], r"prompts\[1\]: the prompt has no tokens"),
    ],
)
def test_texts_that_are_none_are_refused(llm: LLM, prompt: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        llm.generate(prompt, GREEDY)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (5, "sampling_params is 5; it must be SamplingParams, or a list with one for each prompt"),
        ({"temperature": 0}, "sampling_params is {'temperature': 0}"),
        ("greedy", "sampling_params is 'greedy'"),
        (SamplingParams, "sampling_params is <class"),
        ([GREEDY, None], "sampling_params is None; it must be SamplingParams"),
        ([GREEDY], "2 prompts, but 1 sampling parameters; give one, or one each"),
        ([], "2 prompts, but 0"),
        (SamplingParams(stop="a"), "stop texts cannot be found; use stop_token_ids"),
        (SamplingParams(stop_token_ids=[199]), "stop_token_ids names token 199; the model's ids are 0 to 198"),
        (SamplingParams(logit_bias={199: 1.0}), "logit_bias names token 199; the model's ids are 0 to 198"),
    ],
)
def test_parameters_that_are_none_are_refused(without_text: LLM, params: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        without_text.generate([GOOD, GOOD], params)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"use_tqdm": "yes"}, "progress is 'yes'; it must be True or False, or None"),
        ({"lora_request": object()}, "lora_request=.* cannot be honoured: LoRA adapters are not applied yet"),
        ({"priority": [1, 2]}, "1 prompts, but 2 priorities; give one, or one each"),
        ({"priority": "high"}, "priority is 'high'; it must be an integer, or a list with one for each prompt"),
        ({"priority": [1.5]}, "priority is 1.5; it must be an integer"),
        ({"prompt_token_ids": [GOOD]}, r"tokens are prompts themselves: generate\(\[\[1, 2, 3\]\]\)"),
        ({"use_tqm": True}, r"generate has no use_tqm; did you mean use_tqdm\? It has progress"),
        ({"use_tqdm": True, "progress": False}, "contradict"),
    ],
)
def test_other_arguments_are_refused_by_name(without_text: LLM, others: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        without_text.generate(GOOD, GREEDY, **others)


@pytest.mark.parametrize("arguments", [{"model": 5}, {"model": b"x"}, {"progress": 1}, {"model": Path("nowhere")}])
def test_a_model_that_is_none_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(GraphModeError, match=r"model is|progress is|nowhere"):
        LLM(**arguments)


def test_prompts_as_tokens(without_text: LLM) -> None:
    """One list of token ids is a prompt; so is each in a list of lists, or in numpy's and torch's tensors."""
    prompts: list[Any] = [GOOD, [[1, 2, 3]], (1, 2, 3), range(1, 4), np.array(GOOD), [torch.tensor(GOOD)]]
    prompts += [[np.array(GOOD)], {"prompt_token_ids": np.array(GOOD)}, [{"prompt_token_ids": tuple(GOOD)}]]
    outputs = [without_text.generate(prompt, GREEDY) for prompt in prompts]
    assert {len(each) for each in outputs} == {1}
    assert {tuple(each[0].prompt_token_ids) for each in outputs} == {(1, 2, 3)}
    assert {tuple(each[0].outputs[0].token_ids) for each in outputs} == {tuple(outputs[0][0].outputs[0].token_ids)}
    many: list[tuple[Any, list[int]]] = [([[1, 2], [3]], [2, 1]), (iter([[1, 2], [3]]), [2, 1]), ([5], [1])]
    for several, lengths in many:
        outputs = [without_text.generate(several, GREEDY, use_tqdm=False)]
        assert [len(each.prompt_token_ids) for each in outputs[0]] == lengths
    assert without_text.generate([], GREEDY) == []
    assert [*without_text.stream(GOOD, GREEDY)][-1].outputs == without_text.generate(GOOD, GREEDY)[0].outputs


def test_tokens_count_where_a_text_stands_beside_them(llm: LLM) -> None:
    (output,) = llm.generate({"prompt": "JULIET.", "prompt_token_ids": GOOD}, GREEDY)
    assert (output.prompt, output.prompt_token_ids) == ("JULIET.", GOOD)
    assert output.outputs == llm.generate(GOOD, GREEDY)[0].outputs


def test_no_most_tokens_means_up_to_the_models_limit(without_text: LLM) -> None:
    (output,) = without_text.generate(GOOD, SamplingParams(temperature=0, max_tokens=None))
    assert len(output.outputs[0].token_ids) == 64 - 3
    assert output.outputs[0].finish_reason == "length"


def test_prompts_are_cut_from_the_left(without_text: LLM) -> None:
    def tokens(count: int, truncate: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=1, truncate_prompt_tokens=truncate)
        return without_text.generate(list(range(count)), params)[0].prompt_token_ids

    assert tokens(50, 3) == [47, 48, 49]
    assert tokens(2, 3) == [0, 1]
    assert tokens(100, -1) == list(range(37, 100))
    with pytest.raises(InputError, match="truncate_prompt_tokens is 0"):
        tokens(2, 0)


def test_cached_tokens_of_the_prompt_are_counted(without_text: LLM) -> None:
    prompt = [11] * 40
    assert without_text.generate(prompt, GREEDY)[0].num_cached_tokens == 0
    assert without_text.generate(prompt, GREEDY)[0].num_cached_tokens == 32  # two full blocks of 16
    unread = SamplingParams(temperature=0, max_tokens=4, skip_reading_prefix_cache=True)
    assert without_text.generate(prompt, unread)[0].num_cached_tokens == 0


def test_a_conversation_is_its_rendered_prompt(llm: LLM) -> None:
    """Rendered by the template, tokenized without special tokens; one, or several with parameters of their own."""
    one = [{"role": "juliet", "content": "O Romeo!"}]
    other = [*one, {"role": "romeo", "content": [{"type": "text", "text": "Shall I"}, "hear more?"]}]
    (output,) = llm.chat(one, GREEDY)
    assert output.prompt == "JULIET.\nO Romeo!\nROMEO.\n"
    assert output.prompt_token_ids == llm.get_tokenizer()(output.prompt, add_special_tokens=False)["input_ids"]
    assert output.outputs[0].text == llm.generate(output.prompt, GREEDY)[0].outputs[0].text
    outputs = llm.chat([one, other], [GREEDY, SamplingParams(temperature=0, max_tokens=2)], use_tqdm=False)
    assert [len(each.outputs[0].token_ids) for each in outputs] == [4, 2]
    assert outputs[0].outputs == output.outputs
    assert outputs[1].prompt == "JULIET.\nO Romeo!\nROMEO.\nShall I\nhear more?\nROMEO.\n"


def test_what_the_template_is_given(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    (output,) = llm.chat(messages, GREEDY, tools=tools, chat_template_kwargs={"speaker": "NURSE"})
    assert output.prompt == "USER.\nHi\n<look>NURSE.\n"
    (output,) = llm.chat(messages, GREEDY, add_generation_prompt=False)
    assert output.prompt == "USER.\nHi\n"
    (output,) = llm.chat(messages, GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt == "USER.\nHi"
    (output,) = llm.chat(messages, GREEDY, chat_template="{{ messages[0].content }}!")
    assert output.prompt == "Hi!"


HI = {"role": "user", "content": "Hi"}
BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": "Hi"}, "messages is 'Hi'; it must be a list of messages"),
    ({"messages": HI}, "messages is {.*it must be a list of messages"),
    ({"messages": None}, "messages is None"),
    ({"messages": []}, r"messages is \[\]"),
    ({"messages": [HI, None]}, "a conversation of messages is {"),
    ({"messages": [[HI], []]}, r"a conversation of messages is \[\]"),
    ({"messages": [[HI, "Hi"]]}, r"messages\[1\] is 'Hi'; it must be a dict such as"),
    ({"messages": [{"content": "Hi"}]}, r"messages\[0\] is {'content': 'Hi'}; it must have a 'role'"),
    ({"messages": [{"role": 5, "content": "Hi"}]}, "it must have a 'role'"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'; give a text"),
    ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\]\['content'\] is 5; it must be a text or a list"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ({"messages": [{"role": "user", "content": [5]}]}, r"messages\[0\]\['content'\]\[0\] is 5"),
    ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": 1}]}]}, "what it names: text, image"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": 1}]}]}, "the model takes text alone"),
    ({"messages": [{"role": "tool", "content": "Hi"}]}, "the chat template cannot render .* no tools here"),
    ({"messages": [HI], "chat_template": "{% if %}"}, "the chat template cannot render the conversation: Template"),
    ({"messages": [HI], "chat_template": "{{ 1 / 0 }}"}, "cannot render the conversation: ZeroDivisionError"),
    ({"messages": [HI], "chat_template": 5}, "chat_template is 5; it must be a text"),
    ({"messages": [HI], "tools": [len]}, "the chat template cannot render the conversation"),
    ({"messages": [HI], "tools": "look"}, "tools is 'look'; it must be a list of JSON schemas"),
    ({"messages": [HI], "chat_template_kwargs": 5}, "chat_template_kwargs is 5"),
    ({"messages": [HI], "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs holds tokenize"),
    ({"messages": [HI], "add_generation_prompt": "no"}, "add_generation_prompt is 'no'; it must be True or False"),
    ({"messages": [HI], "continue_final_message": True}, "set add_generation_prompt=False"),
    ({"messages": [HI], "sampling_params": 5}, "sampling_params is 5"),
    ({"messages": [HI], "lora_request": 5}, "lora_request=5 cannot be honoured"),
    ({"messages": [HI], "tempature": 5}, "chat has no tempature"),
    ({"messages": [HI], "chat_template": "{{ '' }}"}, "the prompt has no tokens"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_CHATS)
def test_a_conversation_that_is_none_is_refused(llm: LLM, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        llm.chat(**arguments)


def test_a_model_without_a_template_or_a_tokenizer_says_so(without_text: LLM, bundled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without a tokenizer, so it has no chat template"):
        without_text.chat([HI], GREEDY)
    with pytest.raises(InputError, match="without a tokenizer"):
        without_text.get_tokenizer()
    shutil.copytree(bundled, tmp_path / "plain", ignore=shutil.ignore_patterns("chat_template.jinja"))
    llm = LLM(tmp_path / "plain", device="cpu", enforce_eager=True, max_num_seqs=2)
    with pytest.raises(InputError, match="tokenizer has no chat template; give one as chat_template"):
        llm.chat([HI], GREEDY)
