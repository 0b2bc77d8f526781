"""Which modifiers exist: found in this package, and in other packages through the entry-point group."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import warnings
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, TypeVar

from armor_recipes.modifiers.base import AnyModifier
from armor_recipes.recipe.llmcompressor import MODIFIERS, STEP_PYTHON
from armor_recipes.recipe.schema import ModifierConfig
from armor_recipes.recipe.stages import KnownModifiers

ENTRY_POINT_GROUP = "armor_recipes.modifiers"
_REGISTERED: dict[str, type[AnyModifier[Any]]] = {}

M = TypeVar("M", bound=type[AnyModifier[Any]])


def register(cls: M) -> M:
    """Class decorator: make a modifier known to recipes under its class name.

    Raises TypeError for what is no complete modifier, ValueError on a name already taken.
    """
    lack = _lack(cls)
    if lack:
        raise TypeError(
            f"{getattr(cls, '__qualname__', cls)} of {getattr(cls, '__module__', '?')} is no modifier: {lack}"
        )
    other = _REGISTERED.get(cls.__name__)
    if other is not None and other.__module__ != cls.__module__:
        raise ValueError(f"{cls.__name__} of {cls.__module__} is already registered by {other.__module__}")
    _REGISTERED[cls.__name__] = cls
    return cls


def modifiers() -> Mapping[str, type[AnyModifier[Any]]]:
    """All registered modifiers by name, sorted. Warns (RuntimeWarning) of each installed plug-in that cannot be used, once."""
    _discover()
    return MappingProxyType(dict(sorted(_REGISTERED.items())))


def config_types() -> KnownModifiers:
    """What the recipe loader is handed: the config class of each registered modifier, and which plug-ins cannot be used."""
    steps = MODIFIERS if os.environ.get(STEP_PYTHON) or find_spec("llmcompressor") is not None else ()
    return KnownModifiers({name: cls.config_type for name, cls in modifiers().items()}, broken=_discover(), steps=steps)


@functools.cache
def _discover() -> tuple[str, ...]:
    """Import every method folder of this package and every plug-in, once; importing is what registers.

    Returns a sentence for each plug-in that cannot be used. It stops no recipe that does not name it.
    """
    package = importlib.import_module("armor_recipes.modifiers")
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        if found.ispkg:
            importlib.import_module(f"{package.__name__}.{found.name}")
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: (point.name, point.value))
    broken = tuple(filter(None, map(_load, points)))
    for sentence in broken:
        warnings.warn(sentence, RuntimeWarning, stacklevel=3)
    return broken


def _load(point: EntryPoint) -> str:
    """Import a plug-in. Of one that fails nothing stays registered; the return value says why, and is empty for all others."""
    before = dict(_REGISTERED)
    try:
        point.load()
        for name in _REGISTERED.keys() - before.keys():
            _REGISTERED[name].config_type.model_json_schema()
    except (Exception, SystemExit) as error:
        _REGISTERED.clear()
        _REGISTERED.update(before)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        package = "" if point.dist is None else f" of the package {point.dist.name}"
        return (
            f"the plug-in {point.value} of entry-point group {ENTRY_POINT_GROUP}{package} cannot be used ({reason}): mend or "
            "uninstall it"
        )
    return ""


def _lack(cls: Any) -> str:
    """What keeps the engine from using a class as a modifier; empty where nothing does."""
    if not (isinstance(cls, type) and issubclass(cls, AnyModifier) and hasattr(cls, "kind")):
        return "it is no subclass of a kind of armor_recipes.modifiers, such as Modifier or Refiner"
    if cls.__abstractmethods__:
        return f"it does not define {', '.join(sorted(cls.__abstractmethods__))}"
    config = getattr(cls, "config_type", None)
    if not (isinstance(config, type) and issubclass(config, ModifierConfig)):
        return f"its config_type must be a subclass of ModifierConfig (value {config!r})"
    if not isinstance(getattr(cls, "category", None), str):
        return f"its category must be a word (value {getattr(cls, 'category', None)!r})"
    return cls.lack()
