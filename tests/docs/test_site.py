"""The site: zensical.toml and what tools/site.py gathers for it. `make docs` builds it, and checks what was built."""

from __future__ import annotations

import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tests.support.pages import PAGES, ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "site.py"))


def targets(entry: Any) -> Iterator[str]:
    """All files of a navigation, in order."""
    if isinstance(entry, str):
        yield entry
    else:
        for below in entry.values() if isinstance(entry, dict) else entry:
            yield from targets(below)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "docs"
    TOOL["gather"](folder)
    return folder


def test_every_page_is_in_the_navigation_once(tree: Path) -> None:
    named = list(targets(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]))
    assert len(named) == len(set(named))
    assert set(named) == {page.relative_to(tree).as_posix() for page in tree.rglob("*.md")}
    ours = {TOOL["place"](PurePosixPath(page.relative_to(ROOT))).as_posix() for page in PAGES}
    assert ours <= set(named)


def test_links_of_the_gathered_pages_are_those_of_the_site() -> None:
    text, linked = TOOL["moved"](
        "[a](../README.md#limits) [b](solver.md) [c](../examples/ci/README.md) [d](https://x.y/z.md) [e](#here)\n\n"
        "```text\n[f](../README.md)\n```\n\n| `one\\|two` | three \\| four |\n",
        PurePosixPath("docs/cli.md"),
    )
    assert text == (
        "[a](index.md#limits) [b](solver.md) [c](examples/ci/index.md) [d](https://x.y/z.md) [e](#here)\n\n"
        "```text\n[f](../README.md)\n```\n\n| `one|two` | three \\| four |\n"
    )
    assert list(map(str, linked)) == ["README.md", "docs/solver.md", "examples/ci/README.md"]


def test_what_leads_nowhere_or_is_fetched_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h2 id="here">A</h2><a href="#here">1</a><a href="b.html#there">2</a><a href="b.html#gone">3</a>'
        '<a href="c.html">4</a><a href="https://x.y/">5</a><script src="https://cdn.x/y.js"></script><img src="a.html">'
        '<link rel="canonical" href="https://x.y/a.html"><link rel="stylesheet" href="//fonts.x/css">'
    )
    (tmp_path / "b.html").write_text('<p id="there">')
    assert TOOL["complaints"](tmp_path) == [
        "a.html: fetches https://cdn.x/y.js",
        "a.html: fetches //fonts.x/css",
        "a.html: b.html#gone leads nowhere",
        "a.html: c.html leads nowhere",
    ]
