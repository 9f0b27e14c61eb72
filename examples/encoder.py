"""A text encoder: sentences of any length, mean vectors of their tokens. Run: python examples/encoder.py

Two axes are bucketed, how many sentences there are and how long the longest is; there is a graph for each pair. Padding
is masked by the sentences' lengths, inside of a batch and beyond it alike. Rows beyond the batch have a length of 1, so
that no row is masked from end to end.
"""

from functools import partial

import torch
from timing import print_table
from torch import nn

from graphmode.graph import Backend, GraphRunner, Input, get_backend

TOKENS, WIDTH, LONGEST = 1000, 64, 64


class Encoder(nn.Module):
    """A transformer encoder and the mean over true tokens, as a unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LONGEST, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, WIDTH]`` of int64 tokens ``[batch, length]``, of which the first ``lengths`` are true."""
        padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        x = self.layers(x, src_key_padding_mask=padding)
        x = x.masked_fill(padding.unsqueeze(-1), 0).sum(1) / lengths[:, None]
        return nn.functional.normalize(x, dim=-1)


def build(backend: Backend) -> tuple[Encoder, GraphRunner]:
    """Return the encoder with random weights, and its graphs for 1 to 8 sentences of up to LONGEST tokens."""
    encoder = Encoder().eval().to(backend.device)
    runner = GraphRunner(
        encoder,
        [Input("tokens", torch.int64, ("batch", "length")), Input("lengths", torch.int64, ("batch",), padding=1)],
        buckets={"batch": [1, 4, 8], "length": [16, 32, 64]},
        backend=backend,
    )
    return encoder, runner


def sentences(lengths: list[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Return random sentences of these lengths."""
    tokens = torch.randint(TOKENS, (len(lengths), max(lengths)), device=device)
    return {"tokens": tokens, "lengths": torch.tensor(lengths, device=device)}


def main(repeats: int = 50) -> None:
    """Time one sentence and several."""
    backend = get_backend("auto")
    encoder, runner = build(backend)
    runner.capture()
    calls = []
    with torch.inference_mode():
        for lengths in ([9], [60], [5, 13, 16], [20, 41, 64, 7, 33, 50, 12, 60]):
            values = sentences(lengths, backend.device)
            torch.testing.assert_close(runner(**values), encoder(**values))
            name = f"{len(lengths)} of up to {max(lengths)} tokens"
            calls.append((name, partial(encoder, **values), partial(runner, **values)))
        print_table(runner, calls, repeats)


if __name__ == "__main__":
    main()
