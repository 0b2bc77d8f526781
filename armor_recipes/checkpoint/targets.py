"""Which layers of a folder a group of `quantization_config` quantises: named in full, by `re:` pattern or by class."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from armor_recipes.checkpoint.config import SCALE, VALUES, format_of
from armor_recipes.checkpoint.header import shown
from armor_recipes.checkpoint.quantized import FORMATS, WEIGHT_PACKED, Scheme
from armor_recipes.errors import CheckpointError

_PATTERN = "re:"


def quantized_names(tensors: Collection[str]) -> tuple[str, ...]:
    """Full names of the modules of which files hold a quantised weight (`weight_packed`, or `weight` with a scale), sorted."""
    parts = (name.rpartition(".") for name in tensors)
    found = {name for name, _, part in parts if part in (WEIGHT_PACKED, SCALE)}
    return tuple(sorted(n for n in found if f"{n}.{WEIGHT_PACKED}" in tensors or f"{n}.{VALUES}" in tensors))


def plain_schemes(config: object, modules: Collection[str], *, where: str) -> dict[str, Scheme]:
    """Map full module name → what a `quantization_config` quantises a plain layer to, for each that its groups take.

    A name in full goes before a pattern, and a pattern before a class, as in compressed-tensors. Which class a module has no file
    says: a group that names one takes all of `modules` that are left.

    Args:
        config: the `quantization_config`.
        modules: full names of the modules whose weights lie quantised in the folder, ARMOR layers aside.
        where: the file, for messages.

    Raises:
        CheckpointError: where a group is none that compressed-tensors reads, a pattern is no regular expression, or several groups
            name classes.
    """
    groups = _groups(config, where=where)
    found = {name: group.scheme for group in groups for name in group.names}
    by_class = [group for group in groups if group.classes]
    if len(by_class) > 1 and len({group.scheme for group in by_class}) > 1:
        named = " and ".join(shown(list(group.classes)) for group in by_class)
        raise CheckpointError(
            f"{where}: several groups name their layers by class ({named}), and which class a layer has its file does not say: "
            "name the layers of all groups but one in full or by re: patterns"
        )
    ignored = _matcher(_strings(config.get("ignore") if isinstance(config, Mapping) else None), where=where)
    for name in modules:
        if name in found or ignored(name):
            continue
        group = next((g for g in groups if g.matches(name)), by_class[0] if by_class else None)
        if group is not None:
            found[name] = group.scheme
    return found


@dataclass(frozen=True, slots=True)
class _Group:
    """A config group: its scheme, and its targets by what they are."""

    scheme: Scheme
    names: tuple[str, ...]
    classes: tuple[str, ...]
    matches: Callable[[str], bool] = field(compare=False)


def _groups(config: object, *, where: str) -> list[_Group]:
    groups = config.get("config_groups") if isinstance(config, Mapping) else None
    found = []
    for key, group in groups.items() if isinstance(groups, Mapping) else ():
        chosen = format_of(group, config)
        if chosen in FORMATS:
            found.append(_group({**group, "format": chosen}, where=f"{where}: quantization_config.config_groups.{key}"))
    return found


def _group(group: Mapping[str, Any], *, where: str) -> _Group:
    scheme = _read_scheme(group, where=where)
    targets = _strings(group.get("targets"))
    patterns = [target for target in targets if target.startswith(_PATTERN)]
    classes = tuple(target for target in targets if target.isidentifier() and target[:1].isupper())
    names = tuple(target for target in targets if target not in patterns and target not in classes)
    return _Group(scheme, names, classes, _matcher(patterns, where=where))


def _matcher(targets: Sequence[str], *, where: str) -> Callable[[str], bool]:
    """Whether a name is one of these, or begins with what a pattern among them matches."""
    try:
        patterns = [re.compile(t.removeprefix(_PATTERN)) for t in targets if t.startswith(_PATTERN)]
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: a target is no regular expression: {error}") from error
    names = frozenset(targets)
    return lambda name: name in names or any(pattern.match(name) for pattern in patterns)


def _strings(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _read_scheme(group: Mapping[str, Any], *, where: str) -> Scheme:
    from compressed_tensors.quantization import QuantizationScheme

    try:
        return Scheme.of(QuantizationScheme(**group))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise CheckpointError(f"{where} is no group that compressed-tensors reads: {error}") from error
