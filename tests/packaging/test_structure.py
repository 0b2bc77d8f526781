"""What the house promises of its structure, beside the import contracts of pyproject.toml."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import armor_recipes

PACKAGE = Path(armor_recipes.__file__).parent
KINDS = {"AnyModifier", "Modifier", "FactorModifier", "Refiner", "Rearranger", "Kind"}


def sources(*rooms: str, but: str = "") -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if (not rooms or name.startswith(rooms)) and not (but and name.startswith(but)):
            yield name, path.read_text(encoding="utf-8")


def calls(text: str, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
            yield node


def test_nobody_outside_the_modifiers_asks_for_a_kind() -> None:
    asked = [
        (name, ast.unparse(call))
        for name, text in sources(but="modifiers/")
        for function in ("isinstance", "issubclass")
        for call in calls(text, function)
        if KINDS & set(re.findall(r"\w+", ast.unparse(call.args[1])))
    ]
    assert asked == []


def test_configs_of_modifiers_are_read_by_their_fields_and_by_modifiers_alone() -> None:
    asked = [
        (name, ast.unparse(call))
        for name, text in sources(but="modifiers/")
        for call in calls(text, "getattr")
        if re.search(r"\b(entry|modifier|share)\b.*config", ast.unparse(call.args[0])) and name != "model/facts.py"
    ]
    assert asked == []


def test_the_models_config_is_read_in_one_place() -> None:
    readers = {
        name
        for name, text in sources()
        if "get_text_config" in text
        or any(re.search(r"config$|section$", ast.unparse(call.args[0])) for call in calls(text, "getattr"))
    }
    # a modifier's config, and an adapter's
    assert readers - {"modifiers/base.py", "integrations/peft.py"} == {"model/facts.py"}


def test_the_engine_names_no_method_and_no_kind() -> None:
    for name, text in sources("session/", "plan/"):
        code = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
        assert not re.findall(r"\b(ARMOR|NoWag|Wanda|SparseGPT|Magnitude|Quantization)\w*Modifier\b", code), name
        if name.startswith("session/"):
            assert not re.findall(r"kinds\.(module|factor|refiner|rearranger)\b", code), name
