"""`ARMORModifier`: from a module and its input statistics to a factorisation."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from armor_recipes.calibration.split import GramMoments, SplitGram
from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.errors import NumericalError, PlanError, UnfitError
from armor_recipes.modifiers.armor.config import ARMORConfig, Budget
from armor_recipes.modifiers.armor.sizes import (
    check_sizes,
    choose,
    core_bytes,
    factor_values,
    has_sizes,
    measured_block,
)
from armor_recipes.modifiers.base import (
    UNROUNDED,
    Estimate,
    ModuleShape,
    SolveProgress,
    Unsettled,
    WithGradients,
)
from armor_recipes.modifiers.kinds.module import Modifier, Outcome
from armor_recipes.modifiers.registry import register
from armor_recipes.modifiers.seeding import module_seed
from armor_recipes.solver import factorize, relative_loss
from armor_recipes.solver.hessian import (
    choose_shrinkage,
    hessian_loss,
    matched_loss,
    matched_weight,
    regular_scale,
    regularize,
)
from armor_recipes.solver.normalize import gradient_row_weights
from armor_recipes.solver.patterns import parse_pattern

AUTO_SIZES = (128, 64, 32, 16)
#: Products of (O, I) with a block-diagonal factor in one cycle of `exact` and one step of `adam`.
_PRODUCTS = {"exact": 15, "adam": 7}
#: Working copies of an (O, I) float32 matrix that a solve holds at its peak.
_WORKING_COPIES = 12
#: Products of an (O, I) matrix with G in one cycle of `hessian`: for the sweep, A, B and the loss.
_GRAM_PRODUCTS = 4
#: (I, I) float32 matrices, a float64 one as two, until a statistic is finished: four parts, their sum, what is left of it
#: without one (all float64), H, and two splits; for `matched` C and XXᵀ/n in float64 besides.
_FINISHING, _MATCHED_FINISHING = 17, 4
#: In a solve after that: H, G, and one of them in float64; for `matched` C and XXᵀ/n besides.
_SOLVING, _MATCHED_SOLVING = 4, 2
#: λ from which `hessian` fits one text hardly more than others (docs/experiments.md).
_FAR_SHRINKAGE = 0.5
_TOO_FEW_WINDOWS = (
    "`shrinkage: auto` cannot be chosen on fewer than 4 calibration windows: raise `calibration.samples`, or set `shrinkage` to a "
    "number from 0 to 1"
)
#: Cycles of a trial, and at least how many times as many the run itself takes.
_TRIAL_CYCLES, _TRIAL_SHARE = 4, 12
#: Cycles that take as long as what begins and ends a solve.
_AROUND_CYCLES = 2


@register
class ARMORModifier(Modifier[ARMORConfig]):
    """Factorises each targeted weight into A · S · B (arXiv 2510.05528)."""

    config_type = ARMORConfig
    category: ClassVar[str] = "prune"
    traits: ClassVar[tuple[str, ...]] = ("factors",)
    cannot_follow: ClassVar[Mapping[str, str]] = {"quantize": UNROUNDED}

    def plan(self, module: ModuleShape) -> Estimate:
        """Resolve the block size against the module's shape; PlanError names the sizes that would divide it.

        What cannot be packed is stored as the dense product A·S·B, and costs its bytes.
        """
        b_o, b_i = self.block_size(module)
        packed = self.packs(module)
        factor_bytes = factor_values(module, (b_o, b_i)) * module.itemsize if packed else 0
        own_bytes = core_bytes(module) if packed else module.dense_bytes
        flops = 1.0 * self.config.iterations * _PRODUCTS[self.config.solver]
        flops *= module.d_out * module.d_in * (b_o + b_i)
        if self.config.objective == "hessian":
            flops += 2.0 * self.config.iterations * _GRAM_PRODUCTS * module.d_out * module.d_in**2
        return Estimate(
            stored_bytes=own_bytes + factor_bytes,
            factor_bytes=factor_bytes,
            block_size=(b_o, b_i),
            flops=flops,
            peak_bytes=self._peak_bytes(module),
            stored_as="packed" if packed else "dense",
        )

    def _peak_bytes(self, module: ModuleShape) -> int:
        """The more of what finishing the statistic takes, and what solving with it does."""
        working = _WORKING_COPIES * module.d_out * module.d_in * 4
        if not self.config.needs_gram:
            return working
        gram, matched = 4 * module.d_in**2, self.config.propagate == "matched"
        finishing = gram * (_FINISHING + _MATCHED_FINISHING * matched)
        return max(finishing, working + gram * (_SOLVING + _MATCHED_SOLVING * matched))

    @property
    def steps(self) -> int:
        """Cycles of a solve at most."""
        return self.config.iterations

    @property
    def needs_gradients(self) -> bool:
        """Whether rows are weighed by their outputs' gradients."""
        return self.config.gradient_power > 0

    def groups(self, modules: Sequence[tuple[ModuleShape, str]]) -> list[list[ModuleShape]]:
        """With `share_input_factor` those that read the same input and have blocks of one size, else each by itself."""
        found: dict[Hashable, list[ModuleShape]] = {}
        for shape, reader in modules:
            key = (reader, shape.block_size) if self.config.share_input_factor else shape.name
            found.setdefault(key, []).append(shape)
        return list(found.values())

    def poor_on(self, datasets: int) -> str:
        """What `hessian` and `matched` were measured to cost elsewhere, calibrated on one text (docs/experiments.md)."""
        config = self.config
        if datasets > 1 or not config.needs_gram:
            return ""
        near = config.shrinkage == "auto" or config.shrinkage < _FAR_SHRINKAGE
        if config.objective == "hessian" and near:
            name, better, worse = "objective: hessian", 4, 75
            advice = f"set `shrinkage: {_FAR_SHRINKAGE}` (8 % better on its like, 8 % worse on other text), "
        elif config.propagate == "matched":
            name, better, worse, advice = "propagate: matched", 5, 28, ""
        else:
            return ""
        return (
            f"`{name}` calibrated on one kind of text was {better} % better than without on its like on SmolLM2-135M (with "
            f"`shrinkage: auto`), and up to {worse} % worse on other text: {advice}name several datasets, or leave it "
            "out where other text is to come"
        )

    def check_windows(self, origins: Sequence[int]) -> None:
        """Raise PlanError where `shrinkage: auto` finds neither two datasets nor a fourth window to hold out."""
        if self.config.needs_gram and self.config.shrinkage == "auto" and len(set(origins)) < 2 and len(origins) < 4:
            raise PlanError(_TOO_FEW_WINDOWS)

    def statistic(self, module: ModuleShape) -> InputSecondMoment | SplitGram:
        """h: the mean of x² over the calibration tokens, `(I,)`; or the means of all products of two channels."""
        if not self.config.needs_gram:
            return InputSecondMoment(module.name, module.d_in)
        return SplitGram(module.name, module.d_in, choose_shrinkage if self.config.shrinkage == "auto" else None)

    def solve(
        self,
        module: ModuleShape,
        weight: Tensor,
        statistic: InputSecondMoment | SplitGram | WithGradients,
        on_progress: SolveProgress | None,
    ) -> Outcome:
        """Factorise the weight `(O, I)`."""
        config = self.config
        moments = _Moments.of(config, statistic, weight)
        found = factorize(
            moments.target(weight),
            moments.h,
            gram=moments.regular if config.objective == "hessian" else None,
            normalize=config.normalize,
            row_weights=moments.row_weights,
            block_size=module.block_size or self.block_size(module),
            pattern=config.pattern,
            solver=config.solver,
            iterations=config.iterations,
            tolerance=config.tolerance,
            seed=module_seed(config.seed, module.name),
            on_progress=on_progress,
        )
        return Outcome(
            weight=found.dense(),
            losses=found.losses,
            factorization=found if self.packs(module) else None,
            iterations=len(found.losses) - 1,
            stop_reason=found.stop_reason.value,
            counts={**found.counts, **moments.counts},
            measures={**moments.measures, "masks_changed": found.masks_changed},
        )

    def loss(
        self, weight: Tensor, statistic: InputSecondMoment | SplitGram | WithGradients, approximation: Tensor
    ) -> float:
        """The objective relative to Ŵ = 0; with `propagate: matched` the true one, `‖W X − Ŵ X̂‖² / ‖W X‖²`."""
        moments = _Moments.of(self.config, statistic, weight)
        if moments.cross is not None and moments.gram is not None and moments.dense is not None:
            return matched_loss(weight, moments.dense, moments.cross, moments.gram, approximation)
        if self.config.objective == "hessian" and moments.regular is not None:
            return hessian_loss(
                weight,
                moments.regular,
                approximation,
                normalize=self.config.normalize,
                row_weights=moments.row_weights,
            )
        return relative_loss(
            weight, moments.h, approximation, normalize=self.config.normalize, row_weights=moments.row_weights
        )

    def block_size(self, module: ModuleShape) -> tuple[int, int]:
        """(b_o, b_i) for this module. Raises PlanError where pattern or size do not fit the weight."""
        group = parse_pattern(self.config.pattern).group
        if module.d_in % group:
            raise UnfitError(
                f"pattern {self.config.pattern} needs rows of a multiple of {group} entries, {module.name} has {module.d_in}",
                f"add {module.name!r} to `ignore`",
            )
        asked = self._own_size(module)
        sizes = AUTO_SIZES if asked == "auto" else (asked,)
        step = group if self.config.solver == "adam" else 1
        for b_o, b_i in ((size, size) if isinstance(size, int) else size for size in sizes):
            if (
                all(rows % b_o == 0 for rows in module.parts or (module.d_out,))
                and module.d_in % b_i == 0 == b_i % step
            ):
                return b_o, b_i
        raise _no_fit(module, asked, group, f" (adam needs multiples of {group})" if step > 1 else "")

    def _own_size(self, module: ModuleShape) -> int | tuple[int, int] | Literal["auto"]:
        """What the recipe, or a budget of it, says for this module. Raises PlanError where a budget's sizes leave it out."""
        asked = self.config.block_size
        if not isinstance(asked, Budget):
            return asked
        found = (asked.sizes or {}).get(module.name)
        if found is None and not has_sizes(module):
            split = "" if module.served is None else ", with whole blocks for each process of `serve`"
            raise UnfitError(
                f"no block size packs {module.name} ({module.d_out}x{module.d_in}) into less than its dense weight{split} (and "
                "rows must have a multiple of 8 entries)",
                f"add {module.name!r} to `ignore`",
            )
        if found is None:
            raise PlanError(
                f"block_size.sizes has none for {module.name}: add it, or remove `sizes`, which chooses all anew"
            )
        return found

    @property
    def unsettled(self) -> Unsettled | None:
        """The block sizes, where there is a budget for them."""
        config, asked = self.config, self.config.block_size
        if not isinstance(asked, Budget) or asked.sizes is not None:
            return None
        settings = {
            "normalize": config.normalize,
            "gradient_power": config.gradient_power,
            "cycles": self._trial_cycles,
            "seed": config.seed,
        }
        share = (self._trial_cycles + _AROUND_CYCLES) / config.iterations
        return Unsettled("block_size", asked.windows, self.needs_gradients, share, settings)

    def among(self, modules: Sequence[ModuleShape]) -> ARMORModifier:
        """Itself; until a budget is settled one that spends it as if the model needed every weight alike.

        Raises PlanError where the budget cannot be had, or sizes are more than it.
        """
        asked = self.config.block_size
        if not isinstance(asked, Budget):
            return self
        if asked.sizes is not None:
            check_sizes(asked, modules)
            return self
        return type(self)(self.settle(modules, {shape.name: float(shape.d_out * shape.d_in) for shape in modules}))

    def settle(self, modules: Sequence[ModuleShape], costs: Mapping[str, float]) -> ARMORConfig:
        """The config with a size for each module that can be taken. Raises PlanError where the budget cannot be had."""
        asked = self.config.block_size
        assert isinstance(asked, Budget)
        sizes = choose(asked, modules, costs)
        return self.config.model_copy(update={"block_size": asked.model_copy(update={"sizes": sizes})})

    def trial(self, module: ModuleShape, weight: Tensor, statistic: InputSecondMoment | WithGradients) -> Tensor:
        """What a few cycles at a middling block size leave of the weight as error."""
        block = measured_block(module)
        quick = {"block_size": block, "iterations": self._trial_cycles, "solver": "exact", "objective": "diagonal"}
        config = self.config.model_copy(update={**quick, "propagate": "dense"})
        return type(self)(config).solve(replace(module, block_size=block), weight, statistic, None).weight - weight

    @property
    def _trial_cycles(self) -> int:
        """Few enough that measuring is under a tenth of the run."""
        return max(1, min(_TRIAL_CYCLES, self.config.iterations // _TRIAL_SHARE))

    def packs(self, module: ModuleShape) -> bool:
        """Whether the checkpoint can keep core and factors: 2:4, groups that straddle no blocks, whole bytes of bitmask."""
        _, b_i = module.block_size or self.block_size(module)
        return self.config.pattern == "2:4" and b_i % 4 == 0 and module.d_in % 8 == 0


@dataclass(frozen=True, slots=True)
class _Moments:
    """What a statistic gives for one solve, on the weight's device: h `(I,)`, and where they are needed H, its regularised
    form G, for `propagate: matched` C and the dense model's XXᵀ/n, and ω `(O,)` where rows are weighed by gradients."""

    h: Tensor
    damping: float
    counts: Mapping[str, int]
    measures: Mapping[str, float]
    gram: Tensor | None = None
    regular: Tensor | None = None
    cross: Tensor | None = None
    dense: Tensor | None = None
    row_weights: Tensor | None = None

    @classmethod
    def of(
        cls, config: ARMORConfig, statistic: InputSecondMoment | SplitGram | WithGradients, weight: Tensor
    ) -> _Moments:
        device = weight.device
        if isinstance(statistic, WithGradients):
            found = cls.of(config, statistic.inputs, weight)
            g = statistic.gradients.to(device)
            weights, without = gradient_row_weights(
                found.target(weight), g, config.gradient_power, normalize=config.normalize
            )
            counts = {**found.counts, "outputs_without_gradient": without} if without else found.counts
            return replace(found, counts=counts, row_weights=weights)
        if isinstance(statistic, InputSecondMoment):
            return cls(statistic.value.to(device), config.damping, {}, {})
        seen = statistic.finish()
        gram = seen.gram.to(device)
        shrinkage = _chosen_shrinkage(statistic.name, seen) if config.shrinkage == "auto" else config.shrinkage
        regular, dead = regularize(gram, shrinkage=shrinkage, damping=config.damping)
        pairs = _pairs(statistic.name, seen, device) if config.propagate == "matched" else (None, None)
        counts = {"dead_channels": dead} if dead else {}
        return cls(
            gram.diagonal().contiguous(), config.damping, counts, {"shrinkage": shrinkage}, gram, regular, *pairs
        )

    def target(self, weight: Tensor) -> Tensor:
        """W itself, or what takes its place where the dense model's outputs are the target."""
        if self.cross is None or self.gram is None or self.regular is None:
            return weight
        unscaled = self.regular * regular_scale(self.gram, damping=self.damping)
        return matched_weight(weight.float(), self.gram, self.cross, unscaled)


def _chosen_shrinkage(name: str, seen: GramMoments) -> float:
    if seen.choice is None:
        raise NumericalError(f"{name}: {_TOO_FEW_WINDOWS}")
    return seen.choice


def _pairs(name: str, seen: GramMoments, device: torch.device) -> tuple[Tensor, Tensor]:
    """C and XXᵀ/n."""
    if seen.cross is None or seen.dense is None:
        raise NumericalError(f"no calibration token reached {name} in both models, which `propagate: matched` compares")
    return seen.cross.to(device), seen.dense.to(device)


def _no_fit(module: ModuleShape, asked: object, group: int, condition: str) -> UnfitError:
    out_sizes = [b for b in range(1, 513) if module.d_out % b == 0]
    in_sizes = [b for b in range(group, 513, group) if module.d_in % b == 0]
    both = [b for b in in_sizes if b in out_sizes]
    advice = f"sizes that fit both sides: {both}" if both else f"[out, in] sizes that fit: {out_sizes} x {in_sizes}"
    return UnfitError(
        f"block_size {asked} does not fit {module.name} ({module.d_out}x{module.d_in})", advice + condition
    )
