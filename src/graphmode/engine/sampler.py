"""Sampling inside the graph: each running sequence's parameters lie on the device, by its state index.

They are written when a sequence is admitted, not at every step. Index 0 is nobody's: greedy, with nothing on. It stands
for padding, and for rows of logits whose token counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import lru_cache, partial
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from graphmode.engine.restrictions import MAX_WORDS, WINDOW, Restrictions, restrictions
from graphmode.engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
from graphmode.engine.sequence import Sequence as TokenSequence
from graphmode.engine.step_inputs import StepInputs
from graphmode.engine.types import Batch, Limits, ScheduledSequence
from graphmode.errors import InputError
from graphmode.graph import Input
from graphmode.graph.backends.base import Backend
from graphmode.graph.buffers import STAGING_BUFFERS, InputBuffers
from graphmode.graph.memory import free_memory, in_words
from graphmode.graph.staging import StagingRing
from graphmode.ops import (
    Adjustments,
    Bans,
    Filters,
    LogProbabilities,
    adjust_logits,
    ban_tokens,
    count_tokens,
    log_probabilities,
    no_bans,
    note_recent,
    sample,
    start_history,
)

MAX_BARRED = 64  # tokens that min_tokens can bar


Column = TypeVar("Column")  # one sequence's number, or a tensor of many


class SamplingLevel(IntEnum):
    """How much of sampling a graph holds: each level all of those before. A token is the same at any of them."""

    PLAIN = 0
    """Temperature and seed."""
    FILTERED = 1
    """Top-k, top-p and min-p."""
    FULL = 2
    """Penalties, bias, minimum of tokens, log-probabilities."""
    RESTRICTED = 3
    """Allowed tokens, bad words and structured outputs."""
    SCORED = 4
    """Log-probabilities of the prompt."""
    VOCABULARY = 5
    """Log-probabilities of all tokens."""


class _Floats(NamedTuple, Generic[Column]):
    """The float32 parameters of a sequence."""

    temperature: Column
    top_p: Column
    min_p: Column
    repetition_penalty: Column
    presence_penalty: Column
    frequency_penalty: Column


class _Integers(NamedTuple, Generic[Column]):
    """The int64 parameters of a sequence.

    Attributes:
        seed: of the sequence.
        top_k: its parameter.
        history_state: its state index where penalties are on; else -1.
        list_state: its state index where there is a bias or a minimum of tokens; else 0, whose lists are empty.
        ban_state: its state index where tokens are restricted; else 0, which bans nothing.
        stop_from: the first position at which it may draw its stop tokens.
        logprobs: how many of the most likely tokens it wants beside the drawn one; -1 for none at all.
        prompt_logprobs: the same for the tokens of its prompt.
    """

    seed: Column
    top_k: Column
    history_state: Column
    list_state: Column
    ban_state: Column
    stop_from: Column
    logprobs: Column
    prompt_logprobs: Column


_NOBODY_FLOATS = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
_NOBODY_INTEGERS = (0, 0, -1, 0, 0, 0, -1, -1)
STATE_BYTES = 8 * len(_NOBODY_INTEGERS) + 4 * len(_NOBODY_FLOATS)
"""Bytes of a sequence's parameters, on the device and in each copy on the host."""
REPORT_BYTES = 4 * (2 + 2 * MAX_LOGPROBS)
"""Bytes of one token's log-probabilities, at most."""


class _Lists(NamedTuple):
    """What is allocated when a sequence first needs it: the lists of every sequence, by state index."""

    bias_ids: torch.Tensor
    bias: torch.Tensor
    stop_ids: torch.Tensor
    buffers: InputBuffers


class _Bans(NamedTuple):
    """The same for restrictions, and how the masks of grammars get there."""

    tensors: Bans
    buffers: InputBuffers
    masks: InputBuffers


def level_of(scheduled: ScheduledSequence) -> SamplingLevel:
    """Return the least level that serves a sequence."""
    params = scheduled.sequence.params
    if params.logprobs == -1 or (scheduled.scored and params.prompt_logprobs == -1):
        return SamplingLevel.VOCABULARY
    if scheduled.scored:
        return SamplingLevel.SCORED
    if params.restricts:
        return SamplingLevel.RESTRICTED
    if params.penalises or params.logit_bias or params.min_tokens or params.logprobs is not None:
        return SamplingLevel.FULL
    return SamplingLevel.FILTERED if params.filters else SamplingLevel.PLAIN


