"""Names of modules that differ by their numbers alone, as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

R = TypeVar("R")
#: Numbers that are whole parts of a name.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
#: A name around its last number.
_LAST_NUMBER = re.compile(r"(.*\.)(\d+)((?:\.[^.\d][^.]*)*)$")


def grouped(
    rows: Iterable[R], name: Callable[[R], str], kind: Callable[[R], Hashable], layers: Sequence[str] = ()
) -> list[tuple[str, list[R]]]:
    """Rows of one kind whose names differ by numbers alone, under one name: `layers.*.mlp.up_proj ×30`.

    A star stands for all `layers` of a list (without them, for all numbers that rows have there); other numbers are spelt out.
    """
    found: dict[Hashable, list[R]] = {}
    all_rows = list(rows)
    for row in all_rows:
        found.setdefault((kind(row), _NUMBER.sub("#", name(row))), []).append(row)
    lists = _lists(layers or [name(row) for row in all_rows])
    return [(_common([name(row) for row in members], lists), members) for members in found.values()]


def _lists(names: Iterable[str]) -> dict[str, set[str]]:
    """What stands before the last number of a layer's name → the numbers that are there; in others' names, before the first."""
    found: dict[str, set[str]] = {}
    for name in names:
        numbers = list(_NUMBER.finditer(name))
        for match in numbers[-1:] if name.rpartition(".")[2].isdigit() else numbers[:1]:
            found.setdefault(_NUMBER.sub("#", name[: match.start()]), set()).add(match[0])
    return found


def _common(names: Sequence[str], lists: Mapping[str, set[str]]) -> str:
    """One name for names that differ by their numbers."""
    if len(names) == 1:
        return names[0]
    parts = _NUMBER.split(names[0])
    text = before = parts[0]
    for numbers, part in zip(zip(*map(_NUMBER.findall, names), strict=True), parts[1:], strict=True):
        some = set(numbers)
        text += ("*" if len(some) > 1 and some == lists.get(before) else _ranges(sorted(some))) + part
        before += "#" + part
    return f"{text} ×{len(names)}"


def common_parent(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot and short of a list of layers; nothing where there are fewer than two."""
    parts = [name.split(" ")[0].split(".") for name in names]
    found: list[str] = []
    for here, following in zip(zip(*parts, strict=False), list(zip(*parts, strict=False))[1:], strict=False):
        if len(parts) < 2 or len(set(here)) > 1 or not all(map(str.isidentifier, following)):
            break
        found.append(here[0])
    return ".".join(found)


def short(names: Sequence[str]) -> list[str]:
    """Names, one for those that differ by their last number alone."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = _LAST_NUMBER.match(name)
        before, number, after = match.groups() if match else (name, "", "")
        found.setdefault((before, after), []).append(number)
    return [f"{before}{_ranges(numbers)}{after}" for (before, after), numbers in found.items()]


def _ranges(numbers: Sequence[str]) -> str:
    """Numbers as they are written in names: one by itself, several as `{0-3,7}`."""
    if len(numbers) == 1:
        return numbers[0]
    spans: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "{" + ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans) + "}"
