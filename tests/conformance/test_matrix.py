"""Every registered modifier on every kind of layer, by the whole tool: what comes out is right, or refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from armor_recipes.errors import PlanError
from armor_recipes.modifiers import modifiers
from armor_recipes.modifiers.kinds.contract import entry_name
from armor_recipes.run import prepare
from armor_recipes.run.job import read_recipe
from tests.conformance.cases import CLAIMS, COLUMNS, FIELDS, SIZES, Case, Column, cases, expected, mapping
from tests.conformance.checks import ROUNDING, Dense, Ran, Record, digest, loads_when_saved_again, record, run

AGAIN = "make modifiers"
SLOW = pytest.mark.slow


def columns(*, every: bool = False) -> list[object]:
    return [pytest.param(c, id=str(c), marks=SLOW if c.slow or every else ()) for c in COLUMNS]


class Cells:
    """Runs of this process, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dense: dict[str, Dense] = {}
        self.made: dict[tuple[str, str], tuple[Record, Ran | None]] = {}

    def model(self, column: Column) -> Dense:
        if column.name not in self.dense:
            self.dense[column.name] = Dense.write(column, self.folder / column.name)
        return self.dense[column.name]

    def get(self, case: Case, column: Column) -> tuple[Record, Ran | None]:
        key = str(case), column.name
        if key not in self.made:
            self.made[key] = record(case, self.model(column), self.folder / "-".join(key))
        return self.made[key]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    return Cells(tmp_path_factory.mktemp("cells"))


def test_every_modifier_has_a_row() -> None:
    assert {case.modifier for case in cases()} == set(modifiers())
    assert set(expected()["cells"]) == {str(case) for case in cases()}, f"run {AGAIN}"
    assert all(row.keys() == {str(column) for column in COLUMNS} for row in expected()["cells"].values())


@pytest.mark.parametrize("name", modifiers())
def test_the_rows_of_a_modifier_can_be_written(name: str) -> None:
    for case in (case for case in cases() if case.modifier == name):
        read = read_recipe(mapping(case.recipe(COLUMNS[0]), Path("model"), Path("out")))
        assert read.modifiers, f"give FIELDS in tests/conformance/cases.py what {name} cannot do without"
    assert FIELDS.keys() <= modifiers().keys()


@pytest.mark.parametrize("column", columns())
@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_cell_is_as_recorded(case: Case, column: Column, cells: Cells) -> None:
    found, _ = cells.get(case, column)
    assert found.to_dict() == expected()["cells"][str(case)][column.name], f"if that is right, run {AGAIN}"


@pytest.mark.parametrize("case", cases(), ids=str)
def test_what_does_not_fit_is_refused_or_listed(case: Case, tmp_path: Path) -> None:
    """Taken and skipped are all that the targets match; without `unfit: skip` the plan names what it cannot take."""
    column = COLUMNS[0]
    if expected()["cells"][str(case)][column.name]["outcome"] == "refused":
        return
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 62}, num_key_value_heads=2))
    model.save_pretrained(tmp_path / "odd")
    group = case.recipe(column)
    skipping = {name: {**fields, "unfit": "skip", "optional": True} for name, fields in group.items()}
    plan = prepare(read_recipe(mapping(skipping, tmp_path / "odd", tmp_path / "out"))).plan
    for name, fields in group.items():
        own = [row for row in plan.rows if entry_name(row.modifier) == name]
        taken = {module for row in own for module in (row.takes or row.touches)}
        skipped = {one.name for one in plan.skipped if entry_name(one.modifier) == name}
        matched = {module for module in column.modules if re.match(fields["targets"][0].removeprefix("re:"), module)}
        assert not taken & skipped
        assert modifiers()[name].kind.chooses or matched <= taken | skipped
    if plan.skipped:
        with pytest.raises(PlanError, match=re.escape(plan.skipped[0].name)):
            prepare(read_recipe(mapping(group, tmp_path / "odd", tmp_path / "out")))


@pytest.mark.parametrize("column", columns())
@pytest.mark.parametrize("name", CLAIMS)
def test_a_method_is_no_worse_than_what_it_claims_to_beat(name: str, column: Column, cells: Cells) -> None:
    other, measure = CLAIMS[name]
    errors = [ran.error(measure) for case in (name, other) if (ran := cells.get(Case(case), column)[1]) is not None]
    assert len(errors) == 2
    assert errors[0] <= errors[1] * (1 + ROUNDING)


@pytest.mark.parametrize("column", columns(every=True))
@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_same_recipe_writes_the_same_bytes(case: Case, column: Column, cells: Cells, tmp_path: Path) -> None:
    _, first = cells.get(case, column)
    if first is None:
        return  # refused
    second = run(case, cells.model(column), tmp_path / "again")
    assert digest(second.result.output) == digest(first.result.output)
    loads_when_saved_again(first, tmp_path)
