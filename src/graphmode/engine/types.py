"""What the scheduler, the worker and the sampler exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graphmode.engine.sequence import Sequence

Family = Literal["decode", "mixed"]


@dataclass(frozen=True)
class Limits:
    """What a step may hold.

    Attributes:
        max_num_seqs: sequences in a step.
        max_num_batched_tokens: tokens in a step; longer prompts are computed in chunks.
        max_model_len: tokens of a sequence, prompt and output together.
        decode_steps: decode steps that are launched together at most, one after the other without the host.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    decode_steps: int = 1


@dataclass(eq=False, slots=True)
class ScheduledSequence:
    """A sequence's part of a step.

    Attributes:
        sequence: whose.
        start: its first token that the step computes.
        num_tokens: how many it computes.
        samples: whether the step ends at the sequence's last token, so that it makes the next one.
        source: where the last token is still in flight: the row of the step before that makes it; else -1.
        scored: the positions in the prompt, of those that the step computes, whose next token it scores.
        steps: in how many of the batch's steps it takes part: each after the first computes the token that the one
            before made.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    source: int = -1
    scored: range = range(0)
    steps: int = 1


@dataclass(frozen=True)
class Batch:
    """One step, or several decode steps of the same sequences one after the other.

    Attributes:
        family: ``decode`` where every sequence computes one token, else ``mixed``.
        rows: the sequences, in order.
        num_tokens: tokens of all rows, in the first step.
        admitted: the sequences that run from this step on.
    """

    family: Family
    rows: tuple[ScheduledSequence, ...]
    num_tokens: int
    admitted: tuple[Sequence, ...] = ()

    @property
    def steps(self) -> int:
        """How many steps it is."""
        return max(row.steps for row in self.rows)
