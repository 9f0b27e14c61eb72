"""A refusal in the code of an installed package names that line, the user's own, and what helps there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedModel, Qwen3Config, Qwen3Model

from graphmode.graph import CaptureError, GraphRunner, Input, UnsupportedOpError

PACKAGE = """
def scaled(x):
    return x * x.sum().item()

def multiplied(x):
    return x @ x

def called(fn, x):
    return fn(x)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package of somebody else."""
    name = f"somebodys_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / "site-packages" / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(folder.parent)
    return name


def make_runner(fn: Callable[[torch.Tensor], torch.Tensor], device: str) -> GraphRunner:
    return GraphRunner(fn, [Input("x", torch.float32, ("rows", 4))], [2], backend=device, strict=True)


def test_a_line_in_a_package_is_named_with_the_users_own(device: str, package: str) -> None:
    library = __import__(package)
    with pytest.raises(UnsupportedOpError) as error:
        make_runner(lambda x: library.scaled(x) + 1, device).capture()
    assert f"{package}/__init__.py:3: return x * x.sum().item()" in (error.value.location or "")
    assert error.value.location in str(error.value)
    assert "library.scaled(x) + 1" in str(error.value)
    assert __file__ in str(error.value)
    assert f"in the package {package}" in str(error.value)
    with pytest.raises(CaptureError, match=rf"(?s)return x @ x.*library\.multiplied.*in the package {package}"):
        make_runner(lambda x: library.multiplied(x), device).capture()


def test_a_line_of_the_users_that_a_package_calls_is_the_users(device: str, package: str) -> None:
    library = __import__(package)
    with pytest.raises(UnsupportedOpError) as error:
        make_runner(lambda x: library.called(lambda y: y * y.sum().item(), x), device).capture()
    assert __file__ in (error.value.location or "")
    assert package not in str(error.value)
    assert "outside_graph" in str(error.value)


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> PreTrainedModel:
    return BertModel(BertConfig(**SIZES, max_position_embeddings=16))


def qwen3() -> PreTrainedModel:
    return Qwen3Model(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=16))


@pytest.mark.versions
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("make", "causal"), [(bert, False), (qwen3, True)])
def test_a_mask_that_transformers_would_read_has_four_dimensions_instead(
    device: str, make: Callable[[], PreTrainedModel], causal: bool, implementation: str
) -> None:
    length = 6
    model = make().eval().to(device)
    model.set_attn_implementation(implementation)

    def encode(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, attention_mask=mask).last_hidden_state

    def encode_with_four_dimensions(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attends = mask.bool()[:, None, None, :].expand(-1, 1, length, -1)
        if causal:
            attends = attends & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        zeros = torch.zeros(attends.shape, dtype=model.dtype, device=mask.device)
        return encode(tokens, zeros.masked_fill(~attends, torch.finfo(model.dtype).min))

    def runner(fn: Callable[..., torch.Tensor]) -> GraphRunner:
        inputs = [Input(name, torch.int64, ("rows", length), padding=1) for name in ("tokens", "mask")]
        return GraphRunner(fn, inputs, [2, 4], backend=device, strict=True)

    tokens, mask = torch.randint(64, (3, length)), torch.ones(3, length, dtype=torch.int64)
    mask[0, 4:] = mask[2, 1:] = 0
    if not (causal and implementation == "eager"):  # whose masks transformers makes without a look at their values
        with pytest.raises(UnsupportedOpError, match="mask of four dimensions") as error:
            runner(encode).capture()
        assert "masking_utils.py" in (error.value.location or "")
        assert "return model(input_ids=tokens, attention_mask=mask)" in str(error.value)
        assert "outside_graph" not in str(error.value)
    with torch.inference_mode():
        expected = encode(tokens.to(device), mask.to(device))
    replayed = runner(encode_with_four_dimensions)(tokens=tokens, mask=mask)
    torch.testing.assert_close(replayed[mask.bool()], expected[mask.bool()])
