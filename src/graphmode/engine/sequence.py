"""A sequence: one prompt and what has been generated for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graphmode.engine.outputs import FinishReason, TokenLogprobs
from graphmode.engine.sampling_params import SamplingParams

if TYPE_CHECKING:  # which loads transformers
    from graphmode.engine.grammar import GrammarState
    from graphmode.engine.multimodal import VisionPrompt


@dataclass(eq=False)
class Sequence:
    """The state of one sequence in the engine.

    Attributes:
        request_id: the name of the request that it answers.
        prompt_token_ids: the prompt, at least one token.
        params: how to sample it.
        seed: of its random numbers, resolved.
        vision: the images and videos of the prompt; None where it has none.
        index: its number among the answers to the request.
        token_ids: prompt and generated tokens, as far as the host knows them.
        in_flight: tokens that steps in flight are making: one for each that samples it.
        num_computed: tokens whose keys and values are in the cache, or will be when the steps in flight are done.
        num_settled: those of them whose full blocks can be found by other sequences, and are given back where no later
            token reads them.
        num_cached: tokens that another sequence had computed when it first ran; -1 before.
        state_index: where the device keeps what it knows of it while it runs; 0 while it does not.
        prompt_logprobs: of the prompt's tokens from the second on, as far as they are computed, where they are wanted.
        block_tables: of each cache group its blocks, by their place in the sequence; where one behind a window was
            given back stands 0, which is never read. Empty while it does not run.
        block_keys: digests of its tokens up to the end of each block, as far as they are computed.
        max_len: tokens that it may have, prompt and answer together; known once it runs.
        order: its priority, the number of its request and its own in that: what is less runs first.
        finish_reason: None while it runs.
        stop_reason: the token of ``stop_token_ids`` that ended it; the cause of an error; None for any other end.
        grammar: how far it has come in the grammar that it is held to; None where it is free.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    vision: VisionPrompt | None = None
    index: int = 0
    token_ids: list[int] = field(init=False)
    in_flight: int = 0
    num_computed: int = 0
    num_settled: int = 0
    num_cached: int = -1
    state_index: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    block_tables: list[list[int]] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    max_len: int = 0
    order: tuple[int, int, int] = (0, 0, 0)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    grammar: GrammarState | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def contents(self) -> list[tuple[int, int, bytes]]:
        """What tokens stand for beside themselves: ``(start, end, digest)`` of each image's."""
        return self.vision.contents if self.vision else []

    @property
    def may_draw(self) -> bool:
        """Whether a step may sample its next token: in a grammar, all before must be known, and what may follow."""
        return self.grammar is None or (self.grammar.ready and not self.in_flight)

    @property
    def num_tokens(self) -> int:
        """All tokens, those in flight included."""
        return len(self.token_ids) + self.in_flight

    @property
    def num_pending(self) -> int:
        """Tokens not computed yet: the rest of the prompt, or the last generated token."""
        return len(self.token_ids) + self.in_flight - self.num_computed
