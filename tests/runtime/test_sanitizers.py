"""The C sources under AddressSanitizer and UndefinedBehaviorSanitizer, with AVX-512 emulated, so that its logic runs everywhere."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "armor_recipes/runtime/native"
HERE = Path(__file__).parent / "native"
FLAGS = ("-g", "-O1", "-std=c11", "-Wall", "-Wextra", "-Werror", "-DARMOR_STANDALONE", f"-I{SOURCES}")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compiled(compiler: str, folder: Path) -> Path:
    x86 = platform.machine() == "x86_64"
    emulation = ("-Wno-psabi", '-DFEATURES="avx2"', f"-I{HERE / 'emulated'}") if x86 else ()
    emulated, driver = (
        {name: folder / f"{name}.o" for name in ("avx512", "dense", "many", "attention")},
        folder / "driver",
    )
    plain = (SOURCES / f"{name}.c" for name in ("linear", "scalar", "avx2"))
    files = [HERE / "driver.c", *plain, *emulated.values(), "-lm"]
    for command in (
        *([*emulation, "-c", SOURCES / f"{name}.c", "-o", made] for name, made in emulated.items()),
        [f"-DEMULATED_AVX512={int(x86)}", *files, "-o", driver],
    ):
        run = subprocess.run([compiler, *FLAGS, *SANITIZERS, *command], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    return driver


@pytest.mark.slow
def test_every_path_is_exact_and_clean(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    run = subprocess.run([compiled(compiler, tmp_path)], capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("cases agree\n")
