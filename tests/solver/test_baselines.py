"""Published baselines, held against their formulas: exact inverses column by column, brute force, and singular values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.baselines import (
    adapter_rank,
    dampen,
    low_rank_adapter,
    magnitude_scores,
    sparsegpt,
    unstructured_mask,
    wanda_scores,
)
from armor_recipes.solver.patterns import magnitude_mask

SEEDS = st.integers(0, 2**31)


def problem(seed: int, d_out: int, d_in: int, *, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """W `(O, I)` and a correlated H `(I, I)`, float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    mixing = torch.randn(d_in, d_in, generator=generator) + 2 * torch.eye(d_in)
    x = torch.randn(tokens or 4 * d_in, d_in, generator=generator) @ mixing
    return weight, x.T @ x / len(x)


def loss(error: Tensor, gram: Tensor) -> float:
    return float(((error.double() @ gram.double()) * error.double()).sum())


def literal(
    weight: Tensor, gram: Tensor, *, n_keep: int, group: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """OBS one weight at a time in float64: the inverse Hessian of the columns that are left, computed anew for each."""
    w, h = weight.double().clone(), gram.double()
    keep = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.clone()
    for row in range(len(w)):
        for j in range(w.shape[1]):
            if mask is None and j % group == 0:
                cost = [float(w[row, c] ** 2 / torch.linalg.inv(h[c:, c:])[0, 0]) for c in range(j, j + group)]
                kept = sorted(range(group), key=lambda c: (-cost[c], c))[:n_keep]
                keep[row, j : j + group] = torch.tensor([c in kept for c in range(group)])
            if not keep[row, j]:
                inverse = torch.linalg.inv(h[j:, j:])
                w[row, j:] -= w[row, j] / inverse[0, 0] * inverse[0]
                w[row, j] = 0
    return w.float(), keep


def test_scores_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, -0.5]], dtype=torch.bfloat16)
    assert magnitude_scores(weight).tolist() == [[1, 2], [3, 0.5]]
    assert wanda_scores(weight, torch.tensor([9.0, 4.0])).tolist() == [[3, 4], [9, 1]]
    assert wanda_scores(weight, torch.tensor([0.0, 4.0])).tolist() == [[0, 4], [0, 1]]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_wanda_refuses_a_second_moment_that_is_none(bad: float) -> None:
    with pytest.raises(NumericalError, match="1 of 2 input second moments"):
        wanda_scores(torch.ones(1, 2), torch.tensor([1.0, bad]))


@given(
    seed=SEEDS,
    d_out=st.integers(1, 5),
    groups=st.integers(1, 3),
    pattern=st.sampled_from([(2, 4), (1, 4), (4, 8)]),
    blocks=st.integers(1, 2),
)
@settings(max_examples=25, deadline=None)
def test_sparsegpt_is_obs_column_by_column(
    seed: int, d_out: int, groups: int, pattern: tuple[int, int], blocks: int
) -> None:
    n_keep, group = pattern
    weight, gram = problem(seed, d_out, groups * group)
    found, mask, counts = sparsegpt(weight, gram, damping=0.0, block_columns=blocks * group, n_keep=n_keep, group=group)
    wanted, wanted_mask = literal(weight, gram, n_keep=n_keep, group=group)
    assert torch.equal(mask, wanted_mask)
    assert (mask.unflatten(1, (-1, group)).sum(-1) == n_keep).all()
    assert not bool(found[~mask].any())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert counts == {}


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_a_given_mask_is_kept(seed: int) -> None:
    weight, gram = problem(seed, 4, 12)
    mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(seed)) < 0.6
    before = mask.clone()
    found, same, _ = sparsegpt(weight, gram, damping=0.0, block_columns=4, mask=mask)
    assert torch.equal(same, before)
    assert torch.equal(mask, before)
    torch.testing.assert_close(found, literal(weight, gram, n_keep=2, group=4, mask=mask)[0], rtol=1e-5, atol=1e-5)


