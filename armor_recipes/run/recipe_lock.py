"""`recipe.lock.yaml`: all that the bytes of a run depend on and, once they are known, the hash of every tensor."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, JsonValue

from armor_recipes.calibration.text import BUILTIN, local_path
from armor_recipes.checkpoint.files import MANIFEST_FILE, write_whole
from armor_recipes.checkpoint.header import read_json
from armor_recipes.checkpoint.staging import files_below
from armor_recipes.checkpoint.writer import file_hash
from armor_recipes.errors import InputError, RecipeError, ResourceError, VerificationError
from armor_recipes.integrations.models import ModelSource, fetch_files
from armor_recipes.paths import user_path
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.leaves import differing
from armor_recipes.recipe.problems import Mark, Problems, show
from armor_recipes.recipe.schema import Strict
from armor_recipes.recipe.tree import Items, Node, Scalar, Table, plain
from armor_recipes.recipe.validation import validate
from armor_recipes.recipe.yaml_source import Dumper, parse, read_text
from armor_recipes.report.machine import machine_class
from armor_recipes.report.manifest import used_by, versions
from armor_recipes.report.names import without_folders
from armor_recipes.run.data import Data
from armor_recipes.run.planning import Job
from armor_recipes.run.settling import is_settled
from armor_recipes.run.writing import writing
from armor_recipes.version import release_of

LOCK_VERSION = 1
MAX_LOCK_BYTES = 64 * 2**20
"""Of a lock: about 500,000 tensors."""
#: A model's files that a run reads; what else lies in a folder is no part of it.
_MODEL_FILES = (
    "*.safetensors",
    "*.bin",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "readme.md",
    "licen[cs]e*",
    "notice*",
)
_TENSOR = re.compile(r"([0-9a-f]{64})  (.+)")
_HEAD = (
    "# Written by `armor lock`: what a run of the recipe depends on. `armor-apply --locked` refuses any difference.\n"
)
_ELSEWHERE = (
    "the machine class is another one, where the same bytes are not promised: what is are the same tokens, and weights near those "
    "of the lock's class. Run it without --locked, and hold the folder against one from there: `armor diff A B --tolerance 0.25`"
)
_ANEW = "if the change is meant, `armor lock` writes the lock anew"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Plain = dict[str, JsonValue]


class LockedModel(Strict):
    """The model as the recipe names it, the hub's commit, and the hash of each of its files."""

    id: str
    revision: str | None
    commit: str | None
    files: dict[str, Sha256]


class LockedDataset(Strict):
    """A dataset; of local files, the hash of all of them. Of others it is the samples that are held."""

    dataset: str
    sha256: Sha256 | None


class LockedTokens(Strict):
    """Samples: what they are for, how many there are, their hash, and what each dataset gave."""

    used_by: tuple[str, ...]
    samples: int
    sha256: Sha256
    sources: tuple[Plain, ...]


