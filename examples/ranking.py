"""A ranking model: how likely a user is to click on each candidate. Run: python examples/ranking.py

Tags of all candidates lie in one list, and offsets say where those of each begin, as ``EmbeddingBag`` takes them. So
there are two bucketed axes, candidates and tags, and a graph for each pair. Offsets beyond the true ones must lie where
the true tags end, which no constant can say; how many there are comes as tensors, inputs with ``size_of``.
"""

from functools import partial

import torch
from timing import print_table
from torch import nn

from graphmode.graph import Backend, GraphRunner, Input, get_backend

USERS, ITEMS, TAGS, NUMBERS, WIDTH = 1000, 5000, 300, 13, 32


class Ranker(nn.Module):
    """A user, and candidates with numbers and tags, each a vector; their products and a network over them."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS, WIDTH), nn.Embedding(ITEMS, WIDTH)
        self.tags = nn.EmbeddingBag(TAGS, WIDTH, mode="mean", padding_idx=0)
        self.numbers = nn.Sequential(nn.LayerNorm(NUMBERS), nn.Linear(NUMBERS, 64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.top = nn.Sequential(nn.Linear(WIDTH + 6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        self.register_buffer("pairs", torch.triu_indices(4, 4, offset=1))

    def forward(
        self, user: torch.Tensor, item: torch.Tensor, numbers: torch.Tensor, tags: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        """Return how likely a click on each candidate is, ``[candidates]``.

        Args:
            user: int64, of shape ``[]``.
            item: int64 ``[candidates]``.
            numbers: ``[candidates, NUMBERS]``.
            tags: int64 ``[tags]``, of all candidates one after the other; 0 is none.
            offsets: int64 ``[candidates]``, where the tags of each begin.
        """
        dense, item = self.numbers(numbers), self.item(item)
        vectors = torch.stack([dense, self.user(user).expand_as(item), item, self.tags(tags, offsets)], 1)
        products = (vectors @ vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([dense, products], 1)).squeeze(1).sigmoid()


def build(backend: Backend) -> tuple[Ranker, GraphRunner]:
    """Return the model with random weights, and its graphs for up to 128 candidates with 512 tags."""
    ranker = Ranker().eval().to(backend.device)

    def padded(
        tags: torch.Tensor,
        offsets: torch.Tensor,
        tag_count: torch.Tensor,
        candidate_count: torch.Tensor,
        **others: torch.Tensor,
    ) -> torch.Tensor:
        true_tags = torch.arange(len(tags), device=tags.device) < tag_count
        true_offsets = torch.arange(len(offsets), device=offsets.device) < candidate_count
        return ranker(
            tags=torch.where(true_tags, tags, 0), offsets=torch.where(true_offsets, offsets, tag_count), **others
        )

    runner = GraphRunner(
        padded,
        [
            Input("user", torch.int64, ()),
            Input("item", torch.int64, ("candidates",)),
            Input("numbers", torch.float32, ("candidates", NUMBERS)),
            Input("tags", torch.int64, ("tags",)),
            Input("offsets", torch.int64, ("candidates",)),
            Input("tag_count", torch.int64, (), size_of="tags"),
            Input("candidate_count", torch.int64, (), size_of="candidates"),
        ],
        buckets={"candidates": [16, 64, 128], "tags": [32, 128, 256, 512]},
        backend=backend,
    )
    return ranker, runner


def request(candidates: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a random user, and candidates with up to four tags each."""
    counts = torch.randint(0, 5, (candidates,))
    values = {
        "user": torch.randint(USERS, ()),
        "item": torch.randint(ITEMS, (candidates,)),
        "numbers": torch.randn(candidates, NUMBERS),
        "tags": torch.randint(TAGS, (int(counts.sum()),)),
        "offsets": counts.cumsum(0) - counts,
    }
    return {name: value.to(device) for name, value in values.items()}


def main(repeats: int = 100) -> None:
    """Time 10, 50 and 128 candidates."""
    backend = get_backend("auto")
    ranker, runner = build(backend)
    runner.capture()
    calls = []
    with torch.inference_mode():
        for candidates in (10, 50, 128):
            values = request(candidates, backend.device)
            torch.testing.assert_close(runner(**values), ranker(**values))
            calls.append((f"{candidates} candidates", partial(ranker, **values), partial(runner, **values)))
        print_table(runner, calls, repeats)


if __name__ == "__main__":
    main()
