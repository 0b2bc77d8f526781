"""`armor eval` for every measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from armor_recipes import apply, builtin
from tests.cli.test_exit_codes import fail_with
from tests.support.commands import Shell
from tests.support.engine import recipe
from tests.support.tokenizers import byte_tokenizer

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
        "kl divergence p99",
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
            "there is no such measure; give one of perplexity, fidelity, classification, retrieval, multiple_choice, speed",
        ),
        (("--measure", "fidelity"), 2, "fidelity compares a model with the dense one: name that with --against MODEL"),
        (
            ("--measure", "retrieval"),
            2,
            "--measure retrieval: evaluation.retrieval.dataset: required, but missing; name it with --dataset",
        ),
        (
            ("--measure", "speed", "--sequence-length", "9"),
            2,
            "--sequence-length 9: evaluation.speed.sequence_length: unknown key",
        ),
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
        (
            ("--preset", "c4", "--measure", "fidelity"),
            2,
            "--preset c4 is of perplexity, and does not go with --measure",
        ),
        (
            ("--preset", "wikitext2", "--dataset", "a.txt"),
            3,
            "sequence_length 2048 is longer than the 1024 positions of",
        ),
        (("--set", "documents=rolling", "--stride", "3"), 2, "`documents: rolling` has windows of its own"),
        (("--split", "train"), 2, "--split train: builtin:pydoc-heldout is no hub dataset and has no splits"),
        (
            ("--preset", "c4", "--dataset", "a.md", "--text-column", "body"),
            2,
            "a.md is plain text and has no columns; leave it out",
        ),
        (("--sequence-length", "2000"), 3, "sequence_length 2000 is longer than the 1024 positions of"),
        (
            ("--measure", "speed", "--set", "prompt_tokens=1000", "--set", "new_tokens=30"),
            3,
            "prompt_tokens 1000 and new_tokens 30 are more than the 1024 positions of",
        ),
    ],
)
def test_what_is_refused(
    shell: Shell, words: tuple[str, ...], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("armor_recipes.run.measure.load_model", fail_with(AssertionError("weights are read")))
    done = shell("armor", "eval", MODEL, *words)
    assert (done.code, done.out) == (code, ""), done.err
    assert said in done.err


TEXT = ("--dataset", "notes.txt", "--sequence-length", "32", "--json")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("The module of a text, and what it says of itself. " * 40)
    return tmp_path


def test_a_ratio_has_an_interval_of_paired_windows(
    shell: Shell, pruned: tuple[Path, dict[str, object]], notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(notes)
    words = ("armor", "eval", pruned[0], "--against", MODEL, "--preset", "wikitext2", *TEXT)
    found = json.loads(shell(*words).out)
    ratio = found["differences"]["perplexity_ratio"]
    before, after = (found[when]["figures"] for when in ("before", "after"))
    assert ratio["value"] == pytest.approx(after["perplexity"]["value"] / before["perplexity"]["value"])
    assert ratio["value"] > 1
    low, high = ratio["interval"]
    assert low < ratio["value"] < high
    wide = after["perplexity"]["interval"]
    assert high / low < wide[1] / wide[0]
    assert found["after"]["perplexity"] == after["perplexity"]["value"]
    assert [*after] == ["perplexity", "word_perplexity", "byte_perplexity"]
    lines = shell(*words[:-1]).out.splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "perplexity",
        "word perplexity",
        "byte perplexity",
        "perplexity ratio",
    ]
    itself = json.loads(shell("armor", "eval", MODEL, "--against", MODEL, *TEXT).out)["differences"]
    assert itself == {"perplexity_ratio": {"value": 1.0, "interval": [1.0, 1.0]}}


def test_what_does_not_compare(
    shell: Shell, pruned: tuple[Path, dict[str, object]], notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(notes)
    model = AutoModelForCausalLM.from_pretrained(builtin.model_folder("stdlib-llama"))
    tokenizer = AutoTokenizer.from_pretrained(builtin.model_folder("stdlib-llama"))
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained("other")
    tokenizer.save_pretrained("other")
    done = shell("armor", "eval", pruned[0], "--against", "other", "--preset", "wikitext2", *TEXT)
    assert (done.code, done.out) == (3, "")
    assert "says that it was made of another dense model than other (sha256 " in done.err
    assert shell("armor", "eval", pruned[0], "--against", "other", *TEXT).code == 0  # without a preset
    (copy := notes / "copy").mkdir()
    for file in pruned[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((copy / "armor_manifest.json").read_text())
    for said in (3, {}):  # nothing of where it came from
        (copy / "armor_manifest.json").write_text(json.dumps({**manifest, "model": said}))
        assert shell("armor", "eval", copy, "--against", "other", "--preset", "wikitext2", *TEXT).code == 0
    byte_tokenizer().save_pretrained("other")
    few = ("--set", "samples=2")
    for measure, words in (("perplexity", TEXT), ("multiple_choice", few), ("fidelity", (*TEXT, *few))):
        done = shell("armor", "eval", MODEL, "--against", "other", "--measure", measure, *words)
        assert (done.code, done.out) == (3, "")
        assert f"the tokenizers of {MODEL} and other write the text in different tokens" in done.err
        assert ("compare byte_perplexity" in done.err) == (measure == "perplexity")


def test_the_model_to_compare_with_is_checked_as_the_first(
    shell: Shell, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(notes)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    LlamaForSequenceClassification(LlamaConfig(**sizes, max_position_embeddings=64)).save_pretrained("classes")
    for words in (TEXT, ("--measure", "speed", "--set", "prompt_tokens=4", "--set", "new_tokens=2")):
        done = shell("armor", "eval", MODEL, "--against", "classes", *words)
        assert (done.code, done.out) == (3, "")
        assert "classes: " in done.err
        assert "LlamaForSequenceClassification" in done.err


def test_speed_beside_the_dense_model(shell: Shell, pruned: tuple[Path, dict[str, object]]) -> None:
    few = ("--set", "turns=2", "--set", "prompt_tokens=8", "--set", "new_tokens=2")
    found = json.loads(shell("armor", "eval", pruned[0], "--measure", "speed", "--against", MODEL, *few, "--json").out)
    for when in ("before", "after"):
        for name in ("prompt_tokens_per_second", "decode_tokens_per_second"):
            low, high = found[when][name]["interval"]
            assert 0 < low <= found[when][name]["value"] <= high
        assert found[when]["dtype"] == "bfloat16"
    assert found["before"]["sha256"] == found["after"]["sha256"]


def test_against_what_was_measured_before(
    shell: Shell, pruned: tuple[Path, dict[str, object]], notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(notes)
    exact = ("--preset", "wikitext2", *TEXT)
    Path("dense.json").write_text(shell("armor", "eval", MODEL, *exact).out)
    words = ("armor", "eval", pruned[0], "--against")
    found, anew = (json.loads(shell(*words, dense, *exact).out) for dense in ("dense.json", MODEL))
    assert found == anew
    saved = json.loads(Path("dense.json").read_text())
    Path("else.json").write_text(json.dumps({**saved, "origin_sha256": "0" * 64}))
    Path("damaged.json").write_text(json.dumps({**saved, "record": {"before": None, "after": {"nll": "x"}}}))
    after = saved["record"]["after"]
    for name, changed in (
        ("nan", {"value": float("nan")}),
        ("zero", {"value": 0.0}),
        ("word", {"value": "abc"}),
        ("short", {"losses": after["losses"][1:]}),
    ):
        Path(f"{name}.json").write_text(
            json.dumps({**saved, "record": {"before": None, "after": {**after, **changed}}})
        )
    Path("text.json").write_text(
        json.dumps({**saved, "record": {"before": None, "after": {**saved["record"]["after"], "sha256": "0"}}})
    )
    for dense, flags, code, said in (
        ("dense.json", TEXT, 3, "dense.json was measured with bos once and not auto, preset wikitext2 and not None"),
        ("dense.json", (*exact, "--windows", "2"), 3, "with windows None and not 2, so that figures do not compare"),
        ("dense.json", ("--measure", "speed"), 3, "dense.json holds perplexity and not speed"),
        ("dense.json", ("--measure", "fidelity"), 2, "fidelity compares outputs, and dense.json holds figures alone"),
        ("else.json", exact, 3, "made of another dense model than"),
        ("text.json", exact, 3, "was measured on other samples (sha256 0 and "),
        ("damaged.json", exact, 5, "damaged.json is not what `armor eval --json` prints"),
        ("nan.json", exact, 5, "nan.json is not what"),
        ("zero.json", exact, 5, "zero.json is not what"),
        ("word.json", exact, 5, "word.json is not what"),
        ("short.json", exact, 5, "short.json is not what"),
        ("none.json", exact, 5, "no such file; `armor eval MODEL --json > none.json` makes one"),
        (pruned[0] / "config.json", exact, 5, "is not what `armor eval --json` prints"),
    ):
        done = shell(*words, dense, *flags)
        assert (done.code, done.out) == (code, ""), done.err
        assert said in done.err


def test_times_of_another_machine_do_not_compare(
    shell: Shell, pruned: tuple[Path, dict[str, object]], notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(notes)
    few = ("--measure", "speed", "--set", "turns=1", "--set", "prompt_tokens=8", "--set", "new_tokens=2")
    saved = json.loads(shell("armor", "eval", MODEL, *few, "--json").out)
    for machine, code in ((saved["machine"], 0), ({**saved["machine"], "level": "ABACUS"}, 3)):
        Path("dense.json").write_text(json.dumps({**saved, "machine": machine}))
        done = shell("armor", "eval", pruned[0], "--against", "dense.json", *few)
        assert done.code == code, done.err
    assert "was timed with level ABACUS and not " in done.err