class LockFile(Strict):
    """What a lock holds, but for the tensors, of which there are too many for a YAML mapping."""

    lock_version: Literal[1]
    recipe_sha256: Sha256
    order: tuple[str, ...]
    recipe: Plain
    model: LockedModel
    teacher: LockedModel | None
    datasets: tuple[LockedDataset, ...]
    tokens: tuple[LockedTokens, ...]
    evaluation: dict[str, Sha256]
    seeds: dict[str, int]
    versions: dict[str, str]
    device: str
    machine: Plain
    tensors: str | None = None


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that was read, or that would be written: `content`, where in `file` it stands, and tensors' hashes by name."""

    file: Path
    content: LockFile
    tensors: Mapping[str, str]
    table: Table | None = None

    def differences(self, now: LockFile) -> list[str]:
        """A line for each thing that differs, with both values; none of tensors."""
        return [
            f"{self._place(each.path)}: {each.key}: locked {each.first}, now {each.second}"
            for each in differing(_held(self.content), _held(now))
        ]

    def check(self, now: LockFile) -> None:
        """Raise VerificationError, with every difference, where a run would not be the one that is locked."""
        found = self.differences(now)
        if found:
            advice = _ELSEWHERE if now.machine != self.content.machine else _ANEW
            raise VerificationError("\n".join([f"{self.file} does not hold: nothing was computed", *found, advice]))

    def check_output(self, folder: Path) -> None:
        """Hold the tensors that a written folder names against those that are known; raises VerificationError with what differs."""
        made = tensors_of(folder)
        known = self.tensors or made
        lines = {name: line for line, name in enumerate(self.tensors, start=self._first_line())}
        wrong = [
            f"{self.file}:{lines.get(name, self._first_line() - 1)}: {name}: locked {known.get(name, 'nothing')}, "
            f"made {made.get(name, 'nothing')}"
            for name in dict.fromkeys([*known, *made])
            if known.get(name) != made.get(name)
        ]
        if wrong:
            first = f"{len(wrong)} tensor(s) are not those that {self.file} names, on the machine class that it names:"
            raise VerificationError("\n".join([first, *wrong]))

    def finish(self, output: Path) -> str:
        """Tell what was held; a lock that knew no tensors knows those of the output from now on."""
        if self.tensors:
            return f"{self.file}: the same machine class, and the same bytes of all {len(self.tensors)} tensors"
        learnt = replace(self, tensors=tensors_of(output))
        try:
            learnt.write()
        except (RecipeError, ResourceError) as error:
            raise type(error)(f"{error}; the checkpoint is complete in {output}") from error
        return f"{self.file}: holds on this machine class; it knew no tensors, and has the hashes of {len(learnt.tensors)} now"

    def text(self) -> str:
        """The file's content."""
        data = self.content.model_dump(mode="json", exclude={"tensors"})
        text = _HEAD + yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
        lines = "".join(f"  {digest}  {name}\n" for name, digest in self.tensors.items())
        return text + (f"tensors: |\n{lines}" if lines else "")

    def write(self) -> None:
        """Write the file, in one step. Raises RecipeError or ResourceError where that cannot be, or what is there is no lock."""
        with writing(self.file):
            if self.file.exists() and not self.file.read_bytes().startswith(_HEAD.encode()):
                raise RecipeError(f"{self.file} exists and was not written by `armor lock`: move it away")
            write_whole(self.file, self.text().encode())

    def _place(self, path: Sequence[str]) -> str:
        """File and line of what stands at a path, or of what it would stand in."""
        node: Node | None = self.table
        mark = None if node is None else node.mark
        for key in path:
            if isinstance(node, Table) and key in node.entries:
                mark, node = node.entries[key]
            elif isinstance(node, Items) and key.isdigit() and int(key) < len(node.nodes):
                node = node.nodes[int(key)]
                mark = node.mark
        return str(self.file if mark is None else mark)

    def _first_line(self) -> int:
        """The line of the first tensor."""
        entry = None if self.table is None else self.table.entries.get("tensors")
        return 1 + ((entry.mark.line or 0) if entry is not None else self.text().count("\n"))


def lock_file(recipes: Sequence[str | Path]) -> Path:
    """Where the lock of these recipe files lies: beside the last one; of a built-in recipe in the working directory."""
    last = Path(recipes[-1])
    place = last if last.is_file() else Path(last.name)
    return place.with_name(f"{place.stem}.lock.yaml")


def read_lock(file: Path) -> Lock:
    """Read and check a lock. Raises RecipeError with all that is wrong with it, one a line: `file:line: path.to.key: what`."""
    if not file.exists():
        raise RecipeError(f"{file}: there is no such lock; `armor lock` writes it")
    problems = Problems()
    text = read_text(file, problems, limit=MAX_LOCK_BYTES)
    table = None if text is None else parse(text, Mark(str(file), 1, file.parent), problems)
    problems.raise_if_any()
    if not isinstance(table, Table) or "lock_version" not in table.entries:
        raise RecipeError(f"{file}: is no lock: it has no `lock_version`; remove it, and `armor lock` writes one")
    mark, version = table.entries["lock_version"]
    if plain(version) != LOCK_VERSION or isinstance(plain(version), bool):
        raise RecipeError(
            f"{mark}: lock_version: is {show(plain(version))}, and this release reads {LOCK_VERSION}: use a later one, "
            "or remove it, and `armor lock` writes it anew"
        )
    content = validate(LockFile, table, data=plain(table), path=(), problems=problems, mark=table.mark, missing={})
    tensors = _tensors(table, problems)
    problems.raise_if_any()
    assert content is not None, "without a content a problem was noted"
    return Lock(file, content, tensors, table)


