"""How far a run is, told by its journal to whoever asks from another shell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from armor_recipes.checkpoint.files import MANIFEST_FILE
from armor_recipes.checkpoint.header import read_json
from armor_recipes.checkpoint.journal import RECORDS_FILE, journal_folder, read_records
from armor_recipes.checkpoint.lock import holder
from armor_recipes.errors import CheckpointError, InputError
from armor_recipes.paths import user_path
from armor_recipes.session.journal import in_place


@dataclass(frozen=True, slots=True)
class Status:
    """Of the run on one output.

    Attributes:
        state: `running`; `stopped`, where a journal is left; `finished`, where there is a checkpoint and neither, or the journal of
            a run that had put it there.
        process: of a run that goes on, its number, and `host` and `since` with it.
        measured: what was measured, by name, of the compressed model with `after` behind it.
        steps: how many are done.
        share: of the estimated work, 0 to 1.
        stage: in which the last step was, and `last` its key.
        training: of a refiner in the middle of its training, as of its last snapshot: its key, steps taken, and held-out losses.
        damaged: lines of the journal that cannot be used.
        updated: when the last record was written; None where there is none.
    """

    state: Literal["running", "stopped", "finished"]
    output: str
    process: int | None = None
    host: str | None = None
    since: str | None = None
    measured: tuple[str, ...] = ()
    steps: int = 0
    share: float = 0.0
    stage: str | None = None
    last: str | None = None
    training: Mapping[str, Any] | None = None
    damaged: int = 0
    updated: str | None = None


def status(output: str | Path) -> Status:
    """How far the run on an output is.

    Raises InputError where there is neither a run nor a checkpoint, or it cannot be read; CheckpointError for a broken manifest.
    """
    target = user_path(output).resolve()
    owner = holder(target)
    folder = journal_folder(target)
    try:
        records, _, damaged = read_records(folder)
    except OSError as error:
        raise InputError(f"{folder / RECORDS_FILE} cannot be read ({error.strerror})") from error
    if not owner and (in_place(target) or not folder.exists()):
        if not (target / MANIFEST_FILE).is_file():
            raise InputError(
                f"{output}: no run is writing there, none was cut short, and there is no checkpoint of a run"
            )
        if "armor_recipes" not in read_json(target / MANIFEST_FILE):
            raise CheckpointError(
                f"{target / MANIFEST_FILE} is no manifest of a run: restore it, or run the recipe again"
            )
        return Status("finished", str(target))
    steps = [record for record in records if record.get("kind") == "step"]
    last = steps[-1] if steps else {}
    written = records[-1].get("time") if records else None
    return Status(
        "running" if owner else "stopped",
        str(target),
        process=owner.get("process"),
        host=_text(owner.get("host")),
        since=_text(owner.get("since")),
        measured=tuple(str(record.get("name")) for record in records if record.get("kind") == "evaluation"),
        steps=len(steps),
        share=_number(last.get("share")) or 0.0,
        stage=_text(last.get("stage")),
        last=_text(last.get("step")),
        training=_training(records[-1]) if records else None,
        damaged=damaged,
        updated=_when(_number(written)),
    )


def _training(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    state = record.get("state")
    if record.get("kind") != "training" or not isinstance(state, dict):
        return None
    return {"step": record.get("step"), "steps": state.get("step"), "losses": state.get("losses")}


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _when(seconds: float | None) -> str | None:
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, OSError, ValueError):
        return None
