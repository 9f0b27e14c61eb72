"""A capture that fails says what and where, leaves the device usable, and that size runs eagerly."""

import logging
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from graphmode.graph import (
    CaptureError,
    CaptureFailure,
    CaptureMemoryError,
    GraphRunner,
    Input,
    InputError,
    Reason,
    UnsupportedOpError,
)

INPUT = [Input("x", torch.float32, ("rows", 4), padding=1)]

HOST_READS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "item": lambda x: x * x.sum().item(),
    "bool": lambda x: x if x.sum() > 0 else -x,
    "int": lambda x: x * int(x.sum()),
    "tolist": lambda x: x * x.sum(1).tolist()[0],
    "nonzero": lambda x: x + x.nonzero().sum(),
    "mask": lambda x: x + x[x > 0].sum(),
    "unique": lambda x: x + x.unique().sum(),
    "equal": lambda x: x * torch.equal(x, x),
    "repeat": lambda x: x + x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=x.device), dim=1),
}


@pytest.mark.parametrize("name", HOST_READS)
def test_what_depends_on_data_is_refused_with_its_line(device: str, name: str) -> None:
    runner = GraphRunner(HOST_READS[name], INPUT, [2], backend=device, strict=True)
    with pytest.raises(UnsupportedOpError) as error:
        runner.capture()
    assert f'"{name}": lambda x' in str(error.value)
    assert "outside_graph" in str(error.value)
    assert __file__ in (error.value.location or "")
    assert error.value.operator is not None


@pytest.mark.parametrize(
    "read", [np.asarray, str, "{}".format, torch.Tensor.numpy], ids=["asarray", "str", "format", "numpy"]
)
def test_reading_memory_on_the_cpu_is_refused_too(read: Callable[[torch.Tensor], object]) -> None:
    runner = GraphRunner(lambda x: x * len(str(read(x))), INPUT, [2], backend="cpu", strict=True)
    with pytest.raises(UnsupportedOpError):
        runner.capture()


