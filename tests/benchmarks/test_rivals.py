"""What benchmarks/rivals.py does beside measuring: GGUF files, records that stay, ratios and the table."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.support.pages import ROOT

TOKENS = {"decode": 64, "prompt": 512}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def benchmark(name: str) -> ModuleType:
    """A module of benchmarks/ by its file: the folder is on the path while it is loaded, for its neighbours, and not longer."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def turns() -> ModuleType:
    return benchmark("turns")


def record(decode: float, prompt: float | None = None, *, megabytes: int = 1) -> dict[str, Any]:
    seconds = {"decode": decode} | ({} if prompt is None else {"prompt": prompt})
    peak = {"anonymous": megabytes * 10**6, "resident": 3 * megabytes * 10**6}
    return {"seconds": seconds, "peak_bytes": peak, "weight_bytes": 2_000_000}


def test_ratios_are_taken_within_turns(turns: ModuleType) -> None:
    # Turn 2 was twice as slow for both: the ratio stays.
    both = {1: {"a": record(1.0), "b": record(2.0)}, 2: {"a": record(2.0), "b": record(4.0)}, 3: {"a": record(9.0)}}
    assert turns.versus(both, "decode", "a", "b") == "2.00 [2.00, 2.00]"
    assert turns.versus(both, "decode", "b", "a") == "0.50 [0.50, 0.50]"
    assert turns.versus(both, "prompt", "a", "b") == "-"
    assert turns.versus(both, "decode", "a", "a") == "-"


def test_the_interval_holds_the_median_and_is_the_same_each_time(turns: ModuleType) -> None:
    ratios = [1.0, 1.1, 1.2, 1.3, 5.0]
    low, high = turns.interval(ratios)
    assert 1.0 <= low < 1.2 < high <= 5.0
    assert turns.interval(ratios) == (low, high)
    assert turns.interval([1.5]) == (1.5, 1.5)


def test_a_row_that_could_not_be_measured_tells_why(turns: ModuleType) -> None:
    rows = {
        row.name: row
        for row in (
            turns.DENSE,
            turns.KERNELS,
            turns.Row("llama.cpp", "Q8_0", "Q8_0"),
            turns.Row("ARMOR", "int8", "Q8_0", 64),
        )
    }
    dense = {"transformers bf16": record(2.0, 4.0), "dense by our kernels bf16": record(1.5)}
    records = {1: {**dense, "ARMOR 64 int8": record(1.0, 2.0, megabytes=5)}}
    head, _, *lines = turns.table(rows, records, {"llama.cpp Q8_0": "not installed"}, 8, TOKENS).splitlines()
    cells = {line.split(" | ")[0].strip("| "): [cell.strip("| ") for cell in line.split(" | ")[1:]] for line in lines}
    assert head.startswith("| batch 8 |")
    assert cells["llama.cpp Q8_0"][:2] == ["0", "not installed"]
    assert cells["ARMOR 64 int8"] == [
        *("1", "512.00", "2.00 [2.00, 2.00]", "1.50 [1.50, 1.50]", "-"),
        *("2048.00", "2.00 [2.00, 2.00]", "-", "-", "5", "15", "2"),
    ]
    assert {line.count("|") for line in (head, *lines)} == {head.count("|")}


def test_records_are_found_again_and_half_a_record_is_none(turns: ModuleType, tmp_path: Path) -> None:
    for turn in (1, 2, 10):
        turns.keep(turns.record_file(tmp_path, turn, "plain 2:4 bf16"), record(float(turn)))
    half = turns.record_file(tmp_path, 1, "llama.cpp BF16").with_suffix(".half")
    half.write_text("{", encoding="utf-8")
    found = turns.turns_in(tmp_path, ["plain 2:4 bf16", "llama.cpp BF16"])
    assert list(found) == [1, 2, 10]
    assert all(list(kept) == ["plain 2:4 bf16"] for kept in found.values())
    assert found[10]["plain 2:4 bf16"] == record(10.0)
    assert not turns.record_file(tmp_path, 3, "plain 2:4 bf16").exists()


def test_the_program_tells_what_is_missing_beside_what_was_measured(turns: ModuleType, tmp_path: Path) -> None:
    # No llama.cpp lies in this folder, so that nothing is made or measured.
    results = tmp_path / "results"
    kept = {"transformers bf16": record(4.0, 2.0), "llama.cpp Q8_0": record(2.0, 1.0)}
    for name, found in kept.items():
        file = turns.record_file(results / "llama-7b-shapes-1" / "batch1-threads2", 1, name)
        turns.keep(file, {**found, "info": {"version": "of yesterday"}, "load_average": 0.5})
    program = [sys.executable, str(ROOT / "benchmarks/rivals.py"), "--layers", "1", "--batch", "1", "--turns", "1"]
    places = ["--work", str(tmp_path / "work"), "--results", str(results)]
    done = subprocess.run(
        [*program, *places, "--rows", "llama.cpp BF16"], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert re.search(
        r"^\| llama.cpp BF16 \| 0 \| (not installed: .*node-llama-cpp.*|no `node` on PATH) \|",
        done.stdout,
        re.MULTILINE,
    )
    assert (
        "| llama.cpp Q8_0 | 1 | 32.00 | 2.00 [2.00, 2.00] | - | - | 512.00 | 2.00 [2.00, 2.00] | - | - |" in done.stdout
    )
    assert "- llama.cpp Q8_0: version of yesterday; load average 0.5 to 0.5" in done.stdout
    assert not list((tmp_path / "work").iterdir())


def llama(folder: Path, *, tied: bool = False) -> Path:
    """A Llama whose matrices are whole numbers from -8 to 7 times a power of two: Q4_0 holds them exactly."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1000.0,
        tie_word_embeddings=tied,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                whole = torch.randint(-7, 8, (parameter.shape[0], parameter.shape[1] // 32, 32), generator=generator)
                whole[..., 5] = -8
                parameter.copy_(whole.view(parameter.shape) / 32)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize(("form", "error"), [("BF16", 1e-5), ("Q8_0", 0.02), ("Q4_0", 0.02)])
def test_transformers_reads_the_same_model_from_a_gguf_file(
    tmp_path: Path, form: str, error: float, tied: bool
) -> None:
    # Q8_0 rounds these weights, and so the head of a Q4_0 file; rows of q and k in the wrong order give an error of 0.28.
    dense, place = llama(tmp_path / "dense", tied=tied), tmp_path / "gguf"
    place.mkdir()
    benchmark("gguf_files").write_gguf(dense, place / "model.gguf", form)
    assert [file.name for file in place.iterdir()] == ["model.gguf"]
    ids = torch.arange(3, 35)[None]
    ours, theirs = (
        model(ids).logits.detach().numpy()
        for model in (
            AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32),
            AutoModelForCausalLM.from_pretrained(place, gguf_file="model.gguf", dtype=torch.float32),
        )
    )
    assert np.linalg.norm(theirs - ours) < error * np.linalg.norm(ours)


def test_a_model_that_gguf_would_hold_wrongly_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(llama(tmp_path / "dense"))
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
    LlamaForCausalLM(config).save_pretrained(tmp_path / "scaled")
    with pytest.raises(ValueError, match="rope_type 'linear'"):
        benchmark("gguf_files").write_gguf(tmp_path / "scaled", tmp_path / "model.gguf", "BF16")
    assert not (tmp_path / "model.gguf").exists()
