"""A small registry and a valid recipe, shared by the tests of the recipe room."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from armor_recipes.errors import RecipeError
from armor_recipes.recipe import ModifierConfig, Recipe, load_recipe


class PruneConfig(ModifierConfig):
    """A modifier that needs data."""

    needs_calibration: ClassVar[bool] = True

    block_size: int | tuple[int, int] | Literal["auto"] = Field(default=128, title="Block", description="Block size.")
    solver: Literal["exact", "adam"] = Field(default="exact", title="Solver", description="Which solver.")
    tolerance: float = Field(default=0.0, ge=0, title="Tolerance", description="When to stop.")


class QuantConfig(ModifierConfig):
    """A modifier that needs none."""

    scheme: str = Field(default="W8A16", title="Scheme", description="Number format.")

    @model_validator(mode="after")
    def _no_w1(self) -> QuantConfig:
        if self.scheme == "W1":
            raise ValueError("scheme W1 does not exist; use W8A16")
        return self


REGISTRY: dict[str, type[ModifierConfig]] = {"ARMORModifier": PruneConfig, "QuantizationModifier": QuantConfig}

VALID = r"""
model: builtin:stdlib-llama
calibration:
  dataset: builtin:pydoc
  samples: 16
prune_stage:
  armor_modifiers:
    ARMORModifier:
      targets: ['re:.*self_attn\.(q|k|v|o)_proj$']
      block_size: 64
    ARMORModifier@mlp:
      targets: ['re:.*mlp\..*_proj$']
      block_size: [32, 64]
      calibration: {dataset: my_code.jsonl, text_column: content, samples: {at_most: 4}}
quantize_stage:
  quant_modifiers:
    QuantizationModifier: {targets: Linear, ignore: [lm_head], scheme: W8A16}
output: {path: out/smollm2-armor, format: compressed-tensors}
evaluation: {perplexity: {dataset: builtin:pydoc-heldout, sequence_length: 64}}
"""


def write(folder: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    """Write a recipe file and return its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def load(folder: Path, text: str | bytes = VALID, *, overrides: Sequence[str] = (), **flags: object) -> Recipe:
    """Write `text` and load it with the test's registry."""
    return load_recipe([write(folder, text)], overrides=overrides, registry=REGISTRY, **flags)  # type: ignore[arg-type]


def errors(folder: Path, text: str | bytes = VALID, **options: object) -> list[str]:
    """Return the lines of the RecipeError that loading `text` raises, without the folder; fail if none is raised."""
    try:
        load(folder, text, **options)  # type: ignore[arg-type]
    except RecipeError as error:
        return str(error).replace(f"{folder}/", "").split("\n")
    raise AssertionError("the recipe was accepted")
