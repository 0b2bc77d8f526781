"""Plain 2:4 methods as modifiers: each is its formula, and the low-rank correction is folded in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from armor_recipes.modifiers import ModuleShape, modifiers
from armor_recipes.modifiers.pruning import PruningModifier
from armor_recipes.run import apply
from armor_recipes.solver import relative_loss
from armor_recipes.solver.baselines import dampen, low_rank_adapter, sparsegpt
from armor_recipes.solver.patterns import magnitude_mask
from tests.support.engine import ATTENTION, MLP, recipe

SHAPE = ModuleShape("m", 24, 16, 2)
NAMES = ["MagnitudeModifier", "NoWagModifier", "SparseGPTModifier", "WandaPruningModifier"]


def weight() -> Tensor:
    return torch.randn(SHAPE.d_out, SHAPE.d_in, generator=torch.Generator().manual_seed(1))


def make(name: str, **fields: Any) -> PruningModifier[Any]:
    kind = modifiers()[name]
    if name in ("SparseGPTModifier", "WandaPruningModifier") and not {"sparsity", "mask_structure"} & fields.keys():
        fields = {"pattern": "2:4", **fields}
    modifier = kind(kind.config_type(targets=("Linear",), **fields))
    assert isinstance(modifier, PruningModifier)
    return modifier


def fed(modifier: PruningModifier[Any], *, dead: int = 0) -> Any:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, SHAPE.d_in, generator=generator) @ torch.randn(SHAPE.d_in, SHAPE.d_in, generator=generator)
    x[:, :dead] = 0
    statistic = modifier.statistic(SHAPE)
    statistic.update(x)
    return statistic


def test_each_is_its_formula() -> None:
    w = weight()
    found = {name: make(name).solve(SHAPE, w, fed(make(name)), None).weight for name in NAMES}
    wanda, sgpt = make("WandaPruningModifier"), make("SparseGPTModifier", dampening_frac=0.2)
    h = fed(wanda).value
    assert torch.equal(found["MagnitudeModifier"], w * magnitude_mask(w.abs()))
    assert torch.equal(found["WandaPruningModifier"], w * magnitude_mask(w.abs() * h.sqrt()))
    gram = fed(sgpt).value
    assert torch.equal(found["SparseGPTModifier"], sparsegpt(w, gram, damping=0.01)[0])
    damped = sgpt.solve(SHAPE, w, fed(sgpt), None).weight
    assert torch.equal(damped, sparsegpt(w, gram, damping=0.2)[0])
    assert len({str(x.tolist()) for x in [*found.values(), damped]}) == 5


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_comparable(name: str) -> None:
    modifier, w = make(name), weight()
    outcome = modifier.solve(SHAPE, w, fed(modifier), None)
    h = fed(make("WandaPruningModifier")).value
    assert outcome.losses == (pytest.approx(relative_loss(w, h, outcome.weight), rel=1e-5),)


@pytest.mark.parametrize("name", ["NoWagModifier", "SparseGPTModifier", "WandaPruningModifier"])
def test_dead_channels_are_counted(name: str) -> None:
    modifier = make(name)
    assert modifier.solve(SHAPE, weight(), fed(modifier, dead=3), None).counts == {"dead_channels": 3}


@pytest.mark.parametrize("name", NAMES)
def test_the_correction_has_as_many_values_as_the_factors(name: str) -> None:
    plain, corrected, w = make(name), make(name, adapter_block=4), weight()
    before = plain.solve(SHAPE, w, fed(plain), None).weight
    after = corrected.solve(SHAPE, w, fed(corrected), None).weight
    armor = modifiers()["ARMORModifier"]
    factor_bytes = armor(armor.config_type(targets=("Linear",), block_size=4)).plan(SHAPE).factor_bytes
    rank = int(torch.linalg.matrix_rank(after - before, rtol=1e-5))
    assert rank * (SHAPE.d_out + SHAPE.d_in) * SHAPE.itemsize == factor_bytes
    statistic = fed(plain)
    moment = dampen(statistic.value, 0.01) if name == "SparseGPTModifier" else statistic.value
    left, right = low_rank_adapter(w, before, moment, rank=4)
    assert torch.equal(after, before + left @ right)
    assert plain.plan(SHAPE).stored_bytes == corrected.plan(SHAPE).stored_bytes == SHAPE.dense_bytes
    assert plain.plan(SHAPE).flops < corrected.plan(SHAPE).flops


def test_a_block_above_the_weight_corrects_all() -> None:
    modifier, w = make("WandaPruningModifier", adapter_block=1000), weight()
    assert modifier.rank(SHAPE) == 16
    torch.testing.assert_close(modifier.solve(SHAPE, w, fed(modifier), None).weight, w, rtol=1e-4, atol=1e-5)


def test_they_run_through_a_model(llama: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "SparseGPTModifier": {"targets": [ATTENTION], "pattern": "2:4", "dampening_frac": 0.05},
        "WandaPruningModifier": {"targets": [MLP], "pattern": "2:4", "adapter_block": 2},
    }
    result = apply(recipe(llama, tmp_path / "out", **fields))
    saved = load_file(result.output / "model.safetensors")
    assert len(result.modules) == 14
    for name, module in result.modules.items():
        kept = (saved[f"{name}.weight"] != 0).unflatten(1, (-1, 4)).sum(-1)
        assert int(kept.max()) == (2 if "attn" in name else 4)
        assert 0 < module.stored_loss < 1


@pytest.mark.parametrize("name", ["SparseGPTModifier", "WandaPruningModifier"])
@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"pattern": "1:4"}, "1:4"),
        ({"mask_structure": "1:4"}, "3:4"),
        ({"mask_structure": "2:4", "sparsity": 0.5}, "2:4"),
        ({"mask_structure": "1:3", "sparsity": 0.33}, "2:3"),
        ({"mask_structure": "0:0", "sparsity": 0.7}, None),
        ({"sparsity": 0.7}, None),
    ],
)
def test_a_pattern_is_kept_here_and_pruned_there(name: str, fields: dict[str, Any], kept: str | None) -> None:
    kind = modifiers()[name]
    modifier = kind(kind.config_type(targets=("Linear",), **fields))
    assert isinstance(modifier, PruningModifier)
    assert modifier.sparsity == kept
    assert kept is not None or modifier.plan(ModuleShape("m", 5, 7, 2)).stored_bytes == 70


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, r"give `pattern` or `mask_structure`: `pattern` counts what is kept .* `mask_structure` what is pruned"),
        ({"pattern": "2:4", "mask_structure": "2:4"}, r"give either `pattern` or `mask_structure`: `pattern` counts"),
        (
            {"mask_structure": "1:4", "sparsity": 0.5},
            r"sparsity: 0.5 contradicts mask_structure: 1:4, which prunes 25 %",
        ),
        ({"pattern": "1:4", "sparsity": 0.5}, r"sparsity: 0.5 contradicts pattern: 1:4, which prunes 75 %"),
        ({"mask_structure": "0:0"}, r"say how many of them with `sparsity`"),
        ({"mask_structure": "0:4"}, r"must keep N of every M"),
        ({"mask_structure": "2of4"}, r"mask_structure='2of4' is not of the form N:M"),
    ],
)
def test_what_has_two_meanings_or_none_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        modifiers()["SparseGPTModifier"].config_type(targets=("Linear",), **fields)


def test_shares_are_pruned_in_containers(llama: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "SparseGPTModifier": {"targets": [r"re:.*self_attn$"], "ignore": [r"re:.*k_proj"], "sparsity": 0.75},
        "WandaPruningModifier": {"targets": "LlamaMLP", "sparsity": 0.25, "mask_structure": "0:0"},
    }
    result = apply(recipe(llama, tmp_path / "out", **fields))
    saved = load_file(result.output / "model.safetensors")
    assert len(result.modules) == 12
    assert not any("k_proj" in name for name in result.modules)
    for name in result.modules:
        zeros = float((saved[f"{name}.weight"] == 0).double().mean())
        assert zeros == pytest.approx(0.75 if "attn" in name else 0.25, abs=0.01)
    assert {module.pattern for module in result.plan.modules} == {None}
