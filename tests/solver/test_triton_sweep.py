"""The sweep on a GPU: the Triton kernel against the torch form. On a GPU, or in Triton's interpreter in a process of its own."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from armor_recipes.solver import factorize, sweep
from armor_recipes.solver.exact import residual, to_blocks
from armor_recipes.solver.patterns import parse_pattern
from armor_recipes.solver.sweep import SweepProblem, sweep_form
from tests.support.solver import problem_of, random_factors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
#: Block sizes, and whether masks are fixed; few in the interpreter, which takes seconds for one: on either side of powers of two.
SWEEPS = (
    [(1, 4, False), (1, 4, True), (6, 12, False), (6, 12, True), (33, 4, False), (3, 36, False)]
    if INTERPRETED
    else [(*block, fixed) for block in [(1, 4), (6, 8), (18, 12), (33, 4), (3, 36)] for fixed in (False, True)]
)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and not TRITON_INTERPRET=1"
)


@needs_triton
@runs
@pytest.mark.parametrize(("b_o", "b_i", "fixed"), SWEEPS)
def test_a_sweep_is_that_of_the_torch_form(b_o: int, b_i: int, fixed: bool) -> None:
    problem, factors = random_factors(b_o + b_i, 2 * b_o, 3 * b_i, (b_o, b_i))
    a, b = factors.a.float(), factors.b.float()
    b[1, :, 1] = 0  # not all minors are regular
    a[1, :, 0] = 0  # a row that is left as it is
    found = []
    for form, device in (("torch", "cpu"), ("triton", DEVICE)):
        work = SweepProblem(
            correlation=to_blocks(residual(problem, factors).float(), b_o, b_i).clone().to(device),
            core=to_blocks(factors.core.float(), b_o, b_i).clone().to(device),
            index=to_blocks(factors.index, b_o, b_i // 4).clone().to(device),
            gram_a=(a.mT @ a).contiguous().to(device),
            gram_b=(b @ b.mT).contiguous().to(device),
            fixed_mask=fixed,
        )
        before = work.index.clone()
        inverses = sweep._group_inverses(work)
        (sweep._sweep_torch if form == "torch" else sweep._sweep_triton)(work, inverses)
        assert torch.equal(work.index, before) or not fixed
        found.append(work)
    ours, reference = found[1], found[0]
    assert torch.equal(ours.index.cpu(), reference.index)
    torch.testing.assert_close(ours.core.cpu(), reference.core, rtol=1e-3, atol=1e-4)
    assert torch.equal(ours.core[1, :, 0].cpu(), to_blocks(factors.core.float(), b_o, b_i)[1, :, 0])


def test_which_form_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "triton_available", lambda: True)
    assert sweep_form("cuda") == "triton"
    assert sweep_form("cuda", parse_pattern("4:8")) == "torch"
    assert sweep_form("mps") == "torch"
    monkeypatch.setattr(sweep, "native_available", lambda: True)
    assert sweep_form("cpu", parse_pattern("4:8")) == "native"
    assert sweep_form("cpu", parse_pattern("8:16")) == "torch"
    monkeypatch.setattr(sweep, "native_available", lambda: False)
    monkeypatch.setattr(sweep, "triton_available", lambda: False)
    assert sweep_form("cpu") == sweep_form("cuda") == "torch"


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("correlated", [False, True])
def test_a_solve_on_a_gpu_is_as_good_as_on_the_cpu(correlated: bool) -> None:
    weight, h = problem_of(0, 48, 64)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) * h.sqrt()
    losses = []
    for device in ("cpu", "cuda"):
        gram = (x.T @ x / 200).to(device) if correlated else None
        found = factorize(weight.to(device), h.to(device), block_size=16, gram=gram, iterations=30, seed=0)
        losses.append(found.losses[-1])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