def test_that_size_runs_eagerly_counted_and_logged_and_the_others_replay(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x * (x.sum().item() if len(x) == 4 else 2)

    runner = GraphRunner(fn, INPUT, [2, 4, 8], backend=device)
    with caplog.at_level(logging.ERROR):
        runner.capture()
    assert "aten::_local_scalar_dense" in caplog.text
    assert "return x * (x.sum().item()" in caplog.text
    x = torch.ones(4, 4)
    for _ in range(3):
        assert torch.equal(runner(x=x).cpu(), x * 16)
        assert torch.equal(runner(x=x[:2]).cpu(), x[:2] * 2)
        assert torch.equal(runner(x=torch.ones(7, 4)).cpu(), torch.ones(7, 4) * 2)
    assert runner.stats.misses == {Reason.UNSUPPORTED_OP: 3}
    assert runner.stats.replays == 6
    assert list(runner.failed.values()) == [Reason.UNSUPPORTED_OP]


def test_any_other_error_is_located_too(device: str) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        return y @ y  # [2, 4] @ [2, 4]

    runner = GraphRunner(fn, INPUT, [2], backend=device, strict=True)
    with pytest.raises(CaptureError, match="y @ y") as error:
        runner.capture()
    assert error.value.operator in ("aten::mm", "aten::sin")


def test_an_error_before_the_first_operator_names_none(device: str) -> None:
    def raises_for_two(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 2:
            raise ValueError("two are too few")
        return x * 2

    runner = GraphRunner(raises_for_two, INPUT, [2, 4], backend=device)
    runner.capture()
    (failure,) = runner.stats.capture_failures
    assert failure.message.startswith("capture failed before the first operator: ValueError: two are too few")
    assert runner(x=torch.ones(3, 4)).sum().item() == 24
    assert runner(x=torch.ones(1, 4)).sum().item() == 8, "its bucket has no graph, and the function takes one row"
    with pytest.raises(ValueError, match="two are too few"):
        runner(x=torch.ones(2, 4))


def test_failing_first_does_not_harm_later_captures(device: str) -> None:
    """The failed capture is the first of its pool, and a piece of it was captured already."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y * y.sum().item() if len(x) == 8 else y + 1

    runner = GraphRunner(fn, INPUT, [1, 2, 8], backend=device)
    runner.capture()
    assert runner.stats.captures == 2
    for size in (1, 2, 8):
        x = torch.randn(size, 4)
        torch.testing.assert_close(runner(x=x).cpu(), fn(x))


@pytest.mark.gpu
def test_a_capture_that_cuda_itself_refuses_is_cleaned_up() -> None:
    """The guard sees operators alone; a synchronising library call breaks the capture in the driver."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if len(x) == 4 and torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return y + 1

    runner = GraphRunner(fn, INPUT, [2, 4, 8], backend="cuda")
    runner.capture()
    assert list(runner.failed.values()) == [Reason.CAPTURE_FAILED]
    for size in (2, 4, 8, 1, 4):
        x = torch.randn(size, 4)
        torch.testing.assert_close(runner(x=x).cpu(), x * 2 + 1)
    before = torch.cuda.memory_allocated()
    held = [torch.empty(1 << 20, device="cuda") for _ in range(4)]
    del held
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_random_numbers_can_be_drawn_after_a_capture_that_cuda_itself_refused() -> None:
    generator = torch.Generator("cuda")

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x + torch.rand_like(x) + torch.rand(x.shape, device="cuda", generator=generator)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return y

    runner = GraphRunner(fn, INPUT, [2], backend="cuda")
    runner.capture()
    assert list(runner.failed.values()) == [Reason.CAPTURE_FAILED]
    assert runner(x=torch.zeros(2, 4)).min() > 0
    assert torch.rand(3, device="cuda").min() >= 0
    assert torch.rand(3, device="cuda", generator=generator).min() >= 0


def test_an_output_whose_axes_are_not_declared_is_an_error(device: str) -> None:
    """Every second row: their number is no multiple of the rows', and no two sizes could tell."""
    runner = GraphRunner(lambda x: x[::2], INPUT, [8], backend=device, strict=True)
    with pytest.raises(CaptureError, match="output_axes"):
        runner.capture()
    with pytest.raises(InputError, match="output_axes"):
        runner(x=torch.ones(5, 4))
    assert torch.equal(runner(x=torch.ones(8, 4)).cpu(), torch.ones(4, 4))


def test_a_python_output_is_an_error(device: str) -> None:
    runner = GraphRunner(lambda x: (x, 3), INPUT, [2], backend=device, strict=True)
    with pytest.raises(CaptureError, match="returned 3, a int"):
        runner.capture()


def test_failures_are_told_as_they_happen_and_kept(device: str) -> None:
    told: list[CaptureFailure] = []
    runner = GraphRunner(
        lambda x: x * (x.sum().item() if len(x) == 4 else 2),
        INPUT,
        [2, 4],
        backend=device,
        on_capture_failure=told.append,
    )
    runner.capture()
    [failure] = told
    assert runner.stats.capture_failures == told
    assert (failure.key.size, failure.reason) == (4, Reason.UNSUPPORTED_OP)
    assert "aten::_local_scalar_dense" in failure.message
    assert __file__ in failure.message
    runner(x=torch.ones(4, 4))
    runner.stats.reset_steps()
    assert runner.stats.capture_failures == told


def test_what_the_callback_raises_ends_the_capture(device: str) -> None:
    def refuse(failure: CaptureFailure) -> None:
        raise RuntimeError(str(failure.reason))

    runner = GraphRunner(lambda x: x * x.sum().item(), INPUT, [2], backend=device, on_capture_failure=refuse)
    with pytest.raises(RuntimeError, match="unsupported_op"):
        runner.capture()


def test_a_function_warms_up_as_often_as_asked_before_each_capture(device: str) -> None:
    runs: list[int] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        runs.append(len(x))
        return x + 1

    GraphRunner(fn, INPUT, [1, 2], backend=device, warmup_iterations=3).capture()
    assert runs == [2] * 4 + [1] * 4
    with pytest.raises(InputError, match="warmup_iterations is 0"):
        GraphRunner(fn, INPUT, [1], backend=device, warmup_iterations=0)


OUT_OF_MEMORY: dict[str, Callable[[torch.Tensor], object]] = {
    "host": lambda x: torch.empty(1 << 45),
    "python": lambda x: _raise(MemoryError("no room for a list")),
    "device": lambda x: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")),
    "driver": lambda x: _raise(RuntimeError("CUDA error: out of memory")),
}


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_running_out_of_memory_says_so_and_the_other_sizes_go_on(name: str, caplog: pytest.LogCaptureFixture) -> None:
    failing = [8]

    def fn(x: torch.Tensor) -> torch.Tensor:
        if len(x) in failing:
            OUT_OF_MEMORY[name](x)
        return x * 2

    runner = GraphRunner(fn, INPUT, [2, 4, 8], backend="cpu")
    runner.capture()
    assert "out of memory" in caplog.text
    assert "graph_sizes" in caplog.text
    assert "free on cpu" in caplog.text
    assert "outside_graph" not in caplog.text
    assert list(runner.failed.values()) == [Reason.OUT_OF_MEMORY]
    failing.clear()
    for size in (1, 2, 3, 4, 8):
        assert torch.equal(runner(x=torch.ones(size, 4)), torch.ones(size, 4) * 2)
    assert runner.stats.misses == {Reason.OUT_OF_MEMORY: 1}
    assert runner.stats.replays == 4


def test_a_smaller_size_without_memory_takes_the_next_larger_graph() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 4:
            raise MemoryError
        return x * 2

    runner = GraphRunner(fn, INPUT, [2, 4, 8], backend="cpu")
    runner.capture()
    assert torch.equal(runner(x=torch.ones(3, 4)), torch.ones(3, 4) * 2)
    assert (runner.stats.replays, runner.stats.hit_rate) == (1, 1.0)


def test_running_out_of_memory_is_an_error_of_its_own_where_the_runner_is_strict() -> None:
    runner = GraphRunner(lambda x: x + torch.empty(1 << 45), INPUT, [2], backend="cpu", strict=True)
    with pytest.raises(CaptureMemoryError, match=r"140737488355328 bytes[^@]*test_failure.py[^@]*graph_sizes") as error:
        runner.capture()
    assert error.value.operator == "aten::empty.memory_format"


def test_memory_of_a_capture_that_ran_out_is_free_for_the_next() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if len(x) == 8:
            made.append(weakref.ref(y))
            raise MemoryError
        assert all(ref() is None for ref in made)
        return y

    runner = GraphRunner(fn, INPUT, [2, 8], backend="cpu")
    runner.capture()
    assert made
    assert runner.stats.captures == 1
