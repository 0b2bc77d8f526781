"""Fields of `ARMORModifier` in a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from armor_recipes.modifiers.base import CalibratedConfig
from armor_recipes.recipe.schema import Strict

BlockSide = Annotated[int, Field(strict=True, ge=1)]
_NO_SHARE = "is no share: give a number above 0 and at most 1, such as 0.75, or a percentage, such as 75%"
BlockSides = BlockSide | Annotated[tuple[BlockSide, BlockSide], Field(strict=False)]


def _share(value: object) -> object:
    """`5%` as 0.05; all else as it is. Raises ValueError for other text."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", value.strip())
    if found is None:
        raise ValueError(_NO_SHARE)
    return float(found[1]) / 100


def _is_share(value: float) -> float:
    """The value. Raises ValueError where it is none."""
    if not 0 < value <= 1:
        raise ValueError(_NO_SHARE)
    return value


Share = Annotated[float, AfterValidator(_is_share), BeforeValidator(_share, json_schema_input_type=float | str)]


class Budget(Strict):
    """What all modules of an entry may take together; where they need it most, blocks are the largest."""

    budget: Share | None = Field(
        default=None,
        title="Budget",
        description="Bytes of the weights once packed (A, B and the 2:4 core), as a share of their dense bytes.",
    )
    overhead: Share | None = Field(
        default=None, title="Overhead", description="Bytes of A and B, as a share of the dense weights' bytes."
    )
    multiplications: Share | None = Field(
        default=None,
        title="Multiplications",
        description="Multiply-adds of A, S and B for one token, as a share of the dense weights'.",
    )
    windows: Annotated[int, Field(ge=1)] = Field(
        default=8, title="Windows", description="How many of the calibration windows the needs are measured on."
    )
    sizes: Mapping[str, BlockSides] | None = Field(
        default=None,
        title="Sizes",
        description="What a run chose, by module, and then nothing is measured. A run writes it into its checkpoint's recipe.",
    )

    @model_validator(mode="after")
    def _check_one(self) -> Budget:
        given = [self.budget, self.overhead, self.multiplications]
        if sum(value is not None for value in given) != 1:
            raise ValueError("must have one of budget, overhead and multiplications")
        return self

    @property
    def word(self) -> str:
        """The key that says what is counted."""
        return next(word for word in ("budget", "overhead", "multiplications") if getattr(self, word) is not None)

    @property
    def share(self) -> float:
        """How much of the dense weights' there may be."""
        found: float = getattr(self, self.word)
        return found


class ARMORConfig(CalibratedConfig):
    """Factorise each targeted weight into A · S · B."""

    @property
    def needs_gram(self) -> bool:
        """Whether all products of two input channels are needed, not their squares alone."""
        return self.objective == "hessian" or self.propagate == "matched"

    @model_validator(mode="after")
    def _check_solver(self) -> ARMORConfig:
        if self.solver == "adam" and self.objective == "hessian":
            raise ValueError("objective: hessian goes with solver: exact; the paper's method minimises diagonal")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> ARMORConfig:
        if isinstance(self.block_size, Budget) and self.pattern != "2:4":
            raise ValueError(
                f"a budget for block_size counts packed weights, and {self.pattern} is stored dense: give sizes"
            )
        if isinstance(self.block_size, Budget) and self.share_input_factor:
            raise ValueError(
                "share_input_factor needs one block_size for modules that share B, a budget gives each its own"
            )
        return self

    block_size: BlockSides | Literal["auto"] | Budget = Field(
        default="auto",
        title="Block size",
        description="Side of A's and B's blocks: one number, `[out, in]`, or `auto` (the largest of 128, 64, 32, 16 that "
        "divides both sides of the weight). Larger blocks correct more and cost more bytes. A mapping such as `{budget: 0.75}` "
        "chooses for each module by what the model needs.",
    )
    propagate: Literal["compressed", "dense", "matched"] = Field(  # type: ignore[assignment] # frozen: wider is safe
        default="compressed",
        title="Error propagation",
        description="Where calibration inputs come from: `compressed`, the model as compressed so far; `dense`, the original "
        "model; `matched`, as compressed so far, aiming at what the original model's module gives on the same tokens.",
    )
    iterations: Annotated[int, Field(strict=True, ge=0)] = Field(
        default=60,
        title="Iterations",
        description="Cycles of `exact` or steps of `adam` for each module. 0 gives plain NoWag-P pruning, stored with identity "
        "factors.",
    )
    solver: Literal["exact", "adam"] = Field(
        default="exact",
        title="Solver",
        description="`exact`: block coordinate descent with momentum. `adam`: our implementation of the paper's method.",
    )
    objective: Literal["diagonal", "hessian"] = Field(
        default="diagonal",
        title="Objective",
        description="`diagonal`: the paper's loss, errors weighted by the mean square of their input channel. `hessian`: "
        "correlations between input channels count too; several times dearer, `exact` only.",
    )
    shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        default="auto",
        title="Shrinkage",
        description="`hessian`: share by which correlations are shrunk to zero. `auto` chooses it for each input so that the "
        "shrunk correlations come closest to those of text held out for that: each dataset of the calibration in turn, or "
        "every fourth window of one dataset.",
    )
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.01,
        title="Damping",
        description="`hessian`: share of the mean square input that is added to every channel's.",
    )
    normalize: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        title="NoWag normalisation",
        description="Minimise the loss on rows and columns scaled to norm 1, as the paper does; false: on the weight as it is.",
    )
    gradient_power: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        title="Power of output gradients",
        description="Errors of row i count (r_i² g_i) to this power times: r_i is the row's norm, g_i the mean square of the "
        "gradient of the model's loss at output i. 0: as NoWag weighs them, 1: by their Fisher information. Above 0 the "
        "calibration windows go through the whole model and back once.",
    )
    share_input_factor: Annotated[bool, Field(strict=True)] = Field(
        default=False,
        title="Shared input factor",
        description="One B for the targeted modules of a layer that read the same input, found from the inputs themselves. "
        "The checkpoint stores it once.",
    )
    tolerance: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=1e-3,
        title="Tolerance",
        description="`exact` settles and ends when ten cycles together lower the loss by less than this, relative. 0 never ends "
        "early. `adam` keeps the paper's rule (100 steps without a gain of 1e-6).",
    )
