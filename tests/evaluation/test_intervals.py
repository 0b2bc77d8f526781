from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armor_recipes.evaluation.intervals import bootstrap, bootstrap_quantile, quantile, wilson
from tests.support.engine import rng_states


@given(st.integers(1, 10**6).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_holds_the_rate_and_lies_between_0_and_1(counts: tuple[int, int]) -> None:
    hits, count = counts
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    mirrored = wilson(count - hits, count)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_wilson_as_in_the_literature() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29 by method 3."""
    found = [wilson(*counts) for counts in ((81, 263), (15, 148), (0, 20), (1, 29))]
    expected = [(0.2553, 0.3662), (0.0624, 0.1605), (0.0000, 0.1611), (0.0061, 0.1718)]
    assert np.round(found, 4).tolist() == [list(bounds) for bounds in expected]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_a_bootstrap_lies_within_the_sample_and_is_the_same_each_time(values: list[float]) -> None:
    sample, before = np.array(values), rng_states()
    found = bootstrap(sample)
    assert found == bootstrap(sample)
    assert rng_states() == before
    assert found is not None
    slack = 1e-9 * max(1.0, float(np.abs(sample).max()))
    assert sample.min() - slack <= found[0] <= found[1] <= sample.max() + slack


def test_a_bootstrap_of_a_large_sample_is_that_of_the_normal_distribution() -> None:
    sample = torch.randn(2_500, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
    low, high = bootstrap(sample) or (0, 0)
    assert (low, high) == pytest.approx((sample.mean() - 1.96 / 50, sample.mean() + 1.96 / 50), abs=6e-3)


def test_one_value_has_no_interval() -> None:
    assert bootstrap(np.array([1.0])) is None


def test_threads_change_no_bit() -> None:
    sample = np.linspace(0, 1, 500) ** 2
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = bootstrap(sample)
    finally:
        torch.set_num_threads(before)
    assert found == bootstrap(sample)


def test_weights_of_one_are_the_mean_and_others_a_share() -> None:
    sample = np.linspace(0, 1, 50) ** 2
    assert bootstrap(sample, weights=np.ones(50)) == pytest.approx(bootstrap(sample))
    sizes = np.arange(1.0, 51)
    assert bootstrap(3 * sizes, weights=sizes) == pytest.approx((3, 3))
    assert bootstrap(np.ones(1), weights=np.ones(1)) is None


@given(st.lists(st.lists(st.floats(0, 1e3), min_size=1, max_size=5), min_size=2, max_size=6), st.floats(0.01, 1))
def test_a_quantile_of_resampled_groups_is_that_of_their_values(rows: list[list[float]], share: float) -> None:
    groups, generator = [np.array(row) for row in rows], torch.Generator().manual_seed(0)
    drawn = torch.randint(len(groups), (1000, len(groups)), generator=generator).tolist()
    found = [quantile([groups[place] for place in row], share) for row in drawn]
    assert bootstrap_quantile(groups, share) == pytest.approx(np.quantile(found, [0.025, 0.975]).tolist())
    values = np.sort(np.concatenate(groups))
    assert (values <= quantile(groups, share)).mean() >= share - 1e-9
    assert (values < quantile(groups, share)).mean() < share


def test_one_group_has_no_interval() -> None:
    assert bootstrap_quantile([np.arange(9.0)], 0.5) is None
    assert quantile([np.arange(100.0)], 0.99) == 98
