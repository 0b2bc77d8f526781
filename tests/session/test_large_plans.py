"""Plans of the largest mixtures of experts: work in proportion to the modules, one line for experts that are alike."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from armor_recipes.checkpoint.config import quantization_config
from armor_recipes.cli.tables import plan_table, size
from armor_recipes.errors import PlanError
from armor_recipes.model.blocks import Stacks
from armor_recipes.model.linears import Linears
from armor_recipes.modifiers import modifiers
from armor_recipes.plan import Plan, RunEstimate, building, estimate_run, make_plan, targets
from armor_recipes.report.measure import process_bytes
from armor_recipes.run.job import read_recipe
from tests.support.engine import core, recipe
from tests.support.large import mixture

KINDS: dict[str, dict[str, Any]] = {
    "ARMORModifier": {"targets": [r"re:.*self_attn\..*_proj$"], "block_size": 64},
    "ARMORModifier__experts": {"targets": [r"re:.*mlp\..*_proj$"], "block_size": 32},
    "QuantizationModifier": core(targets=["Linear"], ignore=["lm_head", r"re:.*mlp\.gate$"]),
    "BlockRefineModifier": {"targets": [r"re:.*self_attn\..*_proj$"], "ignore": ["re:.*"], "optional": True},
}


def plan_of(model: Any) -> tuple[Plan, Callable[[], RunEstimate]]:
    mapping = {**recipe("large", **KINDS), "serve": {"tensor_parallel": [1, 2, 4]}}
    read = read_recipe(mapping)
    made = {entry.key: modifiers()[entry.kind](entry.config) for entry in read.modifiers}
    plan = make_plan(read, model, made, itemsize=2)
    return plan, lambda: estimate_run(plan, read, model, made)


def all_of_it(model: Any) -> tuple[Plan, str]:
    """Everything that `--plan` and a run make of a plan; the table as it is printed."""
    plan, estimated = plan_of(model)
    estimate = estimated()
    assert json.loads(json.dumps(plan.to_dict()))["totals"]["modules"] == plan.totals.modules
    assert len(plan.sha256) == 64
    assert hash(plan) == hash(plan)
    packed = {name: row.spec for name, row in plan.stored.items() if row.spec is not None}
    quantization_config(packed, [])
    for key in dict.fromkeys(row.modifier for row in plan.rows):
        assert sum(len(plan.of(key, block)) for block in range(len(plan.layers))) > 0
    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        console.print(plan_table(plan, estimate))
    return plan, captured.get()


def calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what costs time was called while a plan was made."""
    seen: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    with monkeypatch.context() as patch:
        monkeypatch = patch
        counted(targets, "is_match")
        counted(Stacks, "block_of")
        counted(Linears, "places")
        counted(building, "find_linears")
        counted(type(model), "named_modules")
        plan_of(model)
    return seen


def test_calls_grow_as_modules_do(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (mixture(layers=layers, experts=8, hidden=256, intermediate=128) for layers in (2, 8))
    sizes = [sum(1 for _ in model.modules()) for model in (small, large)]
    few, many = calls(small, monkeypatch), calls(large, monkeypatch)
    assert few.keys() == many.keys()
    for name, count in many.items():
        assert count <= 4 * few[name], name
    assert many["is_match"] <= 6 * sizes[1]  # five targets, and `ignore` on what they match
    assert many["block_of"] <= 4 * sizes[1]
    assert many["find_linears"] == 1
    assert many["named_modules"] == few["named_modules"] <= 6


def test_experts_that_are_alike_are_one_line() -> None:
    plan, text = all_of_it(mixture(layers=4, experts=5, hidden=256, intermediate=128, every=2))
    lines = [line for line in text.splitlines() if "experts." in line]
    assert len(lines) == 2 * 3
    assert "layers.{1,3}.mlp.experts.{0-4}.gate_proj ×10" in lines[0]
    (row,) = {row.bytes_before for row in plan.modules if "layers.1.mlp.experts" in row.name}
    assert f" {size(10 * row)} " in lines[0]
    assert len([row for row in plan.modules if "layers.1.mlp.experts" in row.name]) == 2 * 15
    assert "held back by ignore: model.layers.{1,3}.mlp.gate, lm_head" in text


def test_what_many_experts_lack_is_told_once() -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(mixture(layers=3, experts=4, hidden=256, intermediate=64))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all("serve.tensor_parallel 4: model.layers.0.mlp.experts.0." in line for line in lines)
    assert all(" (and 11 more like it: model.layers.0.mlp.experts.1." in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "modules"),
    [
        ({"layers": 94, "experts": 128, "hidden": 4096, "intermediate": 1536}, 94 * (4 + 3 * 128)),
        ({"layers": 48, "experts": 128, "hidden": 5120, "intermediate": 8192, "every": 2}, 48 * 4 + 24 * 3 * 129),
    ],
    ids=["qwen3-moe", "llama4-maverick"],
)
def test_plans_of_four_hundred_billion_parameters(shape: dict[str, int], modules: int) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, and not that of tests before
    before = process_bytes("VmHWM")
    model = mixture(**shape)
    started = time.process_time()
    plan, text = all_of_it(model)
    seconds, peak = time.process_time() - started, (process_bytes("VmHWM") - before) / 1e6
    print(
        f"{plan.totals.modules} modules: {seconds:.1f} s of processor time, {peak:.0f} MB at most, {len(text.splitlines())} lines"
    )
    assert plan.totals.modules == modules
    assert seconds < 30
    assert peak < 1000
