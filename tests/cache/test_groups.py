"""Cache groups: what windows save, how memory is shared out, and which prefixes are found."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphmode.cache.allocate import longest_that_fits, make_cache, needed_bytes, share_out
from graphmode.cache.block_manager import BlockManager
from graphmode.cache.block_pool import block_keys
from graphmode.cache.specs import CacheGroup, CacheShape, LayerCache, group_layers
from graphmode.errors import ModelError

SIZE = 4
LONG = 32768


def group(window: int | None = None, block_size: int = SIZE, block_bytes: int = 1) -> CacheGroup:
    return CacheGroup("full" if window is None else "window", (0,), torch.float32, block_size, block_bytes, window)


@dataclass(eq=False)
class Tokens:
    """A sequence, as the cache sees it."""

    token_ids: list[int]
    num_computed: int = 0
    num_settled: int = 0
    block_tables: list[list[int]] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    contents: list[tuple[int, int, bytes]] = field(default_factory=list)


def compute(manager: BlockManager, sequence: Tokens, tokens: int) -> None:
    """Run a step of so many tokens."""
    assert manager.extend([(sequence, sequence.num_computed + tokens)])
    sequence.num_computed += tokens


def test_layers_of_one_kind_and_window_are_one_group() -> None:
    full, near, far = CacheShape(2, 8, 8), CacheShape(2, 8, 8, window=16), CacheShape(1, 8, 8, window=32)
    latent = CacheShape(1, 12, 8, values_in_keys=True, index_dim=4)
    groups = group_layers([near, full, near, latent, far, full], torch.bfloat16, 16)
    assert [(each.kind, each.window, each.layers) for each in groups] == [
        ("window", 16, (0, 2)),
        ("full", None, (1, 5)),
        ("latent", None, (3,)),
        ("window", 32, (4,)),
    ]
    assert [each.block_bytes for each in groups] == [2 * 16 * elements for elements in (2 * 32, 2 * 32, 16, 16)]
    caches = make_cache(groups, [near, full, near, latent, far, full], [3, 5, 2, 4], torch.device("cpu"))
    assert [(cache.group, cache.window, len(cache.keys)) for cache in caches] == [
        (0, 16, 3), (1, None, 5), (0, 16, 3), (2, None, 2), (3, 32, 4), (1, None, 5)
    ]  # fmt: skip
    assert all(cache.keys.dtype == torch.bfloat16 for cache in caches)


def test_a_layer_that_sees_more_than_is_kept_is_refused() -> None:
    cache = LayerCache(*torch.zeros(2, 1, 16, 1, 8), window=16)
    cache.check_window(16)
    cache.check_window(8)
    LayerCache(cache.keys, cache.values).check_window(None)
    with pytest.raises(ModelError, match="the last 17 tokens, and to the last 16"):
        cache.check_window(17)
    with pytest.raises(ModelError, match="all tokens, and to the last 16"):
        cache.check_window(None)


@given(st.integers(0, 1000), st.integers(1, 64))
def test_blocks_for_is_the_least_that_holds_the_tokens(tokens: int, size: int) -> None:
    blocks = group(block_size=size).blocks_for(tokens)
    assert (blocks - 1) * size < tokens <= blocks * size or tokens == blocks == 0


@pytest.mark.parametrize("caching", [False, True])
def test_a_block_is_given_back_when_the_next_token_no_longer_reads_it_and_not_before(caching: bool) -> None:
    manager = BlockManager([group(6), group()], [8, 8], step_tokens=8, prefix_caching=caching)
    sequence = Tokens(list(range(30)))
    manager.begin(sequence, read_prefix=True)
    compute(manager, sequence, 8)
    held = []
    for _ in range(9):
        compute(manager, sequence, 1)  # the token at 8 reads 3 to 8, that at 9 reads 4 to 9
        held.append(manager.pools[0].num_blocks - manager.pools[0].num_free)
    #               8  9  10 11 12 13 14 15 16
    assert held == [3, 2, 2, 2, 3, 2, 2, 2, 3]
    assert sequence.block_tables[0][:2] == [0, 0]
    assert manager.pools[1].num_free == 8 - 5
    manager.release(sequence)
    assert [pool.num_free for pool in manager.pools] == [8, 8]


def test_tokens_that_the_host_does_not_know_are_kept_until_it_does() -> None:
    manager = BlockManager([group(2)], [8], step_tokens=8, decode_steps=8)
    sequence = Tokens([1])
    manager.begin(sequence, read_prefix=True)
    compute(manager, sequence, 9)  # a burst: eight of its tokens are in flight
    compute(manager, sequence, 1)
    assert manager.pools[0].num_free == 8 - 3
    sequence.token_ids += [2] * 9
    compute(manager, sequence, 1)
    assert manager.pools[0].num_free == 8 - 1
    other = Tokens([1, *[2] * 7, 3])
    manager.begin(other, read_prefix=True)
    assert other.num_computed == 8, "a block was given back before others could find it"


@given(
    groups=st.sampled_from([[group(6)], [group(), group(5)], [group(7, 8), group(block_size=2), group(3)]]),
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=6),
    blocks=st.integers(24, 40),
)
def test_the_longest_prefix_is_found_whose_blocks_are_all_known_that_the_next_token_reads(
    groups: list[CacheGroup], prompts: list[list[int]], blocks: int
) -> None:
    manager = BlockManager(groups, [blocks] * len(groups), step_tokens=40)
    held: list[dict[int, list[int]]] = [{} for _ in groups]  # of each group, what its blocks hold
    unit, step = (choose(each.block_size for each in groups) for choose in (max, min))

    def known(prompt: list[int], tokens: int) -> bool:
        """Whether a prefix can be used, by asking for every block."""
        keys = list(block_keys(prompt, step))
        return all(
            manager.pools[at].find([keys[(block + 1) * each.block_size // step - 1]])
            for at, each in enumerate(groups)
            for block in range(each.first_read(tokens) // each.block_size, tokens // each.block_size)
        )

    for prompt in prompts:
        sequence = Tokens([*prompt, 5])
        best = max((n for n in range(0, len(prompt) + 1, unit) if known(prompt, n)), default=0)
        manager.begin(sequence, read_prefix=True)
        assert sequence.num_computed == best
        for at, each in enumerate(groups):
            first = each.first_read(best) // each.block_size
            for block in range(first, best // each.block_size):
                assert held[at][sequence.block_tables[at][block]] == prompt[: (block + 1) * each.block_size]
        while sequence.num_computed < len(prompt):
            compute(manager, sequence, min(9, len(prompt) - sequence.num_computed))
            for at, each in enumerate(groups):
                for block, number in enumerate(sequence.block_tables[at]):
                    if block >= each.first_read(sequence.num_settled) // each.block_size:
                        held[at][number] = prompt[: (block + 1) * each.block_size]
        manager.release(sequence)
        assert [pool.num_free for pool in manager.pools] == [blocks] * len(groups)


GROUP_SETS = st.lists(
    st.builds(
        group,
        st.one_of(st.none(), st.integers(1, 5000)),
        st.sampled_from([4, 16, 128]),
        st.integers(1, 10**6),
    ),
    min_size=1,
    max_size=4,
)
STEPS = {"step_tokens": st.integers(1, 9000), "decode_steps": st.integers(1, 16)}


@given(
    groups=GROUP_SETS, nbytes=st.integers(0, 10**12), length=st.integers(2, 10**6), seqs=st.integers(1, 500), **STEPS
)
def test_all_groups_fit_together_and_one_sequence_of_full_length_fits_in_each(
    groups: list[CacheGroup], nbytes: int, length: int, seqs: int, step_tokens: int, decode_steps: int
) -> None:
    steps = (step_tokens, decode_steps)
    fitting = longest_that_fits(groups, nbytes, length, *steps)
    assert fitting == 0 or needed_bytes(groups, fitting, *steps) <= nbytes
    assert fitting == length or needed_bytes(groups, fitting + 1, *steps) > nbytes
    if fitting == 0:
        return
    blocks = share_out(
        groups, nbytes, length=fitting, step_tokens=step_tokens, decode_steps=decode_steps, sequences=seqs
    )
    assert sum(count * each.block_bytes for count, each in zip(blocks, groups, strict=True)) <= nbytes
    for count, each in zip(blocks, groups, strict=True):
        assert each.most_blocks(fitting, *steps) <= count <= each.most_blocks(fitting, *steps, seqs)
    manager = BlockManager(groups, [min(count, 10**4) for count in blocks], step_tokens=step_tokens)
    if all(count <= 10**4 for count in blocks):
        assert manager.lacking(fitting) is None


@given(
    block_bytes=st.lists(st.integers(1, 10**6), min_size=1, max_size=3),
    nbytes=st.integers(0, 10**11),
    length=st.integers(2, 10**5),
    seqs=st.integers(1, 500),
)
def test_without_windows_there_are_as_many_blocks_as_fit_or_as_all_sequences_need(
    block_bytes: list[int], nbytes: int, length: int, seqs: int
) -> None:
    groups = [group(None, 16, each) for each in block_bytes]
    possible, each = nbytes // sum(block_bytes), -(-length // 16)
    assert longest_that_fits(groups, nbytes, length, 100, 8) == min(length, 16 * possible)
    if possible >= each:
        blocks = share_out(groups, nbytes, length=length, step_tokens=100, decode_steps=8, sequences=seqs)
        assert set(blocks) == {min(each * seqs, possible)}


def test_each_group_has_half_at_least_of_what_short_and_long_sequences_ask_for() -> None:
    groups = [group(None, 16, 100), group(1024, 16, 500)]
    budget = 100_000 * 600
    full, near = share_out(groups, budget, length=32768, step_tokens=256, decode_steps=8, sequences=10**6)
    assert full * 100 + near * 500 == pytest.approx(budget, rel=1e-3)
    assert near >= 50_000  # half of as many as a group without a window would have
    assert full >= 0.5 * 4.2 * 100_000  # half of more than four times as many
    assert share_out(groups, budget, length=1024, step_tokens=256, decode_steps=8, sequences=10**6) == (100_000,) * 2


# Layer patterns, windows and lengths as published; sizes that are tiny. Bytes of one sequence: (all kept, by groups).
MODELS = {
    "Gemma 3 27B": ([CacheShape(1, 8, 8, window=1024)] * 5 + [CacheShape(1, 8, 8)]) * 10
    + [CacheShape(1, 8, 8, window=1024)] * 2,
    "gpt-oss 20B": [CacheShape(1, 8, 8, window=128), CacheShape(1, 8, 8)] * 12,
    "Mistral 7B v0.1": [CacheShape(1, 8, 8, window=4096)] * 32,
}


@pytest.mark.parametrize(("model", "share"), [("Gemma 3 27B", 0.20), ("gpt-oss 20B", 0.51), ("Mistral 7B v0.1", 0.127)])
def test_a_sequence_of_32k_tokens_holds_what_its_windows_need(model: str, share: float) -> None:
    shapes = MODELS[model]
    groups = group_layers(shapes, torch.bfloat16, 16)
    before = sum(shape.elements for shape in shapes) * 2 * LONG
    blocks = [each.most_blocks(LONG, 256, 8) for each in groups]
    manager = BlockManager(groups, blocks, step_tokens=256, decode_steps=8)
    sequence = Tokens([1] * LONG)
    manager.begin(sequence, read_prefix=False)
    held = 0
    while sequence.num_computed < LONG:
        compute(manager, sequence, 256 if sequence.num_computed < LONG - 256 else 1)
        held = sum(
            (pool.num_blocks - pool.num_free) * each.block_bytes
            for each, pool in zip(groups, manager.pools, strict=True)
        )
    print(f"{model}: a sequence of {LONG} tokens holds {held:,} bytes; {before:,} if nothing is given back")
    assert held <= share * before
    manager.release(sequence)
    assert [pool.num_free for pool in manager.pools] == blocks


def test_a_model_of_windows_alone_takes_far_longer_sequences() -> None:
    windowed, full = (
        group_layers([CacheShape(8, 128, 128, window=window)] * 32, torch.bfloat16, 16) for window in (4096, None)
    )
    budget = 2 << 30
    assert longest_that_fits(full, budget, 10**6, 8192, 8) == 16384
    assert longest_that_fits(windowed, budget, 10**6, 8192, 8) == 10**6
