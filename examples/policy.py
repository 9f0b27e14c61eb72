"""A robot's policy as a set of graphs: 1 to 64 states in one launch. Run: python examples/policy.py"""

import torch
from timing import milliseconds

from graphmode.graph import GraphRunner, Input, get_backend

backend = get_backend("auto")
layers = [layer for _ in range(16) for layer in (torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.SiLU())]
policy = torch.nn.Sequential(*layers, torch.nn.Linear(64, 7)).to(backend.device)

runner = GraphRunner(lambda state: policy(state), [Input("state", torch.float32, ("batch", 64))], 64, backend=backend)
runner.capture()
with torch.inference_mode():
    for batch in (1, 5, 64):
        state = torch.randn(batch, 64, device=backend.device)
        torch.testing.assert_close(runner(state=state), policy(state))
        eager, graph = milliseconds(lambda state=state: policy(state)), milliseconds(lambda s=state: runner(state=s))
        print(
            f"{backend.device.type} batch {batch:2}: eager {eager:.3f} ms, graph {graph:.3f} ms, {eager / graph:.1f} x"
        )
print(f"{runner.stats.graphs} graphs, {runner.stats.graph_bytes / 2**20:.2f} MiB, hit rate {runner.stats.hit_rate}")
