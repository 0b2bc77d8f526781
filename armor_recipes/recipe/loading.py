"""From files, overrides and flags to a checked `Recipe`, or to one RecipeError that lists everything that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from armor_recipes.errors import RecipeError
from armor_recipes.recipe.composition import REMOVE, Files, apply_overrides, passable, set_value
from armor_recipes.recipe.dialect import Dialect
from armor_recipes.recipe.problems import Mark, Problems
from armor_recipes.recipe.python_source import SOURCE, read_mapping
from armor_recipes.recipe.recipe import ModifierEntry, Recipe
from armor_recipes.recipe.schema import ModifierConfig, MoeSpec, Sections
from armor_recipes.recipe.stages import SECTIONS, STAGE, Placed, Stages, listed_names
from armor_recipes.recipe.steps import taken_steps
from armor_recipes.recipe.tree import Entry, Items, Node, Scalar, Table, is_null, merge, plain, without
from armor_recipes.recipe.validation import Model, validate
from armor_recipes.recipe.variables import substitute

Registry = Mapping[str, type[ModifierConfig]]

DATA_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".parquet", ".safetensors")
DATA_PREFIXES = ("./", "../", "/", "~/")
_ADD_DATASET = "name the text to calibrate on, for example `dataset: builtin:pydoc`"
_MISSING_SECTION = {
    ("model",): "add `model: NAME`, or give --set model.id=NAME",
    ("model", "id"): "add `id: NAME`, a hub id, a local folder or builtin:NAME",
    ("output",): "add `output: {path: FOLDER}` or give --output FOLDER",
    ("output", "path"): "add `path: FOLDER` or give --output FOLDER",
    ("calibration", "dataset"): _ADD_DATASET,
    ("evaluation", "perplexity", "dataset"): "name the text to measure on, for example builtin:pydoc-heldout",
    ("serve", "tensor_parallel"): "name the numbers of processes, for example tensor_parallel: [1, 2]",
}
_MISSING_FIELD = {
    ("targets",): "name the modules to change, for example targets: [Linear]",
    ("calibration", "dataset"): _ADD_DATASET,
}


def load_recipe(
    paths: Sequence[str | Path],
    *,
    overrides: Sequence[str] = (),
    registry: Registry,
    builtin_dir: Path | None = None,
    model: str | None = None,
    output: str | None = None,
) -> Recipe:
    """Return the recipe that `paths`, laid over each other in order, `overrides` and the flags make.

    A path is a YAML file, or the name of a built-in recipe (`builtin_dir`/NAME.yaml) where no such file exists. An
    override is `a.b.c=value`; `model` and `output` set `model.id` and `output.path` last of all. `registry` maps each
    kind of modifier to the class of its configuration. Raises RecipeError with all problems at once, one a line:
    `file:line: path.to.key: what`.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise RecipeError("no recipe is given; name a recipe file or a built-in recipe")
    problems = Problems()
    files = Files(builtin_dir, problems)
    table = files.compose(paths)
    if table is None or files.failed:
        problems.raise_if_any()
    assert table is not None, "without a table a problem was noted"
    recipe = finish(table, overrides, {"model": model, "output": output}, registry, problems)
    return replace(recipe, files=tuple(files.opened))


def load_recipe_mapping(
    mapping: Mapping[str, object],
    *,
    overrides: Sequence[str] = (),
    registry: Registry,
    builtin_dir: Path | None = None,
    model: str | None = None,
    output: str | None = None,
) -> Recipe:
    """Return the recipe that a Python mapping makes, with the keys of a recipe file; see `load_recipe`."""
    problems = Problems()
    files = Files(builtin_dir, problems)
    table = files.extend(read_mapping(mapping, problems))
    if files.failed:
        problems.raise_if_any()
    recipe = finish(table, overrides, {"model": model, "output": output}, registry, problems)
    return replace(recipe, files=tuple(files.opened))


def load_section(
    model: type[Model],
    path: tuple[str, ...],
    mapping: Mapping[str, object],
    *,
    flags: Mapping[str, object] | None = None,
    overrides: Sequence[str] = (),
) -> Model:
    """Return one section by itself, checked: what stands at `path` in a recipe.

    Laid over `mapping` are `flags`, keys that `armor eval` was given and that are named as there, and `key=value` overrides.
    Raises RecipeError with all problems at once.
    """
    problems = Problems()
    table = read_mapping(mapping, problems, source=SOURCE if flags is None else f"--measure {path[-1]}")
    for key, value in (flags or {}).items():
        given = read_mapping({key: value}, problems, source=f"--{key.replace('_', '-')} {value}")
        table = set_value(table, (key,), given.entries[key].node, given.mark)
    table = apply_overrides(table, overrides, problems)
    missing: dict[tuple[str, ...], str] = {("dataset",): "name it with --dataset"}
    data = typed_data(table)
    section = validate(model, table, data=data, path=path, problems=problems, mark=table.mark, missing=missing)
    problems.raise_if_any()
    assert section is not None, "without a section a problem was noted"
    return section


