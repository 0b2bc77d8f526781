"""Every family of transformers through the whole tool: ten in each run, all of them with `make test-families`.

With ARMOR_FAMILY_RECORDS=FOLDER each structure's record is kept there, and one that is there is not run again;
`python -m tests.families.page FOLDER` makes docs/support.md and `expected.json` of a complete folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.families.pipeline import Record, read_record, run_family, write_record
from tests.families.stock import Stock
from tests.families.structures import TEN, Structure, expected, structures
from tests.support.forks import Forks

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own of old families
RECORDS = os.environ.get("ARMOR_FAMILY_RECORDS")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Stock:
    return Stock(tmp_path_factory.mktemp("stock"), forks)


def record_of(structure: Structure, folder: Path, stock: Stock) -> Record:
    """From RECORDS where it is there."""
    if RECORDS and (kept := read_record(structure, Path(RECORDS))):
        return kept
    record = run_family(structure.model_type, folder, stock, structure.kind)
    if RECORDS:
        write_record(structure, record, Path(RECORDS))
    return record


def check(structure: Structure, record: Record) -> None:
    wanted = expected().get(str(structure))
    if wanted is None:
        assert record.outcome == "right", f"{record.outcome} at {record.step}: {record.reason}"
        return
    assert (record.outcome, record.step) == (wanted.outcome, wanted.step), (
        f"{record.reason}: record it in expected.json"
    )


@pytest.mark.parametrize("structure", TEN, ids=str)
def test_ten_families(structure: Structure, tmp_path: Path, stock: Stock) -> None:
    check(structure, record_of(structure, tmp_path, stock))


@pytest.mark.families
@pytest.mark.parametrize("structure", [s for s in structures() if s not in TEN], ids=str)
def test_every_other_family(structure: Structure, tmp_path: Path, stock: Stock) -> None:
    check(structure, record_of(structure, tmp_path, stock))
