"""What a plan predicts: the sums, and `--plan --probe`, which measures random weights and inputs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from armor_recipes.cli.view import WorkDone
from armor_recipes.events import LayerStarted, ModuleFinished
from armor_recipes.modifiers.distillation import modifier as distillation
from armor_recipes.plan import Rates, estimate, estimate_run
from armor_recipes.plan.estimate import kind_of
from armor_recipes.plan.memory import weight_bytes
from armor_recipes.run import Job, probing
from armor_recipes.run.planning import work_estimated
from armor_recipes.run.probing import probed
from tests.support.commands import Shell, write_recipe
from tests.support.engine import ARMOR, MLP, core, make_job, recipe, rng_states

TRAINED: dict[str, Any] = {"epochs": 1, "held_out": 0.4}
SPARSE = {"targets": [r"re:.*q_proj"], "pattern": "2:4"}
ENTRIES: dict[str, dict[str, dict[str, Any]]] = {
    "gradients": {"ARMORModifier": {**ARMOR, "gradient_power": 0.5, "propagate": "dense"}},
    "matched": {"ARMORModifier": {**ARMOR, "objective": "hessian", "propagate": "matched"}},
    "pruning": {"MagnitudeModifier": {"targets": [MLP]}, "SparseGPTModifier": SPARSE},
    "layers": {"ARMORModifier": ARMOR, "BlockRefineModifier": TRAINED},
    "distilled": {"ARMORModifier": ARMOR, "DistillationModifier": {**TRAINED, "core": True}},
    "cores": {"ARMORModifier": ARMOR, "QuantizationModifier": core(targets=[MLP])},
}


def rates_of(job: Job, monkeypatch: pytest.MonkeyPatch) -> Rates:
    """What the probe measured."""
    seen: list[Rates] = []
    real = probing.estimated

    def keep(job: Job, **options: Any) -> Any:
        seen.append(options["rates"])
        return real(job, **options)

    monkeypatch.setattr(probing, "estimated", keep)
    found = probed(job)
    assert found.probed
    assert found.peak_bytes > 0
    assert found.cpu_seconds == pytest.approx(sum(found.cpu_seconds_by.values()), abs=0.5)
    return seen[0]


@pytest.mark.parametrize("name", ENTRIES)
def test_every_kind_of_work_is_measured(name: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, before = make_job(recipe(llama, **ENTRIES[name])), rng_states()
    rates = rates_of(job, monkeypatch)
    assert rng_states() == before
    assert rates.token > 0
    assert rates.likeness > 0
    assert rates.logits > 0
    solved = {row.modifier for row in job.plan.modules}
    assert solved == rates.statistic.keys()
    # Factor modifiers have no trial: their work counts at the pace of the slowest that has one.
    kinds = {kind_of(row) for row in job.plan.modules if "Quantization" not in row.modifier}
    assert rates.solve.keys() == {"", *kinds}
    assert {row.modifier for row in job.plan.refinements} == rates.trained.keys()
    assert all(each > 0 for each in (*rates.solve.values(), *rates.statistic.values()))


def test_blocks_share_the_weights_of_the_first(llama: Path) -> None:
    job = make_job(recipe(llama))
    model = probing._materialised(job)
    one = sum(p.numel() for p in model.get_submodule("model.layers.0").parameters())
    held = {p.data_ptr(): p.numel() for p in model.parameters()}
    whole = sum(p.numel() for p in job.shapes.parameters())
    assert sum(held.values()) == whole - one
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert all(p.is_meta for p in job.shapes.parameters())


def test_the_command_prints_it_and_wants_a_plan(shell: Shell, llama: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, llama)
    done = shell("armor-apply", file, "--plan", "--probe")
    assert done.code == 0, done.err
    assert "measured here on one layer: " in done.out
    found = json.loads(shell("armor-apply", file, "--plan", "--probe", "--json").out)["estimate"]
    assert found["probed"] is True
    assert set(found["cpu_seconds_by"]) == {
        "passes",
        "statistics",
        "solving",
        "committing",
        "training",
        "evaluation",
        "measuring",
        "ends",
    }
    done = shell("armor-apply", file, "--plan", "--report", tmp_path / "r.json")
    assert (done.code, done.out, "--report is of a run, and --plan of none" in done.err) == (2, "", True)
    done = shell("armor-apply", file, "--probe")
    assert (done.code, done.out) == (2, "")
    assert "--probe measures for a plan: give --plan, too" in done.err


def test_the_sums(llama: Path) -> None:
    """60 tokens: two passes of the compressed stream, one of the dense one; evaluation twice."""
    job = make_job(recipe(llama, ARMORModifier=ARMOR, BlockRefineModifier=TRAINED))
    key, refiner = (entry.key for entry in job.recipe.modifiers)
    solve = {"": 0.0, **{kind_of(row): 1e-6 for row in job.plan.modules}}
    rates = Rates(0.5, 0.25, solve, {key: 0.125}, {refiner: 2.0})
    found = estimate_run(job.plan, job.recipe, job.shapes, job.modifiers, rates=rates, evaluated=10)
    solving = sum(1e-6 * row.flops for row in job.plan.modules)
    assert found.cpu_seconds_by == {
        "passes": 60 * 3 * 0.5,
        "statistics": 60 * 0.125,
        "solving": solving,
        "committing": 1.2e-8 * 4 * sum(row.d_out * row.d_in for row in job.plan.modules),
        "training": 60 * 2.0,
        "evaluation": 2 * 10 * 0.75,
        "measuring": 0,
        "ends": 1.0 + 1.7e-8 * weight_bytes(job.shapes),
    }
    assert found.cpu_seconds == pytest.approx(90 + 7.5 + solving + 120 + 15 + 1, abs=0.1)
    assert found.seconds == pytest.approx(found.cpu_seconds / torch.get_num_threads(), abs=0.1)


def test_what_takes_next_to_nothing_is_not_rounded_to_nothing(llama: Path) -> None:
    """A run's time left comes from its parts, however small they are on a fast machine."""
    job = make_job(recipe(llama, ARMORModifier=ARMOR))
    rates = Rates(1e-9, 1e-9, {"": 1e-15}, {entry.key: 1e-9 for entry in job.recipe.modifiers}, {})
    work = WorkDone()
    estimate = estimate_run(job.plan, job.recipe, job.shapes, job.modifiers, rates=rates, evaluated=0)
    work(work_estimated(replace(job, estimate=estimate), {}))
    work(LayerStarted("layers.0", 0, 2))
    work(ModuleFinished("layers.0.q_proj", 1.0, 0.5, 0.1, 0.5))
    assert work.left().endswith(" left")


