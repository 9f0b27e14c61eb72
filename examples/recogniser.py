"""A speech recogniser for streams that come and go, 80 ms at a time. Run: python examples/recogniser.py

Each stream has a place of its own in tensors that stay on the device from step to step, ``carried`` inputs: the last
frames of its sound, the hidden state of its GRU and its last symbol. A step takes the streams that have new sound, in
any order, and reads and writes their places. Padding rows read place 0 and write back to it what they found there: how
many rows are streams comes as a tensor, an input with ``size_of``.
"""

from dataclasses import dataclass
from functools import partial

import torch
from timing import print_table
from torch import nn

from graphmode.graph import Backend, GraphRunner, Input, get_backend

STREAMS, FRAMES, BANDS, WIDTH, SYMBOLS = 16, 8, 40, 128, 32
CONTEXT = 2  # frames of the past that the convolution sees


@dataclass
class State:
    """What is kept of each stream, by its place."""

    sound: torch.Tensor
    hidden: torch.Tensor
    symbol: torch.Tensor


class Recogniser(nn.Module):
    """A convolution over time, a GRU and a symbol for each frame; 0 stands for none."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(BANDS, WIDTH, CONTEXT + 1)
        self.gru = nn.GRU(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.out = nn.Linear(WIDTH, SYMBOLS)

    def forward(
        self, sound: torch.Tensor, place: torch.Tensor, first: torch.Tensor, count: torch.Tensor, state: State
    ) -> torch.Tensor:
        """Return the symbols of new sound, 0 for a frame that continues a symbol.

        Args:
            sound: ``[rows, FRAMES, BANDS]``.
            place: int64 ``[rows]``, where the state of each row's stream lies.
            first: bool ``[rows]``, whether a stream begins: what its place held before is not seen.
            count: how many rows are streams, and not padding.
            state: changed in place.

        Returns:
            int64 ``[rows, FRAMES]``.
        """
        live = torch.arange(len(place), device=place.device) < count
        place = torch.where(live, place, 0)
        before = state.sound[place], state.hidden[:, place], state.symbol[place]
        past, hidden, symbol = (
            torch.where(first.view(-1, *[1] * (each.dim() - 1 - dim)), 0, each)
            for each, dim in zip(before, (0, 1, 0), strict=True)
        )
        sound = torch.cat([past, sound], 1)
        features = self.convolution(sound.transpose(1, 2)).relu().transpose(1, 2)
        features, hidden = self.gru(features, hidden.contiguous())
        best = self.out(features).argmax(-1)
        state.sound[place] = torch.where(live[:, None, None], sound[:, -CONTEXT:], before[0])
        state.hidden[:, place] = torch.where(live[:, None], hidden, before[1])
        state.symbol[place] = torch.where(live, best[:, -1], before[2])
        return torch.where(best == torch.cat([symbol[:, None], best[:, :-1]], 1), 0, best)


def build(backend: Backend) -> tuple[Recogniser, GraphRunner]:
    """Return the recogniser with random weights, and its graphs for 1 to STREAMS streams with new sound."""
    recogniser = Recogniser().eval().to(backend.device)
    runner = GraphRunner(
        recogniser,
        {
            "sound": Input("sound", torch.float32, ("rows", FRAMES, BANDS)),
            "place": Input("place", torch.int64, ("rows",)),
            "first": Input("first", torch.bool, ("rows",)),
            "count": Input("count", torch.int64, (), size_of="rows"),
            "state": State(  # one place more than there are streams: 0 is that of padding
                Input("past", torch.float32, (STREAMS + 1, CONTEXT, BANDS), carried=True),
                Input("hidden", torch.float32, (2, STREAMS + 1, WIDTH), carried=True),
                Input("symbol", torch.int64, (STREAMS + 1,), carried=True),
            ),
        },
        buckets=[1, 2, 4, 6, 8, 12, 16],
        backend=backend,
    )
    return recogniser, runner


def empty_state(device: torch.device) -> State:
    """Return the state before any sound, for calls without graphs."""
    return State(
        torch.zeros(STREAMS + 1, CONTEXT, BANDS, device=device),
        torch.zeros(2, STREAMS + 1, WIDTH, device=device),
        torch.zeros(STREAMS + 1, dtype=torch.int64, device=device),
    )


def main(repeats: int = 100) -> None:
    """Time steps of 1, 5 and 16 streams."""
    backend = get_backend("auto")
    recogniser, runner = build(backend)
    runner.capture()
    state, calls = empty_state(backend.device), []
    with torch.inference_mode():
        for rows in (1, 5, 16):
            sound = torch.randn(rows, FRAMES, BANDS, device=backend.device)
            place = 1 + torch.randperm(STREAMS, device=backend.device)[:rows]
            values = {"sound": sound, "place": place, "first": torch.zeros_like(place, dtype=torch.bool)}
            whole = values | {"count": torch.tensor(rows, device=backend.device), "state": state}
            for _ in range(3):
                assert torch.equal(runner(**values), recogniser(**whole))
            calls.append((f"{rows:2} streams", partial(recogniser, **whole), partial(runner, **values)))
        print_table(runner, calls, repeats)


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False  # else results agree to three digits
    main()
