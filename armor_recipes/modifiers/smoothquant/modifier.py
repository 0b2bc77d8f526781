"""`SmoothQuantModifier`: outliers of a norm's outputs go into the weights that read them, and the function stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from armor_recipes.modifiers.base import UNROUNDED
from armor_recipes.modifiers.kinds.smoother import Scales, Smoothed, Smoother
from armor_recipes.modifiers.registry import register
from armor_recipes.recipe.schema import ModifierConfig, SomeTargets, Target
from armor_recipes.solver.smoothing import smoothing_scales


def _frozen(value: object) -> object:
    """Lists in lists as tuples; in place of a list of patterns one may stand by itself."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(
        tuple((part,) if place == 0 and isinstance(part, str) else _tuple(part) for place, part in enumerate(pair))
        if isinstance(pair, list | tuple)
        else pair
        for pair in value
    )


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Readers = Annotated[tuple[Target, ...], Field(min_length=1)]
Mappings = Annotated[tuple[tuple[Readers, Target], ...], BeforeValidator(_frozen)]


class SmoothQuantConfig(ModifierConfig):
    """Divide the outputs of norms by scales, and multiply the weights that read them, so that activations have less outliers.

    Which linear modules read a norm is found by running the model, without a list of architectures.
    """

    needs_calibration: ClassVar[bool] = True

    targets: SomeTargets = Field(
        default=("Linear",),
        title="Targets",
        description="Linear modules for whose inputs norms are smoothed; a norm that none of them reads is left as it is. Others "
        "that read a smoothed norm are scaled with them.",
    )
    smoothing_strength: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        default=0.5,
        title="Smoothing strength",
        description="α: 0 looks at the weights alone, 1 moves all differences between channels into the weights.",
    )
    mappings: Mappings | None = Field(
        default=None,
        title="Mappings",
        description="As in llm-compressor pairs `[[READERS], NORM]` of patterns, within each layer; left out, each norm with the "
        "linear modules that read its output. Where the layer would give another output it is an error.",
    )


@register
class SmoothQuantModifier(Smoother[SmoothQuantConfig]):
    """Moves the range of activations into weights by SmoothQuant (arXiv 2211.10438), as llm-compressor does."""

    config_type = SmoothQuantConfig
    cannot_follow: ClassVar[Mapping[str, str]] = {
        "quantize": UNROUNDED,
        "factors": "factors that were solved for a weight do not follow its scales",
    }

    @property
    def links(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """`mappings`."""
        return self.config.mappings or ()

    def scales(self, found: Smoothed) -> Scales:
        """The channels' scales."""
        assert found.spread is not None
        return Scales(smoothing_scales(found.spread, found.weights, strength=self.config.smoothing_strength))
