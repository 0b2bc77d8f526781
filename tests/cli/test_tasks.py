"""Tasks of lm-eval, offline: a task of one's own with its data beside it, and the same figures by our own measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from armor_recipes import builtin
from tests.support.commands import Shell

MODEL = "builtin:stdlib-llama"
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
metric_list: [{metrics}]
"""
CHOICE = """
task: own_choice
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
"""
ROLLING = """
task: own_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
"""

#: lm-eval's and its packages' own: none of them is about what is measured.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    texts = [{"text": text} for text in builtin.documents("pydoc-heldout")[:12]]
    for name, task, rows, metrics in (
        ("choice", CHOICE, builtin.continuations()[:60], "{metric: acc}"),
        ("text", ROLLING, texts, "{metric: word_perplexity}, {metric: byte_perplexity}"),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{name}.yaml").write_text(task + TASK.format(data=data, metrics=metrics))
    return folder


def test_lm_eval_and_ours_agree(shell: Shell, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    done = shell("armor", "eval", MODEL, "--tasks", "own_choice,own_text", "--include", tasks, "--json")
    assert done.code == 0, done.err
    theirs = json.loads(done.out)
    assert (theirs["measure"], theirs["datasets"], theirs["before"]) == ("tasks", ["own_choice", "own_text"], None)
    assert theirs["after"]["samples"] == 72
    words = ("--set", "documents=rolling", "--sequence-length", "1024", "--dataset", tasks / "text.jsonl", "--json")
    ours = json.loads(shell("armor", "eval", MODEL, *words).out)["figures"]
    for name in ("word_perplexity", "byte_perplexity"):
        assert ours[name]["value"] == pytest.approx(theirs["after"][f"own_text {name}"]["value"], rel=1e-3)
    words = ("--measure", "multiple_choice", "--dataset", tasks / "choice.jsonl", "--json")
    accuracy = json.loads(shell("armor", "eval", MODEL, *words).out)["after"]["accuracy"]
    found = theirs["after"]["own_choice acc"]
    assert accuracy["value"] == found["value"]
    assert accuracy["interval"] == pytest.approx(found["interval"], abs=0.02)


def test_what_lm_eval_does_not_know(shell: Shell, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    done = shell("armor", "eval", MODEL, "--tasks", "own_choice,no_such_task", "--include", tasks)
    assert (done.code, done.out) == (5, "")
    assert "--tasks no_such_task: lm-eval has no such task" in done.err
    (tasks / "choice.jsonl").unlink()
    done = shell("armor", "eval", MODEL, "--tasks", "own_choice", "--include", tasks)
    assert (done.code, done.out) == (5, "")
    assert "lm-eval cannot measure own_choice: " in done.err


def test_without_lm_eval(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = shell("armor", "eval", MODEL, "--tasks", "arc_easy")
    assert (done.code, done.out) == (3, "")
    assert "pip install 'armor-recipes[eval]'" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "a", "--windows", "2"), "--tasks hands over to lm-eval, which takes no flags of a measure"),
        (("--tasks", "a", "--measure", "fidelity"), "--tasks hands over to lm-eval"),
        (("--limit", "2"), "--include and --limit go with --tasks"),
    ],
)
def test_flags_that_do_not_go_together(shell: Shell, words: tuple[str, ...], said: str) -> None:
    done = shell("armor", "eval", MODEL, *words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
