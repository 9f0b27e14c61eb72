import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph.staging import StagingRing


class Device:
    """A device that reads the ring's copies late, in order, when it is told to or waited for."""

    def __init__(self) -> None:
        self.queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0
        self.read: list[int] = []

    def copy(self, memory: torch.Tensor) -> None:
        self.queue.append((memory, memory.clone()))

    def run(self, upto: int) -> None:
        for memory, at_launch in self.queue[self.done : upto]:
            assert torch.equal(memory, at_launch), "a buffer was rewritten before the device had read it"
            self.read.append(int(memory[0]))
        self.done = max(self.done, upto)


class LateEvent:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0

    def record(self) -> None:
        self.at = len(self.device.queue)

    def query(self) -> bool:
        return self.device.done >= self.at

    def synchronize(self) -> None:
        self.device.run(self.at)


@given(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_no_buffer_is_rewritten_before_the_device_has_read_it(count: int, progress: list[int]) -> None:
    """However far the device lags, it reads what each step wrote, in order."""
    device = Device()
    ring = StagingRing(8, count, lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8), lambda: LateEvent(device))
    for step, advance in enumerate(progress):
        buffer = ring.acquire()
        buffer.memory.fill_(step)
        device.copy(buffer.memory)
        ring.release(buffer)
        device.run(min(device.done + advance, len(device.queue)))
    device.run(len(device.queue))
    assert device.read == list(range(len(progress)))


def test_waiting_is_counted() -> None:
    device = Device()
    ring = StagingRing(1, 2, lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8), lambda: LateEvent(device))
    for _ in range(3):
        buffer = ring.acquire()
        device.copy(buffer.memory)
        ring.release(buffer)
    assert ring.waits == 1
