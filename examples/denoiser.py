"""A diffusion transformer that turns noise into latents, several steps in one call. Run: python examples/denoiser.py

A step changes its inputs in place, the latents and how many steps each row has done, so one call repeats it: the host
launches the same graph 10 times and looks at nothing in between. Classifier-free guidance, which computes every image
twice, is a static argument: it has graphs of its own.
"""

import math
from functools import partial

import torch
from timing import print_table
from torch import nn
from torch.nn import functional as F  # noqa: N812

from graphmode.graph import Backend, GraphRunner, Input, get_backend

STEPS, LABELS, WIDTH, HEADS = 10, 10, 64, 4
TOKENS, PATCH = 16, 16  # an image of 8 x 8 with 4 channels, in patches of 2 x 2


class Block(nn.Module):
    """A transformer block whose norms are scaled and shifted by the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, TOKENS, WIDTH]`` of the same and the condition ``[batch, WIDTH]``."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        heads = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp) + shift_mlp)


class Denoiser(nn.Module):
    """Predicts the noise in latents."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(PATCH, WIDTH), nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(LABELS + 1, WIDTH)  # the last: none
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PATCH)

    def forward(self, latents: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, TOKENS, PATCH]`` of the same, times from 0 to 1 ``[batch]`` and labels ``[batch]``."""
        frequencies = torch.exp(-math.log(1e4) * torch.arange(WIDTH // 2, device=time.device) / (WIDTH // 2))
        angles = 1000 * time[:, None] * frequencies
        condition = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.label(label))
        x = self.embed(latents) + self.position
        for block in self.blocks:
            x = block(x, condition)
        return self.out(self.norm(x))


class Sampler(nn.Module):
    """One step of DDIM over a cosine schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser()
        self.register_buffer("times", torch.linspace(0.98, 0.0, STEPS + 1))
        self.register_buffer("kept", torch.cos(self.times * math.pi / 2) ** 2)  # the share of the image, not noise

    def forward(self, latents: torch.Tensor, done: torch.Tensor, label: torch.Tensor, guided: bool) -> torch.Tensor:
        """Move ``latents`` on by a step, in place, and ``done``, the number of steps behind each row, with them."""
        noise = self.denoiser(latents, self.times[done], label)
        if guided:
            plain = self.denoiser(latents, self.times[done], torch.full_like(label, LABELS))
            noise = plain + 4 * (noise - plain)
        now, then = self.kept[done][:, None, None], self.kept[done + 1][:, None, None]
        image = (latents - (1 - now).sqrt() * noise) / now.sqrt()
        latents.copy_(then.sqrt() * image + (1 - then).sqrt() * noise)
        done.add_(1)
        return latents


def build(backend: Backend) -> tuple[Sampler, GraphRunner]:
    """Return the sampler with random weights, and its graphs for 1 to 8 images."""
    sampler = Sampler().eval().to(backend.device)
    runner = GraphRunner(
        sampler,
        [
            Input("latents", torch.float32, ("images", TOKENS, PATCH)),
            Input("done", torch.int64, ("images",)),
            Input("label", torch.int64, ("images",)),
        ],
        buckets=[1, 2, 4, 8],
        static={"guided": (False, True)},
        backend=backend,
    )
    return sampler, runner


@torch.inference_mode()
def sample(sampler: Sampler, latents: torch.Tensor, label: torch.Tensor, guided: bool) -> torch.Tensor:
    """Return the images of ``latents``, step by step, without graphs."""
    latents, done = latents.clone(), torch.zeros_like(label)
    for _ in range(STEPS):
        sampler(latents, done, label, guided)
    return latents


def main(repeats: int = 20) -> None:
    """Time images with and without guidance."""
    backend = get_backend("auto")
    sampler, runner = build(backend)
    runner.capture()
    calls = []
    for count, guided in ((1, False), (4, False), (4, True)):
        latents = torch.randn(count, TOKENS, PATCH, device=backend.device)
        label = torch.randint(LABELS, (count,), device=backend.device)
        values = {"latents": latents, "done": torch.zeros_like(label), "label": label, "guided": guided}
        torch.testing.assert_close(runner(**values, repeats=STEPS), sample(sampler, latents, label, guided))
        name = f"{count} images{', guided' if guided else ''}"
        calls.append((name, partial(sample, sampler, latents, label, guided), partial(runner, **values, repeats=STEPS)))
    print_table(runner, calls, repeats)


if __name__ == "__main__":
    main()
