"""Prune a large language model to 2:4 sparsity with ARMOR, from one declarative recipe.

Importing this package teaches compressed-tensors, and through it `transformers`, to read ARMOR checkpoints:
`import armor_recipes`, then `AutoModelForCausalLM.from_pretrained(folder)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from armor_recipes.integrations.deferred import after_import
from armor_recipes.version import __version__

if TYPE_CHECKING:
    from armor_recipes.integrations.transformers import load as load
    from armor_recipes.run import Result as Result
    from armor_recipes.run import apply as apply

__all__ = ["Result", "__version__", "apply", "load"]


def _register() -> None:
    # Importing it registers. If it is the one that imports compressed-tensors right now, it does so when it gets there.
    import_module("armor_recipes.integrations.transformers")


def __getattr__(name: str) -> Any:
    """`apply`, `load` and `Result`, imported when first used: torch and transformers take seconds."""
    if name == "load":
        from armor_recipes.integrations.transformers import load

        return load
    if name in ("apply", "Result"):
        from armor_recipes import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


after_import("compressed_tensors.compressors", _register)
