"""The one Cholesky factorisation, on matrices that are typed in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.spd import AS_IT_IS, NORMAL_EQUATIONS, UP_TO_A_TENTH, cholesky, inverse_or_zero, with_ridge

WORDS = {"what": "matrices of the test", "advice": "type in others"}
ROOT = torch.tensor([[2.0, 0, 0], [6, 1, 0], [-8, 5, 3]], dtype=torch.float64)
GOOD = torch.tensor([[4.0, 12, -16], [12, 37, -43], [-16, -43, 98]])


def test_a_factor_that_is_known() -> None:
    lower, retries = cholesky(GOOD, **WORDS)
    assert lower.dtype == torch.float64
    assert lower.tolist() == ROOT.tolist()
    assert retries == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_dtype_is_factorised_in_float64_and_left_alone(dtype: torch.dtype) -> None:
    given = GOOD.to(dtype)
    lower, _ = cholesky(given, **WORDS)
    assert torch.equal(lower, ROOT)
    assert torch.equal(given, GOOD.to(dtype))


def test_only_the_lower_triangle_is_read() -> None:
    assert torch.equal(cholesky(GOOD.tril(), **WORDS)[0], ROOT)


@pytest.mark.parametrize("ridges", [NORMAL_EQUATIONS, UP_TO_A_TENTH])
def test_what_succeeds_at_once_has_the_bits_of_one_plain_call(ridges: tuple[float, ...]) -> None:
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    gram = (x.mT @ x).double()
    share = ridges[0] * gram.diagonal(dim1=1, dim2=2).mean(-1)
    plain = torch.linalg.cholesky(gram + share[:, None, None] * torch.eye(16, dtype=torch.float64))
    lower, retries = cholesky(gram, ridges=ridges, **WORDS)
    assert retries == 0
    assert torch.equal(lower, plain)


def test_each_matrix_of_a_batch_has_the_ridge_that_it_needs() -> None:
    """Of mean diagonal 1 each: the second fails with shares of 1e-6 and 1e-5, the third with 1e-6 alone."""
    batch = torch.stack([torch.diag(torch.tensor([2.0 - last, last])) for last in (1.0, -2e-5, -2e-6)])
    lower, retries = cholesky(batch, ridges=NORMAL_EQUATIONS, **WORDS)
    assert retries == 3
    added = (lower @ lower.mT - batch.double()).diagonal(dim1=1, dim2=2).mean(-1)
    assert added.tolist() == pytest.approx([1e-6, 1e-4, 1e-5], rel=1e-6)


def test_zeros_become_the_identity() -> None:
    lower, retries = cholesky(torch.zeros(2, 3, 3), ridges=NORMAL_EQUATIONS, **WORDS)
    assert torch.equal(lower, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert retries == 0


@pytest.mark.parametrize(
    ("gram", "ridges", "message"),
    [
        (torch.diag(torch.tensor([1.0, -1.0, 3.0])), AS_IT_IS, r"1 of 1 \(3x3, mean diagonal 1\) are not positive definite: "),
        (torch.ones(2, 2), AS_IT_IS, "are not positive definite: type in others"),
        (torch.tensor([[1.0, 5.0], [5.0, 3.0]]), UP_TO_A_TENTH, r"mean diagonal 2\) are .* even with 0\.1 of it added"),
        (torch.stack((torch.eye(2), -torch.eye(2))), NORMAL_EQUATIONS, r"1 of 2 .* mean diagonal -1\)"),
        (torch.full((2, 2), torch.nan), UP_TO_A_TENTH, "mean diagonal nan"),
    ],
)  # fmt: skip
def test_what_no_ridge_mends_says_what_and_what_to_do(gram: Tensor, ridges: tuple[float, ...], message: str) -> None:
    with pytest.raises(NumericalError, match=message) as caught:
        cholesky(gram, ridges=ridges, **WORDS)
    assert str(caught.value).startswith("matrices of the test: ")
    assert str(caught.value).endswith(": type in others")


def test_a_ridge_is_a_share_of_the_mean_diagonal() -> None:
    given = torch.tensor([[[1.0, 2.0], [2.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert with_ridge(given, 0.25).tolist() == [[[1.5, 2], [2, 3.5]], [[1, 0], [0, 1]]]


def test_inverses_are_zero_where_there_is_none() -> None:
    """A good one, one of rank 1, one that is nearly so, one that is indefinite, and zeros."""
    near = torch.tensor([[1.0, 1 - 1e-7], [1 - 1e-7, 1.0]], dtype=torch.float64)
    kinds = [torch.tensor([[2.0, 1.0], [1.0, 1.0]]), torch.ones(2, 2), near, torch.diag(torch.tensor([1.0, -1.0]))]
    found = inverse_or_zero(torch.stack([*(k.double() for k in kinds), torch.zeros(2, 2)]), least_pivot=1e-6)
    torch.testing.assert_close(found[0], torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64))
    assert not found[1:].any()
