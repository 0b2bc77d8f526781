"""`armor doctor`: what is told of a machine, and that looking starts nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from armor_recipes.run import doctor
from armor_recipes.runtime.kernel import Capabilities
from tests.support.commands import Shell, surroundings

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_it_fits_80_columns_and_says_the_same_as_json(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = shell("armor", "doctor")
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) <= 80
    found = json.loads(shell("armor", "doctor", "--json").out)
    assert {"python", "packages", "processor", "kernels", "solver", "threads", "memory", "gpu", "triton"} < set(
        found["findings"]
    )
    assert f"torch {torch.__version__}" in found["findings"]["packages"]["found"]
    assert found["machine"]["level"] == torch.backends.cpu.get_cpu_capability()
    for subject, row in found["findings"].items():
        assert subject in done.out
        assert (row["state"] == "ok") == (row["advice"] == "")


def test_a_path_of_the_kernel_that_is_none_is_a_row(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMOR_CPU_PATH", "sse")
    done = shell("armor", "doctor", "--json")
    row = json.loads(done.out)["findings"]["kernels"]
    assert (done.code, row["state"]) == (1, "broken")
    assert "ARMOR_CPU_PATH 'sse'" in row["found"]
    assert "avx2" in row["advice"]


@pytest.mark.parametrize(("held", "state"), [("always [madvise] never", "ok"), ("always madvise [never]", "less")])
def test_huge_pages_that_are_off_are_told(
    held: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "enabled"
    monkeypatch.setattr(doctor, "_HUGE_PAGES", file)
    assert "huge pages" not in {row.subject for row in doctor.examine(Path())}
    file.write_text(held)
    row = next(row for row in doctor.examine(Path()) if row.subject == "huge pages")
    assert (row.state, row.found) == (state, held.partition("[")[2].partition("]")[0])


def test_every_extra_is_told() -> None:
    assert set(doctor.EXTRAS) == set(PROJECT["optional-dependencies"]) - {"dev", "docs"}  # those of who works on it


def test_what_is_missing_is_told_with_what_it_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name in ("gguf", "vllm") else find(name)
    )
    rows = {row.subject: row for row in doctor.examine(Path())}
    assert rows["extra gguf"].advice == "for models that are GGUF files: pip install 'armor-recipes[gguf]'"
    assert (rows["vllm"].state, rows["vllm"].found) == ("less", "not installed")


def test_a_kernel_that_is_wrong_ends_with_1_and_one_that_is_missing_with_0(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "capabilities", lambda: Capabilities(True, ("scalar",), ("avx2",), "scalar", 1))
    done = shell("armor", "doctor")
    assert (done.code, done.err.startswith("error: does not work here: kernels")) == (1, True)
    monkeypatch.setattr(doctor, "capabilities", lambda: Capabilities(False, (), (), None, 1))
    monkeypatch.setattr(doctor, "native_available", lambda: False)
    done = shell("armor", "doctor")
    assert (done.code, done.out.count("install a C compiler")) == (0, 2)


def test_looking_imports_no_library_of_a_gpu_and_none_of_an_extra() -> None:
    assert imported("from armor_recipes.run.doctor import examine; examine(Path())") == imported(
        "import armor_recipes.run"
    )


def imported(code: str) -> str:
    names = {"triton", "vllm", "llmcompressor", "gguf", "PIL", "lm_eval", "tensorboard", "trackio", "wandb", "mlflow"}
    script = f"import sys; from pathlib import Path; {code}; print(sorted({names} & sys.modules.keys()))"
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=surroundings(), capture_output=True, text=True, check=True).stdout
