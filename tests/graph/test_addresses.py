"""Weights that are replaced after capture are an error that names them, and recapture() takes the new ones."""

import copy
import functools
import gc
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize, prune

from graphmode.graph import GraphRunner, Input, StaleAddressError
from graphmode.graph.captures import CHECK_EVERY

INPUT = [Input("x", torch.float32, ("rows", 4))]
Case = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[], object], str]


def make_runner(fn: Callable[..., Any], device: str, **options: Any) -> GraphRunner:
    return GraphRunner(fn, INPUT, [2], backend=device, strict=True, **options)


def tensor(device: str, value: float) -> torch.Tensor:
    return torch.full((4, 4), value, device=device)


class Policy(torch.nn.Module):
    """Modules within modules, a buffer, a plain attribute and tied weights."""

    scale = torch.ones(4)

    def __init__(self, device: str, value: float = 1.0) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(2))
        self.head = torch.nn.Linear(4, 4, bias=False)
        self.head.weight = self.layers[0].weight
        self.register_buffer("shift", torch.zeros(4))
        self.dropout = torch.nn.Dropout(0.5)
        self.extra = [{"w": torch.ones(4, device=device)}]
        self.scale = torch.ones(4, device=device)
        self.to(device).eval()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(x)) * self.scale * self.extra[0]["w"] + self.shift


def modules(device: str) -> dict[str, Case]:
    def case(change: Callable[[Any], object], named: str) -> Case:
        holder = SimpleNamespace(policy=Policy(device))
        return lambda x: holder.policy(x), lambda: change(holder), named

    def put(holder: Any, name: str, value: object) -> None:
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, holder.policy), last, value)

    def replace_dict(holder: Any) -> None:
        new = {name: value + 1 for name, value in holder.policy.state_dict().items()}
        holder.policy.load_state_dict(new, assign=True)

    weight = torch.nn.Parameter(tensor(device, 3.0))
    return {
        "data": case(
            lambda h: put(h, "layers.1.weight.data", tensor(device, 3.0)), r"policy\.layers\.1\.weight .*moved"
        ),
        "parameter": case(lambda h: put(h, "layers.1.weight", weight), r"policy\.layers\.1\.weight .*replaced"),
        "tied": case(lambda h: put(h, "head.weight", weight), r"policy\.head\.weight .*replaced"),
        "module": case(lambda h: setattr(h, "policy", Policy(device, 3.0)), r"policy\.\S+ .*replaced"),
        "child": case(
            lambda h: h.policy.layers.__setitem__(1, torch.nn.Linear(4, 4, device=device)), r"policy\.layers\.1\.weight"
        ),
        "other": case(lambda h: setattr(h, "policy", torch.nn.Identity()), r"policy\.\S+ .*replaced"),
        "assign": case(replace_dict, r"policy\.\S+ .*replaced"),
        "buffer": case(
            lambda h: h.policy.register_buffer("shift", torch.ones(4, device=device)), r"policy\.shift .*replaced"
        ),
        "attribute": case(lambda h: put(h, "scale", torch.zeros(4, device=device)), r"policy\.scale .*replaced"),
        "item": case(
            lambda h: h.policy.extra[0].update(w=torch.zeros(4, device=device)), r"policy\.extra\[0\]\['w'\] .*replaced"
        ),
        "element": case(
            lambda h: h.policy.extra.__setitem__(0, {"w": torch.zeros(4, device=device)}), r"policy\.extra\[0\]\['w'\]"
        ),
        "none": case(lambda h: put(h, "layers.0.weight", None), r"policy\.layers\.0\.weight .*replaced"),
        "pruned": case(
            lambda h: prune.l1_unstructured(h.policy.layers[1], "weight", 0.5), r"policy\.layers\.1\.weight .*replaced"
        ),
        "parametrized": case(
            lambda h: parametrize.register_parametrization(h.policy.layers[1], "weight", torch.nn.Tanh()),
            r"policy\.layers\.1\.weight .*replaced",
        ),
        "wrapped": case(
            lambda h: h.policy.layers.__setitem__(0, torch.nn.Sequential(h.policy.layers[0])),
            r"policy\.layers\.0\.weight .*replaced",
        ),
        "half": case(lambda h: h.policy.double(), r"policy\.\S+ .*(moved|replaced)"),
    }


