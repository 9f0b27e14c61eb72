"""Recording does not change the path that code takes: a replay is bitwise what runs without a recorder."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from graphmode.graph import GraphRunner, Input, Reason, UnsupportedOpError
from graphmode.graph.guard import Guard

BATCH, TIME, WIDTH = 4, 5, 8
Function = Callable[[torch.Tensor], torch.Tensor]


def mask(x: torch.Tensor) -> torch.Tensor:
    """Return the padding of sequences of 3 of 5 tokens."""
    return torch.arange(TIME, device=x.device).expand(len(x), TIME) >= 3


def state(x: torch.Tensor, layers: int) -> torch.Tensor:
    return torch.linspace(-1, 1, layers * len(x) * 6, device=x.device).view(layers, len(x), 6)


def layer(**options: object) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, **options)  # type: ignore[arg-type]


def recurrent(kind: type[nn.RNNBase], **options: object) -> Function:
    return _first(kind(WIDTH, 6, batch_first=True, **options))  # type: ignore[arg-type]


def _first(module: nn.Module) -> Function:
    """Return a function of the module as it is for inference; of several results the first."""
    return _Of(module, lambda module, x: module(x))


class _Of(nn.Module):
    def __init__(self, module: nn.Module, call: Callable[[nn.Module, torch.Tensor], object]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.call(self.module, x)
        while isinstance(result, tuple):
            result = result[0]
        assert isinstance(result, torch.Tensor)
        return result


MODULES: dict[str, Callable[[], Function]] = {
    "encoder": lambda: _first(nn.TransformerEncoder(layer(), 2)),
    "encoder without nested tensors": lambda: _Of(
        nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False), lambda m, x: m(x, src_key_padding_mask=mask(x))
    ),
    "encoder, causal": lambda: _Of(
        nn.TransformerEncoder(layer(), 2),
        lambda m, x: m(x, torch.ones(TIME, TIME, device=x.device, dtype=torch.bool).triu(1), is_causal=True),
    ),
    "encoder layer": lambda: _first(layer()),
    "encoder layer, gelu, norm first": lambda: _first(layer(activation="gelu", norm_first=True)),
    "encoder layer, masked": lambda: _Of(layer(), lambda m, x: m(x, src_key_padding_mask=mask(x))),
    "encoder layer without a fast path": lambda: _first(layer(activation=torch.tanh)),
    "decoder": lambda: _Of(
        nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=True), 2),
        lambda m, x: m(x, x.flip(1)),
    ),
    "transformer": lambda: _Of(nn.Transformer(WIDTH, 2, 1, 1, 16, batch_first=True), lambda m, x: m(x, x.flip(1))),
    "attention": lambda: _Of(nn.MultiheadAttention(WIDTH, 2, batch_first=True), lambda m, x: m(x, x, x)),
    "attention weights": lambda: _Of(
        nn.MultiheadAttention(WIDTH, 2, batch_first=True), lambda m, x: m(x, x, x)[1].sum(2, keepdim=True)
    ),
    "attention, no weights": lambda: _Of(
        nn.MultiheadAttention(WIDTH, 2, batch_first=True), lambda m, x: m(x, x, x, need_weights=False)
    ),
    "attention, masked": lambda: _Of(
        nn.MultiheadAttention(WIDTH, 2, batch_first=True), lambda m, x: m(x, x, x, key_padding_mask=mask(x))
    ),
    "attention to others": lambda: _Of(
        nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_bias_kv=True), lambda m, x: m(x, x.flip(1), x.flip(1))
    ),
    "LSTM": lambda: recurrent(nn.LSTM),
    "LSTM, two layers both ways": lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "LSTM, projected": lambda: recurrent(nn.LSTM, proj_size=3),
    "LSTM without biases": lambda: recurrent(nn.LSTM, bias=False),
    "LSTM from a state": lambda: _Of(
        nn.LSTM(WIDTH, 6, batch_first=True), lambda m, x: m(x, (state(x, 1), state(x, 1) * 2))
    ),
    "LSTM cell": lambda: _Of(nn.LSTMCell(WIDTH, 6), lambda m, x: m(x[:, 0])),
    "GRU": lambda: recurrent(nn.GRU),
    "GRU, two layers both ways from a state": lambda: _Of(
        nn.GRU(WIDTH, 6, num_layers=2, bidirectional=True, batch_first=True), lambda m, x: m(x, state(x, 4))
    ),
    "GRU cell": lambda: _Of(nn.GRUCell(WIDTH, 6), lambda m, x: m(x[:, 0])),
    "RNN, two layers both ways": lambda: recurrent(nn.RNN, num_layers=2, bidirectional=True),
    "RNN, relu": lambda: recurrent(nn.RNN, nonlinearity="relu"),
    "linear of a transposed batch": lambda: _Of(nn.Linear(WIDTH, 6), lambda m, x: m(x.transpose(0, 1)).transpose(0, 1)),
    "convolution": lambda: _first(nn.Sequential(nn.Conv1d(TIME, 6, 3, padding="same"), nn.BatchNorm1d(6), nn.SiLU())),
    "embedding bag": lambda: _Of(nn.EmbeddingBag(9, 6), lambda m, x: m((x[:, 0] * 8).abs().long().clamp(0, 8))),
    "scripted": lambda: _first(torch.jit.script(nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU()))),
    "channel shuffle": lambda: _first(nn.Sequential(nn.Unflatten(1, (TIME, 1)), nn.ChannelShuffle(5), nn.Flatten())),
}

NESTED: dict[str, Callable[[], Function]] = {
    "encoder": lambda: _Of(nn.TransformerEncoder(layer(), 2), lambda m, x: m(x, src_key_padding_mask=mask(x))),
    "encoder, unchecked": lambda: _Of(
        nn.TransformerEncoder(layer(), 2, mask_check=False), lambda m, x: m(x, src_key_padding_mask=mask(x))
    ),
    "transformer": lambda: _Of(
        nn.Transformer(WIDTH, 2, 1, 1, 16, batch_first=True),
        lambda m, x: m(x, x.flip(1), src_key_padding_mask=mask(x), memory_key_padding_mask=mask(x)),
    ),
}


def _made(make: Callable[[], Function], device: str) -> Function:
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        made = make()
    return made.eval().to(device) if isinstance(made, nn.Module) else made


def _runner(fn: Function, device: str, *, strict: bool) -> GraphRunner:
    return GraphRunner(fn, [Input("x", torch.float32, ("batch", TIME, WIDTH))], [BATCH], backend=device, strict=strict)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_takes_its_own_path(device: str, name: str) -> None:
    runner = _runner(_made(MODULES[name], device), device, strict=True)
    for _ in range(3):
        x = torch.randn(BATCH, TIME, WIDTH)
        assert torch.equal(runner(x=x), runner.run_eagerly(runner.keys[0], x=x))


@pytest.mark.parametrize("name", NESTED)
def test_a_path_through_nested_tensors_is_refused_and_runs_eagerly(device: str, name: str) -> None:
    fn = _made(NESTED[name], device)
    with pytest.raises(UnsupportedOpError, match=r"nested tensor.*use padded tensors") as error:
        _runner(fn, device, strict=True).capture()
    assert "lambda m, x: m(x" in str(error.value)
    runner = _runner(fn, device, strict=False)
    for _ in range(2):
        x = torch.randn(BATCH, TIME, WIDTH)
        assert torch.equal(runner(x=x), runner.run_eagerly(runner.keys[0], x=x))
    assert runner.stats.misses == {Reason.UNSUPPORTED_OP: 2}


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: x.to_sparse().to_dense(), "sparse tensor depends on data; use dense tensors"),
        (lambda x: torch.sparse.mm(SPARSE.to(x.device), x[0]) + x, "sparse tensor depends on data; use dense tensors"),
        (lambda x: x.flatten(1).to_sparse_csr().sum() + x, "sparse tensor depends on data; use dense tensors"),
        (lambda x: torch.nested.as_nested_tensor(list(x)).to_padded_tensor(0.0), "nested tensor depend on data"),
        (
            lambda x: nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), 2), batch_first=True).data.sum() + x,
            "use padded tensors",
        ),
    ],
    ids=["sparse", "sparse constant", "csr", "nested", "packed"],
)
def test_tensors_that_are_not_dense_are_refused_with_the_fix(device: str, fn: Function, message: str) -> None:
    with pytest.raises(UnsupportedOpError, match=message):
        _runner(fn, device, strict=True).capture()


SPARSE = torch.eye(TIME).to_sparse()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.gpu
def test_recurrent_layers_stay_one_operator_on_cuda(kind: type[nn.RNNBase]) -> None:
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    module = kind(WIDTH, 6, batch_first=True).cuda()
    guard = Guard(torch.device("cuda"))
    installed = guard.installed(lambda func, args, kwargs: func(*args, **kwargs), lambda func, args, kwargs: None)
    with torch.inference_mode(), Seen(), installed:
        module(torch.randn(BATCH, TIME, WIDTH, device="cuda"))
    assert seen.count("aten::_cudnn_rnn") == 1
    assert len(seen) < 10


class Quantized(torch.Tensor):
    """A weight of 8-bit integers and a scale, which is a tensor to whoever computes with it."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> "Quantized":
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values_, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.t.default:
            return cls(args[0].values_.t(), args[0].scale)
        dense = [value.values_ * value.scale if isinstance(value, cls) else value for value in args]
        return func(*dense, **(kwargs or {}))


