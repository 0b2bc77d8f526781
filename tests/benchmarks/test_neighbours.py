"""benchmarks/neighbours.py: figures are those of `armor eval`, bytes are as stored, and rows that were not run say why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import armor_recipes
from armor_recipes.builtin import model_folder
from armor_recipes.checkpoint.reader import inspect
from armor_recipes.run.measure import evaluate_model
from tests.support.forks import Forks
from tests.support.pages import ROOT

MODEL, LENGTH, PASSAGES = "builtin:stdlib-llama", 32, 6
#: `python benchmarks/neighbours.py ARGUMENTS`.
PROGRAM = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
try:
    runpy.run_path({str(ROOT / "benchmarks" / "neighbours.py")!r}, run_name="__main__")
except SystemExit as end:
    print("exit", end.code)
"""


@pytest.fixture(scope="module")
def place(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `results` lie of two rows, on four windows of `notes.txt`."""
    folder = tmp_path_factory.mktemp("neighbours")
    tokenizer = AutoTokenizer.from_pretrained(model_folder("stdlib-llama"))
    text = "The module provides functions that open files. " * 40
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: 4 * LENGTH + 9]
    (folder / "notes.txt").write_text(tokenizer.decode(ids), encoding="utf-8")
    run(forks, folder, "--rows", "dense;Q4_0;int4 of 64, GPTQ")
    return folder


def run(forks: Forks, folder: Path, *more: str, windows: int = 4) -> str:
    text, size = ["--text", "notes=notes.txt"], ["--windows", str(windows), "--length", str(LENGTH)]
    options = [*text, *size, "--passages", str(PASSAGES), "--results", "results", *more]
    return forks.run(PROGRAM, *options, folder=folder, path=ROOT)


def rows_of(place: Path) -> dict[str, Any]:
    table = json.loads((place / "results" / "builtin-stdlib-llama.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in table["rows"]}


def test_figures_are_those_of_armor_eval(place: Path, tmp_path: Path) -> None:
    source = model_folder("stdlib-llama")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    stored, linears = 0, 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                rounded = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
                weight.copy_(torch.from_numpy(gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q4_0)))
                stored, linears = stored + rounded.nbytes, linears + weight.numel()
    model.save_pretrained(tmp_path / "q4")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "q4")

    def taken(measure: str, **keys: object) -> Any:
        keys = {"dataset": str(place / "notes.txt"), "sequence_length": LENGTH, **keys}
        return evaluate_model(str(tmp_path / "q4"), measure, keys, against=MODEL).after

    row = json.loads((place / "results" / "builtin-stdlib-llama" / "Q4_0.json").read_text(encoding="utf-8"))
    found = {key: torch.tensor(values, dtype=torch.float64).mean() for key, values in row["texts"]["notes"].items()}
    near, choice = (
        taken("fidelity", samples=4),
        taken("multiple_choice", dataset="builtin:continuations", samples=PASSAGES),
    )
    assert float(found["loss"]) == pytest.approx(taken("perplexity").nll, rel=1e-6)
    assert float(found["kl_divergence"]) == pytest.approx(near["kl_divergence"].value, rel=1e-5)
    assert float(found["top1_agreement"]) == pytest.approx(near["top1_agreement"].value)
    assert [float(hit) for hit in row["hits"]] == list(choice.rows["accuracy"])
    # 4 bits for each weight and 16 for 32 of them; what is no linear layer keeps its bytes.
    assert row["weight_bytes"] == stored == linears * 18 // 32
    dense = json.loads((place / "results" / "builtin-stdlib-llama" / "dense.json").read_text(encoding="utf-8"))
    assert dense["model_bytes"] - row["model_bytes"] == linears * 2 - stored
    assert max(dense["texts"]["notes"]["kl_divergence"]) == 0


def test_rows_that_were_not_run_have_no_figures_and_a_reason(place: Path) -> None:
    rows = rows_of(place)
    assert rows["SparseGPT 2:4"]["note"] == "no --llmcompressor was given"
    assert rows["NoWag-P 2:4"]["note"] == "not run yet"
    assert rows["NoWag-P 2:4"]["weight_share"] is None
    assert rows["NoWag-P 2:4"]["notes"]["perplexity"] is None
    assert [name for name, row in rows.items() if row["note"] is None] == ["dense", "Q4_0"]
    assert rows["dense"]["notes"]["ratio"] is None
    assert 1 < float(rows["Q4_0"]["notes"]["ratio"].split()[0]) < 2


def test_what_exists_is_not_run_again_and_other_windows_are_refused(forks: Forks, place: Path) -> None:
    assert run(forks, place, "--rows", "dense;Q4_0") == ""
    assert run(forks, place, "--rows", "dense", windows=3) == "exit 2\n"
    assert run(forks, place, "--rows", "dense;Q5_0") == "exit 2\n"


def test_the_page_s_rows_are_of_the_windows_and_passages_that_its_command_reads_today(
    forks: Forks, tmp_path: Path
) -> None:
    kept = ROOT / "docs" / "benchmarks" / "neighbours"
    shutil.copytree(kept / "builtin-stdlib-llama", tmp_path / "results" / "builtin-stdlib-llama")
    size = ["--windows", "100", "--passages", "500"]
    assert forks.run(PROGRAM, *size, "--rows", "dense", "--results", "results", folder=tmp_path, path=ROOT) == ""
    file = "builtin-stdlib-llama.json"
    assert (tmp_path / "results" / file).read_text(encoding="utf-8") == (kept / file).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_folder_is_measured_as_it_is_and_its_factors_get_another_core(
    forks: Forks, place: Path, tmp_path: Path
) -> None:
    calibration = {"dataset": "builtin:pydoc", "samples": 4, "sequence_length": LENGTH}
    solved = {"targets": "preset:all-linear", "block_size": 32, "iterations": 1}
    out = tmp_path / "armor"
    stage = {"armor_modifiers": {"ARMORModifier": solved}}
    armor_recipes.apply(
        {"model": MODEL, "calibration": calibration, "prune_stage": stage, "output": {"path": str(out)}}
    )
    run(forks, place, "--recipe", f"ARMOR={out}", "--rows", "ARMOR;ARMOR, int8 core")
    found, whole, core = (
        json.loads((place / "results" / "builtin-stdlib-llama" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("dense", "ARMOR", "ARMOR-int8-core")
    )
    assert whole["weight_bytes"] == sum(layer.nbytes for layer in inspect(out).layers)
    assert whole["recipe"]["prune_stage"] == core["recipe"]["prune_stage"] == stage
    assert core["recipe"]["core_stage"]["core_modifiers"]["QuantizationModifier"]["calibration"] == calibration
    assert core["weight_bytes"] < whole["weight_bytes"] < found["weight_bytes"]
    losses = [fmean(row["texts"]["notes"]["kl_divergence"]) for row in (found, whole, core)]
    assert losses[0] == 0 < losses[1]
    assert losses[2] == pytest.approx(losses[1], rel=0.2)
