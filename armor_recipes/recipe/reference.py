"""The reference page's tables, written from the titles and descriptions of the models."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, PlainSerializer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from armor_recipes.recipe.json_schema import EXTENDS_DESCRIPTION, REMOVE_DESCRIPTION, VARS_DESCRIPTION
from armor_recipes.recipe.schema import (
    AtMost,
    CalibrationSpec,
    ClassificationSpec,
    EvaluationSpec,
    FidelitySpec,
    MetadataSpec,
    ModelSpec,
    ModifierConfig,
    MoeSpec,
    MultipleChoiceSpec,
    OutputSpec,
    PerplexitySpec,
    RetrievalSpec,
    Sections,
    ServeSpec,
    SkippedLayers,
    Strict,
    WeightedDataset,
)

_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("metadata", MetadataSpec),
    ("model", ModelSpec),
    ("calibration", CalibrationSpec),
    ("calibration.samples", AtMost),
    ("calibration.dataset (each of a list)", WeightedDataset),
    ("evaluation", EvaluationSpec),
    ("evaluation.perplexity", PerplexitySpec),
    ("evaluation.fidelity", FidelitySpec),
    ("evaluation.classification", ClassificationSpec),
    ("evaluation.retrieval", RetrievalSpec),
    ("evaluation.multiple_choice", MultipleChoiceSpec),
    ("output", OutputSpec),
    ("serve", ServeSpec),
    ("moe", MoeSpec),
    ("skip_layers (of a modifier)", SkippedLayers),
)


def reference_markdown(registry: Mapping[str, type[ModifierConfig]]) -> str:
    """Return Markdown with one table of keys for each section, the keys that all modifiers share, and each kind's own.

    The part about sections does not depend on `registry` and comes first; kinds are in alphabetical order, after them the
    mappings inside values of their fields.
    """
    top = [
        _row("extends", "text or list of text", "none", EXTENDS_DESCRIPTION),
        _row("remove", "text or list of text", "none", REMOVE_DESCRIPTION),
        _row("vars", "mapping", "none", VARS_DESCRIPTION),
        *_rows(Sections.model_fields),
    ]
    parts = [_table("Top level", "The keys beside the stages.", top)]
    parts += [_table(f"`{name}`", _summary(model), _rows(model.model_fields)) for name, model in _SECTIONS]
    parts.append(_table("Every modifier", "The keys that all modifiers share.", _rows(ModifierConfig.model_fields)))
    inner: dict[type[Strict], dict[str, None]] = {}
    for kind, model in sorted(registry.items()):
        own = {name: field for name, field in model.model_fields.items() if name not in ModifierConfig.model_fields}
        parts.append(_table(f"`{kind}`", _summary(model), _rows(own)))
        for name, field in own.items():
            forms = _mappings(field.annotation)
            parts += [
                _table(f"`{kind}.{name}` (as a mapping)", _summary(form), _rows(form.model_fields)) for form in forms
            ]
            for form in _inside(field.annotation):
                if form not in forms:
                    inner.setdefault(form, {})[f"`{kind}.{name}`"] = None
    for form, places in sorted(inner.items(), key=lambda item: item[0].__name__):
        summary = f"{_summary(form)} In {', '.join(places)}."
        parts.append(_table(f"`{form.__name__}` (in a modifier's fields)", summary, _rows(form.model_fields)))
    return "\n".join(parts)


def _inside(annotation: object) -> Iterator[type[Strict]]:
    """The models at any depth of a field's value."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
        for field in annotation.model_fields.values():
            yield from _inside(field.annotation)
    for part in typing.get_args(annotation):
        yield from _inside(part)


def _mappings(annotation: object) -> list[type[Strict]]:
    """The models among several forms that a field's value may have."""
    forms = [form for form in typing.get_args(annotation) if form is not type(None)]
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType) or len(forms) == 1:
        return []
    return [form for form in forms if isinstance(form, type) and issubclass(form, Strict)]


def _summary(model: type[BaseModel]) -> str:
    """Return the first line of the model's docstring."""
    return (model.__doc__ or "").strip().split("\n")[0]


def _table(title: str, summary: str, rows: Iterable[str]) -> str:
    body = "\n".join(rows)
    head = "| key | value | default | meaning |\n|---|---|---|---|"
    table = f"{head}\n{body}" if body else "No keys beyond those that all modifiers share."
    return f"### {title}\n\n{summary}\n\n{table}\n"


def _rows(fields: Mapping[str, FieldInfo]) -> list[str]:
    return [
        _row(name, kind_of(_accepted(field)), _default(field), field.description or "")
        for name, field in fields.items()
    ]


def _accepted(field: FieldInfo) -> object:
    """Return the type that a field takes, which is wider than its own where a validator converts first."""
    wider = [item.json_schema_input_type for item in field.metadata if isinstance(item, BeforeValidator)]
    return next((form for form in wider if form is not PydanticUndefined), field.annotation)


def _row(name: str, kind: str, default: str, description: str) -> str:
    cells = (f"`{name}`", kind, default, description)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    match value:
        case None:
            return "none"
        case bool():
            return f"`{str(value).lower()}`"
        case str() if "\n" in value:
            return f"`{json.dumps(value)}`"
        case tuple():
            return f"`{_flow(_written(field, value))}`"
        case _:
            return f"`{value}`"


def _written(field: FieldInfo, value: object) -> object:
    """Return a value as a recipe writes it."""
    serializers = [item.func for item in field.metadata if isinstance(item, PlainSerializer)]
    return serializers[0](value) if serializers else value  # type: ignore[call-arg]


def _flow(value: object) -> str:
    """Return lists, mappings and plain values as YAML on one line."""
    match value:
        case tuple() | list():
            return f"[{', '.join(map(_flow, value))}]"
        case Mapping():
            return f"{{{', '.join(f'{key}: {_flow(part)}' for key, part in value.items())}}}"
        case _:
            return str(value)


def kind_of(annotation: object) -> str:
    """Return how a field's type is described to a user: `text`, `list of text`, `auto, float16 or float32`, …."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        wider = [item.json_schema_input_type for item in parts[1:] if isinstance(item, BeforeValidator)]
        return kind_of(next((form for form in wider if form is not PydanticUndefined), parts[0]))
    if origin is Literal:
        return _either(f"`{value}`" for value in parts)
    if origin in (typing.Union, types.UnionType):
        return _either(kind_of(part) for part in parts if part is not type(None))
    if origin in (dict, Mapping):
        return "mapping"
    if origin in (tuple, list):
        return _kind_of_list([part for part in parts if part is not Ellipsis])
    if isinstance(annotation, type):
        return _PLAIN.get(annotation, "mapping")
    return str(annotation)


def _kind_of_list(parts: list[object]) -> str:
    kinds = [kind_of(part) for part in parts]
    return f"list of {kinds[0]}" if len(kinds) == 1 else f"[{', '.join(kinds)}]"


def _either(kinds: Iterable[str]) -> str:
    *most, last = dict.fromkeys(kinds)
    return f"{', '.join(most)} or {last}" if most else last
