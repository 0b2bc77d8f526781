"""What `armor eval --json` says besides its figures, so that a later evaluation is held against it and a report shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from armor_recipes.checkpoint.header import read_json
from armor_recipes.checkpoint.writer import manifest_hash
from armor_recipes.errors import InputError, PlanError
from armor_recipes.evaluation import Evaluation, Measured, Measurement, Perplexity
from armor_recipes.evaluation.records import from_record, to_record
from armor_recipes.paths import user_path
from armor_recipes.report.names import shared, without_folders


@dataclass(frozen=True, slots=True)
class Saved:
    """An evaluation as its file has it; `after` is of the model that was named."""

    file: Path
    measure: str
    keys: Mapping[str, Any]
    origin: str | None
    machine: Mapping[str, Any]
    manifest: str | None
    before: Measured | None
    after: Measured

    def check(self, measure: str, keys: Mapping[str, Any]) -> None:
        """Raise PlanError where it is of another measure, or was taken with other keys."""
        if measure != self.measure:
            raise PlanError(f"{self.file} holds {self.measure} and not {measure}: name a file of the same measure")
        asked = shared(dict(keys))
        differ = [key for key in sorted({*asked, *self.keys}) if asked.get(key) != self.keys.get(key)]
        if differ:
            told = ", ".join(f"{key} {self.keys.get(key)} and not {asked.get(key)}" for key in differ)
            raise PlanError(
                f"{self.file} was measured with {told}, so that figures do not compare: give the same flags"
            )

    def check_data(self, sha256: str) -> None:
        """Raise PlanError where it was measured on other samples."""
        if sha256 != self.sha256:
            raise PlanError(
                f"{self.file} was measured on other samples (sha256 {self.sha256[:12]} and {sha256[:12]}): data or "
                "tokenizer differ, so that figures do not compare; measure it anew"
            )

    def check_rows(self, after: Measured) -> None:
        """Raise InputError where it has no values of samples that what was measured now has, so that no difference is known."""
        missing = sorted(set(getattr(after, "rows", ())) - set(getattr(self.after, "rows", ())))
        if missing:
            raise InputError(f"{self.file} has no {missing[0]} of each sample, and is not compared: measure it anew")

    @property
    def sha256(self) -> str:
        """The hash of what it was measured on."""
        return str(getattr(self.after, "sha256", ""))


def saved_dict(found: Evaluation, model: str, machine: Any) -> dict[str, Any]:
    """Plain data: of which folder, with which keys, on which machine class, and what was found, number for number."""
    return {
        "model": without_folders(model),
        "manifest_sha256": manifest_hash(user_path(model)),
        "origin_sha256": found.origin,
        "machine": machine,
        "measure": found.name,
        "keys": shared(dict(found.keys)),
        "record": {"before": to_record(found.before), "after": to_record(found.after)},
    }


def is_saved(name: str) -> bool:
    """Whether a name is that of such a file, and of no model."""
    return name.endswith(".json")


def read_saved(file: Path) -> Saved:
    """Read what `armor eval --json` printed into a file. Raises InputError where it is none, CheckpointError for no JSON."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; `armor eval MODEL --json > {file.name}` makes one")
    data = read_json(file)
    try:
        record = data["record"]
        before, after = from_record(record["before"]), from_record(record["after"])
        for found in (before, after):
            _check_numbers(found)
        if after is None or not (isinstance(data["keys"], dict) and isinstance(data["machine"], dict)):
            raise TypeError("no keys, machine or figures")
        return Saved(
            file,
            str(data["measure"]),
            data["keys"],
            data["origin_sha256"],
            data["machine"],
            data["manifest_sha256"],
            before,
            after,
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{file} is not what `armor eval --json` prints ({type(error).__name__}: {error}): measure again"
        ) from error


def _check_numbers(found: Measured | None) -> None:
    """Whatever is no number in a record is met here, and not where figures are shown."""
    if found is None:
        return
    "".join([*found.datasets, found.size, *(value.name + value.text() for value in found.figures)])
    numbers = [number for value in found.figures for number in (value.value, *(value.interval or ()))]
    if isinstance(found, Measurement):
        for name, row in found.rows.items():
            if len(row) != found.samples:
                raise ValueError(f"{len(row)} values of {name} for {found.samples} samples")
            numbers += row
    elif isinstance(found, Perplexity):
        numbers += [found.nll, *found.losses]
        if not found.value > 0:
            raise ValueError(f"a perplexity of {found.value}")
        for name, row in (("losses", found.losses), ("targets", found.targets)):
            if len(row) != found.windows:
                raise ValueError(f"{len(row)} {name} of {found.windows} windows")
    if not np.isfinite(np.asarray(numbers, dtype=np.float64)).all():
        raise ValueError("a number that is not finite")


def later_row(saved: Saved) -> dict[str, Any]:
    """What report.json keeps of an evaluation of its folder that was taken later."""

    def figures(found: Measured | None) -> dict[str, Any] | None:
        return None if found is None else {value.name: value.to_dict() for value in found.figures}

    return {
        "size": saved.after.size,
        "datasets": [without_folders(name) for name in saved.after.datasets],
        "before": figures(saved.before),
        "after": figures(saved.after),
    }