@given(seed=SEEDS, count=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_kept_weights_end_at_least_squares_where_the_removed_come_first(seed: int, count: int) -> None:
    """With columns 0 … k−1 removed, the best others solve w_F H_FF = w H_:F, and the loss is w_k [H⁻¹_kk]⁻¹ w_kᵀ."""
    weight, gram = problem(seed, 3, 8)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[:, :count] = False
    found, _, _ = sparsegpt(weight, gram, damping=0.0, mask=mask)
    w, h = weight.double(), gram.double()
    best = torch.linalg.solve(h[count:, count:], h[count:] @ w.T).T
    torch.testing.assert_close(found[:, count:].double(), best, rtol=1e-5, atol=1e-5)
    removed = torch.linalg.inv(h)[:count, :count]
    cost = float((w[:, :count] @ torch.linalg.inv(removed) * w[:, :count]).sum())
    assert loss(weight - found, gram) == pytest.approx(cost, rel=1e-4)


@given(seed=SEEDS, scale=st.sampled_from([1.0, 1e-6, 1e6]))
@settings(max_examples=15, deadline=None)
def test_without_correlations_it_is_magnitude_pruning(seed: int, scale: float) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    weight[0] = 1.0  # ties go to the lower index
    found, mask, counts = sparsegpt(weight, scale * torch.eye(16))
    assert torch.equal(mask, magnitude_mask(magnitude_scores(weight)))
    assert torch.equal(found, weight.float() * mask)
    assert counts == {}


def test_with_uneven_channels_its_mask_is_wandas() -> None:
    weight, _ = problem(0, 6, 16)
    h = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.1
    found, mask, _ = sparsegpt(weight, h.diag(), damping=0.0)
    assert torch.equal(mask, magnitude_mask(wanda_scores(weight, h)))
    assert torch.equal(found, weight * mask)


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_blocks_change_rounding_only(seed: int) -> None:
    weight, gram = problem(seed, 8, 40)
    one = sparsegpt(weight, gram, block_columns=4)
    for block in (8, 16, 40, 128):
        other = sparsegpt(weight, gram, block_columns=block)
        assert torch.equal(other[1], one[1])
        torch.testing.assert_close(other[0], one[0], rtol=1e-5, atol=1e-6)


@given(seed=SEEDS, scale=st.sampled_from([2.0**-10, 2.0**10]))
@settings(max_examples=10, deadline=None)
def test_the_scale_of_the_inputs_does_not_matter(seed: int, scale: float) -> None:
    weight, gram = problem(seed, 8, 24)
    one, other = sparsegpt(weight, gram), sparsegpt(weight, gram * scale)
    assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)


def test_it_beats_pruning_without_an_update() -> None:
    for seed in range(3):
        weight, gram = problem(seed, 32, 64)
        found, mask, _ = sparsegpt(weight, gram)
        wanda = weight * magnitude_mask(wanda_scores(weight, gram.diagonal()))
        assert loss(weight - found, gram) < 0.8 * min(loss(weight * ~mask, gram), loss(weight - wanda, gram))


def test_dead_channels_are_zeroed_and_counted() -> None:
    weight, gram = problem(3, 5, 12)
    live = torch.ones(12, dtype=torch.bool)
    live[[1, 7]] = False
    gram = gram * live * live[:, None]
    found, mask, counts = sparsegpt(weight, gram)
    assert counts == {"dead_channels": 2}
    assert not bool(found[:, ~live].any())
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    same, _, _ = sparsegpt(weight * live, gram, mask=mask)
    assert torch.equal(same, found)  # what stood there pushes nothing into other columns


def test_few_tokens_need_damping_or_jitter() -> None:
    weight, gram = problem(4, 5, 32, tokens=6)
    damped, _, none = sparsegpt(weight, gram, damping=0.01)
    raw, _, counts = sparsegpt(weight, gram - 1e-6 * gram.diagonal().mean() * torch.eye(32), damping=0.0)
    assert (none, counts) == ({}, {"gram_jitter": 1})
    assert bool(damped.isfinite().all())
    assert bool(raw.isfinite().all())


