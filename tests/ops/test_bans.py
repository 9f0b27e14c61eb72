from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.ops import Bans, ban_tokens, no_bans, note_recent
from graphmode.ops.sampling import bans as module
from graphmode.ops.sampling.bans import ban_tokens_reference, note_recent_reference

INF = float("inf")
WINDOW = 4


@pytest.fixture
def ban(implementation: str):
    return getattr(module, f"ban_tokens_{implementation}")


def with_bans(
    state_indices: dict[int, tuple[set[int], list[list[int]], list[int]]], vocab: int, words: int = 3
) -> Bans:
    """Bans of five state indices: of each, forbidden tokens, words, and what it made from position 7 on."""
    bans = no_bans(5, vocab, words, WINDOW, "cpu")
    for state, (forbidden, sequences, made) in state_indices.items():
        for token in forbidden:
            bit = 1 << token % 32
            bans.forbidden[state, token // 32] |= bit - (1 << 32 if bit >> 31 else 0)
        for at, word in enumerate(sequences):
            bans.prefixes[state, at, : len(word) - 1] = torch.tensor(word[-2::-1], dtype=torch.int32)
            bans.finals[state, at] = word[-1]
        for position, token in enumerate(made, 7):
            bans.recent[state, position % WINDOW] = token
    return bans


def on(device: str, bans: Bans) -> Bans:
    return Bans(*(tensor.to(device) for tensor in bans))


def banned_in(
    bans: Bans, logits: torch.Tensor, positions: list[int], state_indices: list[int], device: str, ban
) -> list[set]:
    given_ = logits.to(device, copy=True)
    ban(given_, torch.tensor(positions).to(device), torch.tensor(state_indices).to(device), on(device, bans))
    kept = given_.cpu() != -INF
    assert torch.equal(given_.cpu()[kept], logits[kept])
    return [set((~row).nonzero().flatten().tolist()) for row in kept]


@pytest.mark.parametrize("vocab", [40, 1025])
def test_a_set_and_the_last_tokens_of_words_are_banned(ban, kernel_device: str, vocab: int) -> None:
    state_indices = {
        1: ({0, 31, 32, vocab - 1}, [], []),
        2: (set(), [[5, 6, 7], [6, 9], [1, 6, 8]], [5, 6]),
        3: ({4}, [[1, 2, 3, 4, 5]], [0, 1, 2, 3, 4]),
        4: (set(), [[6, 5]], [6, 9]),
    }
    bans = with_bans(state_indices, vocab)
    got = banned_in(bans, torch.randn(6, vocab), [8, 9, 12, 9, 8, 3], [1, 2, 3, 4, 4, 0], kernel_device, ban)
    assert got == [{0, 31, 32, vocab - 1}, {7, 9}, {4, 5}, set(), {5}, set()]


def test_the_prompt_is_no_part_of_a_word(ban, kernel_device: str) -> None:
    """A place of the ring that no output token fills matches nothing, though a word begins with what is beyond it."""
    bans = with_bans({1: (set(), [[5, 6, 7]], [6])}, 40)
    assert banned_in(bans, torch.randn(1, 40), [8], [1], kernel_device, ban) == [set()]


@pytest.mark.parametrize("words", [0, 1, 70])
def test_any_number_of_words(ban, kernel_device: str, words: int) -> None:
    bans = with_bans({2: (set(), [[9, token] for token in range(words)], [9])}, 80, words)
    assert banned_in(bans, torch.randn(1, 80), [8], [2], kernel_device, ban) == [set(range(words))]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@given(data=st.data())
def test_words_are_found_as_they_come(implementation: str, data: st.DataObject) -> None:
    """Tokens noted one by one ban what a look at the whole answer bans, whatever else is in the batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ban, note = getattr(module, f"ban_tokens_{implementation}"), getattr(module, f"note_recent_{implementation}")
    tokens = st.integers(0, 3)
    words = data.draw(st.lists(st.lists(tokens, min_size=2, max_size=WINDOW + 1), max_size=3))
    start = data.draw(st.integers(1, 9))
    answer = data.draw(st.lists(tokens, max_size=9))
    bans = on(device, with_bans({2: (set(), words, [])}, 33))
    for made in range(len(answer) + 1):
        position = torch.tensor([1, start + made]).to(device)
        state_indices = torch.tensor([0, 2]).to(device)
        logits = torch.zeros(2, 33, device=device)
        ban(logits, position, state_indices, bans)
        expected = {
            word[-1] for word in words if len(word) <= made + 1 and answer[made - len(word) + 1 : made] == word[:-1]
        }
        assert set((logits[1] == -INF).nonzero().flatten().tolist()) == expected
        assert not logits[0].any()
        if made < len(answer):
            note(bans.recent, position, state_indices, torch.tensor([3, answer[made]]).to(device))


def test_public_functions_choose_by_device_and_refuse_what_does_not_fit() -> None:
    bans = with_bans({1: ({3}, [[1, 2]], [1])}, 40)
    logits, positions, state_indices = torch.randn(2, 40), torch.tensor([8, 8]), torch.tensor([1, 0])
    expected = logits.clone()
    ban_tokens_reference(expected, positions, state_indices, bans)
    ban_tokens(logits, positions, state_indices, bans)
    assert torch.equal(logits, expected)
    noted = bans.recent.clone()
    note_recent_reference(noted, positions, state_indices, torch.tensor([7, 0]))
    note_recent(bans.recent, positions, state_indices, torch.tensor([7, 0]))
    assert torch.equal(bans.recent, noted)
    with pytest.raises(ValueError, match=r"logits is torch\.float16"):
        ban_tokens(logits.half(), positions, state_indices, bans)
    with pytest.raises(ValueError, match="forbidden has shape"):
        ban_tokens(torch.randn(2, 80), positions, state_indices, bans)
    with pytest.raises(ValueError, match="the window is 3, expected a power of two"):
        ban_tokens(logits, positions, state_indices, no_bans(5, 40, 3, 3, "cpu"))