def test_what_measuring_sizes_takes_is_counted(llama: Path) -> None:
    """2 windows of 12 tokens: for statistics, forward and back for gradients, and so again beside the changes' products; trials."""
    fields = {**ARMOR, "iterations": 30, "gradient_power": 0.5, "block_size": {"budget": 0.9, "windows": 2}}
    job = make_job(recipe(llama, ARMORModifier=fields))
    (key,) = (entry.key for entry in job.recipe.modifiers)
    rates = Rates(0.5, 0.25, {"": 1e-6}, {key: 0.0}, {})
    found = estimate_run(job.plan, job.recipe, job.shapes, job.modifiers, rates=rates, evaluated=0)
    trials = 4 / 30 * 1e-6 * sum(row.flops for row in job.plan.modules)  # two cycles, and what begins and ends a solve
    assert found.cpu_seconds_by["measuring"] == pytest.approx(2 * 12 * (6 * 0.5 + 5 * 0.25) + trials, abs=0.1)
    assert make_job(recipe(llama, ARMORModifier=ARMOR)).estimate.cpu_seconds_by["measuring"] == 0


def test_small_models_cost_what_does_not_depend_on_their_size(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for each module and step, and numbers of a weight that are looked at, beside the products."""
    speeds = estimate._Speeds(solve=1e6, product=math.inf, value=1e3, call=2.0, logit=500.0)
    monkeypatch.setattr(estimate._Speeds, "measured", lambda _: speeds)
    job = make_job(recipe(llama, ARMORModifier=ARMOR))
    rates = estimate.product_rates(job.plan, job.shapes, job.modifiers)
    for row in job.plan.modules:
        beside = (3 * 33 + 127) * row.d_out * row.d_in / 1e3 + (3 * 300 + 320) * 2.0
        assert rates.solve[kind_of(row)] * row.flops == pytest.approx(row.flops / 1e6 + beside)
    widths = 2 * (4 * 64 + 3 * 96)
    assert rates.token == pytest.approx(4 * widths / 1e3 + 25 * 15 * 2.0 / 24)
    assert rates.logits == pytest.approx(4 * 96 / 500.0)  # numbers that no cache holds
    assert rates.likeness == pytest.approx((60 + 25) * 96 / 1e3)  # compared, and kept before that


def test_comparing_with_the_dense_model_counts_once(llama: Path) -> None:
    fields = {"dataset": "builtin:pydoc-heldout", "sequence_length": 12, "samples": 5}
    job = make_job({**recipe(llama, ARMORModifier=ARMOR), "evaluation": {"fidelity": fields}})
    rates = Rates(0.5, 0.25, {"": 0.0}, {}, {}, likeness=2.0)
    found = estimate_run(job.plan, job.recipe, job.shapes, job.modifiers, rates=rates, evaluated=60)
    assert found.cpu_seconds_by["evaluation"] == pytest.approx(2 * 60 * 0.75 + 60 * 2.0)


def test_products_of_a_training_count_in_their_own_dtype(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {torch.float32: 1e6, torch.bfloat16: 4e6}
    monkeypatch.setattr(estimate, "_product_speed", speeds.__getitem__)
    monkeypatch.setattr(estimate, "_rate", lambda *_: 1e18)

    def training(half: bool, **fields: Any) -> float:
        monkeypatch.setattr(distillation, "multiplies_bfloat16", lambda _: half)
        job = make_job(recipe(llama, ARMORModifier=ARMOR, DistillationModifier={**TRAINED, **fields}))
        return job.estimate.cpu_seconds_by["training"]

    assert training(half=False) == pytest.approx(4 * training(half=True), rel=0.01)
    assert training(half=True, logit_stride=8) < training(half=True)
    assert training(half=True, compute_dtype="float32") == training(half=False)


def test_what_no_recipe_names_is_told_and_not_guessed(llama: Path, tmp_path: Path) -> None:
    mapping = recipe(llama)
    mapping["evaluation"] = {"perplexity": {"dataset": "builtin:pydoc-heldout", "sequence_length": 16}}
    found = make_job(mapping).estimate
    assert found.cpu_seconds_by["evaluation"] == 0
    assert found.uncounted == (
        "the evaluation of perplexity is not counted: how long the data are shows once they are read",
    )
    mapping["evaluation"]["perplexity"]["windows"] = 4
    assert make_job(mapping).estimate.uncounted == ()