def finish(
    table: Table, overrides: Sequence[str], flags: Mapping[str, str | None], registry: Registry, problems: Problems
) -> Recipe:
    """Lay overrides and flags (`model`, `output`) over a merged `table`, and check the result. Raises RecipeError."""
    before = len(problems.found)
    table = apply_overrides(table, overrides, problems)
    for (section, value), key in zip(flags.items(), ("id", "path"), strict=True):
        mark = Mark(f"--{section} {value}".strip(), None, Path())
        if value is not None and passable(table, (section, key), mark, problems):
            table = set_value(table, (section, key), Scalar(value, mark, text=value), mark)
    if REMOVE in table.entries:
        problems.add(table.entries[REMOVE].mark, (REMOVE,), "there is no recipe before this one; name it in `extends`")
    table = substitute(without(table, REMOVE), problems)
    if len(problems.found) > before:
        problems.raise_if_any()
    dialect = Dialect(registry, problems)
    recipe = check(dialect.read(table), registry, problems)
    return replace(recipe, notes=dialect.notes)


def check(table: Table, registry: Registry, problems: Problems) -> Recipe:
    """Return the recipe that a merged tree in our words makes. Raises RecipeError with all problems, also those noted before."""
    sections = _sections(table, problems)
    default = table.entries.get("calibration")
    found = list(Stages(registry, problems).walk(table))
    steps, placed = taken_steps(found, problems)
    if not found and all(problem.path[:1] and problem.path[0] in SECTIONS for problem in problems.found):
        problems.add(
            table.mark,
            (),
            "the recipe has no modifier; add `NAME_stage: {NAME_modifiers: {MODIFIER: {…}}}`. To measure a model as it is, or "
            "write it in another format, take `armor eval` or `armor export`",
        )
    configs = [_config(modifier, registry[modifier.kind], default, problems) for modifier in placed]
    problems.raise_if_any()
    assert sections is not None, "a section that failed noted a problem"
    entries = tuple(
        ModifierEntry(m.name, m.kind, m.stage, m.group, config, str(m.mark))
        for m, config in zip(placed, configs, strict=True)
        if config is not None
    )
    stages = tuple(key for key in table.entries if key.endswith(STAGE))
    return Recipe(
        model=sections.model,
        modifiers=entries,
        stages=stages,
        calibration=sections.calibration,
        output=sections.output,
        evaluation=sections.evaluation,
        serve=sections.serve,
        moe=sections.moe or MoeSpec(),
        metadata=sections.metadata,
        resolved=_resolved(table),
        steps=steps,
    )


def _sections(table: Table, problems: Problems) -> Sections | None:
    given = Table({key: entry for key, entry in table.entries.items() if key in SECTIONS}, table.mark)
    return validate(
        Sections, given, data=typed_data(given), path=(), problems=problems, mark=table.mark, missing=_MISSING_SECTION
    )


def _config(
    modifier: Placed, model: type[ModifierConfig], default: Entry | None, problems: Problems
) -> ModifierConfig | None:
    """Return the checked configuration of a modifier, its calibration completed from the default."""
    fields = complete(modifier.fields, default)
    config = validate(
        model,
        fields,
        data=typed_data(fields),
        path=modifier.path,
        problems=problems,
        mark=modifier.mark,
        missing=_MISSING_FIELD,
    )
    if model.needs_calibration and "calibration" not in fields.entries:
        text = (
            f"required, but missing: {modifier.kind} needs data; add a top-level `calibration` or one of its own, or give "
            "--set calibration.dataset=NAME"
        )
        problems.add(modifier.mark, (*modifier.path, "calibration"), text)
    return config


def complete(fields: Table, default: Entry | None) -> Table:
    """Return a modifier's fields with the keys of the default `calibration` that its own does not give."""
    own = fields.entries.get("calibration")
    if own is not None and is_null(own.node):
        own = None
        fields = Table({key: entry for key, entry in fields.entries.items() if key != "calibration"}, fields.mark)
    if default is None or not isinstance(default.node, Table):
        return fields
    entry = default if own is None else Entry(own.mark, merge(default.node, own.node))
    return Table({**fields.entries, "calibration": entry}, fields.mark)


def typed_data(node: Node) -> object:
    """Return `node` as plain data in which every `dataset` that is a local file is an absolute path."""
    match node:
        case Table(entries=entries):
            return {
                key: _local(entry.node)
                if key == "dataset" and isinstance(entry.node, Scalar)
                else typed_data(entry.node)
                for key, entry in entries.items()
            }
        case Items(nodes=nodes):
            return [typed_data(child) for child in nodes]
        case Scalar(value=value):
            return value


def _local(node: Scalar) -> object:
    """Return a dataset that is a local file as an absolute path, relative to the file that names it; else as it is."""
    name = node.value
    if not isinstance(name, str) or name.startswith("builtin:") or "://" in name:
        return name
    try:
        path = node.mark.folder / Path(name).expanduser()
        if name.startswith(DATA_PREFIXES) or name.endswith(DATA_SUFFIXES) or path.is_file():
            return str(path.resolve())
    except (OSError, ValueError, RuntimeError):  # too long for a path, or a home folder that is not known
        return name
    return name


def _resolved(table: Table) -> dict[str, Any]:
    """Return the merged recipe as plain data, in the one form that each thing has several forms of."""
    return {
        key: {group: _group(entry.node) for group, entry in node.entries.items()}
        if key.endswith(STAGE) and isinstance(node, Table)
        else plain(node)
        for key, (_, node) in table.entries.items()
        if not is_null(node)
    }


def _group(node: Node) -> dict[str, object]:
    """Return a group as a mapping from names to fields, also where it was written as a list."""
    if isinstance(node, Items):
        named = [(name, entry) for _, name, entry in listed_names(node.nodes) if entry is not None]
    else:
        named = list(node.entries.items()) if isinstance(node, Table) else []
    return {name: {} if is_null(entry.node) else plain(entry.node) for name, entry in named}
