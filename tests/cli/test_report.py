"""`armor report`: the page of a run anew, or of several."""

from __future__ import annotations

import json
import shutil
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
    names = [run, shutil.copytree(run, tmp_path / "a" / "out"), shutil.copytree(run, tmp_path / "b" / "out")]
    assert shell("armor", "report", *names, "--output", file).code == 0
    assert [f'"name":"{name}"' in file.read_text() for name in (f"{tmp_path.name}/out", "a/out", "b/out")] == [True] * 3


def test_a_damaged_report_changes_nothing(llama: Path, tmp_path: Path, shell: Shell) -> None:
    run = armor_recipes.apply(recipe(llama, tmp_path / "out")).output
    report, before = json.loads((run / "report.json").read_text()), (run / "report.html").read_bytes()
    damage = [(key, "12 s") for key in ("cpu_seconds", "size_after_bytes", "peak_memory_bytes")]
    for key, value in (*damage, ("cpu_seconds_estimated", []), ("peak_memory_bytes", 10**400)):
        (run / "report.json").write_text(json.dumps({**report, key: value}))
        for words in ((run,), (run, run, "--output", tmp_path / "both.html")):
            done = shell("armor", "report", *words)
            assert (done.code, "Traceback" in done.err) == (5, False), done.err
        assert (run / "report.html").read_bytes() == before
    assert not (tmp_path / "both.html").exists()
    (run / "report.json").write_text(json.dumps(report))
    manifest = (run / "armor_manifest.json").read_text()
    (run / "armor_manifest.json").write_text(json.dumps({**json.loads(manifest), "recipe_sha256": None}))
    assert shell("armor", "report", run).code == 5
    (run / "armor_manifest.json").write_text(manifest)
    for text in ("{a: [", None):
        (run / "recipe.yaml").unlink() if text is None else (run / "recipe.yaml").write_text(text)
        done = shell("armor", "report", run)
        assert (done.code, "recipe.yaml is missing or holds no recipe" in done.err) == (5, True), done.err


def test_evaluations_that_were_taken_later_are_shown_from_then_on(llama: Path, tmp_path: Path, shell: Shell) -> None:
    run = armor_recipes.apply(recipe(llama, tmp_path / "out")).output
    few = ("--set", "turns=2", "--set", "prompt_tokens=8", "--set", "new_tokens=2")
    found = shell("armor", "eval", run, "--measure", "speed", "--against", llama, *few, "--json").out
    (file := tmp_path / "speed.json").write_text(found)
    assert str(tmp_path) not in found
    assert shell("armor", "report", run, "--eval", file).code == 0
    assert shell("armor", "report", run).code == 0  # and kept
    text = (run / "report.md").read_text()
    assert "| speed decode tokens per second (armor eval) | " in text
    later = json.loads((run / "report.json").read_text())["later"]["speed"]
    assert later["after"]["decode_tokens_per_second"] == json.loads(found)["after"]["decode_tokens_per_second"]
    assert later["before"]["decode_tokens_per_second"] == json.loads(found)["before"]["decode_tokens_per_second"]
    assert "speed decode tokens per second (armor eval)" in (run / "report.html").read_text()
    twice = shutil.copy(file, tmp_path / "twice.json")
    other = shutil.copytree(run, tmp_path / "other")
    (other / "armor_manifest.json").write_bytes((run / "armor_manifest.json").read_bytes() + b"\n")
    for code, words in (
        (5, (other, "--eval", file)),
        (5, (run, "--eval", run / "report.json")),
        (5, (run, "--eval", tmp_path / "none.json")),
        (2, (run, run, "--eval", file, "--output", tmp_path / "both.html")),
        (2, (run, "--eval", file, "--eval", twice)),
    ):
        done = shell("armor", "report", *words)
        assert (done.code, done.out) == (code, ""), done.err
        assert "Traceback" not in done.err
