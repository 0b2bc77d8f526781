"""docs/support.md against the structures of the matrix."""

from __future__ import annotations

import re

import transformers

from tests.families.page import HEAD, PAGE
from tests.families.structures import expected, structures


def test_the_page_lists_what_the_matrix_has() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if not page.startswith(HEAD.format(version=transformers.__version__)[:200]):
        return  # another transformers has other families: `make test-families` tells which
    rows = set(re.findall(r"^\| ([\w.-]+) \| \w+ \|", page, re.MULTILINE))
    others = set(re.findall(r"`([\w.-]+)`", page.split("## Not in the table")[1]))
    assert rows | others >= {str(structure) for structure in structures()}
    assert rows <= {str(structure) for structure in structures()}


def test_what_is_expected_is_of_structures_that_there_are() -> None:
    if PAGE.read_text(encoding="utf-8").startswith(HEAD.format(version=transformers.__version__)[:200]):
        assert expected().keys() <= {str(structure) for structure in structures()}
