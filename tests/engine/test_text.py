"""An answer's text is the same however its tokens come: that of prompt and answer less that of the prompt."""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, CTRLTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from graphmode.engine.text import AnswerText, Detokenizer
from graphmode.errors import ModelError

CORPUS = ["the stop of the story: it's 漢字 and 😀 and 😃, naïve\n\n  or not. stop stop"] * 8
SPECIAL = ["<s>", "</s>", "<|sep|>"]


def fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE as of GPT-2, Llama 3 or Qwen; tokens may begin and end within characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return fast(tokenizer)


PIECES = ["▁", "▁The", "▁is", "▁true", "b", "is", "st", "op", "▁sto", "p", "é", "\n", "▁▁", "."]


def byte_fallback() -> PreTrainedTokenizerFast:
    """BPE with byte tokens and the decoder of Llama 2, which drops the text's first space."""
    vocab = {text: at for at, text in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(tokenizer)


def word_pieces(decoder: Any, words: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoder
    return fast(tokenizer)


class Syllables(PreTrainedTokenizer):
    """A tokenizer in Python with nothing but what it must have: no backend, and ids that it cannot decode."""

    pieces = ("a", "st", "op", " ", "é", "\n", ".", "<s>", "</s>", "<|sep|>")

    def __init__(self, **options: Any) -> None:
        super().__init__(bos_token="<s>", eos_token="</s>", extra_special_tokens=["<|sep|>"], **options)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {piece: at for at, piece in enumerate(self.pieces)}

    def _tokenize(self, text: str) -> list[str]:
        return [letter for letter in text if letter in self.pieces]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def ctrl() -> CTRLTokenizer:
    """Tokens that go on end with ``@@``, which a tokenizer in Python takes away where another follows."""
    words = ["<unk>", "hel@@", "lo", "world", "a", "st@@", "op", "foo\n", "\n", "<s>", "</s>", "<|sep|>"]
    names = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<|sep|>"]}
    with TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({word: at for at, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CTRLTokenizer(str(vocab), str(merges), **names)


WORDS = ["a", "play", "##ing", "st", "##op", "'", "s", "."]
MAKE: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "word piece": lambda: word_pieces(decoders.WordPiece(), WORDS),
    "metaspace": lambda: word_pieces(decoders.Metaspace(), PIECES),
    "suffix": lambda: word_pieces(decoders.BPEDecoder(), ["a</w>", "st", "op</w>", "hel", "lo</w>"]),
    "no decoder": lambda: word_pieces(None, ["a", "stop", "b"]),
    "syllables": Syllables,
    "byt5": lambda: ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|sep|>"]),
    "ctrl": ctrl,
}


@cache
def of_kind(kind: str) -> tuple[Any, Detokenizer]:
    tokenizer = MAKE[kind]()
    return tokenizer, Detokenizer(tokenizer, kind)


def whole(tokenizer: Any, prompt: list[int], answer: list[int], skip: bool) -> str:
    """Return the answer's text by decoding everything at once."""
    unfinished = re.compile("(\ufffd|@@)$")
    if "<0x41>" not in tokenizer.get_vocab():
        both, before = (tokenizer.decode(ids, skip_special_tokens=skip) for ids in (prompt + answer, prompt))
        # What the prompt's last character becomes with the answer belongs to the answer.
        return both.removeprefix(before) if both.startswith(before) else both.removeprefix(unfinished.sub("", before))

    def text(ids: list[int]) -> str:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        shown = [piece for piece in pieces if piece and not (skip and piece in SPECIAL)]
        data = b"".join(
            bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()
            for piece in shown
        )
        return data.decode("utf-8", "replace").removeprefix(" ")

    both, before = text(prompt + answer), text(prompt)
    return both.removeprefix(before) if both.startswith(before) else both.removeprefix(before.removesuffix("\ufffd"))


def bursts_of(answer: list[int], sizes: list[int]) -> list[list[int]]:
    """Return an answer in parts of these sizes, repeated. The last may be empty: an answer's end may come alone."""
    ends = [end for end in accumulate(sizes * (len(answer) + 1)) if end <= len(answer)]
    return [answer[begin:end] for begin, end in zip([0, *ends], [*ends, len(answer)], strict=True)]


def feed(text: AnswerText, bursts: list[list[int]]) -> list[str]:
    """Feed all bursts until a stop text is found, and return what is shown after each."""
    shown = []
    for index, burst in enumerate(bursts, start=1):
        found = text.feed(burst, last=index == len(bursts))
        shown.append(text.shown)
        if found:
            break
    return shown


@cache
def tokens(kind: str) -> st.SearchStrategy[list[int]]:
    """Lists of token ids, some beyond what the tokenizer has; the ones of one character often come in order."""
    tokenizer, _ = of_kind(kind)
    top = max(tokenizer.get_vocab().values()) + 3
    characters = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("😀", "é", "漢", "stop", " a", "\n")
    ]
    parts = st.lists(st.integers(0, top), max_size=3) | st.sampled_from(characters)
    return st.lists(parts, max_size=8).map(lambda lists: [token for part in lists for token in part]).filter(bool)


sizes = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", MAKE)
@given(data=st.data(), skip=st.booleans(), sizes=sizes)
def test_a_text_in_steps_is_the_text_at_once(kind: str, data: st.DataObject, skip: bool, sizes: list[int]) -> None:
    tokenizer, detokenizer = of_kind(kind)
    prompt = data.draw(tokens(kind), "prompt")
    answer = data.draw(tokens(kind), "answer")
    text = AnswerText(detokenizer, prompt, skip_special_tokens=skip)
    shown = feed(text, bursts_of(answer, sizes))
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert shown[-1] == text.text
    known = [[token for token in ids if decodable(tokenizer, token)] for ids in (prompt, answer)]
    assert text.text == whole(tokenizer, *known, skip)


def decodable(tokenizer: Any, token: int) -> bool:
    try:
        return tokenizer.decode([token]) is not None
    except (ValueError, IndexError, KeyError, TypeError):
        return False


@pytest.mark.parametrize("kind", MAKE)
@given(data=st.data(), min_tokens=st.integers(0, 6), include=st.booleans(), sizes=sizes)
def test_a_stop_text_ends_it_at_the_token_that_completes_it_in_any_bursts(
    kind: str, data: st.DataObject, min_tokens: int, include: bool, sizes: list[int]
) -> None:
    _, detokenizer = of_kind(kind)
    prompt, answer = (data.draw(tokens(kind), name) for name in ("prompt", "answer"))
    plain = AnswerText(detokenizer, prompt)
    texts = ["", *feed(plain, [[token] for token in answer])]
    assume(plain.text)
    begins = st.integers(0, len(plain.text) - 1)
    parts = st.builds(lambda begin, size: plain.text[begin : begin + size], begins, st.integers(1, 4))
    stops = data.draw(st.lists(parts | st.sampled_from(["stop", "st", "\ufffd", "never"]), min_size=1, max_size=3))

    expected = (len(answer), plain.text, None)
    least = len(texts[min(min_tokens, len(answer))])
    for count, text in enumerate(texts):
        ends = {stop: text.find(stop, max(0, least - len(stop) + 1)) for stop in stops}
        if count > min_tokens and (found := [(at, len(stop), stop) for stop, at in ends.items() if at >= 0]):
            at, _, stop = min(found)
            expected = (count, text[:at] + (stop if include else ""), stop)
            break

    text = AnswerText(detokenizer, prompt, stop=stops, min_tokens=min_tokens, include_stop=include)
    shown = feed(text, bursts_of(answer, sizes))
    assert (text.num_tokens, text.text, text.stop) == expected
    assert shown[-1] == text.text
    assert all(text.text.startswith(part) for part in shown)


@pytest.mark.parametrize("kind", MAKE)
@given(data=st.data(), sizes=sizes, skip=st.booleans())
def test_stop_texts_with_special_tokens_are_found_where_these_are_shown_or_not(
    kind: str, data: st.DataObject, sizes: list[int], skip: bool
) -> None:
    """The text before the stop is that of the tokens before it."""
    tokenizer, detokenizer = of_kind(kind)
    separator = tokenizer.convert_tokens_to_ids("<|sep|>")
    assert separator in detokenizer.special
    prompt, before, after = (data.draw(tokens(kind), name) for name in ("prompt", "before", "after"))
    before = [token for token in before if token != separator]
    answer = [*before, separator, *after]
    text = AnswerText(detokenizer, prompt, stop=["<|sep|>", "never said"], skip_special_tokens=skip)
    shown = feed(text, bursts_of(answer, sizes))
    plain = AnswerText(detokenizer, prompt, skip_special_tokens=skip)
    plain.feed([*before, separator], last=True)
    assert (text.num_tokens, text.stop) == (len(before) + 1, "<|sep|>")
    without = plain.text.removesuffix("<|sep|>")
    assert text.text.removesuffix("@@") == without.removesuffix("@@")  # CTRL's: whether its last token goes on
    assert all(text.text.startswith(part) for part in shown)
    with_stop = AnswerText(detokenizer, prompt, stop=["<|sep|>"], skip_special_tokens=skip, include_stop=True)
    feed(with_stop, bursts_of(answer, sizes))
    assert with_stop.text == text.text + "<|sep|>"


TWO_EMOJI = [f"<0x{byte:02X}>" for byte in "😀😃".encode()]


def ids(kind: str, *pieces: str) -> list[int]:
    return [of_kind(kind)[0].convert_tokens_to_ids(piece) for piece in pieces]


def answer(kind: str, prompt: list[int], tokens: list[int], **options: Any) -> AnswerText:
    text = AnswerText(of_kind(kind)[1], prompt, **options)
    feed(text, [[token] for token in tokens])
    return text


def test_bytes_that_are_no_character_become_replacement_characters() -> None:
    prompt = ids("byte fallback", "▁The")
    assert answer("byte fallback", prompt, ids("byte fallback", "<0x41>", "<0xE2>", "b")).text == "A\ufffdb"
    assert answer("byte fallback", prompt, ids("byte fallback", *TWO_EMOJI[:6])).text == "😀\ufffd"
    assert answer("byte fallback", prompt, ids("byte fallback", *TWO_EMOJI)).text == "😀😃"
    byte_level = of_kind("byte level")[0]("😀😃", add_special_tokens=False)["input_ids"]
    assert answer("byte level", [1], byte_level).text == "😀😃"


def test_a_character_that_prompt_and_answer_share_belongs_to_the_answer() -> None:
    begun, rest = ids("byte fallback", *TWO_EMOJI[:2]), ids("byte fallback", *TWO_EMOJI[2:4], "b")
    assert answer("byte fallback", begun, rest).text == "😀b"
    assert answer("byte fallback", begun, ids("byte fallback", "b")).text == "b"
    assert answer("byte fallback", begun, rest[:1]).text == ""


def test_the_prompt_comes_before_the_text() -> None:
    """A decoder that drops the first space of a text drops none of an answer's."""
    prompt, tokens = ids("byte fallback", "<s>", "▁The"), ids("byte fallback", "▁is", "▁true")
    assert answer("byte fallback", prompt, tokens).text == " is true"
    stopped = answer("byte fallback", prompt, tokens, stop=[" is"])
    assert (stopped.text, stopped.num_tokens, stopped.stop) == ("", 1, " is")
    assert answer("byte fallback", prompt[:1], tokens).text == "is true"
    assert answer("byte fallback", prompt[:1], ids("byte fallback", "<0x20>", "<0x41>")).text == "A"
    assert answer("ctrl", ids("ctrl", "world"), ids("ctrl", "hel@@", "lo")).text == " hello"
    assert answer("ctrl", ids("ctrl", "hel@@"), ids("ctrl", "lo")).text == "lo"


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, 2), (1, 2), (2, 4), (3, 4), (4, 6)])
def test_only_what_tokens_after_the_minimum_complete_ends_an_answer(min_tokens: int, expected: int) -> None:
    tokens = ids("byte fallback", "st", "op", "st", "op", "b", "b")
    text = answer("byte fallback", ids("byte fallback", "▁The"), tokens, stop=["stop"], min_tokens=min_tokens)
    assert text.num_tokens == expected
    assert text.stop == ("stop" if expected < 6 else None)


