"""Chat messages of a row, in the one form that every chat template reads: each content is text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from armor_recipes.calibration.files import Cell, shown
from armor_recipes.errors import InputError

Message = dict[str, Any]  # `content` is a str


def messages_of(cell: Cell) -> list[Message]:
    """Return the row's messages, none for a row that is null.

    Content that is null, or that a message with `tool_calls` lacks, becomes an empty text; a list of text parts becomes their
    texts, joined. Other keys are kept but for those that are null, which tables write for keys that a message lacks.

    Raises InputError for everything that is not a list of `{role, content}`, and for parts that are no text.
    """
    if cell.value is None:
        return []
    if not isinstance(cell.value, list):
        raise _no_messages(cell)
    return [
        _message(value, cell, f"{cell.where}, message {number}") for number, value in enumerate(cell.value, start=1)
    ]


def is_left_out(messages: Sequence[Message], written: str) -> bool:
    """Whether no word of the messages stands in what a template wrote: one for parts of content finds none in a text."""
    words = {word for message in messages for word in re.findall(r"\w{3,}", message["content"])}
    return bool(words) and not any(word in written for word in words)


def _no_messages(cell: Cell) -> InputError:
    hint = " (where a string is JSON, write the list itself)" if isinstance(cell.value, str) else ""
    return InputError(
        f"{cell.where}: the messages column holds {shown(cell.value)}; it must be a list of {{role, content}}{hint}; "
        "name another `messages_column`, or use `text_column`"
    )


def _message(value: object, cell: Cell, where: str) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise _no_messages(cell)
    if "content" not in value and value.get("tool_calls") is None:
        raise _no_messages(cell)
    kept = {str(key): part for key, part in value.items() if part is not None}
    return {**kept, "content": _content(value.get("content"), where)}


def _content(value: object, where: str) -> str:
    match value:
        case None:
            return ""
        case str():
            return value
        case list():
            return "".join(_part(part, where) for part in value)
        case _:
            raise InputError(f"{where}: `content` is {shown(value)}, not text; write text, or a list of text parts")


def _part(part: object, where: str) -> str:
    match part:
        case str(text) | {"type": "text", "text": str(text)}:
            return text
        case {"type": "text"}:
            raise InputError(f"{where}: {shown(part)} is a text part without text; write its `text`, or take it out")
        case {"type": kind}:
            raise InputError(
                f"{where}: a part of `content` is of type {kind!r}, and only text can be used; take the part or the row out, "
                "or name another dataset"
            )
        case _:
            raise InputError(
                f'{where}: {shown(part)} is no part of `content`; write text, or {{"type": "text", "text": …}}'
            )
