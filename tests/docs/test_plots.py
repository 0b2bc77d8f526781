"""Plots of experiments are those of the JSON as it is, and a page shows each with words for who does not see it."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.support.pages import ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "plots.py"))
NAMES = TOOL["names"]()
PLOTS = ROOT / "docs" / "assets" / "experiments"


@pytest.mark.parametrize("name", NAMES)
def test_a_plot_is_of_its_json(name: str) -> None:
    text = (PLOTS / f"{name}.svg").read_text(encoding="utf-8")
    assert re.findall(r"<dc:source>(.*?)</dc:source>", text) == [TOOL["source"](name)]
    assert "<dc:date>" not in text  # the same bytes on another day


def test_each_is_shown_once_with_a_text() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    shown = re.findall(r"^!\[([^\]]{40,})\]\(assets/experiments/([\w/-]+)\.svg\)$", page, re.MULTILINE)
    assert sorted(name for _, name in shown) == NAMES
    assert sorted(file.relative_to(PLOTS).with_suffix("").as_posix() for file in PLOTS.rglob("*.svg")) == NAMES