def test_of_two_stop_texts_that_a_token_completes_the_one_that_begins_first_counts() -> None:
    prompt, tokens = ids("byte fallback", "▁The"), ids("byte fallback", "st", "▁true")
    assert answer("byte fallback", prompt, tokens, stop=["true", "t t", "st true"]).text == ""
    text = answer("byte fallback", prompt, tokens, stop=["rue", "true", "tru"], include_stop=True)
    assert (text.text, text.stop) == ("st tru", "tru")


def test_a_hidden_special_token_parts_no_word_but_is_found() -> None:
    prompt, tokens = ids("byte fallback", "▁The"), ids("byte fallback", "st", "<|sep|>", "op", "b")
    hidden = answer("byte fallback", prompt, tokens, stop=["stop"])
    assert (hidden.text, hidden.num_tokens) == ("", 3)
    across = answer("byte fallback", prompt, tokens, stop=["t<|sep|>o"])
    assert (across.text, across.num_tokens) == ("s", 3)
    assert answer("byte fallback", prompt, tokens, stop=["stop"], skip_special_tokens=False).text == "st<|sep|>opb"


def test_special_tokens_that_are_kept_are_shown_and_the_others_are_not() -> None:
    prompt, tokens = ids("byte fallback", "▁The"), ids("byte fallback", "<s>", "st", "<|sep|>", "op")
    detokenizer = of_kind("byte fallback")[1]
    shown = AnswerText(detokenizer.keeping(["<|sep|>"]), prompt)
    feed(shown, [[token] for token in tokens])
    assert shown.text == "st<|sep|>op"
    assert answer("byte fallback", prompt, tokens).text == "stop"


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(("burst", "stop"), [(1, []), (1, ["never"]), (8, ["never", "<|sep|>"]), (4096, [])])
def test_the_work_for_a_text_is_linear_in_its_tokens(kind: str, burst: int, stop: list[str]) -> None:
    tokenizer, _ = of_kind(kind)
    detokenizer = Detokenizer(tokenizer)
    decode, decoded = detokenizer.decode, 0

    def counted(token_ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return decode(token_ids)

    detokenizer.decode = counted  # type: ignore[method-assign]
    tokens = tokenizer("stop 漢字 a 😀 " * 400, add_special_tokens=False)["input_ids"][:2000]
    text = AnswerText(detokenizer, tokens[:50], stop=stop)
    feed(text, [tokens[begin : begin + burst] for begin in range(0, len(tokens), burst)])
    assert decoded < 60 * len(tokens)
    assert decoded > 0


class Backwards(Syllables):
    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(reversed(tokens))


class Broken(Syllables):
    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        raise RuntimeError("no such file")


@pytest.mark.parametrize(("cls", "words"), [(Backwards, "cannot be made"), (Broken, "no such file")])
def test_a_tokenizer_whose_texts_cannot_be_made_in_steps_is_refused(cls: type, words: str) -> None:
    with pytest.raises(ModelError, match=f"the model: its tokenizer .{cls.__name__}.*{words}"):
        Detokenizer(cls(), "the model")
