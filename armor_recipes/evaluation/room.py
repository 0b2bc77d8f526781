"""Room on the disk for what is kept of the dense model until the compressed one is measured."""

from __future__ import annotations

import shutil
from pathlib import Path

from armor_recipes.errors import ResourceError


def check_room(folder: Path, nbytes: int, *, beside: int = 0) -> None:
    """Raise ResourceError where so many bytes do not fit on the folder's disk, if there are any, `beside` others to be written."""
    free = max(0, shutil.disk_usage(folder).free - beside)
    if nbytes > free:
        raise ResourceError(
            f"the outputs of the dense model that evaluation compares with take {nbytes / 1e9:.3g} GB, and {free / 1e9:.3g} GB are "
            f"free for them on the disk of {folder}: lower `samples` or `sequence_length` of evaluation.fidelity, or free some"
        )
