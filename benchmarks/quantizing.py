"""Another core for an ARMOR checkpoint that exists: its factors, as they are stored, in a run with `QuantizationModifier`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import Field
from torch import Tensor

import armor_recipes
from armor_recipes.checkpoint.export import Source, export
from armor_recipes.modifiers import Estimate, Modifier, ModuleShape, Outcome, register
from armor_recipes.modifiers.base import SolveProgress
from armor_recipes.recipe.schema import ModifierConfig
from armor_recipes.solver import Factorization, relative_error
from armor_recipes.solver.result import StopReason

#: Fields of `QuantizationModifier` by the name of the core.
CORES: dict[str, dict[str, Any]] = {
    "int8": {"config_groups": {"core": {"weights": {"num_bits": 8, "strategy": "channel"}}}},
    "int4": {"config_groups": {"core": {"weights": {"num_bits": 4, "group_size": 64}}}},
    "W8A8": {"scheme": "W8A8"},
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
}


class StoredFactorsConfig(ModifierConfig):
    """Put the factors of a checkpoint in the place of the weights that they stand for."""

    checkpoint: str = Field(title="Checkpoint", description="An ARMOR folder with every target.")


@register
class StoredFactorsModifier(Modifier[StoredFactorsConfig]):
    """Takes factors as they are stored, bit for bit. A B that several modules share becomes one for each."""

    config_type = StoredFactorsConfig
    category: ClassVar[str] = "prune"

    def __init__(self, config: StoredFactorsConfig) -> None:
        super().__init__(config)
        self._source = Source.open(Path(config.checkpoint))

    def plan(self, module: ModuleShape) -> Estimate:
        """Of a float core with a B of its own."""
        b_o, b_i = block_size = self._source.specs[module.name].block_size
        factor_bytes = (module.d_out * b_o + module.d_in * b_i) * module.itemsize
        entries = module.d_out * module.d_in
        return Estimate(
            stored_bytes=module.dense_bytes // 2 + entries // 8 + factor_bytes,
            factor_bytes=factor_bytes,
            block_size=block_size,
            flops=1.0 * entries,
            peak_bytes=12 * entries,
            stored_as="packed",
        )

    def statistic(self, module: ModuleShape) -> Any:
        """Never asked for: the config takes no calibration."""
        raise NotImplementedError

    def solve(
        self,
        module: ModuleShape,
        weight: Tensor,
        statistic: None,
        on_progress: SolveProgress | None,  # noqa: ARG002 - done in one step
    ) -> Outcome:
        """Read the module's factors."""
        stored = self._source.layer(module.name).factors(name=module.name)
        found = Factorization(
            stored.a.float(), stored.core.float(), stored.mask, stored.b.float(), (), (), StopReason.ITERATIONS, {}
        )
        product = found.dense()
        return Outcome(product, (self.loss(weight, statistic, product),), found, stop_reason="stored")

    def loss(self, weight: Tensor, statistic: None, approximation: Tensor) -> float:  # noqa: ARG002 - nothing is learned
        """Squared error of the weight, relative to 0."""
        return relative_error(weight, approximation) ** 2


def quantise(
    checkpoint: Path,
    destination: Path,
    fields: Mapping[str, Any],
    calibration: Mapping[str, Any],
) -> None:
    """Write `checkpoint` with a quantised core into the new folder `destination`, by a run on its product in dense form.

    Args:
        checkpoint: an ARMOR folder with float cores.
        destination: is put in place once it is whole and verified.
        fields: of `QuantizationModifier`.
        calibration: the recipe's section; inputs are those of the model as compressed so far.
    """
    source = Source.open(checkpoint)
    targets = sorted(source.specs)
    stage = {
        "StoredFactorsModifier": {"targets": targets, "checkpoint": str(checkpoint)},
        "QuantizationModifier": {"targets": targets, "calibration": dict(calibration), **fields},
    }
    with tempfile.TemporaryDirectory(dir=destination.parent) as dense:
        export(source, Path(dense), to="dense")
        recipe = {
            "model": dense,
            "prune_stage": {"quantise_modifiers": stage},
            "output": {"path": str(destination)},
        }
        armor_recipes.apply(recipe)


def calibration_of(checkpoint: Path, *, samples: int | None = None) -> dict[str, Any]:
    """The calibration section of the recipe that made a checkpoint, with another number of windows if one is given."""
    section: dict[str, Any] = yaml.safe_load((checkpoint / "recipe.yaml").read_text(encoding="utf-8"))["calibration"]
    return section if samples is None else {**section, "samples": samples}
