"""What can be said of a model and its calibration before anything long: which modules the samples reach, and in which order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

from torch import nn

from armor_recipes.calibration.inputs import InputSet
from armor_recipes.errors import PlanError
from armor_recipes.model.blocks import Stacks, inner_name
from armor_recipes.model.experts import every_expert, expert_of
from armor_recipes.model.hooks import Hooks
from armor_recipes.model.survey import Survey, survey
from armor_recipes.modifiers.kinds.contract import Share, once
from armor_recipes.recipe.schema import CalibrationSpec, MoeSpec

#: A part of a name that is a number: a member of a list inside a block, which not every sample may reach.
_MEMBER = re.compile(r"(^|\.)\d+(\.|$)")


def look(
    model: nn.Module,
    stacks: Stacks,
    shares: Sequence[Share],
    tokens: Mapping[CalibrationSpec, InputSet],
    hooks: Hooks,
    *,
    moe: MoeSpec,
    sharing: Mapping[str, Sequence[str]],
) -> Survey:
    """Send the first sample of each dataset through the model, and all others as long as members of lists are not reached.

    Where all samples are windows of tokens, whose form tells nothing apart, it is the first of them all.

    Raises PlanError where they never reach what is to learn from them, where the model has no logits that an entry needs, or where
    an entry that runs blocks by themselves takes weights that several blocks share; InputError where the model's own code fails.
    """
    _check_alone(stacks, shares, sharing)
    learning = [s for s in shares if s.entry.config.calibration is not None]
    specs = dict.fromkeys(spec for s in learning if (spec := s.entry.config.calibration) is not None)
    first = next((s.entry.config.calibration for s in learning if s.modifier.needs.streams), None)
    names = _names(shares)
    found: dict[CalibrationSpec, Survey] = {}
    for spec in specs if first is None else dict.fromkeys([first, *specs]):
        with every_expert(model):  # one sample may not be routed to all of them
            begun = _begun(tokens[spec])
            seen = [survey(model, stacks, names, tokens[spec].sample(at), hooks, sharing) for at in begun]
            found[spec] = reduce(Survey.and_also, seen)
            wanted = {name for share in learning if share.entry.config.calibration == spec for name in _observed(share)}
            for at in range(len(tokens[spec])):
                if at in begun:
                    continue
                missing = _unreached(wanted, found[spec], moe)
                if not missing or not all(_may_come(name, found[spec], stacks) for name in missing):
                    break
                sample = tokens[spec].sample(at)
                found[spec] = found[spec].and_also(survey(model, stacks, names, sample, hooks, sharing))
    if not found:
        return Survey({}, {}, frozenset(), logits=True)
    for share in learning:
        spec = share.entry.config.calibration
        assert spec is not None
        _check_reached(share, found[spec], moe)
        _check_logits(share, found[spec], model)
    total, *others = found.values()
    for other in others:
        total = total.and_also(other)
    return total


def _names(shares: Sequence[Share]) -> list[str]:
    """Modules that are taken, and those that are only observed behind them."""
    rows = [row for share in shares for row in share.rows]
    taken = [name for row in rows for name in row.takes]
    return list(dict.fromkeys([*taken, *(shape.name for row in rows for shape in row.observed)]))


def _begun(inputs: InputSet) -> list[int]:
    """The places of samples that are looked at in any case: the first of each source that may be of another form."""
    return [0] if inputs.is_windows else [inputs.origins.index(source) for source in dict.fromkeys(inputs.origins)]


def _observed(share: Share) -> list[str]:
    """The modules that an entry learns from, where it learns from what comes to them."""
    if not share.modifier.needs.streams:
        return []
    return list(dict.fromkeys(shape.name for row in share.rows for shape in row.observed))


def _unreached(names: Iterable[str], seen: Survey, moe: MoeSpec) -> list[str]:
    """Those that are not called, nor others that share their weights.

    One expert of several that are called is left to the statistics, and all of them where the recipe skips those without tokens.
    """
    skips = moe.below == "skip" and moe.minimum_tokens != 0
    reached = {expert.layer for name in seen.called if (expert := expert_of(name)) is not None}
    missing = []
    for name in names:
        expert = expert_of(name)
        passed_over = expert is not None and (skips or expert.layer in reached)
        if not passed_over and name not in seen.called:
            missing.append(name)
    return missing


def _may_come(name: str, seen: Survey, stacks: Stacks) -> bool:
    """Whether a module is one of a list inside a block that is called: other samples may reach it."""
    block = stacks.block_of(name)
    if block is None or block not in seen.blocks:
        return False
    return _MEMBER.search(inner_name(stacks.block_name(block), name)) is not None


def _check_reached(share: Share, seen: Survey, moe: MoeSpec) -> None:
    missing = _unreached(_observed(share), seen, moe)
    if missing:
        experts = ", or set `moe.below: skip`" if all(map(expert_of, missing)) else ""
        reason = (
            "{} is never called: the calibration inputs never reach it, or the model reads its weight without calling it. Give "
            f"inputs that reach it (with images, where it looks at images), or add it to `ignore`{experts}"
        )
        raise PlanError(f"{share.entry.where}: {share.entry.name}: {once(reason, missing)}")


def _check_logits(share: Share, seen: Survey, model: nn.Module) -> None:
    if share.modifier.needs.gradients and not seen.logits:
        raise PlanError(
            f"{share.entry.where}: {share.entry.name}: it weighs outputs by what the loss of the model's logits feels of them, and "
            f"a {type(model).__name__} gives no logits: switch that off"
        )


def _check_alone(stacks: Stacks, shares: Sequence[Share], sharing: Mapping[str, Sequence[str]]) -> None:
    """Raise PlanError where a block is to be run by itself for weights that other blocks use, too."""
    for share in (share for share in shares if share.modifier.needs.dense in ("block", "outputs")):
        taken = dict.fromkeys(name for row in share.rows for name in (*row.takes, *getattr(row, "modules", ())))
        several = [name for name in taken if len({stacks.block_of(user) for user in sharing.get(name, (name,))}) > 1]
        if several:
            reason = (
                "the weight of {} is used by several layers, and "
                f"{share.modifier.needs.because} compares one layer with the dense one: add it to `ignore`"
            )
            raise PlanError(f"{share.entry.where}: {share.entry.name}: {once(reason, several)}")
