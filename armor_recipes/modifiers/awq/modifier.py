"""`AWQModifier`: scales between layers, searched by what quantising the weights that follow costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from armor_recipes.checkpoint.quantized import Scheme
from armor_recipes.errors import PlanError
from armor_recipes.modifiers.base import UNROUNDED, Propagate
from armor_recipes.modifiers.kinds.searcher import Loss, Searcher
from armor_recipes.modifiers.kinds.smoother import Scales
from armor_recipes.modifiers.registry import register
from armor_recipes.modifiers.scales import global_scale_of, rounded
from armor_recipes.recipe.schema import ModifierConfig, SomeTargets, Strict, Target
from armor_recipes.solver.awq import candidate, grid, mean_weight_sizes, search

_PAIR = 2


def _mapping(value: object) -> object:
    """A pair of a pattern and a list of patterns, in either order, as a mapping."""
    if not isinstance(value, list | tuple) or len(value) != _PAIR:
        return value
    lists = [part for part in value if isinstance(part, list | tuple)]
    names = [part for part in value if isinstance(part, str)]
    return {"smooth_layer": names[0], "balance_layers": lists[0]} if len(lists) == len(names) == 1 else value


class AWQMapping(Strict):
    """A module and those that read its outputs: llm-compressor's `AWQMapping`."""

    smooth_layer: Target = Field(
        title="Smooth layer",
        description="Pattern of the module whose outputs are divided by scales: a norm, or a linear module.",
    )
    balance_layers: SomeTargets = Field(
        title="Balance layers",
        description="Patterns of the modules that read them, whose weights are multiplied by the scales.",
    )
    activation_hook_target: str | None = Field(
        default=None,
        title="Activation hook target",
        description="Where llm-compressor measures a norm's outputs when the first reader gets only some of them. They are always "
        "measured at the norm itself here, so that it changes nothing.",
    )


Mappings = tuple[Annotated[AWQMapping, BeforeValidator(_mapping)], ...]


class AWQConfig(ModifierConfig):
    """Scale channels between layers so that quantising the weights costs least, by AWQ; a quantisation must follow in the recipe.

    Which linear modules read a norm is found by running the model, without a list of architectures.
    """

    needs_calibration: ClassVar[bool] = True

    propagate: Propagate = Field(
        default="compressed",
        title="Error propagation",
        description="Where calibration inputs come from: `compressed`, the model as compressed so far; `dense`, the original one, "
        "as llm-compressor has it before a QuantizationModifier.",
    )
    targets: SomeTargets = Field(
        default=("Linear",),
        title="Targets",
        description="Linear modules for whose sake scales are searched; of them those that an entry behind this one quantises. "
        "Others that read the same are scaled with them.",
    )
    mappings: Mappings | None = Field(
        default=None,
        title="Mappings",
        description="As in llm-compressor `{smooth_layer: PATTERN, balance_layers: [PATTERNS]}`, or pairs of the two, within each "
        "layer. Left out: each norm with the linear modules that read its output, `v_proj` with `o_proj` and `up_proj` with "
        "`down_proj` (of fused layers `qkv_proj` and `gate_up_proj`), where sizes agree and the layer's output stays. Where a "
        "mapping would change that it is an error.",
    )
    duo_scaling: Literal["both"] | bool = Field(
        default=True,
        title="Duo scaling",
        description="Whether candidates look at the size of weights, too, besides that of activations: true, false, or `both` for "
        "half of them each.",
    )
    n_grid: Annotated[int, Field(strict=True, ge=2)] = Field(
        default=20, title="Grid", description="Candidates of one search: each is a pass of all calibration windows."
    )

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        try:
            grid(self.n_grid, self.duo_scaling)
        except ValueError as error:
            raise ValueError(f"n_grid: {self.n_grid} with duo_scaling: {self.duo_scaling}: {error}") from error
        return self


@register
class AWQModifier(Searcher[AWQConfig]):
    """Moves scales between layers by a search over what quantising costs (AWQ, arXiv 2306.00978), as llm-compressor does."""

    config_type = AWQConfig
    cannot_follow: ClassVar[Mapping[str, str]] = {
        "quantize": UNROUNDED,
        "factors": "factors that were solved for a weight do not follow its scales",
    }
    needs_after: ClassVar[Mapping[str, str]] = {
        "quantize": "it chooses scales by what quantising costs, and quantises nothing itself"
    }

    @property
    def links(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """`mappings`."""
        return tuple((one.balance_layers, one.smooth_layer) for one in self.config.mappings or ())

    @property
    def pairs(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """Linear modules whose outputs another one reads channel by channel, by the names that llm-compressor knows them by."""
        return (
            ((r"re:.*\bo_proj$",), r"re:.*\b(v|qkv)_proj$"),
            ((r"re:.*\bdown_proj$",), r"re:.*\b(up|gate_up)_proj$"),
        )

    @property
    def tries(self) -> int:
        """Candidates."""
        return len(grid(self.config.n_grid, self.config.duo_scaling))

    def check_scheme(self, name: str, scheme: Scheme) -> None:
        """Raise PlanError for one scale of a whole weight, by which `duo_scaling` would tell nothing."""
        if self.config.duo_scaling is not False and scheme.args.weights.strategy == "tensor":
            raise PlanError(
                f"duo_scaling compares weights with the others that have their scale, and {name} is to have one scale in all "
                "(strategy tensor): set duo_scaling: false, or take a scheme by channel or group"
            )

    def rounded(self, weights: Mapping[str, Tensor], scheme: Scheme) -> Mapping[str, Tensor]:
        """Rounded to nearest on the range of what has one scale, whatever the scheme's observer, as llm-compressor searches."""
        args = scheme.args.weights.model_copy(update={"observer": None, "observer_kwargs": {}})
        shared = None
        if args.strategy == "tensor_group":
            shared = torch.stack([global_scale_of(weight, args) for weight in weights.values()]).amin(0)
        return {name: rounded(weight, args, shared) for name, weight in weights.items()}

    def search(self, sizes: Tensor, weights: Sequence[tuple[Tensor, Scheme]], loss: Loss) -> Scales:
        """Try the grid."""
        config, own = self.config, None
        if config.duo_scaling is not False:
            own = mean_weight_sizes([(weight, _piece(weight, scheme)) for weight, scheme in weights])
        found = search(grid(config.n_grid, config.duo_scaling), lambda point: candidate(point, sizes, own), loss)
        first = found.first_loss if math.isfinite(found.first_loss) else None
        return Scales(found.scales, {**asdict(found.best), "loss": found.loss, "first_loss": first})


def _piece(weight: Tensor, scheme: Scheme) -> tuple[int, int]:
    """Rows and columns of a weight that have one scale."""
    args = scheme.args.weights
    match args.strategy:
        case "channel":
            return 1, weight.shape[1]
        case "group" | "tensor_group":
            return 1, int(args.group_size)
        case _:
            rows, columns = args.block_structure
            return int(rows), int(columns)