def test_what_no_jitter_mends_is_an_error() -> None:
    weight, gram = problem(5, 5, 8)
    gram[0, 1] = gram[1, 0] = 5 * gram.diagonal().max()
    with pytest.raises(NumericalError, match=r"not positive definite even with 0\.1"):
        sparsegpt(weight, gram)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(bad: float) -> None:
    weight, gram = problem(6, 5, 8)
    broken = gram.clone()
    broken[2, 3] = bad
    with pytest.raises(NumericalError, match="1 of 64 entries of the Gram matrix"):
        sparsegpt(weight, broken)
    weight[1, 1] = bad
    with pytest.raises(NumericalError, match="1 of 40 weights are not finite"):
        sparsegpt(weight, gram)


def test_inputs_that_are_always_zero_lose_nothing() -> None:
    pruned, mask, counts = sparsegpt(torch.ones(5, 8), torch.zeros(8, 8))
    assert not pruned.any()
    assert counts == {"dead_channels": 8}
    assert mask.view(5, 2, 4).sum(-1).eq(2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damping": -0.1}, "damping=-0.1"),
        ({"block_columns": 6}, "block_columns=6"),
        ({"n_keep": 5}, "n_keep=5 of group=4"),
        ({"group": 5}, "group=5 does not fit d_in=8"),
        ({"mask": torch.ones(5, 4, dtype=torch.bool)}, r"mask must be bool \(5, 8\)"),
        ({"mask": torch.ones(5, 8)}, "got torch.float32"),
        ({"gram": torch.eye(4)}, r"gram \(I, I\), got \(5, 8\) and \(4, 4\)"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, object], message: str) -> None:
    weight, gram = problem(7, 5, 8)
    with pytest.raises(ValueError, match=message):
        sparsegpt(**{"weight": weight, "gram": gram, **change})  # type: ignore[arg-type]


