"""The page of a run, opened in headless Chromium."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import armor_recipes
from armor_recipes.checkpoint.verify import verify
from armor_recipes.report.curves import thinned
from armor_recipes.report.page import page
from armor_recipes.report.view import run_view
from tests.support.browser import CHROMIUM, browser
from tests.support.engine import recipe, save_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return armor_recipes.apply(recipe(save_model(folder / "m"), folder / "out")).output


def test_a_run_writes_its_report_beside_the_manifest(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert str(run.parent) not in text
    hashed = json.loads((run / "armor_manifest.json").read_text())["file_hashes"]
    assert not {"report.html", "report.md", "report.json"} & hashed.keys()
    assert verify(run).missing == ()
    view = run_view(run)
    assert [block for block, _ in view["depth"]] == ["model.layers.0", "model.layers.1"]
    assert all(len(row["curve"]) == 4 and row["overhead"] > 0 and 0 <= row["masks"] <= 100 for row in view["modules"])


def test_what_a_text_says_is_no_markup(run: Path) -> None:
    view = run_view(run) | {"model": "</script><img src=x onerror=alert(1)>", "recipe": "</script><!--"}
    text = page([view])
    assert text.count("</script>") == page([run_view(run)]).count("</script>")
    assert "<img" not in text.partition("<body>")[2].partition('<script type="application/json"')[0]


def test_curves_are_thinned_to_what_was_measured() -> None:
    assert thinned(4, 8) == [0, 1, 2, 3]
    found = thinned(20_001, 120)
    assert (found[0], found[-1]) == (0, 20_000)
    assert len(found) <= 120


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_in_a_browser(run: Path, tmp_path: Path, width: int, dark: bool) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.show(run / "report.html", width=width, dark=dark)
        assert tab.complaints == []
        assert tab.requests == [(run / "report.html").resolve().as_uri()]
        assert tab.ask("innerWidth") == width
        assert tab.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert tab.ask("document.querySelectorAll('.chart svg').length") == 5
        assert tab.ask("document.querySelectorAll('#losses tbody tr').length") == 14
        assert tab.ask("document.documentElement.dataset.theme") == ("dark" if dark else "light")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_runs_side_by_side_in_a_browser(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "both.html"
    without = {key: [] if key in ("depth", "modules") else value for key, value in run_view(run).items()}
    file.write_text(page([run_view(run), run_view(run, "another"), without]), encoding="utf-8")
    with browser(tmp_path / "profile") as tab:
        tab.show(file, width=360, dark=False)
        assert tab.complaints == []
        assert tab.ask("document.querySelectorAll('#summary thead th').length") == 10
        assert tab.ask("document.querySelectorAll('.chart svg').length") > 3
        assert tab.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