def _tensors(table: Table, problems: Problems) -> dict[str, str]:
    """The hashes of tensors by name, from lines as `sha256sum` writes them."""
    entry = table.entries.get("tensors")
    if entry is None or not isinstance(entry.node, Scalar) or not isinstance(entry.node.value, str):
        return {}
    found: dict[str, str] = {}
    for line, text in enumerate(entry.node.value.splitlines(), start=1):
        match = _TENSOR.fullmatch(text)
        if match is None or match[2] in found:
            mark = replace(entry.mark, line=None if entry.mark.line is None else entry.mark.line + line)
            problems.add(
                mark, ("tensors",), f"must be a SHA-256, two spaces and a name of its own (value {show(text)})"
            )
            continue
        found[match[2]] = match[1]
    return found


def make_lock(job: Job, file: Path, *, output: Path | None = None) -> Lock:
    """The lock of a job, whose data are read for it. Nothing is written.

    Tensors are those of `output`, the folder of a run of this job, or else those that the file knows, if nothing else differs.

    Raises VerificationError where the output's manifest names anything else than the job does; InputError.
    """
    before = read_lock(file) if file.exists() else None
    content = locked_facts(job, job.data())
    if output is not None:
        return Lock(file, content, _tensors_of_run(user_path(output), job, content))
    kept = before is not None and not before.differences(content)
    return Lock(file, content, before.tensors if before is not None and kept else {})


def locked_facts(job: Job, data: Data) -> LockFile:
    """What the bytes of a job's result depend on, as it is here and now."""
    recipe = job.recipe
    entries = {entry.key: entry.config for entry in recipe.modifiers}
    seeds = {key: config.seed for key, config in entries.items()}
    seeds |= {f"{key}.calibration": config.calibration.seed for key, config in entries.items() if config.calibration}
    found = {
        "lock_version": LOCK_VERSION,
        "recipe_sha256": recipe.hash(),
        "order": [*(step.key for step in recipe.steps), *(entry.key for entry in recipe.modifiers)],
        "recipe": recipe.resolved,
        "model": _model(recipe.model.id, job.source),
        "teacher": None if job.teacher is None else _model(str(recipe.model.teacher), job.teacher),
        "datasets": [{"dataset": without_folders(name), "sha256": fingerprint(name)} for name in recipe.datasets],
        "tokens": [
            {
                "used_by": used_by(recipe, spec),
                "samples": len(tokens),
                "sha256": tokens.sha256,
                "sources": [{**asdict(s), "dataset": without_folders(s.dataset)} for s in tokens.sources],
            }
            for spec, tokens in data.tokens.items()
        ],
        "evaluation": {measure.name: measure.sha256 for measure in data.measures},
        "seeds": seeds,
        "versions": {
            **versions(llmcompressor=bool(recipe.steps)),
            **_plug_ins(job),
            "python": platform.python_version(),
        },
        "device": job.device.type,
        "machine": machine_class(job.device.type),
    }
    return LockFile.model_validate_json(json.dumps(found))


def run_hash(job: Job) -> str:
    """SHA-256, in hex, of all that the bytes of a job's result depend on, its data included, which are read. Raises InputError."""
    held = _held(locked_facts(job, job.data()))
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def check_recipe(file: Path, recipe: Recipe) -> str:
    """Hold a recipe against its lock, if it has one; says in words what was. Neither data nor model are read.

    Raises VerificationError with every key that differs, and RecipeError for a lock that cannot be read.
    """
    place = lock_file([file])
    if not place.exists():
        return "well formed"
    lock = read_lock(place)
    known = lock.content.model_copy(update={"recipe": recipe.resolved, "recipe_sha256": recipe.hash()})
    found = lock.differences(known)
    if found:
        raise VerificationError("\n".join([f"{place} is of another recipe than {file}", *found, _ANEW]))
    return f"well formed, and what {place} locks"