def test_arguments_are_left_alone() -> None:
    weight, gram = problem(8, 5, 8)
    weight, gram = weight.double(), gram.double()
    gram[3] = gram[:, 3] = 0
    before = weight.clone(), gram.clone()
    sparsegpt(weight, gram)
    dampen(gram, 0.1)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_damping_by_hand() -> None:
    gram = torch.tensor([[2.0, 1.0, 0.0], [1.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert dampen(gram, 0.1).tolist() == [[2 + 0.1 * 3, 1, 0], [1, 4 + 0.1 * 3, 0], [0, 0, 3]]


@given(seed=SEEDS, shape=st.sampled_from([(8, 8), (12, 8), (8, 20)]), rank=st.integers(1, 8), full=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_adapter_is_the_best_of_its_rank(seed: int, shape: tuple[int, int], rank: int, full: bool) -> None:
    """The least weighted error of rank r is the sum of the other squared singular values of E·H^½ (Eckart-Young)."""
    weight, gram = problem(seed, *shape)
    pruned = weight * magnitude_mask(magnitude_scores(weight))
    if not full:
        gram = gram.diagonal().diag()
    left, right = low_rank_adapter(weight, pruned, gram if full else gram.diagonal(), rank=rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    assert left.dtype == right.dtype == torch.float32
    root = torch.linalg.cholesky(gram.double())
    singular = torch.linalg.svdvals((weight - pruned).double() @ root)
    after = loss(weight.double() - pruned.double() - left.double() @ right.double(), gram)
    best, whole = float(singular[rank:].square().sum()), loss(weight - pruned, gram)
    assert after == pytest.approx(best, rel=1e-5, abs=1e-9 * whole)
    assert after <= whole


def test_the_adapter_of_a_singular_gram() -> None:
    weight, gram = problem(9, 6, 16, tokens=3)
    pruned = weight * magnitude_mask(magnitude_scores(weight))
    left, right = low_rank_adapter(weight, pruned, gram, rank=3)
    assert loss(weight - pruned - left @ right, gram) < 1e-6 * loss(weight - pruned, gram)
    nothing = low_rank_adapter(weight, weight, gram, rank=2)
    assert not bool((nothing[0] @ nothing[1]).any())


@pytest.mark.parametrize(
    ("pruned", "moment", "rank", "message"),
    [
        ((5, 8), (8,), 0, "rank=0 is not in 1 to 5"),
        ((5, 8), (8,), 6, "rank=6 is not in 1 to 5"),
        ((5, 4), (8,), 1, r"\(5, 4\)"),
        ((5, 8), (5, 5), 1, r"\(5, 5\)"),
    ],
)
def test_adapters_that_do_not_fit(pruned: tuple[int, ...], moment: tuple[int, ...], rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        low_rank_adapter(torch.ones(5, 8), torch.ones(pruned), torch.ones(moment), rank=rank)


@pytest.mark.parametrize(
    ("shape", "values", "rank"),
    [
        ((576, 576), 64 * (576 + 576), 64),
        ((1536, 576), 32 * (1536 + 576), 32),
        ((64, 256), 16 * 64 + 64 * 256, (16 * 64 + 64 * 256) // 320),
        ((8, 16), 23, 0),
        ((8, 16), 24, 1),
        ((8, 16), 10**6, 8),
    ],
)
def test_equal_bytes(shape: tuple[int, int], values: int, rank: int) -> None:
    assert adapter_rank(*shape, values) == rank


def literal_share(weight: Tensor, gram: Tensor, share: float, columns: int, *, keep_zeros: bool) -> Tensor:
    """SparseGPT without a pattern, from its formula: the factor of H⁻¹, and a threshold over all rows of each block."""
    w, factor = weight.double().clone(), torch.linalg.cholesky(torch.linalg.inv(gram.double())).mT
    zeros = w == 0 if keep_zeros else torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], columns):
        block = slice(start, start + columns)
        cost = (w[:, block] / factor.diagonal()[block]).square().masked_fill(zeros[:, block], 0.0)
        rank = int(cost.numel() * share)
        prune = cost <= cost.flatten().sort().values[rank]
        if rank <= int(zeros[:, block].sum()) and keep_zeros:
            prune = zeros[:, block]
        for j in range(start, min(start + columns, w.shape[1])):
            found = w[:, j].masked_fill(prune[:, j - start], 0.0)
            w[:, j:] -= ((w[:, j] - found) / factor[j, j])[:, None] * factor[j, j:]
            w[:, j] = found
        w[:, block] = w[:, block].masked_fill(prune, 0.0)
        w[:, start + columns :] = w[:, start + columns :].masked_fill(zeros[:, start + columns :], 0.0)
    return w.float()


@given(seed=SEEDS, share=st.sampled_from([0.25, 0.5, 0.8]), columns=st.sampled_from([3, 8, 20]), zeros=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_share_of_each_block_is_pruned(seed: int, share: float, columns: int, zeros: bool) -> None:
    weight, gram = problem(seed, 5, 16)
    if zeros:
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = 0
    pruned, mask, counts = sparsegpt(
        weight, gram, damping=0.0, block_columns=columns, sparsity=max(share, 0.5), keep_zeros=zeros
    )
    wanted = literal_share(weight, gram, max(share, 0.5), columns, keep_zeros=zeros)
    assert torch.equal(pruned == 0, wanted == 0)
    assert torch.equal(mask, pruned != 0)
    assert counts == {}
    assert not zeros or not bool(pruned[weight == 0].any())
    torch.testing.assert_close(pruned, wanted, rtol=1e-4, atol=1e-4)


def test_zeros_are_kept_in_a_pattern() -> None:
    weight, gram = problem(3, 6, 16)
    weight[:, 1::4] = 0
    pruned, mask, _ = sparsegpt(weight, gram, keep_zeros=True)
    assert not bool(pruned[:, 1::4].any())
    assert (mask.view(6, 4, 4).sum(-1) == 2).all()
    weight[:, ::2] = weight[:, 3::4] = 0
    with pytest.raises(NumericalError, match=r"100\.0 % of the weights are zero already, more than the 50\.0 %"):
        sparsegpt(weight, gram, keep_zeros=True)


def test_a_share_of_each_row_by_hand() -> None:
    scores = torch.tensor([[4.0, 1, 3, 2, 5], [0, 0, 0, 0, 0]])
    assert unstructured_mask(scores, 0.5).tolist() == [
        [True, False, True, False, True],
        [False, False, True, True, True],
    ]


@pytest.mark.parametrize("fields", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": 0.5, "block_columns": 0}])
def test_a_share_that_is_none_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="sparsity="):
        sparsegpt(torch.ones(2, 4), torch.eye(4), **fields)  # type: ignore[arg-type]
