"""`armor eval` for every measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from armor_recipes import apply
from tests.cli.test_exit_codes import fail_with
from tests.support.commands import Shell
from tests.support.engine import recipe

WINDOWS = ("--sequence-length", "16", "--set", "samples=2")
MODEL = "builtin:stdlib-llama"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A checkpoint, and what its manifest says of the evaluation."""
    folder = tmp_path_factory.mktemp("pruned")
    mapping = recipe(MODEL, folder / "out", ARMORModifier={"targets": [r"re:.*layers\.0\..*_proj$"], "iterations": 1})
    fidelity = {"dataset": "builtin:pydoc-heldout", "sequence_length": 16, "samples": 2}
    output = apply({**mapping, "evaluation": {"fidelity": fidelity}}).output
    return output, json.loads((output / "armor_manifest.json").read_text())["evaluation"]


def test_fidelity_of_a_checkpoint_is_what_the_run_measured(
    shell: Shell, pruned: tuple[Path, dict[str, object]]
) -> None:
    folder, evaluation = pruned
    words = ("armor", "eval", folder, "--measure", "fidelity", "--against", MODEL, *WINDOWS)
    found = json.loads(shell(*words, "--json").out)
    assert found == {"measure": "fidelity", "datasets": ["builtin:pydoc-heldout"], "before": None, **found}
    assert found["after"] == evaluation["fidelity"]["after"]  # type: ignore[index]
    lines = shell(*words).out.splitlines()
    assert lines[0] == "2 samples (output logits, positions 32) of builtin:pydoc-heldout"
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "cosine",
        "relative difference",
        "top1 agreement",
        "kl divergence",
    ]


def test_retrieval_before_and_after(shell: Shell, tmp_path: Path, pruned: tuple[Path, dict[str, object]]) -> None:
    rows = [{"query": f"the {word}", "document": f"{word} module"} for word in ("json", "os", "re")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("armor", "eval", pruned[0], "--measure", "retrieval", "--dataset", "pairs.jsonl", "--set", "pooling=last")
    words = (*words, "--sequence-length", "16", "--against", MODEL)
    found = json.loads(shell(*words, "--json").out)
    assert found["before"]["documents"] == found["after"]["documents"] == 3
    done = shell(*words)
    assert " -> " in done.out
    assert done.out.startswith("3 samples (documents 3, pooling last) of ")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ("--measure", "taste"),
            2,
            "there is no such measure; give one of perplexity, fidelity, classification, retrieval",
        ),
        (("--measure", "fidelity"), 2, "fidelity compares a model with the dense one: name that with --against MODEL"),
        (("--measure", "retrieval"), 2, "evaluation.retrieval.dataset: required, but missing; name it with --dataset"),
        (
            ("--set", "window=3"),
            2,
            "--set window=3: evaluation.perplexity.window: unknown key; nearest valid key: windows",
        ),
        (
            ("--measure", "retrieval", "--dataset", "a.jsonl", "--windows", "3"),
            2,
            "evaluation.retrieval.windows: unknown key",
        ),
        (("--measure", "retrieval", "--dataset", "./a.jsonl"), 5, "no such file or folder: "),
        (("--measure", "classification", "--dataset", "a.jsonl"), 3, "LlamaForCausalLM has no classification head"),
    ],
)
def test_what_is_refused(
    shell: Shell, words: tuple[str, ...], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("armor_recipes.run.measure.load_model", fail_with(AssertionError("weights are read")))
    done = shell("armor", "eval", MODEL, *words)
    assert (done.code, done.out) == (code, ""), done.err
    assert said in done.err
