"""The calls of each backend are those that its device takes, and the fakes refuse what the device refuses."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graphmode.graph import (
    BackendError,
    CaptureError,
    GraphRunner,
    HostArguments,
    Input,
    InputError,
    Reason,
    UnsupportedOpError,
    device_support,
    get_backend,
    outside_graph,
)
from graphmode.graph.backends.mlu import MluBackend
from graphmode.graph.backends.npu import NpuBackend, graph_limit
from graphmode.graph.backends.streams import StreamBackend
from tests.devices.conftest import fake_mlu, fake_npu
from tests.devices.fake import NPU_INTERFACE, DeviceError, DispatchMode, FakeDevice, on_cpu

INPUT = [Input("x", torch.float32, ("n", 3))]
MODES = {"cuda": {"capture_error_mode": "thread_local"}, "mlu": {"capture_error_mode": "relaxed"}, "xpu": {}}
MODES["npu"] = {"auto_dispatch_capture": False, "capture_error_mode": "thread_local"}


def innermost() -> Any:
    return torch.utils._python_dispatch._get_current_dispatch_mode()


@outside_graph
def rounded(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[round(each) for each in row] for row in x.tolist()]) + 0.0


def test_full_and_piecewise_graphs_give_the_eager_result(backend: StreamBackend, fake: FakeDevice, name: str) -> None:
    for fn in (lambda x: (x * 2).cumsum(0).softmax(-1), lambda x: rounded(x * 3).relu() - 1):
        runner = GraphRunner(fn, INPUT, [1, 2, 4], backend=backend, strict=True)
        runner.capture(progress=False)
        for size in (1, 2, 3, 4, 1, 3):
            x = torch.randn(size, 3)
            torch.testing.assert_close(runner(x=x), fn(x))
        assert runner.stats.hit_rate == 1
    assert runner.stats.graphs == 2 * runner.stats.captures
    for _, pool, stream, options in fake.named("graph"):
        assert stream is not None
        assert stream is not fake.default_stream
        assert pool is not None
        assert options == MODES[name]


def test_a_broken_capture_leaves_the_device_usable(backend: StreamBackend, fake: FakeDevice) -> None:
    runner = GraphRunner(lambda x: x * 2 if x.sum() > 0 else x, INPUT, [2], backend=backend)
    runner.capture(progress=False)
    assert runner.failed == {runner.keys[0]: Reason.UNSUPPORTED_OP}
    assert innermost() is None
    assert fake.current is fake.default_stream
    fake.fail_at_end = True
    runner = GraphRunner(lambda x: x + 1, INPUT, [1, 2], backend=backend)
    pools = fake.pools
    runner.capture(progress=False)
    assert list(runner.failed.values()) == [Reason.CAPTURE_FAILED]
    assert runner.stats.captures == 1
    assert fake.pools == pools + 1
    assert innermost() is None
    for size in (1, 2):
        assert runner(x=torch.ones(size, 3)).tolist() == [[2.0] * 3] * size


def test_an_error_in_the_function_reaches_the_caller_by_its_line(backend: StreamBackend) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]

    with pytest.raises(UnsupportedOpError, match=r"return x\[x > 0\]"):
        GraphRunner(fn, INPUT, [2], backend=backend, strict=True).capture(progress=False)
    assert innermost() is None


def test_the_fake_refuses_what_the_device_refuses(name: str, fake: FakeDevice) -> None:
    graph = getattr(fake, {"cuda": "CUDAGraph", "mlu": "MLUGraph", "npu": "NPUGraph", "xpu": "XPUGraph"}[name])
    with pytest.raises(DeviceError, match="default"):
        graph().capture_begin()
    with pytest.raises(DeviceError, match="fourth positional"):
        fake.graph(graph(), (0, 1), fake.Stream(), "thread_local")
    with pytest.raises(TypeError):
        fake.graph(graph(), pool=(0, 1), stream=fake.Stream(), error_mode="relaxed")
    if name == "xpu":
        with pytest.raises(TypeError):
            fake.graph(graph(), capture_error_mode="relaxed")
    with pytest.raises(DeviceError, match="auto_dispatch_capture"):
        graph().update(cpu_update_input=[{}])
    with pytest.raises(DeviceError, match="not permitted"), fake.graph(graph(), stream=fake.Stream()) as _:
        fake.synchronize()


def test_the_npu_s_dispatch_mode_must_leave_first() -> None:
    fake = fake_npu()
    mode, guard = DispatchMode(fake.update_stream), DispatchMode(fake.update_stream)
    with mode, guard, pytest.raises(DeviceError, match="innermost"):
        mode.__exit__(None, None, None)


@pytest.mark.parametrize("name", ["mlu", "npu"])
def test_without_the_device_s_package_the_error_names_it(name: str) -> None:
    with pytest.raises(BackendError, match=rf"'{name}'.*torch_{name}"):
        get_backend(name)


@pytest.mark.skipif(torch.xpu.is_available(), reason="for machines without an Intel GPU")
def test_without_the_device_the_error_says_so() -> None:
    with pytest.raises(BackendError, match=r"'xpu'.*torch sees none"):
        get_backend("xpu")


def test_a_torch_without_the_graphs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.delattr(torch.xpu, "XPUGraph", raising=False)
    with pytest.raises(BackendError, match=rf"torch {re.escape(torch.__version__)} has no torch\.xpu\.XPUGraph"):
        get_backend("xpu")


def test_a_device_index_that_is_not_there_is_refused() -> None:
    with pytest.raises(BackendError, match="cpu:3"):
        NpuBackend(torch.device("cpu", 3), fake_npu())


def test_docs_say_of_every_device_what_info_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    for device, support in device_support().items():
        row = f"| {device} | {support.captured} | {support.parameters} | {support.limits} | {support.verified} |"
        assert row in page


# Host arguments.

ATTENTION = {"num_heads": 1, "input_layout": "TND", "num_key_value_heads": 1, "sparse_mode": 3, "block_size": 128}
KEYS = torch.randn(1, 128, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def lengths(family: str, sizes: Any, values: Any) -> dict[str, list[int]]:
    known = values["lens"].tolist() if values else []
    return {
        "actual_seq_lengths": list(range(1, sizes["n"] + 1)),
        "actual_seq_lengths_kv": known + [0 if values else 128] * (sizes["n"] - len(known)),
    }


def attention_runner(device: FakeDevice, **options: Any) -> GraphRunner:
    host = HostArguments(lengths)

    def fn(q: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        for _ in range(2):  # two layers
            tables = torch.zeros(q.shape[0], 1, dtype=torch.int32)
            q = torch.ops.npu.npu_fused_infer_attention_score(
                q.contiguous(), KEYS, KEYS, atten_mask=MASK, block_table=tables, **ATTENTION, **host.current
            )[0]
        return q + lens.view(-1, 1, 1)

    inputs = [Input("q", torch.bfloat16, ("n", 1, 16)), Input("lens", torch.int64, ("n",))]
    backend = on_cpu(NpuBackend, device)
    return GraphRunner(fn, inputs, [1, 2, 4], backend=backend, host_arguments=host, **{"strict": True, **options})


def step(size: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(size, 1, 16, generator=generator).bfloat16()
    return {"q": q, "lens": torch.randint(1, 129, (size,), generator=generator)}


def test_the_published_graph_has_what_updates_are_made_with() -> None:
    attributes = NPU_INTERFACE["attributes"]
    assert "graph_dispatch_mode" in attributes["NPUGraph"]
    assert {"update_stream", "graph_dispatch_records"} <= set(attributes["_GraphDispatchMode"])
    assert set(NPU_INTERFACE["updated_by"]) == lengths("", {"n": 1}, {}).keys()


def test_replays_take_the_lengths_of_their_step() -> None:
    fake = fake_npu()
    runner, eager = attention_runner(fake), attention_runner(fake_npu(), enabled=False)
    runner.capture(progress=False)
    sizes = [1, 2, 3, 4, 4, 1, 3, 2] * 3
    for seed, size in enumerate(sizes):
        values = step(size, seed)
        assert torch.equal(runner(**values), eager(**values))
        assert torch.equal(runner.run_eagerly(runner.decide(size).key, **values), eager(**values))  # type: ignore[arg-type]
    assert runner.stats.hit_rate == 1
    assert len(fake.named("update")) == len(sizes)
    assert all(options["auto_dispatch_capture"] for *_, options in fake.named("graph"))


def test_lengths_that_are_not_updated_give_wrong_results() -> None:
    """The hazard: without an update the operators keep the lengths of the capture."""
    fake = fake_npu()
    stale, eager = attention_runner(fake), attention_runner(fake_npu(), enabled=False)
    stale.backend.recording = lambda pool, host: NpuBackend.recording(stale.backend, pool, None)  # type: ignore[method-assign, arg-type]
    stale.capture(progress=False)
    values = step(3, 0)
    assert not torch.equal(stale(**values), eager(**values))
    assert not fake.named("update")


def test_an_update_comes_after_the_replay_before_and_beside_its_own() -> None:
    fake = fake_npu()
    runner = attention_runner(fake)
    runner.capture(progress=False)
    fake.calls.clear()
    for seed in range(3):
        runner(**step(4, seed))
    assert [call[0] for call in fake.calls] == ["wait_stream", "replay", "update"] * 3
    assert all(call[1] is fake.update_stream and call[2] is fake.current for call in fake.named("wait_stream"))


def test_the_fake_sees_updates_that_come_too_early_or_never() -> None:
    fake = fake_npu()
    runner = attention_runner(fake)
    runner.capture(progress=False)
    runner(**step(4, 0))
    graph = fake.named("replay")[-1][1]
    arguments = [lengths("", {"n": 4}, step(4, 1))]
    with pytest.raises(DeviceError, match="before the replay before it has finished"):
        graph.update(cpu_update_input=arguments)
    fake.update_stream.wait_stream(fake.current)
    graph.replay()
    with pytest.raises(DeviceError, match="waits for ever"):
        fake.synchronize()
    fake.update_stream.wait_stream(fake.current)
    with pytest.raises(DeviceError, match="waits for the replay that waits for it"):
        graph.update(cpu_update_input=arguments)


@pytest.mark.parametrize("at_end", [True, False])
def test_a_refused_capture_takes_its_dispatch_mode_with_it(at_end: bool) -> None:
    """Where the device refuses a graph, its own context leaves the mode that records operators behind."""
    fake, eager = fake_npu(max_graphs=10000 if at_end else 1), attention_runner(fake_npu(), enabled=False)
    fake.fail_at_end = at_end
    runner = attention_runner(fake, strict=False)
    runner.capture(progress=False)
    assert innermost() is None
    assert runner.stats.captures == (2 if at_end else 1)
    for size in (1, 2, 4):
        values = step(size, size)
        assert torch.equal(runner(**values), eager(**values))


def test_host_arguments_need_a_device_that_takes_them() -> None:

    with pytest.raises(InputError, match="host_arguments"):
        GraphRunner(
            lambda x: x, INPUT, [1], backend=on_cpu(MluBackend, fake_mlu()), host_arguments=HostArguments(lengths)
        )


# What the device has room for.


def test_graph_limit_is_the_former_rule_of_vllm_ascend() -> None:
    for layers in (1, 27, 61):
        for groups in range(5):
            sizes = (1800 - 40 * groups) // (layers + 1) / (1 + 2 * groups)
            assert graph_limit(groups) // (layers + 1) == int(sizes)


@pytest.mark.parametrize("known", [True, False])
def test_capture_stops_at_the_device_s_limit_and_larger_sizes_serve(
    known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the limit is known beforehand or the device refuses a graph."""
    fake = fake_npu(max_graphs=10000 if known else 3)
    backend = on_cpu(NpuBackend, fake)
    if known:
        monkeypatch.setattr(type(backend), "capabilities", replace(backend.capabilities, graph_limit=3))
    sizes = [1, 2, 4, 8, 16]
    runner = GraphRunner(lambda x: x * 2, INPUT, sizes, backend=backend)
    runner.capture(progress=False)
    assert runner.stats.captures == 3
    assert {key.size for key, reason in runner.failed.items() if reason is Reason.OUT_OF_GRAPHS} == {2, 8}
    assert runner.stats.out_of_graphs == 2
    assert "2 of 5 sizes stay without one" in caplog.text
    for size in range(1, 17):
        decision = runner.decide(size)
        assert decision.key is not None
        assert decision.key.size == min(bucket for bucket in (1, 4, 16) if bucket >= size)
        assert decision.reason is None
        assert runner(x=torch.ones(size, 3)).tolist() == [[2.0] * 3] * size
    assert innermost() is None


