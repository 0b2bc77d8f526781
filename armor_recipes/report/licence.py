"""The base model's licence, copied along with what is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from armor_recipes.integrations.models import ModelSource

_LICENCE_FILES = (
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "LICENCE",
    "NOTICE",
    "NOTICE.txt",
    "NOTICE.md",
    "USE_POLICY.md",
)


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
    """The licence of a local folder's model card and its licence files, or what the hub's local cache has of them."""
    folder = source.folder or _cached_folder(source)
    if folder is None:
        return Licence()
    files = {name: (folder / name).read_bytes() for name in _LICENCE_FILES if (folder / name).is_file()}
    return Licence(fields=_card_fields(folder / "README.md"), files=files)


def _card_fields(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    try:
        data = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return {}
    wanted = ("license", "license_name", "license_link")
    return {key: data[key] for key in wanted if isinstance(data, dict) and isinstance(data.get(key), str)}


def _cached_folder(source: ModelSource) -> Path | None:
    """The hub snapshot that the weights were just read from; its card is fetched if it can be."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(source.location, "README.md", revision=source.revision)).parent
    except (HfHubHTTPError, OSError, ValueError):
        return None
