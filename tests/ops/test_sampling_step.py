"""The whole of sampling in one graph: adjust, sample, log-probabilities, count; each row with its own parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graphmode.graph import GraphRunner, Input
from graphmode.ops import Adjustments, Filters, adjust_logits, count_tokens, log_probabilities, sample, start_history

VOCAB, SLOTS, MAX_BIAS, MAX_STOP, TOP_N = 120, 6, 2, 2, 3

# Padding on purpose holds what no request would ask for.
INPUTS = (
    Input("logits", torch.float32, ("rows", VOCAB), padding=float("nan")),
    Input("temperature", torch.float32, ("rows",), padding=float("nan")),
    Input("seeds", torch.int64, ("rows",), padding=-3),
    Input("positions", torch.int64, ("rows",), padding=-1),
    Input("state_indices", torch.int64, ("rows",), padding=-1),
    Input("top_k", torch.int32, ("rows",), padding=-9),
    Input("top_p", torch.float32, ("rows",), padding=float("nan")),
    Input("min_p", torch.float32, ("rows",), padding=float("nan")),
    Input("repetition_penalty", torch.float32, ("rows",), padding=0.0),
    Input("presence_penalty", torch.float32, ("rows",), padding=float("nan")),
    Input("frequency_penalty", torch.float32, ("rows",), padding=float("nan")),
    Input("bias_ids", torch.int64, ("rows", MAX_BIAS), padding=-1),
    Input("bias", torch.float32, ("rows", MAX_BIAS), padding=float("nan")),
    Input("stop_ids", torch.int64, ("rows", MAX_STOP), padding=-1),
    Input("stop_from", torch.int64, ("rows",), padding=2**62),
    Input("wanted", torch.int32, ("rows",), padding=2**30),
    Input("new_state_indices", torch.int64, ("rows",), padding=-1),
)


class Sampler:
    """A history and the function that a graph captures, which starts histories with an empty prompt's token 0."""

    def __init__(self, device: str) -> None:
        self.history = torch.zeros(SLOTS, VOCAB, dtype=torch.int32, device=device)

    def step(
        self, logits, temperature, seeds, positions, state_indices, wanted, new_state_indices, **parameters
    ) -> tuple:
        start_history(self.history, new_state_indices, torch.zeros_like(new_state_indices), new_state_indices)
        adjustments = Adjustments(*(parameters[name] for name in Adjustments._fields))
        filters = Filters(*(parameters[name] for name in Filters._fields))
        adjusted = adjust_logits(logits, positions, self.history, state_indices, adjustments)
        tokens = sample(adjusted, temperature, seeds, positions, filters)
        count_tokens(self.history, state_indices, tokens)
        return (tokens, *log_probabilities(logits, tokens, wanted, TOP_N))


@dataclass
class Request:
    """A request's parameters, and what it got."""

    number: int
    changes: dict[str, object] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)

    def row(self, state: int) -> dict[str, object]:
        n, position = self.number, 1 + len(self.tokens)  # after a prompt of one token
        generator = torch.Generator().manual_seed(1000 * n + position)
        return {
            "logits": (torch.randn(VOCAB, generator=generator) * 2).tolist(),
            "temperature": [0.0, 0.7, 1.0, 1.5][n % 4],
            "seeds": 77 * n,
            "positions": position,
            "state_indices": state,
            "top_k": [0, 5, VOCAB, 40][n % 4],
            "top_p": [1.0, 0.9, 0.6][n % 3],
            "min_p": [0.0, 0.05][n % 2],
            "repetition_penalty": [1.0, 1.3][n % 2],
            "presence_penalty": [0.0, 0.5, -0.5][n % 3],
            "frequency_penalty": [0.2, 0.0][n % 2],
            "bias_ids": [n % VOCAB, -1],
            "bias": [4.0, 0.0],
            "stop_ids": [n % VOCAB, 3],
            "stop_from": n % 5,
            "wanted": n % (TOP_N + 1),
            "new_state_indices": state if position == 1 else -1,
            **self.changes,
        }


def serve(sampler: Sampler, runner: GraphRunner | None, batches: list[dict[int, Request]], device: str) -> None:
    """Run a step for each batch, ``{state index: request}``: by graph, or without a runner eagerly at the true size."""
    for batch in batches:
        rows = [request.row(state) for state, request in batch.items()]
        inputs = {spec.name: torch.tensor([row[spec.name] for row in rows], dtype=spec.dtype) for spec in INPUTS}
        if runner is None:
            results = sampler.step(**{name: value.to(device) for name, value in inputs.items()})
        else:
            results = runner(**inputs)
        for request, token, chosen in zip(batch.values(), results[0].tolist(), results[1].tolist(), strict=True):
            request.tokens.append(token)
            request.chosen.append(chosen)


def test_requests_get_the_same_alone_and_replayed_in_any_batch(device: str) -> None:
    alone = [Request(number) for number in range(9)]
    for request in alone:
        serve(Sampler(device), None, [{2: request}] * 6, device)

    together = [Request(number) for number in range(9)]
    sampler = Sampler(device)
    runner = GraphRunner(sampler.step, INPUTS, [1, 4, 6], backend=device, strict=True)
    runner.capture()
    first = dict(zip([3, 0, 5, 1, 2], together[:5], strict=True))
    second = dict(zip([0, 4, 1], together[5:8], strict=True))  # state indices 0 and 1 again
    last = {3: together[8]}
    serve(sampler, runner, [first] * 6 + [second, second] + [last] * 6 + [second] * 4, device)
    assert runner.stats.hit_rate == 1.0
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
        assert one.chosen == other.chosen


def test_a_minimum_of_tokens_holds(device: str) -> None:
    """A stop token that a bias makes all but certain comes at the first position that allows it."""
    request = Request(7, {"bias": [1000.0, 0.0], "stop_from": 5, "repetition_penalty": 1.0})
    serve(Sampler(device), None, [{0: request}] * 5, device)
    assert request.tokens[4] == 7
    assert not {3, 7} & set(request.tokens[:4])