class Sampler:
    """The sampling parameters of the running sequences, and the end of the step that reads them.

    Args:
        backend: the device.
        limits: how many sequences there may be, how long, and how many rows of logits a step has.
        vocab_size: tokens that the model has.
        eos_token_ids: tokens that end a text.
        tokenizer: makes tokens of bad words; None where the model comes without one.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self._backend = backend
        self._limits = limits
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        # Requests often share them.
        self._restrictions = lru_cache(8)(partial(restrictions, vocab_size=vocab_size, tokenizer=tokenizer))
        states, device = limits.max_num_seqs + 1, backend.device
        # The host keeps all parameters too: where a step admits sequences, they go to the device in one copy.
        nbytes = states * STATE_BYTES
        self._on_host = torch.empty(nbytes, dtype=torch.uint8)
        self._on_device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._staging = StagingRing(nbytes, STAGING_BUFFERS, backend.host_buffer, backend.event)
        floats, integers = _columns_in(self._on_host, states)
        floats.copy_(torch.tensor(_NOBODY_FLOATS).unsqueeze(1))
        integers.copy_(torch.tensor(_NOBODY_INTEGERS).unsqueeze(1))
        self._on_device.copy_(self._on_host)
        self._host_floats, self._host_integers = floats.numpy(), integers.numpy()
        self._floats, self._integers = _columns_in(self._on_device, states)
        self._lists: _Lists | None = None
        self._bans: _Bans | None = None
        self._top_n = min(MAX_LOGPROBS, vocab_size)
        # The tokens of the sequences with penalties, as graphmode.ops.sampling.token_counts has them.
        self.history = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        # Log-probabilities of a step: of what it samples, then, from max_logits on, of what it scores.
        self.max_reports = limits.max_logits + limits.max_num_seqs
        self.reports = torch.zeros(0, 2 + 2 * self._top_n, dtype=torch.int32, device=device)
        # The logits of the same, where any sequence wants the log-probabilities of all tokens.
        self.logits = torch.zeros(0, vocab_size, device=device)

    def check(self, params: SamplingParams) -> None:
        """Check that the model can sample so.

        Raises:
            InputError: a token that the model does not have, more stop tokens than ``min_tokens`` can bar, bad words
                that are too many or too long, or nothing is left to draw.
        """
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(params, name):
                if not 0 <= token < self._vocab_size:
                    raise InputError(f"{name} names token {token}; the model's ids are 0 to {self._vocab_size - 1}")
        if len(barred := self._barred(params)) > MAX_BARRED:
            raise InputError(
                f"min_tokens={params.min_tokens} bars {len(barred)} tokens, the stop tokens and the end of text; it "
                f"can bar {MAX_BARRED}. Give fewer stop_token_ids"
            )
        if params.restricts:
            self._restrictions_of(params)
        if -1 in (params.logprobs, params.prompt_logprobs) and not len(self.logits):
            rows = self.max_reports
            needed, free = 4 * rows * self._vocab_size, free_memory(self._backend.device)
            if needed > free:
                raise InputError(
                    f"log-probabilities of all tokens need {in_words(needed)}, the logits of {rows} rows of "
                    f"{self._vocab_size} tokens; {self._backend.device} has {in_words(free)} free. Ask for "
                    f"{MAX_LOGPROBS} at most, or lower max_num_seqs or kv_cache_memory"
                )

    def _barred(self, params: SamplingParams) -> list[int]:
        """Return the tokens that may not be drawn before there is the minimum of tokens.

        Of an answer in a grammar its masks say it: the grammar may come to its end before.
        """
        if params.min_tokens == 0 or params.structured_outputs is not None:
            return []
        stops = set(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        return sorted(token for token in stops if 0 <= token < self._vocab_size)

    def _restrictions_of(self, params: SamplingParams) -> Restrictions:
        allowed = None if params.allowed_token_ids is None else tuple(params.allowed_token_ids)
        return self._restrictions(allowed, tuple(params.bad_words), tuple(self._barred(params)))

    def admit(self, batch: Batch, level: SamplingLevel) -> None:
        """Write the parameters of a batch's new sequences, before the step on the same stream."""
        if level >= SamplingLevel.FULL:
            self._allocate()
        if level >= SamplingLevel.RESTRICTED and self._bans is None:
            self._bans = self._without_bans()
        if level is SamplingLevel.VOCABULARY and not len(self.logits):
            self.logits = torch.zeros(self.max_reports, self._vocab_size, device=self._backend.device)
        sequences = batch.admitted
        if not sequences:
            return
        states = [sequence.state_index for sequence in sequences]
        self._host_floats[:, states] = np.array([_floats(sequence) for sequence in sequences], dtype=np.float32).T
        self._host_integers[:, states] = np.array([_integers(sequence) for sequence in sequences]).T
        staged = self._staging.acquire()
        staged.memory.copy_(self._on_host)
        self._on_device.copy_(staged.memory, non_blocking=True)
        self._staging.release(staged)
        for sequence in sequences:
            params = sequence.params
            if self._lists is not None and (params.penalises or params.logit_bias or params.min_tokens):
                with torch.inference_mode():
                    self._admit_lists(self._lists, sequence)
            if self._bans is not None and params.restricts:
                with torch.inference_mode():
                    self._admit_bans(self._bans, sequence)

    def mask(self, batch: Batch) -> None:
        """Bring what the sequences of a batch that follow grammars may not draw in its first step, as :meth:`admit`."""
        followed = [(each.sequence, each.sequence.grammar) for each in batch.scheduled if each.samples]
        rows = [(sequence.state_index, grammar.forbidden) for sequence, grammar in followed if grammar is not None]
        if not rows:
            return
        assert self._bans is not None, "admit() allocates before a step of this level runs"
        states, forbidden = zip(*rows, strict=True)
        masks = self._bans.masks
        bound = masks.bind({"rows": len(rows)})
        with torch.inference_mode():
            masks.load(bound, {"state_index": np.array(states), "forbidden": np.stack(forbidden)})
            self._bans.tensors.forbidden.index_copy_(0, bound.views["state_index"], bound.views["forbidden"])

    def _allocate(self) -> None:
        """Make room for histories and lists, once."""
        if self._lists is not None:
            return
        states, device = self._limits.max_num_seqs + 1, self._backend.device
        self._lists = _Lists(
            bias_ids=torch.full((states, MAX_LOGIT_BIAS), -1, dtype=torch.int64, device=device),
            bias=torch.zeros(states, MAX_LOGIT_BIAS, device=device),
            stop_ids=torch.full((states, MAX_BARRED), -1, dtype=torch.int64, device=device),
            buffers=InputBuffers(
                [
                    Input("state_index", torch.int64, (1,)),
                    Input("bias_ids", torch.int64, (1, MAX_LOGIT_BIAS), padding=-1),
                    Input("bias", torch.float32, (1, MAX_LOGIT_BIAS)),
                    Input("stop_ids", torch.int64, (1, MAX_BARRED), padding=-1),
                    Input("tokens", torch.int64, ("tokens",)),
                    Input("prompt_states", torch.int64, ("tokens",), padding=-1),
                    Input("output_states", torch.int64, ("tokens",), padding=-1),
                ],
                {"tokens": self._limits.max_model_len},
                self._backend,
            ),
        )
        self.history = torch.zeros(states, self._vocab_size, dtype=torch.int32, device=device)
        self.reports = torch.zeros(self.max_reports, self.reports.shape[1], dtype=torch.int32, device=device)

    def _admit_lists(self, lists: _Lists, sequence: TokenSequence) -> None:
        bias, prompt, state = sequence.params.logit_bias, len(sequence.prompt_token_ids), sequence.state_index
        tokens = torch.tensor(sequence.token_ids)
        places = torch.arange(len(tokens))
        bound = lists.buffers.bind({"tokens": len(tokens)})
        values = {
            "state_index": torch.tensor([state]),
            "bias_ids": torch.tensor([list(bias)], dtype=torch.int64),
            "bias": torch.tensor([list(bias.values())], dtype=torch.float32),
            "stop_ids": torch.tensor([self._barred(sequence.params)], dtype=torch.int64),
            "tokens": tokens,
            "prompt_states": torch.where(places < prompt, state, -1),
            "output_states": torch.where(places < prompt, -1, state),
        }
        lists.buffers.load(bound, values)
        on_device = bound.views
        for name in ("bias_ids", "bias", "stop_ids"):
            getattr(lists, name).index_copy_(0, on_device["state_index"], on_device[name])
        # Cached and preempted tokens belong to it too, so it starts from all that the sequence has.
        start_history(self.history, on_device["state_index"], on_device["tokens"], on_device["prompt_states"])
        count_tokens(self.history, on_device["output_states"], on_device["tokens"])

    def _without_bans(self) -> _Bans:
        """Make room for bans."""
        device = self._backend.device
        bans = no_bans(self._limits.max_num_seqs + 1, self._vocab_size, MAX_WORDS, WINDOW, device)
        inputs = [
            Input("state_index", torch.int64, (1,)),
            *(Input(name, torch.int32, (1, *tensor.shape[1:]), padding=-1) for name, tensor in bans._asdict().items()),
        ]
        masks = [
            Input("state_index", torch.int64, ("rows",)),
            Input("forbidden", torch.int32, ("rows", bans.forbidden.shape[1])),
        ]
        return _Bans(
            bans,
            InputBuffers(inputs, {}, self._backend),
            InputBuffers(masks, {"rows": self._limits.max_num_seqs}, self._backend),
        )

    def _admit_bans(self, bans: _Bans, sequence: TokenSequence) -> None:
        found = self._restrictions_of(sequence.params)
        prefixes = np.full((1, max(len(found.words), 1), WINDOW), -1, dtype=np.int32)
        for at, word in enumerate(found.words):
            prefixes[0, at, : len(word) - 1] = word[-2::-1]
        recent = np.full((1, WINDOW), -1, dtype=np.int32)
        end = len(sequence.token_ids)
        for position in range(max(len(sequence.prompt_token_ids), end - WINDOW), end):
            recent[0, position % WINDOW] = sequence.token_ids[position]
        values = {
            "state_index": np.array([sequence.state_index]),
            "forbidden": found.bits[np.newaxis],
            "prefixes": prefixes,
            "finals": np.array([[word[-1] for word in found.words]], dtype=np.int32),
            "recent": recent,
        }
        bound = bans.buffers.bind({})
        bans.buffers.load(bound, {name: torch.from_numpy(value) for name, value in values.items()})
        for name, tensor in bans.tensors._asdict().items():
            tensor.index_copy_(0, bound.views["state_index"], bound.views[name])

    def __call__(
        self, logits_of: Callable[[torch.Tensor], torch.Tensor], level: SamplingLevel, step: StepInputs
    ) -> torch.Tensor:
        """Sample: the end of the function that is captured.

        Where a sequence samples several tokens in a step, penalties and bad words see those from before the step.

        Args:
            logits_of: computes the logits of chosen tokens of the step, ``[chosen, vocab]``.
            level: what to do.
            step: its tensors on the device.

        Returns:
            The sampled tokens, int64 ``[logits]``. Log-probabilities are left in ``reports``, and at the highest level
            logits in ``logits``.
        """
        states, positions = step.logits_state_indices, step.logits_positions
        rows = len(step.logits_indices)
        if level >= SamplingLevel.SCORED:
            all_logits = logits_of(torch.cat([step.logits_indices, step.scored_indices]))
            logits, scored = all_logits[:rows], all_logits[rows:]
        else:
            logits = logits_of(step.logits_indices)
        if level is SamplingLevel.PLAIN:
            temperature = _Floats[torch.Tensor]._make(self._floats).temperature
            return sample(
                logits, temperature, _Integers[torch.Tensor]._make(self._integers).seed, positions, state_indices=states
            )
        floats = _Floats[torch.Tensor]._make(self._floats.index_select(1, states))
        integers = _Integers[torch.Tensor]._make(self._integers.index_select(1, states))
        filters = Filters(integers.top_k.to(torch.int32), floats.top_p, floats.min_p)
        if level is SamplingLevel.FILTERED:
            return sample(logits, floats.temperature, integers.seed, positions, filters)
        assert self._lists is not None, "admit() allocates before a step of this level runs"
        lists = self._lists
        adjustments = Adjustments(
            floats.repetition_penalty,
            floats.presence_penalty,
            floats.frequency_penalty,
            lists.bias_ids.index_select(0, integers.list_state),
            lists.bias.index_select(0, integers.list_state),
            lists.stop_ids.index_select(0, integers.list_state),
            integers.stop_from,
        )
        positions = positions.to(torch.int64)
        adjusted = adjust_logits(logits, positions, self.history, integers.history_state, adjustments)
        if level < SamplingLevel.RESTRICTED:
            tokens = sample(adjusted, floats.temperature, integers.seed, positions, filters)
        else:
            assert self._bans is not None, "admit() allocates before a step of this level runs"
            ban_tokens(adjusted, positions, integers.ban_state, self._bans.tensors)
            tokens = sample(adjusted, floats.temperature, integers.seed, positions, filters)
            note_recent(self._bans.tensors.recent, positions, integers.ban_state, tokens)
        count_tokens(self.history, integers.history_state, tokens)
        wanted = integers.logprobs.to(torch.int32)
        self.reports[:rows].copy_(_packed(log_probabilities(logits, tokens, wanted, self._top_n)))
        if level >= SamplingLevel.SCORED:
            wanted = self._integers[-1].index_select(0, step.scored_state_indices).to(torch.int32)
            packed = _packed(log_probabilities(scored, step.scored_tokens, wanted, self._top_n))
            at = self._limits.max_logits
            self.reports[at : at + len(packed)].copy_(packed)
        if level is SamplingLevel.VOCABULARY:
            self.logits[:rows].copy_(logits)
            self.logits[at : at + len(scored)].copy_(scored)
        return tokens