def test_a_limit_that_is_hit_in_a_step_leaves_the_step_to_what_is_there() -> None:
    runner = GraphRunner(lambda x: x * 2, INPUT, [1, 2, 4], backend=on_cpu(NpuBackend, fake_npu(max_graphs=1)))
    assert runner(x=torch.ones(4, 3)).tolist() == [[2.0] * 3] * 4
    assert runner(x=torch.ones(1, 3)).tolist() == [[2.0] * 3]
    assert runner(x=torch.ones(1, 3)).tolist() == [[2.0] * 3]
    assert (runner.stats.replays, runner.stats.captures, runner.stats.out_of_graphs) == (3, 1, 2)
    assert runner.stats.misses == {Reason.NOT_CAPTURED_YET: 2}


def test_no_room_at_all_runs_eagerly_and_strict_refuses() -> None:
    runner = GraphRunner(lambda x: x * 2, INPUT, [1, 2], backend=on_cpu(NpuBackend, fake_npu(max_graphs=0)))
    runner.capture(progress=False)
    assert runner(x=torch.ones(1, 3)).tolist() == [[2.0] * 3]
    assert runner.stats.misses == {Reason.OUT_OF_GRAPHS: 1}
    assert innermost() is None
    with pytest.raises(CaptureError, match="207008"):
        GraphRunner(lambda x: x, INPUT, [1], backend=on_cpu(NpuBackend, fake_npu(max_graphs=0)), strict=True).capture(
            progress=False
        )


def test_families_with_full_graphs_come_first_as_they_are_declared() -> None:
    """Piecewise graphs would take the room of many full ones."""

    def fn(family: str, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = rounded(x) if family == "piecewise" else x * 1
        return x

    families = {"full": [1, 2, 4], "piecewise": [1, 2, 4, 8]}
    runner = GraphRunner(fn, INPUT, families, backend=on_cpu(NpuBackend, fake_npu(max_graphs=12)))
    runner.capture(progress=False)
    captured = {(key.family, key.size) for key in runner.keys if key not in runner.failed}
    assert captured == {("full", 1), ("full", 2), ("full", 4), ("piecewise", 8), ("piecewise", 1)}
