"""Some rows at a time: the bits are those of whole matrices, for any number of rows and threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from armor_recipes.solver import rows
from armor_recipes.solver.normalize import (
    NORM_EPSILON,
    fill_dead_channels,
    nowag_normalize,
    relative_error,
    relative_loss,
    share_of,
)
from armor_recipes.solver.patterns import Pattern, magnitude_mask, mask_to_index
from armor_recipes.solver.rows import parts, stable_sum

SHAPES = [(1, 8), (7, 16), (64, 64), (200, 96), (513, 40), (1000, 264)]


@pytest.fixture(params=[(1 << 30, 1 << 30), (256, 2), (4096, 64)], ids=["whole", "few", "default rows"])
def at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_ENTRIES", request.param[0])
    monkeypatch.setattr(rows, "_ROWS", request.param[1])


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole_sum(x: Tensor) -> float:
    return float(x.sum(dim=1, dtype=torch.float64).sum())


def whole_normalize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    columns = torch.linalg.vector_norm(weight, dim=0) + NORM_EPSILON
    scaled = weight / columns
    norms = torch.linalg.vector_norm(scaled, dim=1) + NORM_EPSILON
    return scaled / norms[:, None], norms, columns


def whole_loss(weight: Tensor, h: Tensor, other: Tensor, normalize: bool, omega: Tensor | None) -> float:
    h = fill_dead_channels(h.double())[0]
    made = weight.double(), torch.ones(len(weight)).double(), torch.ones(weight.shape[1]).double()
    normal, norms, columns = whole_normalize(weight.double()) if normalize else made
    if omega is not None:
        root = omega.double().sqrt()
        normal, norms = normal * root[:, None], norms / root
    error = normal - other.double() / columns / norms[:, None]
    return share_of(whole_sum(error.square() * h), whole_sum(normal.square() * h))


@pytest.mark.usefixtures("at_a_time", "threads")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_whole_matrices(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, other = drawn(shape, 0, dtype), drawn(shape, 1, dtype)
    h, omega = drawn((1, shape[1]), 2)[0].square(), drawn((1, shape[0]), 3)[0].square() + 0.1
    h[0] = 0  # a dead channel
    found = nowag_normalize(weight.float())
    for one, expected in zip((found.weight, found.rows, found.columns), whole_normalize(weight.float()), strict=True):
        assert torch.equal(one, expected)
    for normalize in (True, False):
        for weights in (None, omega):
            loss = relative_loss(weight, h, other, normalize=normalize, row_weights=weights)
            assert loss == whole_loss(weight, h, other, normalize, weights)
    error = (whole_sum((weight - other).double().square()) / whole_sum(weight.double().square())) ** 0.5
    assert relative_error(weight, other) == error
    assert stable_sum(weight) == whole_sum(weight)
    assert stable_sum(weight, lambda part: other[part]) == whole_sum(other)


@pytest.mark.usefixtures("at_a_time")
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(3, 16)])
@pytest.mark.parametrize("shape", [(1, 16), (7, 16), (200, 96)])
def test_masks_are_those_of_whole_matrices(shape: tuple[int, int], pattern: Pattern) -> None:
    scores = drawn(shape, 4).round(decimals=1)  # with ties
    groups = scores.unflatten(1, (-1, pattern.group))
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., : pattern.keep]
    expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, value=True).flatten(1)
    mask = magnitude_mask(scores, pattern)
    assert torch.equal(mask, expected)
    index = mask_to_index(mask, pattern)
    assert index.shape == (shape[0], shape[1] // pattern.group)
    assert torch.equal(index, torch.cat([mask_to_index(row[None], pattern) for row in mask]))
    wrong = mask.clone()
    wrong[-1, -pattern.group :] = False
    with pytest.raises(ValueError, match="must keep exactly"):
        mask_to_index(wrong, pattern)


def test_parts_cover_the_rows_once_and_an_empty_matrix_has_one() -> None:
    x = torch.zeros(1000, 1 << 10)
    assert torch.equal(torch.cat([torch.arange(1000)[part] for part in parts(x)]), torch.arange(1000))
    assert len(list(parts(x))) == 1000 // 128 + 1
    assert len(list(parts(torch.zeros(0, 4)))) == 1
