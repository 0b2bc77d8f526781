"""Column permutations: exact exchanges, near the best of all on tiny cases, never below the identity, and deterministic."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver import nowag_mask, relative_loss
from armor_recipes.solver.patterns import TWO_OF_FOUR, Pattern, magnitude_mask
from armor_recipes.solver.permutation import (
    _disjoint_swaps,
    _kept_with,
    _others,
    choose_permutation,
    gather_alike,
    kept_share,
    weighted_channels,
)

PATTERNS = [TWO_OF_FOUR, Pattern(1, 4), Pattern(3, 4), Pattern(1, 2), Pattern(4, 8), Pattern(5, 10)]


def scores(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Like those of a weight: squares of Gaussians, columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator).square() * scale


def splits(columns: tuple[int, ...], size: int) -> list[list[tuple[int, ...]]]:
    """All ways to split columns into groups of `size`."""
    if not columns:
        return [[]]
    first, *rest = columns
    found = []
    for others in combinations(rest, size - 1):
        left = tuple(c for c in rest if c not in others)
        found += [[(first, *others), *more] for more in splits(left, size)]
    return found


def best_share(values: Tensor, pattern: Pattern) -> float:
    """The largest share that masks keep in any split."""
    kept = {
        group: float(values[:, list(group)].sort(dim=1, descending=True).values[:, : pattern.keep].sum())
        for group in combinations(range(values.shape[1]), pattern.group)
    }
    found = max(sum(kept[group] for group in split) for split in splits(tuple(range(values.shape[1])), pattern.group))
    return found / float(values.sum())


def is_permutation(order: Tensor) -> bool:
    return order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(len(order)))


def test_a_case_by_hand() -> None:
    # two large columns a group is all that 2:4 can keep; the identity has three in the first
    values = torch.tensor([[9.0, 8.0, 7.0, 0.0, 6.0, 0.0, 0.0, 0.0]])
    assert kept_share(values) == pytest.approx(23 / 30)
    order = choose_permutation(values)
    assert kept_share(values[:, order]) == 1.0


def test_groups_are_in_order_and_what_cannot_be_better_stays() -> None:
    order = choose_permutation(scores(6, 24)).view(-1, 4)
    assert (order[:, 1:] > order[:, :-1]).all()
    assert (order[1:, 0] > order[:-1, 0]).all()
    assert torch.equal(choose_permutation(scores(6, 4)), torch.arange(4))
    assert torch.equal(choose_permutation(torch.zeros(6, 16)), torch.arange(16))
    assert torch.equal(choose_permutation(torch.ones(6, 16)), torch.arange(16))


@pytest.mark.parametrize(
    ("columns", "pattern"), [(8, TWO_OF_FOUR), (12, TWO_OF_FOUR), (8, Pattern(1, 2)), (12, Pattern(2, 6))]
)
def test_it_comes_near_the_best_of_all(columns: int, pattern: Pattern) -> None:
    gaps = []
    for seed in range(12):
        values = scores(5, columns, seed)
        found, best = (
            kept_share(values[:, choose_permutation(values, pattern=pattern)], pattern=pattern),
            best_share(values, pattern),
        )
        assert found <= best + 1e-6
        gaps.append((best - found) / (best - kept_share(values, pattern=pattern) + 1e-9))
    # of what the best permutation gains over the identity this share is missed, in the mean
    assert sum(gaps) / len(gaps) < 0.12, gaps
    assert sum(gap < 1e-4 for gap in gaps) >= len(gaps) // 2, gaps


@given(
    st.integers(1, 6),
    st.integers(1, 7),
    st.sampled_from(PATTERNS),
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.booleans(),
)
def test_never_below_the_identity(rows: int, groups: int, pattern: Pattern, seed: int, sweeps: int, ties: bool) -> None:
    values = scores(rows, groups * pattern.group, seed)
    values = values.round() if ties else values
    order = choose_permutation(values, pattern=pattern, sweeps=sweeps)
    assert is_permutation(order)
    assert kept_share(values[:, order], pattern=pattern) >= kept_share(values, pattern=pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_exchanges_are_scored_exactly(pattern: Pattern) -> None:
    x = scores(7, 3 * pattern.group).double()
    found = _kept_with(*_others(x.unflatten(1, (-1, pattern.group)), pattern.keep), x)
    for place in range(x.shape[1]):
        group = place // pattern.group
        for column in range(x.shape[1]):
            changed = x.clone()
            changed[:, place] = x[:, column]
            own = changed[:, group * pattern.group : (group + 1) * pattern.group]
            kept = float((own * magnitude_mask(own, pattern)).sum())
            assert float(found[place, column]) == pytest.approx(kept, rel=1e-12)


def test_swaps_made_together_touch_no_group_twice_and_gain_what_they_promise() -> None:
    x = scores(7, 40)
    x /= x.sum()
    kept = _kept_with(*_others(x.unflatten(1, (-1, 4)), 2), x)
    left, right, gain = _disjoint_swaps(kept, 4)
    groups = torch.cat((left, right)) // 4
    assert len(left) > 1
    assert len(set(groups.tolist())) == len(groups)
    order = torch.arange(40)
    order[left], order[right] = right, left
    assert kept_share(x[:, order]) - kept_share(x) == pytest.approx(gain, rel=1e-4)


def test_more_sweeps_keep_more() -> None:
    values = scores(32, 256)
    shares = [kept_share(values[:, choose_permutation(values, sweeps=sweeps)]) for sweeps in (1, 2, 10)]
    assert kept_share(values) < shares[0] < shares[1] < shares[2]


def test_bits_depend_on_neither_threads_nor_the_global_generator() -> None:
    values, threads = scores(64, 512), torch.get_num_threads()
    first = choose_permutation(values)
    blocks = gather_alike(values.sqrt(), first, block=64)
    try:
        torch.set_num_threads(3)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            again = choose_permutation(values)
            blocks_again = gather_alike(values.sqrt(), again, block=64)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, again)
    assert torch.equal(blocks, blocks_again)


def test_groups_that_are_alike_share_a_block() -> None:
    generator = torch.Generator().manual_seed(8)
    kinds = torch.linalg.qr(torch.randn(24, 3, generator=generator)).Q  # three directions, each that of four groups
    kind = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 2, 0]).repeat_interleave(4)
    channels = kinds[:, kind] * torch.randn(48, generator=generator) + 0.01 * torch.randn(24, 48, generator=generator)
    order = torch.randperm(12, generator=generator).repeat_interleave(4) * 4 + torch.arange(4).repeat(12)
    found = gather_alike(channels, order, block=16)
    assert is_permutation(found)
    assert (kind[found].view(3, 16) == kind[found].view(3, 16)[:, :1]).all()
    assert {tuple(group) for group in found.view(-1, 4).tolist()} == {
        tuple(group) for group in order.view(-1, 4).tolist()
    }
    with pytest.raises(ValueError, match="block=10 must be a multiple of 4 that divides the 48 columns"):
        gather_alike(channels, order, block=10)


def test_scores_are_those_of_nowag() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, h = torch.randn(10, 16, generator=generator), torch.rand(16, generator=generator)
    found = weighted_channels(weight, h).square()
    mask, _ = nowag_mask(weight, h)
    assert torch.equal(magnitude_mask(found), mask)
    assert 1 - kept_share(found) == pytest.approx(relative_loss(weight, h, weight * mask), rel=1e-4)


def test_a_permuted_pair_is_the_same_function() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second, x = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((16, 6), (5, 16), (6, 9))
    )
    order = choose_permutation(weighted_channels(second, torch.ones(16)).square())
    assert not torch.equal(order, torch.arange(16))
    torch.testing.assert_close(second[:, order] @ (first[order] @ x).relu(), second @ (first @ x).relu())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2:4 needs a multiple of 4 columns, got 6"):
        choose_permutation(scores(3, 6))
    with pytest.raises(NumericalError):
        weighted_channels(torch.ones(3, 4), torch.full((4,), torch.nan))
    with pytest.raises(NumericalError):
        weighted_channels(torch.full((3, 4), torch.inf), torch.ones(4))
