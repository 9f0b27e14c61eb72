"""An engine process with a played core: no model, and the faults that the model's name and prompts ask for."""

import os
import sys
from collections.abc import Callable
from threading import Event
from types import SimpleNamespace
from typing import Any

import torch

from graphmode.engine.config import EngineOptions
from graphmode.engine.outputs import NewTokens
from graphmode.engine.requests import Request
from graphmode.engine.stats import EngineStats
from graphmode.errors import InputError, ModelError
from graphmode.serve.engine_process import main

RAISE, HANG, LOSE_DEVICE, UNFIT = 90, 91, 92, 93
"""The first token of a prompt that makes the next step raise, hang, or lose the device; or that is refused."""


class PlayedCore:
    """What the engine process needs of a core. The tokens of an answer count up from its prompt's last one."""

    def __init__(self, model: str, options: EngineOptions, on_capture: Callable[[int, int], object]) -> None:
        if model == "missing":
            raise ModelError("missing is no model; give the name of one")
        if model == "crash":
            os._exit(3)
        for done in range(3):
            on_capture(done, 2)
        self.options, self.device = options, torch.device("cpu")
        self.limits = SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=10**9)
        shape = SimpleNamespace(vocab_size=100, eos_token_ids=frozenset({0}))
        files = SimpleNamespace(checkpoint=SimpleNamespace(name=model))
        self.loaded = SimpleNamespace(shape=shape, files=files, model=SimpleNamespace(dtype=torch.float32))
        self.num_blocks, self.cache_groups = (4,), (SimpleNamespace(block_size=16),)
        self.graphs = SimpleNamespace(
            stats=SimpleNamespace(steps=0),
            policy=SimpleNamespace(enabled=True, buckets={"decode": (1, 2)}),
            backend=SimpleNamespace(synchronize=self._synchronize),
        )
        self.runner = SimpleNamespace(graphs=self.graphs)
        self._requests: dict[str, tuple[Request, int]] = {}
        self._aborted: list[str] = []
        self._device_lost = False

    @property
    def stats(self) -> EngineStats:
        numbers: dict[str, Any] = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
        known = {"capture_failures": [], "misses": {}, "vision_misses": {}, "buckets": {"decode": {8: 3}}}
        return EngineStats(**{**numbers, **known, "blocks_used": [1], "blocks_total": [4], "queue_seconds": []})

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    def submit(self, request: Request) -> str:
        if request.prompt_token_ids[0] == UNFIT:
            raise InputError("unfit")
        assert request.request_id is not None
        self._requests[request.request_id] = request, 0
        return request.request_id

    def abort(self, request_id: str, index: int | None, reason: str) -> None:
        self._aborted.append(request_id)

    def step(self) -> list[NewTokens]:
        try:
            return self._step()
        except Exception:
            self._requests.clear()
            raise

    def _step(self) -> list[NewTokens]:
        self.graphs.stats.steps += 1
        for request, _ in self._requests.values():
            self._fail_as(request.prompt_token_ids[0])
        news = [NewTokens(name, 0, [], finish_reason="abort") for name in self._aborted if name in self._requests]
        for new in news:
            del self._requests[new.request_id]
        self._aborted.clear()
        for request_id, (request, made) in list(self._requests.items()):
            ends = made + 1 == request.params.max_tokens
            token = request.prompt_token_ids[-1] + made + 1
            news.append(NewTokens(request_id, 0, [token], finish_reason="length" if ends else None))
            self._requests[request_id] = request, made + 1
            if ends:
                del self._requests[request_id]
        Event().wait(0.001)  # the device computes
        return news

    def _fail_as(self, token: int) -> None:
        if token == RAISE:
            raise ValueError("seeded fault")
        if token == HANG:
            Event().wait()
        if token == LOSE_DEVICE:
            self._device_lost = True
            raise ValueError("seeded loss")

    def _synchronize(self) -> None:
        if self._device_lost:
            raise RuntimeError("no device")


if __name__ == "__main__":
    main(sys.argv[1:], load=PlayedCore)  # type: ignore[arg-type]