def test_tensors_made_of_others_are_captured_by_what_they_are_made_of(device: str) -> None:
    values = torch.randint(-9, 9, (6, WIDTH), dtype=torch.int8, device=device)
    weight = Quantized(values, torch.tensor(0.1, device=device))
    runner = _runner(lambda x: nn.functional.linear(x, weight), device, strict=True)
    for step in range(3):
        values.fill_(step)  # read at replay
        x = torch.randn(BATCH, TIME, WIDTH)
        assert torch.equal(runner(x=x), runner.run_eagerly(runner.keys[0], x=x))
        torch.testing.assert_close(runner(x=x)[..., 0].cpu(), x.sum(-1) * 0.1 * step)


def test_code_that_asks_for_torch_functions_gets_the_answer_of_an_eager_run(device: str) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        seen = torch.overrides.has_torch_function((x,)), torch.overrides.has_torch_function_unary(x)
        with torch.device(x.device):  # a mode of the caller's own is seen as ever
            inside = torch.overrides.has_torch_function_variadic(x)
        return x + torch.full((TIME, WIDTH), 100.0 * seen[0] + 10 * seen[1] + inside, device=x.device)

    runner = _runner(fn, device, strict=True)
    before = torch.overrides.has_torch_function
    assert torch.equal(runner(x=torch.zeros(BATCH, TIME, WIDTH)).cpu(), torch.ones(BATCH, TIME, WIDTH))
    assert torch.overrides.has_torch_function is before
