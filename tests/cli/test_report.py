"""`armor report`: the page of a run anew, or of several."""

from __future__ import annotations

from pathlib import Path

import armor_recipes
from tests.support.commands import Shell
from tests.support.engine import recipe


def test_armor_report_writes_a_run_anew_and_runs_side_by_side(llama: Path, tmp_path: Path, shell: Shell) -> None:
    run = armor_recipes.apply(recipe(llama, tmp_path / "out")).output
    page_file, text = run / "report.html", (run / "report.html").read_text()
    page_file.unlink()
    assert shell("armor", "report", run).out == f"wrote {page_file}\n"
    assert page_file.read_text() == text
    file, taken = tmp_path / "both.html", tmp_path / "taken.html"
    assert shell("armor", "report", run, run, "--output", file).code == 0
    assert shell("armor", "report", run, run, "--output", file).code == 0  # a page of ours is replaced
    taken.write_text("mine")
    for code, words in (
        (2, ("armor", "report", run, run)),
        (2, ("armor", "report", run, "--output", taken)),
        (5, ("armor", "report", llama)),
        (5, ("armor", "report", run, tmp_path / "nowhere", "--output", file)),
    ):
        done = shell(*words)
        assert (done.code, done.out) == (code, ""), done.err
        assert "Traceback" not in done.err
    assert taken.read_text() == "mine"
