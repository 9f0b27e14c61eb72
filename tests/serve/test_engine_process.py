"""The engine process: what it serves, and what happens when it dies, stops, hangs, or does not start."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import psutil
import pytest
import zmq

from graphmode import bundled_model
from graphmode.engine.config import EngineOptions
from graphmode.engine.requests import Request
from graphmode.engine.sampling_params import SamplingParams
from graphmode.errors import EngineDownError, InputError
from graphmode.serve import messages
from graphmode.serve.client import EngineClient, TokenStream
from graphmode.serve.messages import Alive
from tests.serve.faulty_engine import HANG, RAISE

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 120.0
"""How long anything may take before a test gives up."""
OPTIONS = EngineOptions(device="cpu", graph_sizes=[64], max_num_batched_tokens=64)


class Server:
    """An engine client on an event loop that runs while a test asks it to."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self._runner = asyncio.Runner()

    def run(self, body: Awaitable[object]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(LIMIT_SECONDS):
                await body

        self._runner.run(bounded())

    def close(self) -> None:
        process = self.client._process
        self.run(self.client.close(0))
        self._runner.close()
        assert process is None or not psutil.pid_exists(process.pid or 0)  # not even a zombie

    async def ready(self) -> int:
        await self.client.wait_ready()
        assert self.client._process is not None
        return self.client._process.pid or 0

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds."""
        while not holds():
            await asyncio.sleep(0.01)

    def asks(self, first: int = 1, max_tokens: int = 4) -> TokenStream:
        return self.client.generate(Request([first, 10], SamplingParams(max_tokens=max_tokens)))


@contextmanager
def started(module: str, model: str | Path, options: EngineOptions, stall_seconds: float = 10.0) -> Iterator[Server]:
    """Yield a server whose engine process runs a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setattr("graphmode.serve.supervisor.ENGINE_MODULE", module)
        server = Server(EngineClient(model, options, stall_seconds=stall_seconds))
        server.run(server.client.start())
        yield server
        server.close()


@pytest.fixture(scope="module")
def faulty() -> Iterator[Server]:
    """A played engine, which is started anew after each fault."""
    with started("tests.serve.faulty_engine", "played", EngineOptions(), stall_seconds=2.0) as made:
        yield made


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The bundled model's engine."""
    with started("graphmode.serve.engine_process", bundled_model(), OPTIONS) as made:
        yield made


async def tokens(stream: TokenStream) -> list[int]:
    return [token async for news in stream for new in news for token in new.token_ids]


async def serves(server: Server) -> None:
    await server.ready()
    assert await tokens(server.asks()) == [11, 12, 13, 14]


async def fails_mid_stream(server: Server, fault: Callable[[int], object], cause: str, phase: str) -> None:
    """Let a fault happen while a request streams: it fails with the cause, and the state says so."""
    pid = await server.ready()
    restarts = server.client.state.restarts
    stream = server.asks(max_tokens=10**8)
    await anext(stream)
    fault(pid)
    with pytest.raises(EngineDownError, match=cause) as down:
        await tokens(stream)
    assert down.value.retry_after is not None
    assert server.client.state.phase == phase
    await server.until(lambda: not psutil.pid_exists(pid))
    await server.until(lambda: server.client.state.restarts == restarts + 1)
    assert server.client.state.cause is not None


def test_a_step_that_raises_fails_its_requests_and_the_next_are_served(faulty: Server) -> None:
    async def body() -> None:
        pid = await faulty.ready()
        running = faulty.asks(max_tokens=10**8)
        await anext(running)
        bad = faulty.asks(first=RAISE)
        for stream in (running, bad):
            with pytest.raises(EngineDownError, match="a step failed: ValueError: seeded fault"):
                await tokens(stream)
        await serves(faulty)
        assert await faulty.ready() == pid

    faulty.run(body())


def test_it_is_started_again_after_kill_9_and_serves(faulty: Server) -> None:
    async def body() -> None:
        await fails_mid_stream(faulty, lambda pid: os.kill(pid, signal.SIGKILL), "SIGKILL", "starting")
        await serves(faulty)

    faulty.run(body())


def test_it_is_killed_and_started_again_where_it_is_stopped(faulty: Server) -> None:
    faulty.run(fails_mid_stream(faulty, lambda pid: os.kill(pid, signal.SIGSTOP), "no sign of life for 2 s", "stalled"))


@pytest.mark.slow
def test_it_is_killed_and_started_again_where_a_step_hangs(faulty: Server) -> None:
    async def body() -> None:
        await fails_mid_stream(faulty, lambda pid: faulty.asks(first=HANG), "completed no step for 2 s", "stalled")
        await serves(faulty)

    faulty.run(body())


def test_it_ends_when_the_process_that_started_it_is_killed() -> None:
    folder = tempfile.mkdtemp()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox = context.socket(zmq.PULL)
    inbox.bind(f"ipc://{folder}/from-engine")
    command = f"{sys.executable} -m tests.serve.faulty_engine {folder} 1 $$ & echo $!; wait"
    parent = subprocess.Popen(["sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    engine = psutil.Process(int(parent.stdout.readline()))
    assert inbox.poll(1000 * LIMIT_SECONDS)
    assert isinstance(messages.decode_from_engine(inbox.recv()), Alive)
    parent.kill()
    parent.wait()
    psutil.wait_procs([engine], timeout=LIMIT_SECONDS)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE  # where nobody inherits it
    context.destroy(linger=0)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("module", "cause"), [("this", "ended with status 0; its log"), ("tests.serve.failing_engine", "^no room for it$")]
)
def test_a_process_that_ends_at_once_is_noticed_with_what_it_said(module: str, cause: str) -> None:
    with started(module, "any", EngineOptions()) as server:

        async def body() -> None:
            with pytest.raises(EngineDownError, match=cause):
                await server.client.wait_ready()
            assert (server.client.state.phase, server.client.state.restarts) == ("dead", 0)

        server.run(body())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["truncated", "missing"])
def test_a_model_that_cannot_be_loaded_is_said_in_a_line_and_not_tried_again(tmp_path: Path, fault: str) -> None:
    model = tmp_path / "model"
    if fault == "truncated":
        shutil.copytree(bundled_model(), model)
        os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size // 2)
    with started("graphmode.serve.engine_process", model, OPTIONS) as server:

        async def body() -> None:
            with pytest.raises(EngineDownError, match=str(model)) as down:
                await server.client.wait_ready()
            assert "\n" not in str(down.value)
            assert (server.client.state.phase, server.client.state.restarts) == ("dead", 0)

        server.run(body())


def test_fifty_at_once_answer_as_each_does_alone(server: Server) -> None:
    def asks(number: int) -> TokenStream:
        params = SamplingParams(max_tokens=8, seed=number % 10, logprobs=1 if number % 10 == 3 else None)
        return server.client.generate(Request([5 + number % 10, 20, 30], params))

    async def body() -> None:
        await server.ready()
        alone = [await tokens(asks(number)) for number in range(10)]
        assert await asyncio.gather(*(tokens(asks(number)) for number in range(50))) == alone * 5
        state = server.client.state
        assert 0 < state.captured == state.to_capture

    server.run(body())


def test_a_request_that_does_not_fit_fails_alone(server: Server) -> None:
    async def body() -> None:
        await server.ready()
        other = server.asks()
        with pytest.raises(InputError, match=r"token id 1000000; the model's ids are 0 to"):
            await anext(server.asks(first=10**6))
        assert len(await tokens(other)) == 4

    server.run(body())


def test_blocks_of_a_stream_that_is_left_are_free_when_the_engine_rests(server: Server) -> None:
    async def body() -> None:
        await server.ready()
        async with aclosing(server.asks(max_tokens=900)) as stream:
            await anext(stream)
            await server.until(lambda: server.client.snapshot is not None and server.client.snapshot.running == 1)
        await server.until(lambda: server.client.snapshot is not None and server.client.snapshot.running == 0)
        assert server.client.snapshot is not None
        assert server.client.snapshot.kv_blocks_used == [0]
        assert server.client.snapshot.waiting == 0

    server.run(body())


def test_nothing_is_left_behind(server: Server) -> None:
    server.run(server.ready())
    process = server.client._process
    assert process is not None
    server.run(server.until(lambda: process._folder is None))  # removed when all sockets are connected
    engine = psutil.Process(process.pid)
    family = [engine, *engine.children(recursive=True)]
    server.run(server.client.close(10))
    assert not [each for each in family if psutil.pid_exists(each.pid)]
