"""Structured outputs: answers hold what they are held to, others are as they are alone, no grammar harms anybody."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graphmode import LLM, SamplingParams, bundled_model
from graphmode.engine.grammar import GrammarCompiler, GrammarState, GrammarWorkers
from graphmode.engine.outputs import CompletionOutput, RequestOutput
from graphmode.engine.requests import Request
from graphmode.engine.structured_outputs import StructuredOutputs
from graphmode.errors import InputError

VOCAB = 4096 + 37  # of a model with more tokens than its tokenizer
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SENTENCE = 'root ::= noun " " verb "."\nnoun ::= "Romeo" | "Juliet"\nverb ::= "sings" | "dies"'
HELD = [
    {"json": PERSON},
    {"json": json.dumps(PERSON)},
    {"choice": ["yes, my lord", "no (never!)", "é\n"]},
    {"regex": r"[A-Z][a-z]{2,5} \d{2}"},
    {"grammar": SENTENCE},
]
FREE = [SamplingParams(temperature=float(seed % 2), seed=seed, max_tokens=24) for seed in range(3)]


@pytest.fixture(scope="module")
def llm(bundled: Path) -> LLM:
    """Tokens come in bursts, and not all requests fit a step."""
    return LLM(bundled, device="cpu", max_num_seqs=6, max_num_batched_tokens=8, graph_sizes=[6, 8], decode_steps=4)


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    return [llm.generate("ROMEO.\n", params)[0].outputs[0].token_ids for params in FREE]


@pytest.fixture(scope="module")
def compiler(bundled: Path) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(AutoTokenizer.from_pretrained(bundled), VOCAB, {0})
    yield compiler
    compiler.close()


def holds(structured: dict[str, Any], answer: CompletionOutput) -> bool:
    """Whether a text is what it is held to."""
    text = answer.text
    if "json" in structured:
        schema = structured["json"]
        schema = json.loads(schema) if isinstance(schema, str) else schema
        return jsonschema_rs.is_valid(schema, json.loads(text))
    if "choice" in structured:
        return text in structured["choice"]
    pattern = structured.get("regex", r"(Romeo|Juliet) (sings|dies)\.")
    return re.fullmatch(pattern, text) is not None


def params(structured: dict[str, Any], **others: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=structured, **{"max_tokens": 200, **others})


def test_answers_hold_and_rows_beside_them_are_as_they_are_alone(llm: LLM, alone: list[list[int]]) -> None:
    held = [params(each, temperature=at % 2, seed=at, n=1 + at % 2) for at, each in enumerate(HELD)]
    outputs = llm.generate(["ROMEO.\n"] * 8, [*FREE, *held])
    assert [output.outputs[0].token_ids for output in outputs[:3]] == alone
    for structured, output in zip(HELD, outputs[3:], strict=True):
        for answer in output.outputs:
            assert answer.finish_reason == "stop", answer
            assert answer.token_ids[-1] == 0
            assert holds(structured, answer), answer.text
    # A grammar is followed alike alone and in any batch.
    again = llm.generate("ROMEO.\n", held[3])[0].outputs
    assert [each.token_ids for each in again] == [each.token_ids for each in outputs[6].outputs]


@pytest.mark.gpu
def test_on_a_gpu_answers_hold_and_rows_beside_them_keep_their_bursts(bundled: Path) -> None:
    llm = LLM(bundled, device="cuda", max_num_seqs=16)
    eager = LLM(bundled, device="cuda", max_num_seqs=16, enforce_eager=True, memory_share=0.3)
    alone = [llm.generate("ROMEO.\n", each)[0].outputs[0].token_ids for each in FREE]
    held = [params(each, temperature=at % 2, seed=at) for at, each in enumerate(HELD * 2)]
    outputs = [each.generate(["ROMEO.\n"] * 13, [*FREE, *held]) for each in (llm, eager)]
    one, other = ([output.outputs[0].token_ids for output in each] for each in outputs)
    assert one == other
    assert one[:3] == alone
    for structured, output in zip(HELD * 2, outputs[0][3:], strict=True):
        assert holds(structured, output.outputs[0]), output.outputs[0].text


def test_eager_steps_and_preempted_answers_draw_the_same(llm: LLM, bundled: Path) -> None:
    """Prompts come in chunks, and the cache is too small: some give their blocks back and are computed again."""
    block = 2 * 6 * 16 * 2 * 64 * 4  # keys and values, layers, tokens, heads, dim, float32
    limits = {"max_num_seqs": 6, "max_num_batched_tokens": 12, "kv_cache_memory": 6 * block, "max_model_len": 80}
    small = LLM(bundled, device="cpu", enforce_eager=True, **limits)
    held = [params(each, temperature=1, seed=seed, max_tokens=24) for seed, each in enumerate(HELD[1:4])]
    asked = [FREE[1], *held, params({"json": True}, max_tokens=24, seed=5, logprobs=2)]
    one, other = (each.generate(["JULIET.\n" * 4] * 5, asked) for each in (llm, small))
    assert [output.outputs[0].token_ids for output in one] == [output.outputs[0].token_ids for output in other]
    assert llm.stats.replays > 0
    assert small.stats.preemptions > 0
    assert small.engine.core.scheduler.blocks.num_free == (6,)


LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 40},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["red", 1, None, [True]]},
        {"const": {"a": 1}},
        {"type": "string", "minLength": 1, "maxLength": 3},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 2},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda each: {"type": "array", "items": each, "minItems": 1, "maxItems": 2}, inner),
        st.builds(lambda first, second: {"anyOf": [first, second]}, inner, inner),
        st.builds(
            lambda first, second: {
                "type": "object",
                "properties": {"first": first, "second": second},
                "required": ["second"],
                "additionalProperties": False,
            },
            inner,
            inner,
        ),
    ),
    max_leaves=4,
)


@given(schema=SCHEMAS, seed=st.integers(0, 99))
def test_whatever_is_drawn_of_what_a_schema_allows_is_valid(
    compiler: GrammarCompiler, schema: dict[str, Any], seed: int
) -> None:
    """Also where the model would draw anything: tokens by chance."""
    state = GrammarState(compiler.compile({"json": schema}), SamplingParams(), pytest.fail)
    chance, tokens = np.random.default_rng(seed), [-1]
    while tokens[-1] != 0:
        tokens.append(int(chance.choice(allowed(state))))
        if tokens[-1] != 0:
            state.advance(tokens[-1:])
        assert len(tokens) < 1000
    text = AutoTokenizer.from_pretrained(bundled_model()).decode(tokens[1:-1])
    assert jsonschema_rs.is_valid(schema, json.loads(text)), text


@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
@given(schemas=st.lists(SCHEMAS, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_answers_to_any_schema_are_valid(
    llm: LLM, alone: list[list[int]], schemas: list[dict[str, Any]], seed: int
) -> None:
    asked = [params({"json": schema}, temperature=seed % 2, seed=seed, max_tokens=60) for schema in schemas]
    free, *outputs = llm.generate(["ROMEO.\n"] * (1 + len(asked)), [FREE[1], *asked])
    assert free.outputs[0].token_ids == alone[1]
    for schema, output in zip(schemas, outputs, strict=True):
        (answer,) = output.outputs
        assert answer.finish_reason == "stop" or len(answer.token_ids) == 60
        assert answer.finish_reason == "length" or jsonschema_rs.is_valid(schema, json.loads(answer.text)), answer.text


def one(outputs: list[RequestOutput]) -> CompletionOutput:
    return outputs[0].outputs[0]


def test_other_ends_of_an_answer(llm: LLM) -> None:
    count = {"regex": "[0-9]{60}"}
    answer = one(llm.generate("A", params(count, max_tokens=5)))
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 5)
    assert re.fullmatch("[0-9]+", answer.text)
    seven = llm.get_tokenizer().encode("7")
    answer = one(llm.generate("A", params(count, stop_token_ids=seven, logit_bias={seven[0]: 100})))
    assert (answer.finish_reason, answer.token_ids) == ("stop", seven)
    answer = one(llm.generate("A", params({"regex": "ab+c"}, temperature=0, logit_bias={}, stop="b")))
    assert (answer.finish_reason, answer.stop_reason, answer.text) == ("stop", "b", "a")


def test_a_grammar_that_may_end_goes_on_until_min_tokens_and_one_that_must_end_does(llm: LLM) -> None:
    letters = llm.get_tokenizer().encode("a")
    bias = {0: 100.0}  # the end of text is what the model would draw
    some = {"regex": "a*"}
    answer = one(llm.generate("A", params(some, temperature=0, logit_bias=bias)))
    assert answer.token_ids == [0]
    answer = one(llm.generate("A", params(some, temperature=0, logit_bias=bias, min_tokens=3)))
    assert len(answer.token_ids) == 4
    answer = one(llm.generate("A", params(some, logit_bias=bias, ignore_eos=True, max_tokens=9)))
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 9)
    for others in ({"min_tokens": 50}, {"ignore_eos": True}):
        answer = one(llm.generate("A", params({"regex": "a"}, **others)))
        assert (answer.finish_reason, answer.token_ids) == ("stop", [*letters, 0])


def test_an_answer_is_aborted_in_its_grammar(llm: LLM) -> None:
    engine = llm.engine
    long = Request([5], params({"regex": "[a-z]{400}"}, max_tokens=400), request_id="long")
    engine.submit(long)
    engine.abort(engine.submit(Request([5], params({"regex": "[a-z]{401}"}))))  # before its grammar is compiled
    outputs = []
    while engine.has_requests:
        outputs += engine.step()
        if len(outputs) == 5:
            engine.abort("long")
    assert {output.request_id: output.outputs[0].finish_reason for output in outputs if output.finished}[
        "long"
    ] == "abort"
    engine.step()
    assert not engine.core.scheduler.has_work


def test_what_becomes_too_complex_ends_alone_with_its_cause(llm: LLM, alone: list[list[int]]) -> None:
    bomb = "".join(f"(.*[{chr(97 + at)}-z].{{{at + 3}}})" for at in range(20))
    asked = [params({"regex": bomb}, temperature=1, seed=1), FREE[1]]
    answer, free = (output.outputs[0] for output in llm.generate(["ROMEO.\n"] * 2, asked))
    assert free.token_ids == alone[1]
    assert answer.finish_reason == "error"
    assert "too many expressions" in str(answer.stop_reason)


def test_an_answer_goes_on_where_others_have_used_up_what_they_share(compiler: GrammarCompiler) -> None:
    """Matchers of one grammar share their lexer, whose states are limited."""
    structured = {"regex": r"(.*[a-e].{12}|.*[f-j].{9})+x"}
    grammar, chance = compiler.compile(structured), np.random.default_rng(0)
    shared = [grammar.begin()[0]]
    while len(shared) < 3:
        state = GrammarState(grammar, params(structured), pytest.fail)
        for _ in range(30):
            state.advance([int(chance.choice(allowed(state)[1:]))])
        if grammar.begin()[0] is not shared[-1]:
            shared.append(grammar.begin()[0])


def test_a_grammar_that_nobody_has_checked_ends_its_request_with_the_cause(llm: LLM) -> None:
    """As the engine process of a server is given requests: they were checked in another."""
    core = llm.engine.core
    core.submit(Request([5], params({"regex": "a("}, n=2), request_id="unchecked"))
    news = []
    while core.has_requests:
        news += core.step()
    assert [(new.index, new.token_ids, new.finish_reason) for new in news] == [(0, [], "error"), (1, [], "error")]
    assert all("unclosed group" in str(new.stop_reason) for new in news)


def chain(length: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {f"d{at}": {"$ref": f"#/$defs/d{at + 1}"} for at in range(length)}
    return {"$defs": definitions | {f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


ENDLESS = nested(1)
ENDLESS["items"] = ENDLESS
REFUSED = [
    ({}, "has nothing; give exactly one of json, regex, choice and grammar"),
    ({"json": True, "regex": "a"}, "has json and regex; give exactly one"),
    ({"schema": {}}, "StructuredOutputs has no schema"),
    ({"structural_tag": "{}"}, "structural_tag='{}' cannot be honoured"),
    ({"json": False}, "json is False; it must be a JSON schema"),
    ({"json": "{"}, "json is no JSON"),
    ({"json": "[" * 10_000}, "json is no JSON"),
    ({"json": "[1]"}, r"json is \[1\]; it must be a JSON schema"),
    ({"json": {"enum": [{1, 2}]}}, "cannot be written as JSON"),
    ({"json": {"enum": [float("nan")]}}, "cannot be written as JSON"),
    ({"json": {"x-guidance": {"lenient": True}}}, "leave it out"),
    ({"json": nested(100)}, "nested more than 64 levels"),
    ({"json": ENDLESS}, "nested more than 64 levels"),
    ({"json": {"description": "x" * 2**20}}, "json has 1048594 bytes; it may have 131072"),
    ({"json": {"enum": list(range(2**18))}}, "more than 131072 parts"),
    ({"regex": 7}, "regex is 7; it must be a text"),
    ({"regex": "a" * 20_000}, "regex has 20000 bytes; it may have 16384"),
    ({"choice": []}, "choice is empty"),
    ({"choice": "yes"}, "choice is 'yes'; it must be a list of texts"),
    ({"choice": ["a", ""]}, "that are not empty"),
    ({"choice": [str(number) for number in range(10_000)]}, "choice has 10000 texts; it may have 8192"),
    ({"choice": ["x" * 2**18]}, "choice has 262144 bytes"),
    ({"grammar": "x" * 2**17}, "grammar has 131072 bytes"),
]


@pytest.mark.parametrize(("structured", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_malformed_or_too_large_is_refused_where_it_is_said(structured: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SamplingParams(structured_outputs=structured)


def test_what_contradicts_is_refused() -> None:
    for others in ({"allowed_token_ids": [1]}, {"bad_words": "a"}):
        with pytest.raises(InputError, match="allowed_token_ids and bad_words may leave no token"):
            params({"regex": "a"}, **others)
    with pytest.raises(InputError, match="structured_outputs is 7"):
        SamplingParams(structured_outputs=7)  # type: ignore[arg-type]


FAULTY = [
    ({"json": {"type": "array", "uniqueItems": True}}, 'json cannot be followed: Unimplemented keys: ."uniqueItems".'),
    ({"json": {"items": {"not": {}, "x-guidance": {"lenient": True}}}}, 'Unimplemented keys: ."not".'),
    ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "Unsatisfiable"),
    ({"json": {"$ref": "http://nowhere/schema"}}, "not present in a registry"),
    ({"json": {"$ref": "#"}}, "it allows no answer at all"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": "a("}, "unclosed group"),
    ({"grammar": "start: other"}, "unknown name"),
    ({"grammar": "begin ::= 'a'"}, "grammar cannot be followed"),
    ({"grammar": 'root ::= "a" other'}, "Rule 'other' not found"),
    ({"json": {"properties": {f"p{number}": {} for number in range(4000)}}}, "cannot be followed|too complex"),
    ({"json": chain(3000)}, "too complex"),
    ({"grammar": "start: X\nX: " + " & ".join(f"/(.*[a-z]){{{at},}}.*/" for at in range(1, 60))}, "too complex"),
    ({"regex": "(" * 5000 + "a" + ")" * 5000}, "regex cannot be followed"),
    (
        {"grammar": "start: a0\n" + "".join(f'a{at}: a{at + 1} | "b"\n' for at in range(2000)) + 'a2000: "a"'},
        "too complex",
    ),
]


@pytest.mark.parametrize(("structured", "words"), FAULTY, ids=range(len(FAULTY)))
def test_what_cannot_be_compiled_in_a_second_is_refused(
    compiler: GrammarCompiler, structured: dict[str, Any], words: str
) -> None:
    """By a process of its own, which some of them take down."""
    for _ in range(2):
        with pytest.raises(InputError, match=words):
            compiler.check(structured)
        assert compiler.knows(structured)
    assert not compiler.knows({"regex": f"still{words}"})
    compiler.check({"regex": "still[0-9]+"})


def test_a_faulty_grammar_is_refused_before_anything_runs(llm: LLM) -> None:
    steps = llm.stats.steps
    with pytest.raises(InputError, match=r"prompts\[1\]: structured_outputs.regex cannot be followed"):
        llm.generate(["A", "B"], [FREE[0], params({"regex": "a("})])
    assert llm.stats.steps == steps


def allowed(state: GrammarState, vocab: int = VOCAB) -> list[int]:
    bits = np.unpackbits(state.forbidden.view(np.uint8), bitorder="little")[:vocab]
    return np.flatnonzero(bits == 0).tolist()


@pytest.mark.parametrize("structured", [{"regex": r"(?s:.)*"}, {"grammar": "start: <[4100]> | /[a-z]+/"}])
def test_no_token_is_allowed_that_the_tokenizer_does_not_have(
    compiler: GrammarCompiler, structured: dict[str, Any]
) -> None:
    state = GrammarState(compiler.compile(structured), params(structured), pytest.fail)
    assert len(allowed(state)) > 0
    assert max(allowed(state)) < 4096
    assert (0 in allowed(state)) == ("regex" in structured)


def test_every_token_that_ends_a_text_may_end_an_answer(bundled: Path) -> None:
    compiler = GrammarCompiler(AutoTokenizer.from_pretrained(bundled), VOCAB, {0, 9, VOCAB})
    state = GrammarState(compiler.compile({"regex": "a?"}), params({"regex": "a?"}), pytest.fail)
    letter = AutoTokenizer.from_pretrained(bundled).encode("a")
    assert allowed(state) == [0, 9, *letter]
    state.advance(letter)
    assert allowed(state) == [0, 9]


@given(choices=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True))
def test_any_text_can_be_chosen(compiler: GrammarCompiler, choices: list[str]) -> None:
    matcher = compiler.compile({"choice": choices}).begin()[0].deep_copy()
    tokenizer = compiler._model_tokenizer
    assert tokenizer is not None
    for text in choices:
        tokens = tokenizer.encode(text)
        assert matcher.try_consume_tokens(tokens) == len(tokens)
        assert matcher.is_accepting()
        matcher.reset()


def sentence_piece(**options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind that Llama 2 and Mistral have: spaces are letters, bytes are tokens."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["to be, or not to be: that is the question"] * 3, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", **options)


def test_a_tokenizer_of_sentence_pieces() -> None:
    tokenizer = sentence_piece()
    compiler = GrammarCompiler(tokenizer, 512, {2})
    structured = {"regex": " ?to be, é\\n"}
    state = GrammarState(compiler.compile(structured), params(structured), pytest.fail)
    tokens = tokenizer.encode("to be, é\n", add_special_tokens=False)
    assert {"▁to▁be,▁", "<0xC3>"} <= set(tokenizer.convert_ids_to_tokens(tokens))
    for token in [*tokens, 2]:
        assert token in allowed(state, 512)
        assert not {0, 1, 511} & set(allowed(state, 512))
        if token != 2:
            state.advance([token])


def test_models_that_serve_no_grammars_say_so(tiny: Path, bundled: Path) -> None:
    with pytest.raises(InputError, match="need a tokenizer, and the model comes without one"):
        LLM(tiny, device="cpu", enforce_eager=True).generate([[1]], params({"regex": "a"}))
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="byte-level BPE, or SentencePiece"):
        GrammarCompiler(PreTrainedTokenizerFast(tokenizer_object=words), 2, {0}).check({"regex": "a"})
    with pytest.raises(InputError, match="need a token that ends a text"):
        GrammarCompiler(AutoTokenizer.from_pretrained(bundled), 4096, set()).check({"regex": "a"})


@pytest.mark.parametrize(
    ("given_", "meant"),
    [
        ({"guided_json": PERSON}, {"json": PERSON}),
        ({"guided_regex": "a"}, {"regex": "a"}),
        ({"guided_choice": ["a"]}, {"choice": ["a"]}),
        ({"guided_grammar": SENTENCE}, {"grammar": SENTENCE}),
        ({"guided_decoding": {"json_object": True}}, {"json": True}),
        ({"response_format": {"type": "json_object"}}, {"json": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": PERSON}}},
            {"json": PERSON},
        ),
    ],
)
def test_other_names(given_: dict[str, Any], meant: dict[str, Any]) -> None:
    assert SamplingParams(**given_).structured_outputs == StructuredOutputs(**meant)
    with pytest.raises(InputError, match="contradict"):
        SamplingParams(**given_, structured_outputs={"regex": "b"})


def test_names_that_ask_for_nothing() -> None:
    nothing = {"guided_json": None, "response_format": {"type": "text"}, "guided_decoding": None}
    assert SamplingParams(**nothing) == SamplingParams()
    with pytest.raises(InputError, match="response_format is"):
        SamplingParams(response_format={"type": "xml"})  # type: ignore[call-arg]


def test_a_grammar_that_takes_long_does_not_keep_the_engine_from_other_requests() -> None:
    workers, ends = GrammarWorkers(), Event()
    workers.run(ends.wait)
    assert workers.wait(finished=0)  # returns, although the job runs
    assert workers.finished == 0
    ends.set()
    while not workers.finished:
        assert workers.wait(finished=0)
    assert not workers.wait(finished=1)
