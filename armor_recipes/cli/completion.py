"""What a shell completes beside verbs and flags: names of recipes. A key is pressed for it, so it imports nothing slow."""

from __future__ import annotations

from pathlib import Path

_BUILTIN = Path(__file__).parents[1] / "recipes"


def complete_names(incomplete: str) -> list[str]:
    """Built-in recipes whose names begin so."""
    return [name for name in sorted(file.stem for file in _BUILTIN.glob("*.yaml")) if name.startswith(incomplete)]


def complete_recipes(incomplete: str) -> list[str]:
    """Built-in recipes, YAML files and folders whose names begin so."""
    folder = incomplete[: incomplete.rfind("/") + 1]
    place = Path(folder or ".").expanduser()
    files = sorted(place.iterdir()) if place.is_dir() else []
    paths = [f"{folder}{file.name}{'/' if file.is_dir() else ''}" for file in files if _may_be(file)]
    return complete_names(incomplete) + [path for path in paths if path.startswith(incomplete)]


def _may_be(file: Path) -> bool:
    return not file.name.startswith(".") and (file.is_dir() or file.suffix in (".yaml", ".yml"))