def _columns_in(memory: torch.Tensor, states: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the views of uint8 ``[bytes]`` that hold ``_Floats`` and ``_Integers``, ``[columns, states]`` each."""
    end = 8 * len(_NOBODY_INTEGERS) * states
    return memory[end:].view(torch.float32).view(-1, states), memory[:end].view(torch.int64).view(-1, states)


def _floats(sequence: TokenSequence) -> _Floats[float]:
    params = sequence.params
    return _Floats(
        temperature=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
    )


def _integers(sequence: TokenSequence) -> _Integers[int]:
    params, state = sequence.params, sequence.state_index
    return _Integers(
        seed=sequence.seed,
        top_k=params.top_k,
        history_state=state if params.penalises else -1,
        list_state=state if params.logit_bias or params.min_tokens else 0,
        ban_state=state if params.restricts else 0,
        stop_from=len(sequence.prompt_token_ids) + params.min_tokens,
        # Where all are wanted, the host makes them of the logits.
        logprobs=-1 if params.logprobs is None else max(params.logprobs, 0),
        prompt_logprobs=-1 if params.prompt_logprobs is None else max(params.prompt_logprobs, 0),
    )


def _packed(logs: LogProbabilities) -> torch.Tensor:
    """Return one int32 row for each: the chosen one's bits, its rank, the top ids, the bits of theirs."""
    return torch.cat(
        [
            logs.chosen.view(torch.int32).unsqueeze(1),
            logs.rank.to(torch.int32).unsqueeze(1),
            logs.top_ids.to(torch.int32),
            logs.top.view(torch.int32),
        ],
        dim=1,
    )


def unpacked(reports: torch.Tensor, tokens: Sequence[int]) -> list[dict[int, tuple[float, int]]]:
    """Read the reports of some rows on the host.

    Args:
        reports: int32 ``[rows, 2 + 2 * top_n]`` as in ``Sampler.reports``.
        tokens: the chosen token of each row.

    Returns:
        For each row, the log-probability and the rank of the chosen token and of the most likely ones, by token id.
    """
    top_n = reports.shape[1] // 2 - 1
    ids = reports[:, 2 : 2 + top_n].tolist()
    logs = reports[:, 2 + top_n :].view(torch.float32).tolist()
    chosen = reports[:, 0].view(torch.float32).tolist()
    ranks = reports[:, 1].tolist()
    return [
        {token: (chosen[row], ranks[row])}
        | {top: (log, place) for place, (top, log) in enumerate(zip(ids[row], logs[row], strict=True), 1) if top >= 0}
        for row, token in enumerate(tokens)
    ]
