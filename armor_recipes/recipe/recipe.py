"""A checked recipe: what the rest of the house works from."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from armor_recipes.recipe.llmcompressor import rotates_as_it_runs
from armor_recipes.recipe.schema import (
    CalibrationSpec,
    EvaluationSpec,
    MetadataSpec,
    ModelSpec,
    ModifierConfig,
    MoeSpec,
    OutputSpec,
    ServeSpec,
)
from armor_recipes.recipe.stages import STAGE
from armor_recipes.recipe.yaml_source import Dumper


@dataclass(frozen=True, slots=True)
class ModifierEntry:
    """One modifier of a recipe.

    `name` is `Kind` or `Kind@name`, unique within its group; `config` is checked, its `calibration` completed from the
    default; `where` is the place that a message can point to (`recipe.yaml:12`).
    """

    name: str
    kind: str
    stage: str
    group: str
    config: ModifierConfig
    where: str

    @property
    def key(self) -> str:
        """`stage.group.name`."""
        return f"{self.stage}.{self.group}.{self.name}"


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One modifier that llm-compressor's `oneshot` runs, with its own fields: before any of ours, or in the place of ours."""

    name: str
    kind: str
    stage: str
    group: str
    fields: dict[str, Any]
    where: str

    @property
    def key(self) -> str:
        """`stage.group.name`."""
        return f"{self.stage}.{self.group}.{self.name}"

    @property
    def rotates(self) -> bool:
        """Whether the model that it leaves rotates activations as it runs, for which it needs a loader that makes rotations."""
        return rotates_as_it_runs(self.kind, self.fields)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe. `modifiers` and `stages` are in the order in which they run.

    `resolved` is the merged input as plain data: without `extends`, with `model` as a mapping and groups as mappings,
    paths as the user wrote them. The typed sections hold data files as absolute paths. `files` are the recipe files that
    were read, without links. `notes` are sentences on what was left out of them.
    """

    model: ModelSpec
    modifiers: tuple[ModifierEntry, ...]
    stages: tuple[str, ...]
    calibration: CalibrationSpec | None
    output: OutputSpec
    evaluation: EvaluationSpec | None
    serve: ServeSpec | None
    moe: MoeSpec
    resolved: dict[str, Any]
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    metadata: MetadataSpec | None = None
    steps: tuple[StepEntry, ...] = ()
    """What llm-compressor runs first, in this order."""

    asked: dict[str, Any] | None = None
    """`resolved` before a measurement settled what it leaves open; None where it leaves nothing open."""

    def settled(self, configs: Mapping[str, ModifierConfig]) -> Recipe:
        """The recipe with other configs of some modifiers, by key, in `resolved` as well."""
        resolved = copy.deepcopy(self.resolved)
        entries = []
        for entry in self.modifiers:
            config = configs.get(entry.key, entry.config)
            before = dict(entry.config)
            changed = {name for name, value in config if value != before[name]}
            if changed:
                fields = resolved[entry.stage][entry.group][entry.name]
                fields |= config.model_dump(mode="json", include=changed, exclude_unset=True)
            entries.append(replace(entry, config=config))
        return replace(self, modifiers=tuple(entries), resolved=resolved, asked=self.asked or self.resolved)

    @property
    def is_theirs(self) -> bool:
        """Whether llm-compressor runs the whole recipe, so that what it writes is the result."""
        return bool(self.steps) and not self.modifiers

    @property
    def datasets(self) -> tuple[str, ...]:
        """All datasets that calibration and evaluation name, each once."""
        specs = [entry.config.calibration for entry in self.modifiers]
        specs += [self.calibration] if self.steps else []
        named = list(self.evaluation.datasets) if self.evaluation is not None else []
        named += [dataset for spec in specs if spec is not None for dataset in spec.datasets]
        return tuple(dict.fromkeys(named))

    def resolved_yaml(self) -> str:
        """Return `resolved` as YAML; loading it gives a recipe with the same hash."""
        return yaml.dump(self.resolved, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)

    def hash(self) -> str:
        """Return the SHA-256, in hex, of `resolved`; see `hash_of`."""
        return hash_of(self.resolved)


def hash_of(resolved: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of the canonical JSON of a resolved recipe without `output.path` and `metadata`.

    Keys are sorted where their order means nothing and kept where it does: stages, groups and modifiers.
    """
    sections = {key: value for key, value in resolved.items() if not key.endswith(STAGE) and key != "metadata"}
    output = {key: value for key, value in sections["output"].items() if key != "path"}
    stages = [
        [
            stage,
            [[group, [[name, fields] for name, fields in modifiers.items()]] for group, modifiers in groups.items()],
        ]
        for stage, groups in resolved.items()
        if stage.endswith(STAGE)
    ]
    canonical = {"sections": {**sections, "output": output}, "stages": stages}
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
