"""Whether tokens were drawn from a distribution."""

from __future__ import annotations

import torch


def check_drawn_from(probabilities: torch.Tensor, tokens: torch.Tensor) -> None:
    """Compare the numbers of ``tokens`` with float64 ``probabilities`` ``[vocab]``: chi-square, at four deviations."""
    expected = probabilities * tokens.numel()
    drawn = torch.bincount(tokens, minlength=len(expected)).double()
    assert not drawn[expected == 0].any()
    # Rare tokens are counted together: chi-square wants some five expected draws in each class.
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True).clamp(min=1e-9)])
    drawn = torch.cat([drawn[~rare], drawn[rare].sum(0, keepdim=True)])
    degrees = len(expected) - 1
    chi_square = ((drawn - expected) ** 2 / expected.clamp(min=1)).sum()
    assert chi_square < degrees + 4 * max(2 * degrees, 1) ** 0.5