@pytest.mark.parametrize("name", modules("cpu"))
def test_weights_of_modules_that_are_replaced_are_named(device: str, name: str) -> None:
    fn, change, named = modules(device)[name]
    runner, x = make_runner(fn, device), torch.ones(2, 4)
    runner(x=x)
    change()
    with pytest.raises(StaleAddressError, match=named):
        runner.check_addresses()


TABLE = torch.ones(4, 4)


@dataclass
class Weights:
    w: torch.Tensor


class Slotted:
    __slots__ = ("__hidden", "w")

    def __init__(self, w: torch.Tensor) -> None:
        self.w = w
        self.__hidden = w + 1

    def put(self, w: torch.Tensor) -> None:
        self.__hidden = w

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.__hidden


class Shared:
    w = torch.ones(4, 4)
    bias = torch.ones(4)

    @staticmethod
    def step(x: torch.Tensor) -> torch.Tensor:
        return x @ Shared.w

    @property
    def doubled(self) -> torch.Tensor:
        return TABLE * 2

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.doubled + self.bias


def by_global(x: torch.Tensor) -> torch.Tensor:
    return x @ TABLE


def deep(x: torch.Tensor) -> torch.Tensor:
    return by_global(x) + 1


def nested(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([(lambda y: y @ TABLE)(row) for row in x.split(1)])


def wrapped(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(fn)
    def wrapper(**kwargs: torch.Tensor) -> torch.Tensor:
        return fn(**kwargs)

    return wrapper


def variables(device: str) -> dict[str, Case]:
    """Functions that reach a tensor in all ways that Python has, and what replaces it."""
    global TABLE
    TABLE = tensor(device, 1.0)
    Shared.w, Shared.bias = tensor(device, 1.0), torch.ones(4, device=device)
    w, new = tensor(device, 1.0), tensor(device, 3.0)
    weights, slotted, pair = Weights(w), Slotted(w), [tensor(device, 1.0), deque([w])]
    by_key = {("layer", 1): tensor(device, 1.0), Weights: {"w": w}}

    def rebind() -> None:
        nonlocal w
        w = new

    def rebind_table() -> None:
        global TABLE
        TABLE = new

    def with_default(x: torch.Tensor, *, weights: Weights = weights) -> torch.Tensor:
        return x @ weights.w

    by_closure = lambda x: x @ w  # noqa: E731
    bound = functools.partial(lambda weights, x: x @ weights.w, weights)
    shared = Shared()
    reference, slot_step = weakref.ref(weights), slotted.step
    holder = SimpleNamespace(mul=tensor(device, 1.0).matmul)
    module = torch.nn.Linear(4, 4, device=device).eval()
    parameters = {name: value.detach().clone() for name, value in module.named_parameters()}
    module.register_forward_hook(lambda module, args, result: result + weights.w.sum())
    return {
        "closure": (by_closure, rebind, "the graphs cannot be replayed: w "),
        "closure of a wrapped function": (wrapped(by_closure), rebind, ": w "),
        "global": (by_global, rebind_table, "TABLE .*replaced"),
        "global of a called function": (deep, rebind_table, "TABLE .*replaced"),
        "global of a nested function": (nested, rebind_table, "TABLE .*replaced"),
        "global of a property": (Shared(), rebind_table, "TABLE .*replaced"),
        "attribute before that of the class": (shared, lambda: setattr(shared, "bias", new[0]), r"bias .*replaced"),
        "class attribute": (Shared.step, lambda: setattr(Shared, "w", new), r"Shared\.w .*replaced"),
        "dataclass": (lambda x: x @ weights.w, lambda: setattr(weights, "w", new), r"weights\.w .*replaced"),
        "default": (with_default, lambda: setattr(weights, "w", new), r"weights\.w .*replaced"),
        "partial": (bound, lambda: setattr(weights, "w", new), r"args\[0\]\.w .*replaced"),
        "slot": (lambda x: x @ slotted.w, lambda: setattr(slotted, "w", new), r"slotted\.w .*replaced"),
        "private slot": (slotted.step, lambda: slotted.put(new), r"self\._Slotted__hidden .*replaced"),
        "list": (lambda x: x @ pair[0], lambda: pair.__setitem__(0, new), r"pair\[0\] .*replaced"),
        "deque": (lambda x: x @ pair[1][0], lambda: pair[1].__setitem__(0, new), r"pair\[1\]\[0\] .*replaced"),
        "dict": (
            lambda x: x @ by_key["layer", 1],
            lambda: by_key.update({("layer", 1): new}),
            r"by_key\[\('layer', 1\)\] .*replaced",
        ),
        "dict of dicts": (lambda x: x @ by_key[Weights]["w"], lambda: by_key.update({Weights: {"w": new}}), "by_key"),
        "weak reference": (lambda x: x @ reference().w, lambda: setattr(weights, "w", new), r"reference\.w .*replaced"),
        "hook": (lambda x: module(x), lambda: setattr(weights, "w", new), r"weights\.w .*replaced"),
        "bound method": (lambda x: slot_step(x), lambda: slotted.put(new), r"slot_step\.__self__\._Slotted__hidden"),
        "method of a tensor": (
            lambda x: holder.mul(x.T).T,
            lambda: setattr(holder, "mul", new.matmul),
            r"holder\.mul\.__self__ .*replaced",
        ),
        "decorated": (torch.no_grad()(by_global), rebind_table, "TABLE .*replaced"),
        "functional_call": (
            lambda x: torch.func.functional_call(module, parameters, (x,)),
            lambda: parameters.update(weight=new),
            r"parameters\['weight'\] .*replaced",
        ),
        "data": (lambda x: x @ weights.w.data, lambda: setattr(weights, "w", new), r"weights\.w .*replaced"),
        "view": (lambda x: x @ weights.w.t()[:, :4], lambda: setattr(weights, "w", new), r"weights\.w .*replaced"),
    }


@pytest.mark.parametrize("name", variables("cpu"))
def test_tensors_that_are_replaced_are_named_by_the_path_to_them(device: str, name: str) -> None:
    fn, change, named = variables(device)[name]
    runner, x = make_runner(fn, device), torch.ones(2, 4)
    runner(x=x)
    change()
    with pytest.raises(StaleAddressError, match=named):
        runner.check_addresses()
    runner.recapture()
    assert torch.equal(runner(x=x), runner.run_eagerly(runner.keys[0], x=x))


def test_the_runner_checks_before_the_first_replay_of_each_graph_and_after_many(device: str) -> None:
    layer = torch.nn.Linear(4, 4, device=device)
    runner = GraphRunner(lambda x: layer(x), INPUT, [1, 2], backend=device)
    x = torch.ones(2, 4)
    runner.capture()
    runner(x=x)
    layer.weight = torch.nn.Parameter(tensor(device, 3.0))
    runner.recapture()
    layer.weight = torch.nn.Parameter(tensor(device, 4.0))
    with pytest.raises(StaleAddressError, match=r"layer\.weight .*replaced"):
        runner(x=x)
    runner.recapture()
    runner(x=x)
    layer.weight = torch.nn.Parameter(tensor(device, 5.0))
    with pytest.raises(StaleAddressError, match=r"layer\.weight .*replaced"):  # noqa: PT012
        for _ in range(CHECK_EVERY + 1):
            runner(x=x)


def test_memory_given_up_is_an_error_at_the_next_check_and_never_read_after_it_was_freed(device: str) -> None:
    box = [tensor(device, 1.0)]
    runner, x = make_runner(lambda x: x @ box[0], device), torch.ones(2, 4)
    assert runner(x=x).tolist() == [[4.0] * 4] * 2
    box.clear()
    gc.collect()
    garbage = [tensor(device, 9.0) for _ in range(32)]
    assert runner(x=x).tolist() == [[4.0] * 4] * 2
    with pytest.raises(StaleAddressError, match=r"box\[0\] .*freed"):
        runner.check_addresses()
    assert garbage


def test_nothing_on_a_path_is_kept_alive(device: str) -> None:
    holder = SimpleNamespace(policy=Policy(device))
    runner = make_runner(lambda x: holder.policy(x), device)
    runner.capture()
    parts = [
        weakref.ref(part) for part in (*holder.policy.modules(), *holder.policy.state_dict(keep_vars=True).values())
    ]
    holder.policy = None
    gc.collect()
    assert [part() for part in parts] == [None] * len(parts)
    with pytest.raises(StaleAddressError, match="replaced"):
        runner.check_addresses()


def no_replacement(device: str) -> dict[str, tuple[Callable[[Policy], object], bool]]:
    """What may happen to a model while graphs are in use; and whether it changes what the model computes."""

    @torch.no_grad()
    def fill(policy: Policy) -> None:
        for weight in policy.parameters():
            weight.fill_(2.0)

    def train(policy: Policy) -> None:
        optimizer = torch.optim.AdamW(policy.parameters(), 0.1)
        policy(torch.ones(2, 4, device=device)).sum().backward()
        optimizer.step()

    def load(policy: Policy) -> None:
        policy.load_state_dict({name: value + 1 for name, value in policy.state_dict().items()})

    def delete(policy: Policy) -> None:
        """The weights live on, but the path to them has ended."""
        policy.kept = policy.extra.pop()

    return {
        "in place": (fill, True),
        "optimizer": (train, True),
        "load_state_dict": (load, True),
        "the same memory": (lambda policy: policy.load_state_dict(policy.state_dict(), assign=True), False),
        "requires_grad_": (lambda policy: policy.requires_grad_(False), False),
        "to the same device": (lambda policy: policy.to(device), False),
        "another attribute": (lambda policy: setattr(policy, "more", torch.ones(4)), False),
        "a new container": (lambda policy: setattr(policy, "extra", [dict(policy.extra[0])]), False),
        "deleted": (delete, False),
    }


@pytest.mark.parametrize("name", no_replacement("cpu"))
def test_what_is_no_replacement_is_no_error(device: str, name: str) -> None:
    policy = Policy(device)
    runner, x = make_runner(lambda x: policy(x), device), torch.randn(2, 4)
    before = runner(x=x, own=True)
    change, changes = no_replacement(device)[name]
    change(policy)
    runner.check_addresses()
    after = runner(x=x, own=True)
    assert torch.equal(before, after) is not changes
    if name != "deleted":
        torch.testing.assert_close(after, policy(x.to(device)))


def test_views_that_the_function_makes_anew_at_each_run_are_no_replacement(device: str) -> None:
    class Step:
        def __init__(self) -> None:
            self.table = tensor(device, 1.0)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            self.view = self.table[: len(x)]
            self.last = self.view[-1]
            return x + self.view * self.last

    step = Step()
    runner = GraphRunner(step, INPUT, [1, 2, 4], backend=device, strict=True)
    runner.capture()
    for size in (1, 2, 4, 3, 2):
        runner(x=torch.ones(size, 4))
        runner.run_eagerly(runner.keys[0], x=torch.ones(2, 4))
        runner.check_addresses()


@pytest.mark.parametrize("part", ["", "layers.0", "dropout"])
def test_a_module_switched_between_training_and_evaluation_is_named(device: str, part: str) -> None:
    policy = Policy(device)
    runner, x = make_runner(lambda x: policy(x), device), torch.ones(2, 4)
    runner(x=x)
    policy.get_submodule(part).train()
    with pytest.raises(
        StaleAddressError, match=rf"module policy\S*{part} was switched from eval\(\) to train\(\).*Switch"
    ):
        runner.check_addresses()
    policy.eval()
    runner.check_addresses()


def test_modules_that_the_function_does_not_use_may_be_switched_and_replaced(device: str) -> None:
    class Agent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = Policy(device)
            self.critic = Policy(device)

        def act(self, x: torch.Tensor) -> torch.Tensor:
            return self.policy(x)

    agent = Agent().eval()
    runner, x = make_runner(agent.act, device), torch.ones(2, 4)
    runner(x=x)
    agent.critic.train()
    agent.critic.head.weight = torch.nn.Parameter(tensor(device, 3.0))
    agent.critic = copy.deepcopy(agent.critic)
    runner.check_addresses()
    agent.policy.layers[0].train()
    with pytest.raises(StaleAddressError, match=r"self\.policy\.layers\.0 was switched"):
        runner.check_addresses()


def test_a_runner_of_a_module_names_its_weights(device: str) -> None:
    policy = Policy(device)
    runner, x = make_runner(policy, device), torch.ones(2, 4)
    runner(x=x)
    policy.layers[1].weight = torch.nn.Parameter(tensor(device, 3.0))
    with pytest.raises(StaleAddressError, match=r": layers\.1\.weight .*replaced"):
        runner.check_addresses()


def test_each_family_and_size_has_its_weights_checked(device: str) -> None:
    first, second = torch.nn.Linear(4, 4, device=device), torch.nn.Linear(4, 4, device=device)
    runner = GraphRunner(
        lambda family, x: first(x) if family == "a" or len(x) > 1 else second(x),
        INPUT,
        {"a": [2], "b": [1, 2]},
        backend=device,
    )
    runner.capture()
    second.bias = torch.nn.Parameter(torch.ones(4, device=device))
    with pytest.raises(StaleAddressError, match=r"second\.bias .*replaced"):
        runner.check_addresses()


def test_weights_are_found_behind_what_is_large(device: str) -> None:
    vocabulary = {str(number): [number] for number in range(50_000)}
    holder = {"vocabulary": vocabulary, "numbers": list(range(100_000)), "w": SimpleNamespace(w=tensor(device, 1.0))}
    runner, x = make_runner(lambda x: x @ holder["w"].w, device), torch.ones(2, 4)
    runner(x=x)
    holder["w"].w = tensor(device, 3.0)
    with pytest.raises(StaleAddressError, match=r"holder\['w'\]\.w .*replaced"):
        runner.check_addresses()


def test_recapture_lets_go_of_the_memory_of_old_weights(device: str) -> None:
    holder = SimpleNamespace(policy=Policy(device))
    runner, x = make_runner(lambda x: holder.policy(x), device), torch.randn(2, 4)
    runner(x=x)
    memory = [StorageWeakRef(weight.untyped_storage()) for weight in holder.policy.state_dict().values()]
    holder.policy = Policy(device, 2.0)
    gc.collect()
    assert not any(storage.expired() for storage in memory), "graphs may read it"
    runner.recapture()
    assert all(storage.expired() for storage in memory)
    torch.testing.assert_close(runner(x=x), holder.policy(x.to(device)).detach())


def test_a_runner_may_be_an_attribute_of_its_own_module(device: str) -> None:
    policy = Policy(device)
    policy.runner = make_runner(policy.forward, device)
    x = torch.ones(2, 4)
    policy.runner(x=x)
    policy.runner.check_addresses()
    policy.head = torch.nn.Linear(4, 4, bias=False, device=device).eval()
    with pytest.raises(StaleAddressError, match=r"self\.head\.weight .*replaced"):
        policy.runner.check_addresses()


def test_a_graph_captured_after_a_replacement_does_not_hide_it(device: str) -> None:
    layer = torch.nn.Linear(4, 4, device=device)
    runner = GraphRunner(lambda x: layer(x), INPUT, [1, 2], backend=device)
    runner(x=torch.ones(1, 4))
    layer.weight = torch.nn.Parameter(tensor(device, 3.0))
    with pytest.raises(StaleAddressError, match=r"layer\.weight .*replaced"):
        runner(x=torch.ones(2, 4))
    with pytest.raises(StaleAddressError, match=r"layer\.weight .*replaced"):
        runner.check_addresses()
    runner.recapture()
    assert runner.stats.captures == 2
    for size in (1, 2):
        torch.testing.assert_close(runner(x=torch.ones(size, 4)).cpu(), layer(torch.ones(size, 4, device=device)).cpu())


def test_recapture_before_any_capture_does_nothing(device: str) -> None:
    for enabled in (True, False):
        runner = make_runner(lambda x: x + 1, device, enabled=enabled)
        runner.recapture()
        runner.check_addresses()
        assert runner.stats.captures == 0
        assert torch.equal(runner(x=torch.zeros(2, 4)).cpu(), torch.ones(2, 4))
