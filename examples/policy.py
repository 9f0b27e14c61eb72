"""A robot's policy as a set of graphs: 1 to 64 robots in one launch. Run: python examples/policy.py

What a robot sees is a dataclass, and so is what it does. Values are numpy arrays, as simulators and drivers give them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import print_table
from torch import nn

from graphmode.graph import Backend, GraphRunner, Input, get_backend

JOINTS, WIDTH = 7, 64


@dataclass
class Observation:
    """What robots see: inputs in the declaration of a runner, arrays in a call.

    Attributes:
        joints: angles and speeds, ``[robots, 2 * JOINTS]``.
        camera: pixels from 0 to 255, uint8 ``[robots, 3, 16, 16]``.
        goal: where to go to, ``[robots, 3]``, and whether to grip there, bool ``[robots]``.
    """

    joints: Any
    camera: Any
    goal: dict[str, Any]


@dataclass
class Action:
    """What robots do: change angles, ``[robots, JOINTS]``, and close the hand or not, bool ``[robots]``."""

    angles: torch.Tensor
    close: torch.Tensor


class Policy(nn.Module):
    """Three encoders and a deep, narrow network."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4), nn.SiLU(), nn.Flatten(), nn.Linear(128, WIDTH), nn.SiLU()
        )
        self.joints, self.goal = nn.Linear(2 * JOINTS, WIDTH), nn.Linear(4, WIDTH)
        layers = [layer for _ in range(16) for layer in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.SiLU())]
        self.body = nn.Sequential(*layers, nn.Linear(WIDTH, JOINTS + 1))

    def forward(self, observation: Observation) -> Action:
        """Return an action for each robot."""
        goal = torch.cat([observation.goal["place"], observation.goal["grip"][:, None]], 1)
        out = self.body(self.camera(observation.camera / 255) + self.joints(observation.joints) + self.goal(goal))
        return Action(angles=out[:, :JOINTS].tanh(), close=out[:, JOINTS] > 0)


def build(backend: Backend) -> tuple[Policy, GraphRunner]:
    """Return the policy with random weights, and its graphs for 1 to 64 robots."""
    policy = Policy().eval().to(backend.device)
    inputs = Observation(
        joints=Input("joints", torch.float32, ("robots", 2 * JOINTS)),
        camera=Input("camera", torch.uint8, ("robots", 3, 16, 16)),
        goal={"place": Input("place", torch.float32, ("robots", 3)), "grip": Input("grip", torch.bool, ("robots",))},
    )
    return policy, GraphRunner(policy, {"observation": inputs}, 64, backend=backend)


def observe(robots: int) -> Observation:
    """Return what robots might see."""
    random = np.random.default_rng(robots)
    return Observation(
        joints=random.standard_normal((robots, 2 * JOINTS), dtype=np.float32),
        camera=random.integers(0, 256, (robots, 3, 16, 16), dtype=np.uint8),
        goal={"place": random.random((robots, 3), dtype=np.float32), "grip": random.random(robots) < 0.5},
    )


@torch.inference_mode()
def act(policy: Policy, seen: Observation, device: torch.device) -> Action:
    """Return the actions without graphs."""
    goal = {name: torch.from_numpy(value).to(device) for name, value in seen.goal.items()}
    joints, camera = torch.from_numpy(seen.joints).to(device), torch.from_numpy(seen.camera).to(device)
    return policy(Observation(joints, camera, goal))


def main(repeats: int = 100) -> None:
    """Time 1, 5 and 64 robots."""
    backend = get_backend("auto")
    policy, runner = build(backend)
    runner.capture()
    calls = []
    for robots in (1, 5, 64):
        seen = observe(robots)
        action, expected = runner(observation=seen), act(policy, seen, backend.device)
        torch.testing.assert_close(action.angles, expected.angles)
        calls.append(
            (f"{robots:2} robots", partial(act, policy, seen, backend.device), partial(runner, observation=seen))
        )
    print_table(runner, calls, repeats)


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False  # else results agree to three digits
    main()
