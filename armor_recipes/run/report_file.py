"""`--report FILE`: what report.json holds, in a file of one's own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from armor_recipes.errors import RecipeError, ResourceError
from armor_recipes.exhaustion import is_disk_full
from armor_recipes.paths import user_path
from armor_recipes.run.checks import check_writable

_KEY = "seconds_by_phase"


def check_report_file(path: Path) -> None:
    """Raise RecipeError, before anything is computed, where the report cannot be written, or would replace another file."""
    file = user_path(path)
    check_writable(file, "--report")
    if file.is_dir():
        raise RecipeError(f"--report {path} is a folder: name a file")
    if file.is_file() and not _is_report(file):
        raise RecipeError(
            f"--report {path} exists and is no report of this tool: it is not replaced; name another file"
        )


def write_report(path: Path, report: Mapping[str, Any], *, output: Path) -> None:
    """Write it in one step: whoever reads the file meets the old one or the new one.

    Raises ResourceError for a full disk, RecipeError for whatever else has come between; both name the checkpoint, which is there.
    """
    try:
        _write(user_path(path), report)
    except OSError as error:
        full = is_disk_full(error)
        raise (ResourceError if full else RecipeError)(
            f"--report {path} cannot be written ({error.strerror}); the checkpoint is complete in {output}, and its report.json "
            "says the same"
        ) from error


def _write(file: Path, report: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(report), indent=2) + "\n"
    if file.exists() and not file.is_file():  # a pipe, or /dev/stdout
        with contextlib.suppress(BrokenPipeError):  # whose reader is gone
            file.write_text(text, encoding="utf-8")
        return
    beside = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _is_report(file: Path) -> bool:
    try:
        found = json.loads(file.read_bytes() or b"{}")
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and (not found or _KEY in found)
