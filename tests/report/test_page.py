"""The page of a run, opened in headless Chromium."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import armor_recipes
from armor_recipes.checkpoint.verify import verify
from armor_recipes.errors import CheckpointError
from armor_recipes.report.curves import thinned
from armor_recipes.report.page import page
from armor_recipes.report.view import run_view
from tests.support.browser import CHROMIUM, browser, look
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
        look(tab, run / "report.html", width=width, dark=dark, modules=14)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_runs_side_by_side_in_a_browser(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "both.html"
    without = {key: [] if key in ("depth", "modules") else value for key, value in run_view(run).items()}
    another = run_view(run, "another")
    another["keys"] = [[key, "24" if key.endswith(".block_size") else value] for key, value in another["keys"]]
    file.write_text(page([run_view(run), another, without]), encoding="utf-8")
    with browser(tmp_path / "profile") as tab:
        tab.show(file, width=360, dark=False)
        assert tab.complaints == []
        assert tab.ask("document.querySelectorAll('#summary thead th').length") == 10
        marked = tab.ask("[...document.querySelectorAll('#origin tr:has(.differs)')].map((row) => row.innerText)")
        (said,) = marked
        assert said.split() == ["prune_stage.armor_modifiers.ARMORModifier.block_size", "8", "24", "8"]
        assert tab.ask("document.querySelectorAll('.chart svg').length") > 3
        assert tab.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


CHART = "charts.find((one) => one.box.closest('#{}')).instance"
LOSSES = CHART.format("losses") + ".getOption()"
TIP = "document.querySelector('{} .chart > div:last-child').innerText"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_curves_are_shown_filtered_and_scaled(run: Path, tmp_path: Path) -> None:
    modules = run_view(run)["modules"]
    with browser(tmp_path / "profile") as tab:
        tab.show(run / "report.html")
        assert sorted(tab.ask(f"{LOSSES}.series.map((one) => one.data)")) == sorted(row["curve"] for row in modules)

        tab.hover("#losses .chart", "[box.clientWidth / 2, box.clientHeight / 2]")
        first, *others = tab.until(TIP.format("#losses")).splitlines()
        assert first.startswith("iteration ")
        worst = max(modules, key=lambda row: row["curve"][int(first.split()[1])][1])
        assert others[0].startswith(f"{worst['block'].split('.')[-1]} {worst['kind']}: ")
        assert others[-1] == f"… and {len(modules) - 8} more below"

        worst = modules[-1]
        kinds, blocks = (list(dict.fromkeys(row[key] for row in modules)) for key in ("kind", "block"))
        at = [kinds.index(worst["kind"]), blocks.index(worst["block"])]
        place = f"{CHART.format('map')}.convertToPixel({{ gridIndex: 0 }}, {at})"
        tab.hover("#map .chart", place)
        assert tab.until(TIP.format("#map")).splitlines()[0] == worst["name"]

        # By keys: the first layer, then the first type, then a linear scale.
        for key, left in (("ArrowDown", len(kinds)), ("ArrowDown", 1)):
            tab.ask(f"document.querySelectorAll('#losses select')[{int(left == 1)}].focus()")
            tab.press(key)
            assert tab.until(f"{LOSSES}.series.length === {left}")
            assert tab.ask("document.querySelector('#losses [aria-live]').innerText") == f"{left} of 14 curves"
        assert tab.ask(f"{LOSSES}.series[0].data") == modules[0]["curve"]
        assert tab.ask(f"{LOSSES}.yAxis[0].type") == "log"
        tab.ask("document.querySelector('#losses input[type=checkbox]').focus()")
        tab.press(" ")
        assert tab.until(f"{LOSSES}.yAxis[0].type === 'value'")
        assert tab.complaints == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_the_page_is_walked_by_keys(run: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.show(run / "report.html")
        focused = "document.activeElement"
        tab.press("Tab")
        assert tab.ask(f"{focused}.className") == "skip"
        assert tab.ask(f"{focused}.getBoundingClientRect().left") > 0  # it shows itself
        tab.press("Tab")
        tab.press("Enter")
        assert tab.until("document.documentElement.dataset.theme === 'dark'")
        assert tab.ask(f"{focused}.getAttribute('aria-pressed')") == "true"
        met = []
        for _ in range(60):
            tab.press("Tab")
            met.append(tab.ask(f"{focused}.closest('section')?.id ?? {focused}.hash ?? ''"))
        sections = tab.ask("[...document.querySelectorAll('section')].map((one) => one.id)")
        assert [f"#{name}" for name in sections] == met[: len(sections)]  # the links to them, in order
        reached = tab.ask(
            "[...document.querySelectorAll('section')].filter((one) => one.querySelector('select, summary')).map((one) => one.id)"
        )
        assert set(reached) <= set(met)
        unnamed = (
            "[...document.querySelectorAll('svg')].filter((one) => !one.parentElement.closest('[aria-label]')).length"
        )
        assert tab.ask(unnamed) == 0


def test_a_report_of_a_later_release_is_refused(run: Path, tmp_path: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["report_version"] == 1
    for file in ("armor_manifest.json", "recipe.yaml"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    (tmp_path / "report.json").write_text(json.dumps(report | {"report_version": 2}))
    with pytest.raises(CheckpointError, match="report_version 2, and this release reads 1: take a later release"):
        run_view(tmp_path)
