"""A vocoder with a step that no graph can hold: it runs outside, between two graphs. Run: python examples/vocoder.py

Frames of a spectrogram become sound. How loud a chunk came out decides on the host whether a limiter runs: that reads a
value, so it is marked ``@outside_graph`` and breaks the graph into graph, call, graph.
"""

import torch
from timing import milliseconds

from graphmode.graph import GraphRunner, Input, get_backend, outside_graph


@outside_graph
def limit(sound: torch.Tensor) -> torch.Tensor:
    """Scale the chunk down if its peak is above 1."""
    peak = sound.abs().max().item()
    return sound / peak if peak > 1 else sound


class Vocoder(torch.nn.Module):
    """80 bands a frame to 256 samples a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(80, 256),
            *[torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(256, 256)) for _ in range(8)],
        )
        self.smooth = torch.nn.Conv1d(1, 1, 9, padding=4)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Return ``[frames, 256]`` samples of ``[frames, 80]`` bands."""
        return self.smooth(limit(self.body(frames)).unsqueeze(1)).squeeze(1)


backend = get_backend("auto")
vocoder = Vocoder().to(backend.device)
runner = GraphRunner(vocoder, [Input("frames", torch.float32, ("frames", 80))], [8, 16, 32, 64], backend=backend)
runner.capture()
with torch.inference_mode():
    for count in (8, 30, 64):
        frames = 20 * torch.randn(count, 80, device=backend.device)
        torch.testing.assert_close(runner(frames=frames), vocoder(frames), rtol=1e-4, atol=1e-4)
        eager, graph = milliseconds(lambda f=frames: vocoder(f)), milliseconds(lambda f=frames: runner(frames=f))
        print(f"{backend.device.type} {count:2} frames: eager {eager:.3f} ms, piecewise {graph:.3f} ms")
print(f"{runner.stats.captures} sizes, {runner.stats.graphs} graphs (two a size), hit rate {runner.stats.hit_rate}")