def fingerprint(dataset: str) -> str | None:
    """SHA-256 of a local dataset: of the file, or of names and hashes of all files below a folder. None for all else."""
    path = None if dataset.startswith(BUILTIN) else local_path(dataset)
    if path is None:
        return None
    if path.is_file():
        return file_hash(path)
    lines = [f"{file_hash(path / name)}  {name}\n" for name in files_below(path) if (path / name).is_file()]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def tensors_of(folder: Path) -> dict[str, str]:
    """The hashes of tensors that a folder's manifest names. Raises InputError where it names none."""
    found = read_json(folder / MANIFEST_FILE).get("tensors")
    if not isinstance(found, dict) or not found:
        raise InputError(f"{folder / MANIFEST_FILE} names no tensors: it is not of a run that has ended")
    for name, digest in found.items():
        if not isinstance(digest, str) or not name.isprintable() or not _TENSOR.fullmatch(f"{digest}  {name}"):
            raise InputError(f"{folder / MANIFEST_FILE}: tensors: {show(name)} has {show(digest)}, which is no SHA-256")
    return found


def _tensors_of_run(output: Path, job: Job, content: LockFile) -> dict[str, str]:
    """The tensors of an output that a run of this job wrote. Raises VerificationError with all that its manifest says otherwise."""
    if not is_settled(job):
        raise RecipeError(
            f"--from {output}: the recipe leaves sizes to a measurement, and the output's manifest is of those that it gave: lock "
            f"{output / 'recipe.yaml'}, which names them, or let `armor-apply --locked` add the hashes"
        )
    manifest = read_json(output / MANIFEST_FILE)
    calibration = manifest.get("calibration")
    told = {
        "recipe_sha256": manifest.get("recipe_sha256"),
        "tokens": [row.get("sha256") if isinstance(row, dict) else row for row in calibration or ()]
        if isinstance(calibration, list | None)
        else calibration,
        "versions": manifest.get("versions"),
        "armor_recipes": manifest.get("armor_recipes"),
        "machine": manifest.get("machine"),
    }
    here = {
        "recipe_sha256": content.recipe_sha256,
        "tokens": [tokens.sha256 for tokens in content.tokens],
        "versions": {k: v for k, v in content.versions.items() if k in versions() and k != "armor-recipes"},
        "armor_recipes": content.versions["armor-recipes"],
        "machine": content.machine,
    }
    wrong = [
        f"{each.key}: {MANIFEST_FILE} says {each.first}, here it is {each.second}" for each in differing(told, here)
    ]
    if wrong:
        raise VerificationError("\n".join([f"--from {output}: it was not made by this recipe as it is here", *wrong]))
    return tensors_of(output)


def _plug_ins(job: Job) -> dict[str, str]:
    """The releases of the packages that the recipe's modifiers come from, this one apart."""
    roots = {type(modifier).__module__.partition(".")[0] for modifier in job.modifiers.values()} - {"armor_recipes"}
    found = packages_distributions() if roots else {}
    return {name: release_of(name) for root in sorted(roots) for name in sorted(set(found.get(root, ())))}


def _model(name: str, source: ModelSource) -> dict[str, Any]:
    fetch_files(source, _MODEL_FILES)
    folder = source.files
    files = [] if folder is None else [path for path in sorted(folder.iterdir()) if path.is_file()]
    wanted = [path for path in files if any(fnmatchcase(path.name.lower(), pattern) for pattern in _MODEL_FILES)]
    return {
        "id": name,
        "revision": source.revision,
        "commit": folder.name if folder is not None and source.folder is None else None,
        "files": {path.name: file_hash(path) for path in wanted},
    }


def _held(content: LockFile) -> Plain:
    """What is compared: all but the tensors, the output's path and what the recipe says of itself."""
    held: dict[str, Any] = content.model_dump(mode="json", exclude={"tensors"})
    held["recipe"].pop("metadata", None)
    if isinstance(held["recipe"].get("output"), dict):
        held["recipe"]["output"].pop("path", None)
    return held
