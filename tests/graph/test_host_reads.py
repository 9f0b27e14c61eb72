"""What reads or writes memory on the host past the dispatcher is refused with its line, and is never baked in."""

import copy
import io
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.dlpack import to_dlpack

from graphmode.graph import GraphRunner, Input, UnsupportedOpError, outside_graph

INPUT = [Input("x", torch.float32, ("rows", 4), padding=1)]
WEIGHT = torch.nn.Parameter(torch.ones(4), requires_grad=False)

# Each makes a number or a tensor of x in a way that no operator shows.
READS: dict[str, Callable[[torch.Tensor], object]] = {
    "from_dlpack": lambda x: float(np.from_dlpack(x)[0, 0]),
    "__dlpack__": lambda x: x.__dlpack__() and 1,
    "to_dlpack": lambda x: torch.from_dlpack(torch.utils.dlpack.to_dlpack(x)),
    "to_dlpack imported before": lambda x: torch.from_dlpack(to_dlpack(x)),
    "torch.from_dlpack": lambda x: torch.from_dlpack(x),
    "numpy, forced": lambda x: float(x.numpy(force=True)[0, 0]),
    "numpy function": lambda x: float(np.add(x, 1)[0, 0]),
    "array interface": lambda x: float(np.asarray(x)[0, 0]),
    "item of storage": lambda x: x.untyped_storage()[3],
    "storage to list": lambda x: x.untyped_storage().tolist()[3],
    "bytes of storage": lambda x: bytes(x.untyped_storage())[3],
    "typed storage": lambda x: x.storage()[0],
    "typed storage to list": lambda x: x.storage().tolist()[0],
    "storage copied": lambda x: x.untyped_storage().clone().nbytes(),
    "storage written": lambda x: x.untyped_storage().__setitem__(0, 1) or 1,
    "storage filled": lambda x: x.untyped_storage().fill_(0).nbytes(),
    "deepcopy": lambda x: copy.deepcopy(x),
    "copy": lambda x: copy.copy(x),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save": lambda x: torch.save(x, io.BytesIO()) or 1,
    "apply_": lambda x: x.apply_(lambda value: value + 1),
    "map_": lambda x: x.map_(x * 2, lambda one, other: one + other),
    "tensor of a list": lambda x: torch.tensor([x[0, 0], x[0, 1], 0, 1], device=x.device),
    "as_tensor of a list": lambda x: torch.as_tensor([[x[0, 0]], [x[1, 0]]], device=x.device),
    "asarray of a list": lambda x: torch.asarray([x[0, 0]], device=x.device),
    "new_tensor of a list": lambda x: x.new_tensor([x[0, 0]]),
    "Tensor of a list": lambda x: torch.Tensor([x[0, 0]]).to(x.device),
    "FloatTensor of a list": lambda x: torch.FloatTensor([x[0, 0]]).to(x.device),
    "tensor_split at a tensor": lambda x: torch.tensor_split(x[0], torch.tensor([1]))[0],
    "shared with processes": lambda x: x.share_memory_(),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("source", ["computed", "input", "constant"])
def test_a_read_past_the_dispatcher_is_refused_with_its_line(device: str, name: str, source: str) -> None:
    constant = torch.ones(2, 4, device=device)
    sources = {"computed": lambda x: x + 1, "input": lambda x: x, "constant": lambda x: constant}
    runner = GraphRunner(lambda x: x * READS[name](sources[source](x)), INPUT, [2], backend=device, strict=True)
    with pytest.raises(UnsupportedOpError, match="outside_graph") as error:
        runner(x=torch.ones(2, 4))
    assert f'"{name}": lambda x' in str(error.value)


def test_a_weight_that_was_there_before_is_refused_too(device: str) -> None:
    weight = WEIGHT.to(device)
    for read in (lambda: weight.tolist()[0], lambda: float(weight[0]), lambda: weight.untyped_storage()[3]):
        with pytest.raises(UnsupportedOpError):
            GraphRunner(lambda x, read=read: x * read(), INPUT, [2], backend=device, strict=True).capture()


def test_the_same_read_outside_the_graph_is_allowed_and_read_anew_at_each_replay() -> None:
    @outside_graph
    def outside(x: torch.Tensor) -> torch.Tensor:
        values = np.from_dlpack(copy.deepcopy(x)).sum() + len(pickle.dumps(x.tolist())) * 0
        return torch.tensor([values, x[0, 0], 0, 0])

    runner = GraphRunner(lambda x: (x + 1) * outside(x + 1), INPUT, [2], backend="cpu", strict=True)
    for _ in range(3):
        x = torch.rand(2, 4)
        assert torch.equal(runner(x=x), runner.run_eagerly(runner.keys[0], x=x))


def test_a_kernel_may_read_memory_as_it_runs_again_at_each_replay() -> None:
    @torch.library.custom_op("graphmode_tests::reads_memory", mutates_args=())
    def reads(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(x.tolist()) * float(np.from_dlpack(x)[0, 0])

    runner = GraphRunner(lambda x: reads(x + 1), INPUT, [2], backend="cpu", strict=True)
    for _ in range(3):
        x = torch.rand(2, 4)
        assert torch.equal(runner(x=x), (x + 1) * (x + 1)[0, 0])


def test_other_threads_read_what_they_like_while_one_captures() -> None:
    read = []

    def elsewhere() -> None:
        x = torch.arange(4.0)
        read.append((x.tolist(), x.untyped_storage()[0], copy.deepcopy(x).sum().item(), float(np.from_dlpack(x)[1])))

    def fn(x: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return x + 1

    runner = GraphRunner(fn, INPUT, [2], backend="cpu", strict=True)
    runner(x=torch.ones(2, 4))
    assert read == [([0.0, 1.0, 2.0, 3.0], 0, 6.0, 1.0)] * 2


def test_nothing_is_left_in_place_after_a_capture(device: str) -> None:
    before = torch.UntypedStorage.__dict__.copy(), torch.utils.dlpack.to_dlpack
    runner = GraphRunner(lambda x: x * READS["deepcopy"](x), INPUT, [2], backend=device)
    runner.capture()
    assert (dict(torch.UntypedStorage.__dict__), torch.utils.dlpack.to_dlpack) == (dict(before[0]), before[1])
    x = torch.ones(2, 4)
    assert torch.equal(copy.deepcopy(x), x)
    assert x.untyped_storage().tolist()[3] == 63
