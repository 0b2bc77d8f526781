"""Which modifiers exist: found in this package, and in other packages through the entry-point group."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, TypeVar

from armor_recipes.errors import RecipeError
from armor_recipes.modifiers.base import AnyModifier
from armor_recipes.recipe.schema import ModifierConfig

ENTRY_POINT_GROUP = "armor_recipes.modifiers"
_REGISTERED: dict[str, type[AnyModifier[Any]]] = {}

M = TypeVar("M", bound=type[AnyModifier[Any]])


def register(cls: M) -> M:
    """Class decorator: make a modifier known to recipes under its class name. Raises ValueError on a name already taken."""
    other = _REGISTERED.get(cls.__name__)
    if other is not None and other.__module__ != cls.__module__:
        raise ValueError(f"{cls.__name__} of {cls.__module__} is already registered by {other.__module__}")
    _REGISTERED[cls.__name__] = cls
    return cls


def modifiers() -> Mapping[str, type[AnyModifier[Any]]]:
    """All registered modifiers by name, sorted. Raises RecipeError when an installed plug-in cannot be imported."""
    _discover()
    return MappingProxyType(dict(sorted(_REGISTERED.items())))


def config_types() -> dict[str, type[ModifierConfig]]:
    """What the recipe loader is handed: the config class of each registered modifier."""
    return {name: cls.config_type for name, cls in modifiers().items()}


@functools.cache
def _discover() -> None:
    """Import every method folder of this package and every plug-in, once; importing is what registers."""
    package = importlib.import_module("armor_recipes.modifiers")
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        if found.ispkg:
            importlib.import_module(f"{package.__name__}.{found.name}")
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        try:
            point.load()
        except Exception as error:
            raise RecipeError(
                f"the installed plug-in {point.value} of entry-point group {ENTRY_POINT_GROUP} cannot be imported "
                f"({type(error).__name__}: {error}); mend or uninstall it"
            ) from error
