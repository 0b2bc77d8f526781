"""The base model's licence, copied along with what is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from armor_recipes.checkpoint.companions import LICENCES, companions, is_inside
from armor_recipes.errors import InputError
from armor_recipes.integrations.models import ModelSource, fetch_files
from armor_recipes.recipe.problems import Mark, Problems
from armor_recipes.recipe.tree import Table, plain
from armor_recipes.recipe.yaml_source import parse

_MOST_CARD = 1_000_000


@dataclass(frozen=True, slots=True)
class Licence:
    """The base model card's licence fields, its licence files by name, and a sentence for the new card."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """What the model card says of the licence."""
        name = self.fields.get("license_name") or self.fields.get("license")
        if name is None:
            return "The base model states no licence that could be copied: look it up before you share this checkpoint."
        return f"As the base model: {name}."


def base_licence(source: ModelSource) -> Licence:
    """The licence of the model's card and its licence files: of the local folder, or of what the hub (or its cache) has.

    Raises InputError for a file that is there and cannot be read.
    """
    fetch_files(source, ("readme.md", *LICENCES))
    folder = source.files
    if folder is None:
        return Licence()
    card = "README.md"
    fields = _card_fields(folder / card) if (folder / card).is_file() and is_inside(folder, card) else {}
    return Licence(fields=fields, files=companions(folder, LICENCES).files)


def _card_fields(card: Path) -> dict[str, Any]:
    """Licence fields of a model card's front matter; none where that is no YAML that can be read safely."""
    try:
        with card.open("rb") as file:
            text = file.read(_MOST_CARD).decode("utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"{card}, the model's card, cannot be read ({error.strerror}): correct its permissions, or remove it"
        ) from error
    if not text.startswith("---"):
        return {}
    front = text.split("\n---", 1)[0].removeprefix("---")
    found = parse(front, Mark(str(card), 1, card.parent), Problems())
    data = plain(found) if isinstance(found, Table) else {}
    wanted = ("license", "license_name", "license_link")
    return {key: data[key] for key in wanted if isinstance(data, dict) and isinstance(data.get(key), str)}
