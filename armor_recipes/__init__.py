"""Prune a large language model to 2:4 sparsity with ARMOR, from one declarative recipe.

Importing this package teaches compressed-tensors, and through it `transformers`, to read ARMOR checkpoints:
`import armor_recipes`, then `AutoModelForCausalLM.from_pretrained(folder)`.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from armor_recipes.integrations.deferred import after_import
from armor_recipes.version import __version__

if TYPE_CHECKING:
    from armor_recipes.integrations.dense import to_dense as to_dense
    from armor_recipes.integrations.transformers import load as load
    from armor_recipes.run import Result as Result
    from armor_recipes.run import apply as apply

__all__ = ["Result", "__version__", "apply", "load", "to_dense"]

_ROOMS = {"Result": "run", "apply": "run", "load": "integrations.transformers", "to_dense": "integrations.dense"}


def __getattr__(name: str) -> Any:
    """`apply`, `load`, `to_dense` and `Result`, imported when first used: torch and transformers take seconds."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


# Importing them registers. If one is what imports the neighbour right now, it registers when it gets there.
after_import("compressed_tensors.compressors", partial(import_module, f"{__name__}.integrations.transformers"))
after_import("peft", partial(import_module, f"{__name__}.integrations.peft"))
