"""What the source distribution and the wheel hold, built without a network and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
TREE = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "tests/test_builtin.py")
SUFFIXES = {
    ".py",
    ".c",
    ".h",
    ".yaml",
    ".typed",
    ".md",
    ".bin",
    ".xz",
    ".json",
    ".safetensors",
    ".html",
    ".css",
    ".js",
    ".txt",
}

pytest.importorskip("setuptools", minversion="77")


def build(kind: str, tree: Path, folder: Path) -> Path:
    """Build as pip does, but in this environment; no compiler, so that the optional extensions are left out."""
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    command = [sys.executable, "-c", BUILD, kind, str(folder)]
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, nothing built in it, and of a test that must stay out."""
    folder = tmp_path_factory.mktemp("tree")
    for name in TREE:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(
        ROOT / "armor_recipes", folder / "armor_recipes", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return folder


@pytest.fixture(scope="module")
def sources(tree: Path) -> Path:
    """The source distribution, unpacked."""
    archive = build("sdist", tree, tree.parent)
    with tarfile.open(archive) as opened:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4
        opened.extractall(tree.parent, **safely)
    return tree.parent / archive.name.removesuffix(".tar.gz")


def package_files(root: Path) -> set[str]:
    paths = (path.relative_to(root) for path in (root / "armor_recipes").rglob("*"))
    return {path.as_posix() for path in paths if path.suffix in SUFFIXES}


def test_the_source_distribution_holds_the_package_and_no_tests(tree: Path, sources: Path) -> None:
    expected = package_files(tree)
    assert {"armor_recipes/runtime/native/linear.h", "armor_recipes/solver/native/sweep.c"} <= expected
    assert package_files(sources) == expected
    assert {"setup.py", "MANIFEST.in", "LICENSE", "CHANGELOG.md"} <= {path.name for path in sources.iterdir()}
    assert not (sources / "tests").exists()


def test_wheels_from_tree_and_sources_are_equal_and_hold_no_c_sources(
    tree: Path, sources: Path, tmp_path: Path
) -> None:
    names = []
    for place in (tree, sources):
        with zipfile.ZipFile(build("wheel", place, tmp_path)) as wheel:
            names.append(set(wheel.namelist()))
    assert names[0] == names[1]
    package = {name for name in names[0] if name.startswith("armor_recipes/")}
    assert package == {name for name in package_files(tree) if not name.endswith((".c", ".h"))}
    licences = {name.split("/licenses/")[1] for name in names[0] if "/licenses/" in name}
    assert licences == {"LICENSE", "armor_recipes/builtin/NOTICE.md", "armor_recipes/report/page/echarts.licenses.txt"}
