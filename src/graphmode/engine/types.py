"""What the scheduler, the worker and the sampler exchange."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from graphmode.engine.sequence import Sequence
from graphmode.errors import InputError

Family = Literal["decode", "mixed"]


@dataclass(frozen=True)
class Limits:
    """What a step may hold.

    Attributes:
        max_num_seqs: sequences in a step.
        max_num_batched_tokens: tokens in a step; longer prompts are computed in chunks.
        max_model_len: tokens of a sequence, prompt and output together.
        decode_steps: decode steps that are launched together at most, one after the other without the host.
        decode_query_len: tokens that each sequence computes in a step of the ``decode`` family.

    Raises:
        InputError: decode steps of several tokens a sequence are to be launched together.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    decode_steps: int = 1
    decode_query_len: int = 1

    def __post_init__(self) -> None:
        if self.decode_query_len > 1 and self.decode_steps > 1:
            raise InputError(
                f"decode_steps is {self.decode_steps} and decode_query_len {self.decode_query_len}; only steps of one "
                "token a sequence are launched together. Let one of the two be 1"
            )

    @property
    def max_logits(self) -> int:
        """Rows of logits that a step samples from at most."""
        return self.max_num_seqs * self.decode_query_len


@dataclass(eq=False, slots=True)
class ScheduledSequence:
    """A sequence's part of a step.

    Attributes:
        sequence: whose.
        start: its first token that the step computes.
        num_tokens: how many it computes. A token that is still in flight is the last of them.
        samples: after how many of them, the last ones, the step samples a token. 0 where it ends within the prompt.
        scored: the positions in the prompt, of those that the step computes, whose next token it scores.
        steps: in how many of the batch's steps it takes part: each after the first computes the token that the one
            before made.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: int
    scored: range = range(0)
    steps: int = 1


@dataclass(frozen=True)
class Batch:
    """One step, or several decode steps of the same sequences one after the other.

    Attributes:
        family: ``decode`` where every sequence computes ``Limits.decode_query_len`` tokens, else ``mixed``.
        scheduled: the sequences, in order.
        num_tokens: tokens of all of them, in the first step.
        admitted: the sequences that run from this step on.
    """

    family: Family
    scheduled: tuple[ScheduledSequence, ...]
    num_tokens: int
    admitted: tuple[Sequence, ...] = ()

    @cached_property
    def steps(self) -> int:
        """How many steps it is."""
        return max(each.steps for each in self.scheduled)

    @cached_property
    def logits(self) -> list[range]:
        """Of each sequence its rows of logits. It samples from the last of them, as many as its ``samples``.

        In a decode step every token has one. Elsewhere only those that are sampled after, but one of each sequence.
        """
        rows, end = [], 0
        for each in self.scheduled:
            start, end = end, end + (each.num_tokens if self.family == "decode" else max(each.samples, 1))
            rows.append(range(start, end))
        return rows

    @cached_property
    def scored_tokens(self) -> list[int]:
        """The prompt tokens that it scores: the successors of the scored positions."""
        return [each.sequence.prompt_token_ids[at + 1] for each in self.scheduled for at in each.scored]
