"""Resolve a modifier's `targets` and `ignore` to module names, once, on the original module types."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from compressed_tensors.utils import is_match
from torch import nn

from armor_recipes.errors import PlanError
from armor_recipes.recipe.schema import ModifierConfig


@dataclass(frozen=True, slots=True)
class Matched:
    """Linear modules that a modifier takes, and those that `ignore` held back, in the model's order."""

    names: tuple[str, ...]
    ignored: tuple[str, ...]


def resolve_targets(model: nn.Module, config: ModifierConfig) -> Matched:
    """Names of the linear modules that `targets` matches and `ignore` does not.

    A pattern may pass over containers (modules without weights of their own). It is a PlanError when one of the targets
    matches nothing (unless `optional: true`), or matches a module with a weight that is not linear.
    """
    modules = [(name, m) for name, m in model.named_modules() if name]
    taken: dict[str, None] = {}
    ignored: dict[str, None] = {}
    for target in config.targets:
        matched = [(name, m) for name, m in modules if is_match(name, m, target)]
        held = {name for name, m in matched if config.ignore and is_match(name, m, config.ignore)}
        linear = [(name, m) for name, m in matched if isinstance(m, nn.Linear)]
        _refuse_other_weights(target, [(name, m) for name, m in matched if name not in held])
        if not linear and not config.optional:
            raise PlanError(_nothing_matched(target, [name for name, m in modules if isinstance(m, nn.Linear)]))
        taken.update((name, None) for name, _ in linear if name not in held)
        ignored.update((name, None) for name, _ in linear if name in held)
    if not taken and not config.optional:
        raise PlanError(
            f"`ignore` holds back all {len(ignored)} modules that {list(config.targets)} matches; narrow `ignore`"
        )
    order = [name for name, _ in modules]
    return Matched(tuple(n for n in order if n in taken), tuple(n for n in order if n in ignored))


def _refuse_other_weights(target: str, matched: list[tuple[str, nn.Module]]) -> None:
    wrong = [
        f"{name} ({type(m).__name__})"
        for name, m in matched
        if not isinstance(m, nn.Linear) and any(True for _ in m.parameters(recurse=False))
    ]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise PlanError(
            f"target {target!r} matches modules that are not nn.Linear: {shown}; narrow the pattern or add them to `ignore`"
        )


def _nothing_matched(target: str, linear: list[str]) -> str:
    wanted = target.removeprefix("re:").replace("\\", "").replace(".*", "").rstrip("$")
    tails = {name.rsplit(".", 1)[-1]: name for name in reversed(linear)}
    near = difflib.get_close_matches(wanted, linear, n=3, cutoff=0.3)
    near += [tails[tail] for tail in difflib.get_close_matches(wanted.rsplit(".", 1)[-1], tails, n=3, cutoff=0.5)]
    nearest = ", ".join(dict.fromkeys(near)) or ", ".join(linear[:3])
    return (
        f"target {target!r} matches no linear module; nearest: {nearest}. Correct the pattern (it is matched from the start "
        "of the full name), or say `optional: true`"
    )
