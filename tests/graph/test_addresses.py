"""Weights that are replaced after capture are an error that names them, and recapture() takes the new ones."""

import pytest
import torch

from graphmode.graph import GraphRunner, Input, StaleAddressError

INPUT = [Input("x", torch.float32, ("rows", 4))]


def test_recapture_takes_the_weights_as_they_are(device: str) -> None:
    layer = torch.nn.Linear(4, 4, bias=False, device=device)
    runner = GraphRunner(lambda x: layer(x), INPUT, [1, 2, 4], backend=device)
    x = torch.randn(2, 4)
    runner(x=x)
    runner(x=x[:1])
    layer.weight.data = torch.eye(4, device=device) * 3
    with pytest.raises(StaleAddressError, match="recapture"):
        runner.check_addresses()
    runner.recapture()
    assert (runner.stats.captures, runner.stats.graphs) == (2, 2), "what was captured before, and nothing else"
    runner.check_addresses()
    assert torch.equal(runner(x=x).cpu(), x * 3)
