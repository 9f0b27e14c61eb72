from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops import count_tokens as public_count_tokens
from graphmode.ops import start_history as public_start_history
from graphmode.ops.sampling import token_counts as module
from graphmode.ops.sampling.token_counts import count_tokens_reference, start_history_reference

VOCAB = 1030


@pytest.fixture
def start_history(implementation: str):
    return getattr(module, f"start_history_{implementation}")


@pytest.fixture
def count_tokens(implementation: str):
    return getattr(module, f"count_tokens_{implementation}")


def ids(values: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def used_history(device: str) -> torch.Tensor:
    return torch.randint(0, 9, (4, VOCAB), dtype=torch.int32).to(device)


@pytest.mark.parametrize(
    ("state_indices", "prompt", "prompt_state_indices"),
    [
        ([2], [5, 1029, 5, 0], [2, 2, 2, 2]),
        ([0, 3], [5, 7, 7, 9], [0, 0, 3, 3]),
        ([-1, 1, -1], [4, 4, 10**12, -7], [1, -1, -1, -1]),
        ([3, -1], [], []),
        ([-1, -1], [3], [-1]),
        ([], [], []),
    ],
)
def test_starts_histories_and_touches_no_other(
    start_history, kernel_device: str, state_indices: list[int], prompt: list[int], prompt_state_indices: list[int]
) -> None:
    history = used_history(kernel_device)
    expected = history.clone()
    for state in state_indices:
        if state >= 0:
            expected[state] = 0
    for state, token in zip(prompt_state_indices, prompt, strict=True):
        if state >= 0:
            expected[state, token] = 1
    start_history(
        history, ids(state_indices, kernel_device), ids(prompt, kernel_device), ids(prompt_state_indices, kernel_device)
    )
    assert torch.equal(history, expected)


def test_a_prompt_may_come_in_parts(start_history, kernel_device: str) -> None:
    history = used_history(kernel_device)
    start_history(history, ids([1], kernel_device), ids([5, 6], kernel_device), ids([1, 1], kernel_device))
    start_history(history, ids([-1], kernel_device), ids([6, 7], kernel_device), ids([1, 1], kernel_device))
    assert history[1].nonzero().flatten().tolist() == [5, 6, 7]
    assert history[1].max() == 1


@pytest.mark.parametrize(
    ("state_indices", "tokens"),
    [
        ([0, 1, 2, 3], [0, 1029, 3, 3]),
        ([2, -1, 0, -1], [7, -9, 7, 10**12]),
        ([1, 1, 1, 3], [5, 5, 6, 5]),
        ([-1], [0]),
        ([], []),
    ],
)
def test_counts_real_rows(count_tokens, kernel_device: str, state_indices: list[int], tokens: list[int]) -> None:
    history = used_history(kernel_device)
    expected = history.clone()
    for state, token in zip(state_indices, tokens, strict=True):
        if state >= 0:
            expected[state, token] += 2
    count_tokens(history, ids(state_indices, kernel_device), ids(tokens, kernel_device))
    assert torch.equal(history, expected)


@given(
    st.lists(st.integers(0, 9), max_size=12),
    st.lists(st.integers(0, 9), max_size=12),
    st.integers(0, 2),
    st.integers(1, 4),
)
def test_holds_prompt_and_counts(prompt: list[int], output: list[int], state: int, parts: int) -> None:
    """Whatever a history held before, and in however many parts the prompt came."""
    history = torch.randint(0, 99, (3, 10), dtype=torch.int32)
    before = history.clone()
    for part in range(parts):
        tokens = prompt[part::parts]
        start_history_reference(history, ids([state if part == 0 else -1]), ids(tokens), ids([state] * len(tokens)))
    for token in output:
        count_tokens_reference(history, ids([-1, state]), ids([3, token]))
    expected = [2 * output.count(token) + (token in prompt) for token in range(10)]
    assert history[state].tolist() == expected
    others = [other for other in range(3) if other != state]
    assert torch.equal(history[others], before[others])


def test_what_does_not_exist_writes_nothing(kernel_device: str) -> None:
    memory = torch.zeros(4, VOCAB, dtype=torch.int32, device=kernel_device)
    bad = ids([2, 0, 1], kernel_device), ids([5, VOCAB, -1], kernel_device)
    module.count_tokens_triton(memory[:2], *bad)
    module.start_history_triton(memory[:2], ids([2], kernel_device), bad[1], bad[0])
    assert not memory.any()


def test_public_functions_take_the_reference_on_cpu() -> None:
    history = torch.zeros(2, 5, dtype=torch.int32)
    public_start_history(history, ids([1]), ids([4]), ids([1]))
    public_count_tokens(history, ids([1, -1]), ids([4, 4]))
    assert history.tolist() == [[0] * 5, [0, 0, 0, 0, 3]]


@pytest.mark.gpu
def test_public_functions_on_a_gpu() -> None:
    history = torch.randint(0, 9, (16, 151_936), dtype=torch.int32)
    prompt, state_indices = torch.randint(0, 50, (5000,)), torch.randint(-1, 16, (5000,))
    on_gpu = history.cuda()
    for start, count, to in (
        (public_start_history, public_count_tokens, on_gpu),
        (start_history_reference, count_tokens_reference, history),
    ):
        start(to, ids([0, 7, -1], to.device), prompt.to(to.device), state_indices.to(to.device))
        count(to, state_indices.to(to.device), prompt.to(to.device))
    assert torch.equal(on_gpu.cpu(), history)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("history", torch.zeros(3, 9), "history is torch.float32, expected torch.int32"),
        ("history", torch.zeros(9, 3, dtype=torch.int32).T, "history is of strides .*, expected a contiguous tensor"),
        ("history", torch.zeros(0, 3, dtype=torch.int32), "history is of shape .*, expected at least one state"),
        ("state_indices", torch.zeros(2, dtype=torch.int32), "state_indices is torch.int32, expected torch.int64"),
        (
            "prompt_state_indices",
            torch.zeros(5, dtype=torch.int64),
            r"prompt_state_indices has shape \[5\], expected \[4\]",
        ),
        ("state_indices", torch.zeros(2, 1, dtype=torch.int64), r"state_indices has shape \[2, 1\], expected \[any\]"),
        ("tokens", torch.zeros(3, dtype=torch.int64), r"tokens has shape \[3\], expected \[2\]"),
    ],
)
def test_refuses_what_does_not_fit(name: str, value: torch.Tensor, message: str) -> None:
    history = {"history": torch.zeros(3, 9, dtype=torch.int32)}
    start = history | {"state_indices": ids([0]), "prompt": ids([0] * 4), "prompt_state_indices": ids([0] * 4)}
    count = history | {"state_indices": ids([0, 0]), "tokens": ids([0, 0])}
    function, arguments = (public_start_history, start) if name in start else (public_count_tokens, count)
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, name: value})
