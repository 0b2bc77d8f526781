"""From pydantic's errors to problems with a place: union branches merged, values shown, nearest keys named."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from armor_recipes.recipe.problems import Mark, Problems, nearest
from armor_recipes.recipe.stages import describe
from armor_recipes.recipe.tree import Items, Node, Scalar, Table, holds_bad

Model = TypeVar("Model", bound=BaseModel)

_MUST_BE = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
}
_SHAPES = {"string_type", "int_type", "float_type", "bool_type", "tuple_type", "list_type", "set_type", "dict_type"}
_SHAPES |= {"model_type", "model_attributes_type", "none_required", "literal_error", "enum"}


@dataclass(frozen=True, slots=True)
class _Finding:
    """One of pydantic's errors, found in the tree. `key` is the place of its key, `place` that of its value."""

    path: tuple[str, ...]
    key: Mark
    place: Mark
    node: Node
    branch: bool
    error: ErrorDetails


def validate(
    model: type[Model],
    node: Node,
    *,
    data: object,
    path: tuple[str, ...],
    problems: Problems,
    mark: Mark,
    missing: dict[tuple[str, ...], str],
) -> Model | None:
    """Return `model` made from `data`, or None after noting everything that is wrong with it.

    `node` is the tree that `data` was made from, `mark` the place of its key, `path` its keys in the recipe. `missing`
    says what to do about a missing key, by its path below `node`. Values are read as JSON, where pydantic's strict mode
    takes a list for a tuple.
    """
    try:
        return model.model_validate_json(json.dumps(data, allow_nan=False))
    except ValidationError as error:
        findings = [_find(node, mark, details) for details in error.errors(include_url=False, include_input=False)]
    by_path: dict[tuple[str, ...], list[_Finding]] = {}
    for finding in findings:
        if not _overshadowed(finding, findings) and not holds_bad(finding.node):
            by_path.setdefault(finding.path, []).append(finding)
    for group in by_path.values():
        _note(model, group, path, problems, missing)
    return None


def _find(node: Node, mark: Mark, error: ErrorDetails) -> _Finding:
    """Follow pydantic's `loc` through the tree; a part that leads nowhere is the name of a union's branch."""
    path: list[str] = []
    loc = error["loc"]
    place = node.mark
    branch = False
    for position, part in enumerate(loc):
        child = _child(node, part)
        if child is not None:
            mark, node = child
            place, branch = node.mark, False
        elif error["type"] == "missing" and position == len(loc) - 1:
            path.append(str(part))
            return _Finding(tuple(path), mark, mark, Scalar(None, mark), False, error)
        else:
            branch = True
            continue
        path.append(str(part))
    return _Finding(tuple(path), mark, place, node, branch, error)


def _child(node: Node, part: int | str) -> tuple[Mark, Node] | None:
    match node, part:
        case Table(entries=entries), str() if part in entries:
            return entries[part]
        case Items(nodes=nodes), int() if part < len(nodes):
            return nodes[part].mark, nodes[part]
        case _:
            return None


def _overshadowed(finding: _Finding, findings: Iterable[_Finding]) -> bool:
    """Tell whether a finding says nothing beside the others.

    So it is for a union's branch that does not fit at all, beside one that fits but for its size or something deeper,
    and for a list called too short because pydantic counts only its items without errors.
    """
    at, depth = finding.path, len(finding.path)
    deeper = (other for other in findings if len(other.path) > depth and other.path[:depth] == at)
    if finding.error["type"] == "too_short":
        return any(deeper)
    fitting = (other for other in findings if other.path == at and other.error["type"] not in _SHAPES)
    return finding.branch and finding.error["type"] in _SHAPES and (any(deeper) or any(fitting))


def _note(
    model: type[BaseModel],
    findings: list[_Finding],
    path: tuple[str, ...],
    problems: Problems,
    missing: dict[tuple[str, ...], str],
) -> None:
    """Note the findings at one key: what it must be, in one line over all branches of a union; and everything else."""
    first = findings[0]
    at = path + first.path
    wanted = [_must_be(finding.error) for finding in findings]
    choices = list(dict.fromkeys(choice for choice in wanted if choice))
    if choices:
        text = f"must be {' or '.join(choices)} (value {describe(first.node)}){_hint(first.node, findings)}"
        problems.add(first.place, at, text)
    for finding, choice in zip(findings, wanted, strict=True):
        if choice is None:
            mark, text = _other(model, finding, missing)
            problems.add(mark, at, text)


def _must_be(error: ErrorDetails) -> str | None:
    template = _MUST_BE.get(error["type"])
    return template.format(**error.get("ctx", {})) if template else None


def _other(model: type[BaseModel], finding: _Finding, missing: dict[tuple[str, ...], str]) -> tuple[Mark, str]:
    """Return place and text of a finding that is not of the form "must be …"."""
    error = finding.error
    context: dict[str, Any] = error.get("ctx", {})
    value = f"(value {describe(finding.node)})"
    match error["type"]:
        case "extra_forbidden":
            known = valid_keys(model, finding.path[:-1])
            return finding.key, f"unknown key; {nearest(finding.path[-1], known, noun='valid key')}"
        case "missing":
            return finding.key, f"required, but missing; {missing.get(finding.path, 'add it')}"
        case "string_too_short" | "too_short":
            least = context["min_length"]
            wrong = "must not be empty" if least == 1 else f"is too short: at least {least} entries or characters"
            return finding.place, f"{wrong} {value}"
        case "string_too_long" | "too_long":
            return finding.place, f"is too long: at most {context['max_length']} entries or characters {value}"
        case "value_error":
            return finding.place, f"{context['error']} {value}"
        case _:
            return finding.place, f"{error['msg']} {value}"


def _hint(node: Node, findings: list[_Finding]) -> str:
    """Return what to do about a value of the wrong type, where that can be told."""
    kinds = {finding.error["type"] for finding in findings}
    if not isinstance(node, Scalar) or node.value is None:
        return ""
    if not isinstance(node.value, str):
        return f"; to mean the text, quote it: {node.text!r}" if node.text and "string_type" in kinds else ""
    if kinds & {"int_type", "float_type", "bool_type"} and re.fullmatch(
        r"[-+]?(0|[1-9][0-9]*)([.][0-9]+)?|true|false", node.value
    ):
        return "; remove the quotes"
    words = re.findall(r"'([^']*)'", " ".join(_must_be(finding.error) or "" for finding in findings))
    near = nearest(node.value, words, noun="value") if words else ""
    return f"; {near}" if near.startswith("nearest") else ""


def valid_keys(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    """Return the keys that a mapping may have which stands at `path` below a value of `model`."""
    models = [model]
    for name in path:
        if not name.isdigit():
            fields = [parent.model_fields[name].annotation for parent in models if name in parent.model_fields]
            models = [found for annotation in fields for found in _models_in(annotation)]
    return [name for found in models for name in found.model_fields]


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _models_in(part)]
