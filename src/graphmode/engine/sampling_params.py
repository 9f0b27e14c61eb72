"""How a request's tokens are chosen and when it ends."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from graphmode.engine import aliases, checks
from graphmode.engine.structured_outputs import StructuredOutputs, structured_outputs
from graphmode.errors import InputError
from graphmode.graph.memory import in_words

log = logging.getLogger(__name__)

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_COMPLETIONS = 2**14
_COMPLETION_BYTES = 1024  # of a sequence, its text and its output, without tokens


@aliases.by_name(aliases.SAMPLING)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Logits are first biased, then penalised, then divided by the temperature; the filters follow, and the draw. None
    stands for a parameter's default, except where it has a meaning of its own.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it before sampling.
        top_k: sample from the most likely tokens, that many; 0 or -1 takes all. Those tied with the last one count too.
        top_p: sample from the most likely tokens whose probabilities reach this sum, after ``top_k``; 1 takes all.
        min_p: sample from the tokens that are at least this share as likely as the likeliest; 0 takes all.
        repetition_penalty: logits of the tokens that prompt or answer hold are divided by it where positive, else
            multiplied; 1 is off (CTRL, arXiv 1909.05858).
        presence_penalty: taken from the logits of the tokens that the answer holds; 0 is off. From -2 to 2.
        frequency_penalty: the same for each time that the answer holds them; 0 is off. From -2 to 2.
        logit_bias: what is added to the logits of tokens, by token id, at most 300 of them; from -100 to 100.
        allowed_token_ids: the only tokens that are drawn; None allows all.
        bad_words: texts that no answer holds: of the tokens that make one, at the beginning of a text or after a space,
            the last is not drawn where the answer ends with the others.
        structured_outputs: what each answer is held to, a
            :class:`~graphmode.engine.structured_outputs.StructuredOutputs` or a dict of its names, such as
            ``{"json": schema}``; None: nothing. The answer ends where that has come to its end, ``min_tokens`` and
            ``ignore_eos`` notwithstanding; ``max_tokens`` and stop texts may end it before.
        max_tokens: most tokens to make, at least 1; None: as many as the model's limit leaves room for.
        min_tokens: tokens to make before the end-of-text token, ``stop_token_ids`` and ``stop`` count; the tokens
            are not drawn before.
        seed: of the request's random numbers. The same seed gives the same tokens alone and in any batch. None: the
            engine chooses, by its own seed and the request's number.
        ignore_eos: go on after the end-of-text token.
        stop: a text or texts that end the answer, which is cut before them. Not empty.
        stop_token_ids: tokens that end the answer; its tokens keep them, its text does not.
        include_stop_str_in_output: the text keeps what ended it: the stop text, or the stop token's.
        skip_special_tokens: special tokens are left out of the text. A stop text that holds one is found all the same.
        detokenize: make a text; without it there are tokens alone, and no stop texts.
        n: completions of the prompt, at most 16384. The first has ``seed``, the others have seeds derived from it.
        logprobs: return the log-probability of each token and of that many most likely ones, from 0 to 20, by the
            model's own logits; -1 of all tokens, None of none.
        prompt_logprobs: the same for the tokens of the prompt. Its prefix is then not taken from the cache.
        truncate_prompt_tokens: take the last tokens of the prompt, that many; -1: as many as the model's limit allows
            beside an answer's first token. None takes all.
        skip_reading_prefix_cache: compute all of the prompt, whatever is cached.

    Raises:
        InputError: a value of another type or out of range, or a name that is not known or cannot be honoured.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Collection[int] | None = None
    bad_words: str | Sequence[str] = ()
    structured_outputs: StructuredOutputs | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    stop_token_ids: Collection[int] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    skip_reading_prefix_cache: bool = False

    def __post_init__(self) -> None:
        settle = partial(checks.settle, self)
        for each in fields(self):
            if getattr(self, each.name) is None and each.name != "max_tokens":
                default = {} if each.name == "logit_bias" else each.default
                object.__setattr__(self, each.name, default)  # the dataclass is frozen for everyone else
        settle(checks.number, "temperature", least=0, also=", 0 is greedy")
        settle(checks.integer, "top_k", least=-1, most=checks.LARGEST, also=", 0 or -1 is off")
        settle(lambda _, top_k: max(top_k, 0), "top_k")
        settle(checks.number, "top_p", above=0, most=1, also=", 1 is off")
        settle(checks.number, "min_p", least=0, most=1, also=", 0 is off")
        settle(checks.number, "repetition_penalty", above=0, also=", 1 is off")
        settle(checks.number, "presence_penalty", "frequency_penalty", least=-2, most=2, also=", 0 is off")
        settle(_biases, "logit_bias")
        settle(checks.token_ids, "allowed_token_ids", optional=True)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InputError("allowed_token_ids is empty, which allows nothing; give a token at least, or None")
        settle(checks.texts, "bad_words")
        if self.structured_outputs is not None:
            settle(structured_outputs, "structured_outputs")
            if self.allowed_token_ids is not None or self.bad_words:
                raise InputError(
                    "allowed_token_ids and bad_words may leave no token that structured_outputs allow; give either"
                )
        settle(checks.integer, "n", least=1)
        if self.n > MAX_COMPLETIONS:
            raise InputError(
                f"n is {self.n}; it may be at most {MAX_COMPLETIONS}. The host keeps at least {_COMPLETION_BYTES} "
                f"bytes of an answer, {in_words(self.n * _COMPLETION_BYTES)} of that many; send several requests"
            )
        settle(checks.integer, "max_tokens", least=1, most=checks.LARGEST, optional=True)
        settle(checks.integer, "min_tokens", least=0, most=checks.LARGEST)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens is {self.min_tokens}, more than max_tokens={self.max_tokens}; lower it or raise max_tokens"
            )
        settle(checks.integer, "seed", least=-(2**63), most=2**63 - 1, optional=True)
        settle(checks.flag, "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize")
        settle(checks.texts, "stop")
        settle(checks.token_ids, "stop_token_ids")
        settle(lambda _, ids, **limits: tuple(ids), "allowed_token_ids", "stop_token_ids", optional=True)
        if self.stop and not self.detokenize:
            raise InputError(
                f"stop is {checks.shown(self.stop)}, but detokenize=False makes no text to find it in; leave one out, "
                "or use stop_token_ids"
            )
        whole = ", -1 is the whole vocabulary"
        settle(checks.integer, "logprobs", "prompt_logprobs", least=-1, most=MAX_LOGPROBS, optional=True, also=whole)
        but_zero = " other than 0"
        settle(checks.integer, "truncate_prompt_tokens", least=-1, most=checks.LARGEST, optional=True, also=but_zero)
        if self.truncate_prompt_tokens == 0:
            raise InputError("truncate_prompt_tokens is 0, which leaves no prompt; give -1 or at least 1, or None")
        settle(checks.flag, "skip_reading_prefix_cache")

    @property
    def filters(self) -> bool:
        """Whether tokens are sampled from a part of the vocabulary."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def restricts(self) -> bool:
        """Whether tokens are forbidden."""
        return self.allowed_token_ids is not None or bool(self.bad_words) or self.structured_outputs is not None

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def checkpoint_parameters(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling parameters that a checkpoint asks for where a request brings none, by name.

    Args:
        generation: what its generation_config.json holds, by the names that transformers uses there. Values that are
            not allowed are reported and left out.
    """
    names = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    given: dict[str, Any] = {}
    for theirs, ours in {**names, "max_new_tokens": "max_tokens"}.items():
        try:
            SamplingParams(**dict[str, Any]({ours: generation.get(theirs)}))
        except InputError as error:
            log.warning("generation_config.json: %s; it is left out", error)
        else:
            given |= {} if generation.get(theirs) is None else {ours: generation[theirs]}
    if generation.get("do_sample") is False:
        given["temperature"] = 0
    return given


def _biases(_: str, biases: object) -> dict[int, float]:
    """Return a bias by token id; keys may be texts of digits, as they are where a request came as JSON."""
    if not isinstance(biases, Mapping):
        raise checks.unfit("logit_bias", biases, "a mapping of token ids to numbers from -100 to 100")
    if len(biases) > MAX_LOGIT_BIAS:
        raise InputError(f"logit_bias names {len(biases)} tokens; it may name {MAX_LOGIT_BIAS}")
    return {
        checks.integer(
            "a token of logit_bias", int(token) if isinstance(token, str) and token.isdecimal() else token, least=0
        ): checks.number(f"logit_bias of token {checks.shown(token)}", bias, least=-100, most=100)
        for token, bias in biases.items()
    }
