"""A vocoder with a step that no graph can hold: it runs outside, between two graphs. Run: python examples/vocoder.py

Frames of a spectrogram become sound, 256 samples each: an axis that only the output has, as a function of the frames.
How loud a chunk came out decides on the host whether a limiter runs: that reads a value, so it is marked
``@outside_graph`` and breaks the graph into graph, call, graph. The peak and the convolution over the sound would find
frames of padding too, so these are silenced first.
"""

from functools import partial

import torch
from timing import print_table
from torch import nn

from graphmode.graph import Backend, GraphRunner, Input, get_backend, outside_graph

BANDS, HOP = 80, 256


@outside_graph
def limit(sound: torch.Tensor) -> torch.Tensor:
    """Scale the chunk down if its peak is above 1."""
    peak = sound.abs().max().item()
    return sound / peak if peak > 1 else sound


class Vocoder(nn.Module):
    """BANDS bands a frame to HOP samples a frame."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(8) for layer in (nn.GELU(), nn.Linear(256, 256))]
        self.body = nn.Sequential(nn.Linear(BANDS, 256), *layers, nn.Linear(256, HOP))
        self.smooth = nn.Conv1d(1, 1, 9, padding=4)

    def forward(self, frames: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Return ``[HOP * frames]`` samples of ``[frames, BANDS]``, of which ``count`` frames are no padding."""
        live = torch.arange(len(frames), device=frames.device) < count
        sound = self.body(frames).masked_fill(~live[:, None], 0)
        return self.smooth(limit(sound).view(1, -1)).view(-1)


def build(backend: Backend) -> tuple[Vocoder, GraphRunner]:
    """Return the vocoder with random weights, and its graphs for up to 64 frames."""
    vocoder = Vocoder().eval().to(backend.device)
    runner = GraphRunner(
        vocoder,
        [Input("frames", torch.float32, ("frames", BANDS)), Input("count", torch.int64, (), size_of="frames")],
        [8, 16, 32, 64],
        axes={"samples": lambda frames: HOP * frames},
        output_axes=[("samples",)],
        backend=backend,
    )
    return vocoder, runner


def main(repeats: int = 50) -> None:
    """Time 8, 30 and 64 frames."""
    backend = get_backend("auto")
    vocoder, runner = build(backend)
    runner.capture()
    calls = []
    with torch.inference_mode():
        for count in (8, 30, 64):
            frames = 20 * torch.randn(count, BANDS, device=backend.device)
            eager = partial(vocoder, frames, torch.tensor(count, device=backend.device))
            torch.testing.assert_close(runner(frames=frames), eager(), rtol=1e-4, atol=1e-4)
            calls.append((f"{count:2} frames, piecewise", eager, partial(runner, frames=frames)))
        print_table(runner, calls, repeats)


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False  # else results agree to three digits
    main()
