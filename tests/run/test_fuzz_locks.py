"""Whatever a lock or a manifest holds: an error of ours or an answer, nothing run, nothing read outside of what was named."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest

from armor_recipes.checkpoint.diff import diff
from armor_recipes.checkpoint.staging import check_destination
from armor_recipes.checkpoint.verify import verify
from armor_recipes.errors import ArmorError
from armor_recipes.run import Job, apply
from armor_recipes.run.recipe_lock import Lock, check_recipe, make_lock, read_lock
from tests.support.engine import ATTENTION, make_job, recipe
from tests.support.fuzz import damaged, every

_FORBIDDEN = ("exec", "compile", "import", "os.system", "os.exec", "subprocess.Popen", "pickle.find_class")
_HOSTILE = [
    "lock_version: 1e9", "!!python/object/apply:os.system [id]", "*a", "&a [*a]", "<<: 1", "? [1]\n: 2", "{" * 70, "- " * 70, "---",
    "tensors: |\n  ../../etc/passwd", "'\\0'", '"\\u2028"', "2" * 400, "-.inf", "~", "[]", "{}", "true", "\t", "\ufeff", "%YAML 9",
    "../../etc/passwd", "/dev/zero", "0" * 64 + "  " + "x" * 300, "!!binary aGk=", "2001-12-14", "0o7", "null: null",
]  # fmt: skip
_watched: list[Path] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    """Fails a case that executes or imports anything, or opens a file outside of the folders. It cannot be removed again."""
    if not _watched:
        return
    if event in _FORBIDDEN:
        raise AssertionError(f"reading did {event} {arguments}")
    if event == "open" and isinstance(arguments[0], str) and Path(arguments[0]).parent not in _watched:
        raise AssertionError(f"reading opened {arguments[0]}")


@contextmanager
def audited(*folders: Path) -> Iterator[None]:
    _watched.extend(folders)
    try:
        yield
    finally:
        _watched.clear()


class Made:
    """A run, its lock, and a copy of its folder whose manifest is damaged."""

    def __init__(self, folder: Path, llama: Path) -> None:
        mapping = recipe(
            llama, folder / "out", ARMORModifier={"targets": [ATTENTION], "block_size": 8, "iterations": 1}
        )
        apply(mapping)
        self.job: Job = make_job(mapping)
        self.out, self.copy, self.beside = folder / "out", folder / "copy", folder / "lock"
        for place in (self.copy, self.beside):
            place.mkdir()
        for file in self.out.iterdir():
            (self.copy / file.name).write_bytes(file.read_bytes())
        self.lock = make_lock(self.job, self.beside / "recipe.lock.yaml", output=self.out)
        self.manifest = (self.out / "armor_manifest.json").read_bytes()
        data = {**self.lock.content.model_dump(mode="json"), "tensors": _lines(self.lock)}
        self.as_json = json.dumps(data).encode()
        with suppress(ArmorError):
            self.read_lock(self.as_json)
        self.read_manifest(self.manifest)

    def read_lock(self, content: bytes) -> None:
        """All that is done with a lock."""
        file = self.beside / "recipe.lock.yaml"
        file.write_bytes(content)
        with audited(self.beside, self.out):
            lock = read_lock(file)
            lock.differences(self.lock.content)
            with suppress(ArmorError):
                lock.check(self.lock.content)
            with suppress(ArmorError):
                lock.check_output(self.out)
            assert Lock(file, lock.content, lock.tensors).text().encode()
            check_recipe(self.beside / "recipe.yaml", self.job.recipe)

    def read_manifest(self, content: bytes) -> None:
        """All that is done with a manifest, but for a lock's `--from`, which reads data and model, too."""
        (self.copy / "armor_manifest.json").write_bytes(content)
        for use in (
            lambda: verify(self.copy),
            lambda: diff(self.out, self.copy),
            lambda: self.lock.check_output(self.copy),
            lambda: check_destination(self.copy, overwrite=True),
        ):
            with audited(self.out, self.copy), suppress(ArmorError):
                use()
        with suppress(ArmorError):
            make_lock(self.job, self.beside / "other.lock.yaml", output=self.copy)


def _lines(lock: Lock) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in lock.tensors.items())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Made:
    found = Made(tmp_path_factory.mktemp("fuzz"), llama)
    for codec in ("unicode_escape", *(f"utf-{bits}{end}" for bits in (16, 32) for end in ("", "-le", "-be"))):
        "".encode(codec)  # Python imports one when it is first used, json that of what it takes bytes for
    sys.addaudithook(_audit)  # what is imported late is imported by now
    return found


def edited(text: str, chance: Random) -> bytes:
    """A lock of which lines are gone, twice, in another place, or hold something else."""
    lines = text.splitlines()
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(lines))
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        key = lines[place].partition(":")[0]
        word = chance.choice(_HOSTILE)
        made: list[str] = chance.choice(
            [
                [],
                [lines[place]] * 2,
                [indent + word],
                [f"{key}: {word}"],
                [lines[place], indent + word],
                [f"  {lines[place]}"],
            ]
        )
        lines[place : place + 1] = made or [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def one_lock(made: Made, chance: Random) -> None:
    content = damaged({"x.json": made.as_json}, chance)["x.json"] if chance.random() < 0.4 else b""
    with suppress(ArmorError):
        made.read_lock(content or edited(made.lock.text(), chance))


def one_manifest(made: Made, chance: Random) -> None:
    made.read_manifest(damaged({"x.json": made.manifest}, chance)["x.json"])


@every(150)
def test_locks(made: Made, chance: Random) -> None:
    one_lock(made, chance)


@every(60)
def test_manifests(made: Made, chance: Random) -> None:
    one_manifest(made, chance)


@pytest.mark.endurance
@pytest.mark.timeout(1800)
@every(7000)
def test_many_locks(made: Made, chance: Random) -> None:
    one_lock(made, chance)


@pytest.mark.endurance
@pytest.mark.timeout(1800)
@every(3000)
def test_many_manifests(made: Made, chance: Random) -> None:
    one_manifest(made, chance)


def test_the_healthy_ones_are_read_and_nothing_differs(made: Made) -> None:
    made.read_lock(made.as_json)
    made.read_lock(made.lock.text().encode())
    assert read_lock(made.beside / "recipe.lock.yaml").differences(made.lock.content) == []
    made.read_manifest(made.manifest)
    assert verify(made.copy).layers == 8
    assert diff(made.out, made.copy).equal


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"{" * 500, b"a: " * 100, b'{"a":' * 5000])
def test_what_is_nothing_at_all(made: Made, content: bytes) -> None:
    with pytest.raises(ArmorError):
        made.read_lock(content)
    made.read_manifest(content)
