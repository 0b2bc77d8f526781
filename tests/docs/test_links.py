"""Links between pages lead somewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from armor_recipes import errors
from tests.support.pages import PAGES, ROOT, section, without_blocks

_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_headings_of_a_page_differ(page: Path) -> None:
    headings = re.findall(r"^#{1,3} .+$", without_blocks(page), re.MULTILINE)
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page: Path) -> None:
    broken = []
    for match in _LINK.finditer(without_blocks(page)):
        target, _, anchor = match["target"].partition("#")
        if "://" in target:
            continue
        file = (page.parent / target) if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(match["target"])
    assert not broken


def test_one_page_links_every_page_and_the_readme_links_it() -> None:
    index = ROOT / "docs" / "pages.md"
    text = index.read_text(encoding="utf-8")
    others = [page for page in PAGES if page.name not in ("README.md", "pages.md")]
    assert [page for page in others if f"]({os.path.relpath(page, index.parent)})" not in text] == []
    assert "](docs/pages.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_error_names_a_section_that_says_its_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ArmorError)]
    assert len(kinds) > 9
    for kind in kinds:
        page, _, anchor = kind.page().partition("#")
        assert anchor in anchors(ROOT / page), kind.page()
        assert section(ROOT / page, kind.__name__).startswith(f"\nExit code {kind.exit_code}")
    sections = re.findall(r"^## (.*)$", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(sections) == sorted(kind.__name__ for kind in kinds)


def test_an_error_of_a_plug_in_names_the_section_of_the_nearest_class() -> None:
    class TheirError(errors.UnfitError):
        pass

    assert TheirError.page() == "docs/errors.md#unfiterror"
