"""The share of a session's work that is done, told with each event."""

from __future__ import annotations

from pathlib import Path

import pytest

from armor_recipes.events import Event, ModuleFinished, UnitRefined
from tests.support.engine import ARMOR, make_job, make_session, recipe


@pytest.mark.parametrize("solving", [1.0, 3.0])
def test_entries_count_by_their_seconds(llama: Path, solving: float) -> None:
    job = make_job(recipe(llama, ARMORModifier=ARMOR, BlockRefineModifier={"epochs": 1}))
    solver, refiner = (entry.key for entry in job.recipe.modifiers)
    seen: list[Event] = []
    with make_session(job, observer=seen.append, seconds={solver: solving, refiner: 1.0}) as session:
        session.run()
    shares = [event.share for event in seen if isinstance(event, ModuleFinished | UnitRefined)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    kinds = (ModuleFinished, UnitRefined)
    by_kind = dict.fromkeys(kinds, 0.0)
    before = 0.0
    for event in seen:
        if isinstance(event, kinds):
            by_kind[type(event)] += event.share - before
            before = event.share
    assert by_kind[ModuleFinished] == pytest.approx(solving / (solving + 1))


def test_a_plan_tells_the_seconds_of_each_entry(llama: Path) -> None:
    job = make_job(recipe(llama, ARMORModifier=ARMOR, BlockRefineModifier={"epochs": 1}))
    solver, refiner = (entry.key for entry in job.recipe.modifiers)
    found, parts = job.estimate.cpu_seconds_by_entry, job.estimate.cpu_seconds_by
    assert found[refiner] == pytest.approx(parts["training"])
    assert found[solver] == pytest.approx(
        sum(parts[name] for name in ("passes", "statistics", "solving", "committing"))
    )


def test_without_seconds_operations_count_alike(llama: Path) -> None:
    job = make_job(recipe(llama, ARMORModifier=ARMOR))
    seen: list[Event] = []
    with make_session(job, observer=seen.append) as session:
        session.run()
    flops = {row.name: row.flops for row in job.plan.modules}
    before = 0.0
    for event in seen:
        if isinstance(event, ModuleFinished):
            assert event.share - before == pytest.approx(flops[event.module] / sum(flops.values()))
            before = event.share
    assert before == pytest.approx(1)
