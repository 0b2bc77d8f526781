"""The machine class: what it says, and that only what bits depend on is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from armor_recipes.report.machine import machine_class
from armor_recipes.run import apply
from armor_recipes.solver.sweep import native_available
from tests.support.commands import surroundings
from tests.support.engine import recipe

ASK = "import json; from armor_recipes.report.machine import machine_class; print(json.dumps(machine_class('cpu')))"


def elsewhere(**environment: str) -> Any:
    """The class that a process of its own finds."""
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, env={**surroundings(), **environment}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_it_names_what_bits_depend_on() -> None:
    found = machine_class("cpu")
    assert (found["architecture"], found["level"]) == (os.uname().machine, torch.backends.cpu.get_cpu_capability())
    assert found["torch"].startswith(torch.__version__)
    assert found["compiled"]["solver"] is native_available()
    assert found["blas"].keys() == {"BLAS_INFO", "LAPACK_INFO"}
    assert any("OpenMP" in line for line in found["libraries"])


def test_it_is_the_same_for_every_process_and_number_of_threads() -> None:
    assert elsewhere(OMP_NUM_THREADS="2", LANG="C") == json.loads(json.dumps(machine_class("cpu")))


def test_a_processor_kept_to_fewer_instructions_is_another_class() -> None:
    found = elsewhere(ATEN_CPU_CAPABILITY="default")
    assert found["limits"] == "ATEN_CPU_CAPABILITY=default"
    assert found["level"] != machine_class("cpu")["level"]


def test_it_is_in_the_manifest(llama: Path, tmp_path: Path) -> None:
    result = apply(recipe(llama, tmp_path / "out", MagnitudeModifier={"targets": ["lm_head"]}))
    manifest = json.loads((result.output / "armor_manifest.json").read_text())
    assert manifest["machine"] == json.loads(json.dumps(machine_class("cpu")))
