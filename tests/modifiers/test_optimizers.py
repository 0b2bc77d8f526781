"""Steps of training: Adam's are torch's, Muon's have every direction of a block equally long."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from armor_recipes.modifiers.optimizers import Optimizer, orthogonalized, root_mean_square


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(parameter: Tensor, gradients: list[Tensor], *, name: str, rate: float = 0.01) -> Tensor:
    """The parameter after a step along each gradient."""
    p = nn.Parameter(parameter.clone())
    optimizer = Optimizer([p], name)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step(rate, pool)
            assert p.grad is None
    return p.detach()


@given(st.integers(1, 5), st.integers(2, 24), st.integers(0, 1000), st.floats(-30, 30))
def test_singular_values_become_about_one_and_directions_stay(
    count: int, side: int, seed: int, exponent: float
) -> None:
    left, _, right = torch.linalg.svd(random(count, side, side, seed=seed).double())
    values = torch.logspace(0, -1.5, side, dtype=torch.float64)  # of a conditioning that five products bring to about 1
    found = orthogonalized((10**exponent * left * values @ right).float()).double()
    along = left.mT @ found @ right.mT
    diagonal = along.diagonal(dim1=-2, dim2=-1)
    assert float(diagonal.min()) > 0.6
    assert float(diagonal.max()) < 1.25
    assert float((along - torch.diag_embed(diagonal)).abs().max()) < 1e-4


def test_zeros_stay_zeros_and_blocks_do_not_see_each_other() -> None:
    blocks = random(3, 8, 8)
    blocks[1] = 0
    found = orthogonalized(blocks)
    assert not bool(found[1].any())
    assert torch.allclose(found[2], orthogonalized(blocks[2:])[0], atol=1e-5)


def test_a_step_of_muon_has_the_length_that_its_rate_says() -> None:
    start = 3 * random(4, 32, 32)
    step = start - stepped(start, [1e-6 * random(4, 32, 32, seed=1)], name="muon", rate=0.01)
    assert root_mean_square(step) == pytest.approx(0.5 * 0.01 * root_mean_square(start), rel=0.25)


def test_muon_goes_downhill_and_remembers_where_it_came_from() -> None:
    start, first, second = random(2, 8, 8), random(2, 8, 8, seed=1), random(2, 8, 8, seed=2)
    one = start - stepped(start, [first], name="muon")
    assert float((one * first).sum()) > 0
    after = stepped(start, [first, second], name="muon") - stepped(start, [first], name="muon")
    fresh = stepped(start, [second], name="muon") - start
    assert float((after - fresh).norm()) > 0.1 * float(fresh.norm())


@pytest.mark.parametrize("shape", [(16,), (5, 7)])
def test_what_is_no_stack_of_blocks_takes_adams_steps(shape: tuple[int, ...]) -> None:
    start, gradients = random(*shape), [random(*shape, seed=s) for s in (1, 2)]
    assert torch.equal(*(stepped(start, gradients, name=name) for name in ("adam", "muon")))


def test_adams_steps_are_torchs_in_units_of_the_parameters_own_size() -> None:
    start, gradients = 3 * random(2, 8, 8), [random(2, 8, 8, seed=s) for s in (1, 2)]
    p = nn.Parameter(start.clone())
    reference = torch.optim.Adam([p], lr=0.01 * root_mean_square(start), betas=(0.9, 0.95), eps=1e-15)
    for gradient in gradients:
        p.grad = gradient
        reference.step()
    assert torch.allclose(p.detach(), stepped(start, gradients, name="adam"), rtol=1e-5, atol=1e-6)
