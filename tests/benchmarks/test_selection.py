"""benchmarks/selection.py: what each way selects, and that its solves are those of `solver: adam`."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from armor_recipes.solver import factorize
from tests.benchmarks.test_rivals import benchmark


@pytest.fixture(scope="module")
def selection() -> ModuleType:
    return benchmark("selection")


def test_ways_select_what_they_say(selection: ModuleType) -> None:
    gradient = torch.zeros(1, 2, 3, 4)  # two blocks of three groups
    gradient[0, 0, 1] = torch.tensor([3.0, -3.0, 0.0, 0.0])  # L1 6, L2 4.2, L∞ 3
    gradient[0, 0, 2] = torch.tensor([0.0, 0.0, -4.0, 0.0])  # L1 4, L2 4, L∞ 4
    gradient[0, 1, 0] = 1.0
    picked = {way: select(gradient, torch.Generator().manual_seed(0)) for way, select in selection.WAYS.items()}
    assert picked["gradient greedy, L1"].tolist() == picked["gradient greedy, L2"].tolist() == [[1, 0]]
    assert picked["gradient greedy, L∞"].tolist() == [[2, 0]]
    wide = gradient.repeat(1, 2000, 1, 1)
    for way, share in (("L1", 0.6), ("L2", 0.515), ("L∞", 3 / 7)):
        drawn = selection.WAYS[f"gradient random, {way}"](wide, torch.Generator().manual_seed(0))[0, ::2]
        assert set(drawn.tolist()) == {1, 2}
        assert float((drawn == 1).double().mean()) == pytest.approx(share, abs=0.04)
    counts = selection.WAYS["random"](wide, torch.Generator().manual_seed(0)).flatten().bincount(minlength=3)
    assert (counts / counts.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)


def test_our_way_is_that_of_the_solver(selection: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, moment = torch.randn(64, 96, generator=generator), torch.rand(96, generator=generator)
    found = factorize(weight, moment, block_size=32, solver="adam", iterations=100, seed=7)
    row = selection.run(weight, moment, selection.OURS, seed=7, steps=100)
    assert row["losses"]["100"] == pytest.approx(found.losses[-1], rel=1e-6)
    assert row["masks_changed"] == pytest.approx(found.masks_changed)
    assert selection.run(weight, moment, selection.START, seed=7, steps=100)["masks_changed"] == 0


def test_a_row_is_the_mean_of_modules_and_seeds(selection: ModuleType) -> None:
    found = {
        (module, way, seed): {
            "losses": {"100": 2.0 if way == "random" and seed == 1 else 1.0},
            "masks_changed": 0.5,
            "steps": 100,
            "seconds": 1.0,
        }
        for module in selection.MODULES
        for way in selection.WAYS
        for seed in range(3)
    }
    row = {row["name"]: row for row in selection.summary(found, 3)}["random"]
    assert row["ratio"] == row["losses"]["100 steps"] == pytest.approx(2 ** (1 / 3))
    assert (row["lowest"], row["highest"], row["ms_per_step"]) == pytest.approx((1, 2, 10))
