"""`objective: hessian`, `propagate: matched` and `share_input_factor` of ARMORModifier, from the formula to the session."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor, nn

from armor_recipes.calibration import InputGram, SplitGram
from armor_recipes.errors import NumericalError, PlanError
from armor_recipes.modifiers import ModuleShape
from armor_recipes.modifiers.armor import ARMORConfig, ARMORModifier
from armor_recipes.solver.hessian import choose_shrinkage, matched_loss, matched_weight, regular_scale, regularize
from tests.support.engine import ALL, make_job, make_session, recipe


def pairs(seed: int, tokens: int, d_in: int) -> tuple[Tensor, Tensor]:
    """Inputs of a compressed and of a dense module on the same tokens, `(tokens, d_in)` float64 each."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    dense = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64) @ mix
    return dense + 0.3 * torch.randn(tokens, d_in, generator=generator, dtype=torch.float64), dense


def grams(x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H, C and the dense H, as means."""
    return x.T @ x / len(x), dense.T @ x / len(x), dense.T @ dense / len(x)


def test_equal_inputs_leave_the_weight_as_it_is() -> None:
    x, _ = pairs(0, 50, 8)
    h, _, _ = grams(x, x)
    weight = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for shrinkage, damping in ((0.0, 0.0), (0.7, 0.1)):
        unscaled = regularize(h, shrinkage=shrinkage, damping=damping)[0] * regular_scale(h, damping=damping)
        assert torch.allclose(matched_weight(weight, h, h, unscaled), weight, rtol=1e-9)


def test_the_matched_weight_moves_the_true_loss_by_a_constant() -> None:
    x, dense = pairs(2, 60, 8)
    h, c, hx = grams(x, dense)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 8, dtype=torch.float64, generator=generator)
    target = matched_weight(weight, h, c, h)

    def difference(candidate: Tensor) -> float:
        true = float((dense @ weight.T - x @ candidate.T).square().sum() / len(x))
        assert matched_loss(weight, hx, c, h, candidate) == pytest.approx(
            true / float(torch.trace(weight @ hx @ weight.T))
        )
        error = target - candidate
        return true - float(torch.trace(error @ h @ error.T))

    first, *others = (difference(torch.randn(4, 8, dtype=torch.float64, generator=generator)) for _ in range(4))
    assert others == [pytest.approx(first, rel=1e-8)] * 3
    least = float((dense @ weight.T - x @ target.T).square().sum())
    worse = float((dense @ weight.T - x @ (1.01 * target).T).square().sum())
    assert least < worse


def test_every_fourth_window_is_held_out() -> None:
    split, plain = SplitGram("m", 6), InputGram("m", 6)
    windows = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(4))
    for batch in windows.split(2):
        split.update(batch)
        plain.update(batch)
    ((fit, held_out),) = split.splits()
    found = split.finish()
    others = windows[[0, 1, 2, 4, 5, 6]].flatten(0, 1)
    assert split.tokens == 35
    assert torch.allclose(fit, others.T @ others / 30, rtol=1e-5, atol=1e-6)
    assert torch.allclose(held_out, windows[3].T @ windows[3] / 5)
    assert torch.allclose(found.gram, plain.value, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.gram, found.gram.T)
    assert (found.tokens, found.choice, found.cross, found.dense) == (35, None, None, None)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("origins", [(2, 0, 0, 1, 2, 0), (0, 5, 1, 1, 5, 1), (1, 2, 3, 4, 0, 0)])
def test_every_dataset_is_held_out_in_turn(origins: tuple[int, ...], batch: int) -> None:
    """Of more than four datasets the first and the fifth are one group, and so on."""
    windows = torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(4))
    split = SplitGram("m", 6)
    split.expect(origins)
    for part in windows.split(batch):
        split.update(part)
    groups = sorted({origin % 4 for origin in origins})
    for group, (fit, held_out) in zip(groups, split.splits(), strict=True):
        for found, inside in ((held_out, True), (fit, False)):
            rows = windows[[(origin % 4 == group) == inside for origin in origins]].flatten(0, 1)
            assert torch.allclose(found, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    rows = windows.flatten(0, 1)
    assert torch.allclose(split.value, rows.T @ rows / 30, rtol=1e-5, atol=1e-6)


def test_shrinkage_is_chosen_once_for_all_who_read_the_same_input() -> None:
    """Several at once, as threads solve the modules of a layer."""
    asked: list[int] = []

    def choose(splits: Iterable[tuple[Tensor, Tensor]]) -> float:
        asked.append(1)
        time.sleep(0.05)
        return choose_shrinkage(splits)

    modifier = ARMORModifier(ARMORConfig(targets=("Linear",), block_size=4, iterations=1, objective="hessian"))
    shape, weight = ModuleShape("m", 8, 8, 2), torch.eye(8) + 0.1
    windows = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(6)) + 1
    alone, shared = modifier.statistic(shape), SplitGram("m", 8, choose)
    for statistic in (alone, shared):
        statistic.update(windows)
    expected = choose_shrinkage(alone.splits())
    with ThreadPoolExecutor(3) as pool:
        results = pool.map(lambda name: modifier.solve(replace(shape, name=name), weight, shared, None), "qkv")
        assert {result.measures["shrinkage"] for result in results} == {expected}
    assert len(asked) == 1
    assert modifier.solve(shape, weight, alone, None).measures["shrinkage"] == expected


def test_what_is_finished_takes_nothing_more() -> None:
    split = SplitGram("m", 6)
    windows = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(4))
    split.update(windows, windows)
    value = split.value
    found = split.finish()
    assert split.finish() is found
    assert torch.equal(found.gram, value)
    assert split.value is found.gram
    assert split.tokens == found.tokens == 20
    for refused in (
        lambda: split.update(windows),
        lambda: split.merge(SplitGram("m", 6)),
        split.state,
        lambda: [*split.splits()],
    ):
        with pytest.raises(RuntimeError, match="the statistic of m is finished"):
            refused()
    with pytest.raises(RuntimeError, match="the statistic of m is finished"):
        SplitGram("m", 6).merge(split)


def test_what_cannot_be_finished_can_be_tried_again() -> None:
    split = SplitGram("m", 6)
    with pytest.raises(NumericalError, match="no calibration token reached m"):
        split.finish()
    split.update(torch.ones(4, 5, 6))
    assert torch.equal(split.finish().gram, torch.ones(6, 6))


def test_rows_that_are_no_windows_and_windows_of_one_dataset_are_parted_by_their_number() -> None:
    rows = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(4))
    plain, mixed, one = (SplitGram("m", 6) for _ in range(3))
    mixed.expect([0, 1] * 4)
    one.expect([0] * 8)
    for part in rows:
        plain.update(part[None])
        mixed.update(part)
        one.update(part[None])
    (expected,) = plain.splits()
    for ((ours, held_out),) in (mixed.splits(), one.splits()):
        assert torch.equal(ours, expected[0])
        assert torch.equal(held_out, expected[1])


def test_pairs_give_the_cross_moment() -> None:
    x, dense = (part.float() for part in pairs(5, 24, 6))
    split = SplitGram("m", 6)
    split.update(x.view(4, 6, 6), dense.view(4, 6, 6))
    h, c, hx = grams(x, dense)
    moments = split.finish()
    for found, true in ((moments.gram, h), (moments.cross, c), (moments.dense, hx)):
        assert torch.allclose(found, true, rtol=1e-4, atol=1e-4)


def test_matching_without_pairs_is_an_error() -> None:
    modifier = ARMORModifier(ARMORConfig(targets=("Linear",), block_size=4, propagate="matched", shrinkage=0.1))
    shape = ModuleShape("m", 8, 8, 2)
    statistic = modifier.statistic(shape)
    statistic.update(torch.ones(4, 5, 8))
    with pytest.raises(NumericalError, match="no calibration token reached m in both models"):
        modifier.solve(shape, torch.ones(8, 8), statistic, None)


def test_shrinkage_cannot_be_chosen_on_too_few_windows() -> None:
    modifier = ARMORModifier(ARMORConfig(targets=("Linear",), block_size=4, iterations=1, objective="hessian"))
    shape = ModuleShape("m", 8, 8, 2)
    statistic = modifier.statistic(shape)
    statistic.update(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(6)))
    with pytest.raises(NumericalError, match=r"m: .*fewer than 4 calibration windows.*`shrinkage`"):
        modifier.solve(shape, torch.ones(8, 8), statistic, None)


def test_the_plan_counts_products_with_the_gram_matrix() -> None:
    shape = ModuleShape("m", 512, 1024, 2)
    costs = {}
    for fields in (
        {},
        {"objective": "hessian"},
        {"propagate": "matched"},
        {"objective": "hessian", "propagate": "matched"},
    ):
        config = ARMORConfig(targets=("Linear",), block_size=64, iterations=10, **fields)
        costs[tuple(fields.values())] = ARMORModifier(config).plan(shape)
    plain = costs[()]
    assert (
        costs["hessian",].flops - plain.flops
        == 10 * 4 * 2 * 512 * 1024**2
        == costs["hessian", "matched"].flops - plain.flops
    )
    assert costs["matched",].flops == plain.flops


@pytest.mark.parametrize(("d_out", "matrices"), [(512, (6, 17, 21)), (2048, (24, 28, 30))])
def test_the_plan_counts_what_finishing_the_statistic_takes_or_solving_with_it(
    d_out: int, matrices: tuple[int, int, int]
) -> None:
    """In float32 matrices of 1024x1024: fewer rows than columns are solved in less than the statistic took."""
    for fields, count in zip(({}, {"objective": "hessian"}, {"propagate": "matched"}), matrices, strict=True):
        config = ARMORConfig(targets=("Linear",), block_size=64, **fields)
        assert ARMORModifier(config).plan(ModuleShape("m", d_out, 1024, 2)).peak_bytes == count * 4 * 1024**2


def test_the_papers_method_has_no_hessian() -> None:
    with pytest.raises(pydantic.ValidationError, match="objective: hessian goes with solver: exact"):
        ARMORConfig(targets=("Linear",), solver="adam", objective="hessian")


def results(llama: Path, **fields: Any) -> dict[str, Any]:
    session = make_session(
        make_job(recipe(llama, ARMORModifier={"targets": [ALL], "block_size": 8, "iterations": 8, **fields}))
    )
    with session:
        return session.run()


def test_the_chosen_shrinkage_is_told(llama: Path) -> None:
    for result in results(llama, objective="hessian").values():
        assert 0 <= result.measures["shrinkage"] <= 1
    assert {r.measures["shrinkage"] for r in results(llama, objective="hessian", shrinkage=0.25).values()} == {0.25}


@pytest.mark.parametrize("objective", ["diagonal", "hessian"])
def test_matched_lowers_the_true_loss_of_later_layers(llama: Path, objective: str) -> None:
    """All losses here are the true one, relative: that of a solve which aims at W against that of one which aims at W X."""
    matched = results(llama, objective=objective, propagate="matched", shrinkage=0.1)
    assert all(0 < result.stored_loss < 1 for result in matched.values())
    first = [name for name in matched if ".layers.0.self_attn.q" in name]
    plain = results(llama, objective=objective, shrinkage=0.1)
    for name in first:  # nothing was compressed before it, so there is nothing to match
        assert torch.equal(matched[name].packed.bitmask, plain[name].packed.bitmask)
    last = [name for name in matched if ".layers.1." in name]
    assert any(not torch.equal(matched[name].packed.values, plain[name].packed.values) for name in last)


@pytest.mark.parametrize("propagate", ["compressed", "matched"])
def test_shrinkage_is_chosen_on_one_kind_of_text_for_the_others(llama: Path, propagate: str) -> None:
    modifier = {"targets": [r"re:.*layers\.0.*q_proj$"], "block_size": 8, "iterations": 1, "objective": "hessian"}
    mapping = recipe(llama, ARMORModifier={**modifier, "propagate": propagate})
    mapping["calibration"]["dataset"] = [
        {"dataset": "builtin:random-tokens", "weight": 1},
        {"dataset": "builtin:random-tokens", "weight": 2},
    ]
    session = make_session(make_job(mapping))
    (tokens,) = session.tokens.values()
    seen: list[Tensor] = []
    module = session.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        session.model(input_ids=tokens.ids)
        module._forward_pre_hooks.clear()
        parts = [seen[0][[o == part for o in tokens.origins]].flatten(0, 1) for part in (0, 1)]
        first, second = (part.T @ part / len(part) for part in parts)
        with session:
            (result,) = session.run().values()
    expected = choose_shrinkage([(second, first), (first, second)])
    assert result.measures["shrinkage"] == pytest.approx(expected, rel=1e-3)
    every_fourth = SplitGram("m", module.in_features)
    every_fourth.update(seen[0])
    assert abs(choose_shrinkage(every_fourth.splits()) - expected) > 0.01


GROUPS = {
    "qkv": r"re:.*self_attn\.[qkv]_proj$",
    "o": r"re:.*o_proj$",
    "gate_up": r"re:.*(gate|up)_proj$",
    "down": r"re:.*down_proj$",
}


def test_matched_modules_see_what_those_before_them_in_the_layer_have_become(llama: Path) -> None:
    """By one modifier, by one for each group, in whatever order those stand."""
    fields = {"block_size": 8, "iterations": 8, "propagate": "matched", "shrinkage": 0.1}
    entries = {f"ARMORModifier@{name}": {"targets": [target], **fields} for name, target in GROUPS.items()}
    expected = results(llama, propagate="matched", shrinkage=0.1)
    for several in (entries, dict(reversed(entries.items()))):
        with make_session(make_job(recipe(llama, **several))) as session:
            found = session.run()
        assert list(found) == list(expected)
        for name, result in found.items():
            assert torch.equal(result.packed.values, expected[name].packed.values)
            assert result.stored_loss == expected[name].stored_loss


def test_matched_leaves_less_error_than_inputs_alone(llama: Path) -> None:
    """Of the last layer's output, on the tokens of the calibration."""
    errors = {}
    for propagate in ("matched", "compressed"):
        modifier = {"targets": [ALL], "block_size": 8, "iterations": 8, "propagate": propagate, "shrinkage": 0.1}
        with make_session(make_job(recipe(llama, ARMORModifier=modifier))) as session:
            (tokens,) = session.tokens.values()
            with torch.no_grad():
                dense = session.model(input_ids=tokens.ids).logits
                session.run()
                errors[propagate] = float((session.model(input_ids=tokens.ids).logits - dense).square().mean())
    assert errors["matched"] < 0.9 * errors["compressed"]


class Routed(nn.Module):
    """An MLP that sees some tokens only, chosen by their hidden states."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = (1000 * hidden[..., 0]).floor() % 2 == 0  # the least error sends tokens elsewhere
        x = hidden[chosen]
        out = torch.zeros_like(hidden)
        out[chosen] = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def test_matched_needs_the_same_tokens_in_both_models(llama: Path) -> None:
    modifier = {"targets": [ALL], "block_size": 8, "iterations": 1, "propagate": "matched", "shrinkage": 0.1}
    session = make_session(make_job(recipe(llama, ARMORModifier=modifier)))
    layer = session.model.model.layers[1]
    layer.mlp = Routed(layer.mlp)
    with (
        session,
        pytest.raises(PlanError, match=r"recipe.*ARMORModifier: model\.layers\.1\.mlp\..*other tokens reach it"),
    ):
        session.run()


def test_modules_that_read_the_same_input_share_b(llama: Path) -> None:
    shared, own = results(llama, share_input_factor=True), results(llama)
    layer = "model.layers.0."
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        first, *others = (shared[layer + name].packed for name in names)
        assert all(torch.equal(first.b, other.b) for other in others)
        assert len({shared[layer + name].losses for name in names}) == 1
        assert not torch.equal(own[layer + names[0]].packed.b, own[layer + names[1]].packed.b)
    assert not torch.equal(shared[layer + "mlp.down_proj"].packed.b, shared[layer + "self_attn.o_proj"].packed.b)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert shared[layer + name].losses == own[layer + name].losses


def test_matched_is_refused_once_the_dense_model_is_gone(llama: Path) -> None:
    mapping = recipe(llama)
    mapping["late_stage"] = {"m": {"ARMORModifier": {"targets": [ALL], "block_size": 8, "propagate": "matched"}}}
    mapping["late_stage"] = {"late_modifiers": mapping["late_stage"]["m"]}
    with pytest.raises(PlanError, match="propagate: matched needs the original model"):
        make_job(mapping)
