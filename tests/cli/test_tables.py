"""What a plan's table says of the model's blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from armor_recipes.cli.tables import plan_table
from armor_recipes.run import Job
from tests.support.engine import make_job, recipe, save_model


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(recipe(save_model(tmp_path_factory.mktemp("llama") / "m")))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("layer.0", "layer.1"), "2 layers"),
        (("e.layers.0", "e.layers.1", "d.0"), "3 blocks (e.layers.{0-1}, d.0)"),
        (("h.0", "h.1", "proj", "head"), "4 blocks (h.{0-1}, proj, head)"),
        (tuple("abcdefgh"), "8 blocks (a, b, c, d, e, f and 2 more)"),
    ],
)
def test_a_plan_is_titled_by_its_blocks(job: Job, names: tuple[str, ...], said: str) -> None:
    console = Console(width=400, no_color=True)
    with console.capture() as captured:
        console.print(plan_table(replace(job.plan, layers=names), job.estimate))
    assert captured.get().splitlines()[0].strip() == f"Plan for {job.plan.model}: {said}"
