"""Files out of wheels of the Python package index: downloaded, checked against a sha256, unpacked. Nothing is installed or run."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Wheel:
    """A release as pip asks for it (`name==version`), the sha256 of a wheel of it, and how pip finds that one among several."""

    package: str
    sha256: str
    options: tuple[str, ...] = ()


def download(wheel: Wheel, folder: Path) -> Path:
    """Download the wheel into `folder` and check it. Exits with a message when it cannot be had or is another file."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *wheel.options]
    if subprocess.run([*pip, "--dest", str(folder), wheel.package], check=False).returncode != 0:
        raise SystemExit(f"pip could not download {wheel.package}; see its message above, then run this command again")
    name = wheel.package.partition("==")[0].replace("-", "_")
    (file,) = folder.glob(f"{name}-*.whl")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise SystemExit(f"{file.name} has sha256 {found}, expected {wheel.sha256}; it is not used")
    return file


def unpack(archive: Path, member: str, folder: Path) -> Path:
    """Copy one file of the archive into `folder`, under its own name."""
    target = folder / Path(member).name
    with zipfile.ZipFile(archive) as opened, opened.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return target


def fetch_command(description: str, fill: Callable[[Path, Path], None]) -> None:
    """The command line of a script that fetches a model: `--output FOLDER`, see `make_folder`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the model folder to make")
    make_folder(parser.parse_args().output.absolute(), fill)


def make_folder(output: Path, fill: Callable[[Path, Path], None]) -> None:
    """Have `fill(staged, scratch)` write a model folder beside `output`, then rename it into place.

    A complete folder is left alone. Exits with a message when `output` is something else.
    """
    if (output / "config.json").exists():
        print(f"{output} is there already; nothing to do (remove it to fetch the model again)")
        return
    if output.exists():
        raise SystemExit(f"{output} exists and has no config.json; remove it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        with tempfile.TemporaryDirectory(prefix="fetch-") as scratch:
            fill(staged, Path(scratch))
        staged.chmod(0o755)  # mkdtemp makes it private
        staged.rename(output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    print(f"wrote {output}")
