"""Fields of `ARMORModifier` in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from armor_recipes.modifiers.base import CalibratedConfig

BlockSide = Annotated[int, Field(strict=True, ge=1)]


class ARMORConfig(CalibratedConfig):
    """Factorise each targeted weight into A · S · B."""

    block_size: BlockSide | Annotated[tuple[BlockSide, BlockSide], Field(strict=False)] | Literal["auto"] = Field(
        default="auto",
        title="Block size",
        description="Side of A's and B's blocks: one number, `[out, in]`, or `auto` (the largest of 128, 64, 32, 16 that "
        "divides both sides of the weight). Larger blocks correct more and cost more bytes.",
    )
    iterations: Annotated[int, Field(strict=True, ge=0)] = Field(
        default=200,
        title="Iterations",
        description="Cycles of `exact` or steps of `adam` for each module. 0 gives plain NoWag-P pruning, stored with identity "
        "factors.",
    )
    solver: Literal["exact", "adam"] = Field(
        default="exact",
        title="Solver",
        description="`exact`: block coordinate descent with momentum. `adam`: our implementation of the paper's method.",
    )
    objective: Literal["diagonal"] = Field(
        default="diagonal",
        title="Objective",
        description="`diagonal`: the paper's loss, errors weighted by the mean square of their input channel.",
    )
    tolerance: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=1e-3,
        title="Tolerance",
        description="`exact` stops when five cycles together lower the loss by less than this, relative. 0 never stops "
        "early. `adam` keeps the paper's rule (100 steps without a gain of 1e-6).",
    )
