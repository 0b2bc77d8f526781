"""Resolve a modifier's `targets` and `ignore` to module names, once, on the original module types."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from compressed_tensors.utils import is_match
from torch import nn
from torch.nn.modules.conv import _ConvNd

from armor_recipes.errors import PlanError, UnfitError
from armor_recipes.model.blocks import Stacks
from armor_recipes.model.forms import fused_names
from armor_recipes.model.linears import is_linear
from armor_recipes.model.roles import Role, roles
from armor_recipes.recipe.schema import PRESET, ModifierConfig

#: Dimensions of weights that hold those of several experts.
_EXPERT_DIMENSIONS = 3
#: Modules that a target is told which matches none.
_NAMED = 8
#: Roles of the linear modules that a preset of targets means.
_PRESETS: Mapping[str, tuple[Role, ...]] = {
    f"{PRESET}attention": ("attention",),
    f"{PRESET}mlp": ("mlp",),
    f"{PRESET}all-linear": ("attention", "mlp", "other"),
}


@dataclass(frozen=True)
class Tree:
    """All modules of a model with their names, a module that stands at several places at each of them; and its stacks."""

    modules: Sequence[tuple[str, nn.Module]]
    stacks: Stacks

    @cached_property
    def roles(self) -> Mapping[str, Role]:
        """What linear modules in blocks are for, by name."""
        return roles(self.modules, self.stacks)

    def matches(self, name: str, module: nn.Module, *targets: str) -> bool:
        """Whether a module is what one of the targets means."""
        others = [target for target in targets if target not in _PRESETS]
        wanted = {role for target in targets for role in _PRESETS.get(target, ())}
        return (bool(others) and bool(is_match(name, module, others))) or (
            bool(wanted) and self.roles.get(name) in wanted
        )

    def skips(self, name: str, config: ModifierConfig) -> bool:
        """Whether a module is in one of the first or last blocks of its list that the entry leaves alone."""
        skip = config.skip_layers
        block = None if skip is None else self.stacks.block_of(name)
        if skip is None or block is None:
            return False
        indices = self.stacks.of_block(block).indices
        return len(indices) > 1 and not indices[0] + skip.first <= block < indices[-1] + 1 - skip.last


@dataclass(frozen=True, slots=True)
class Matched:
    """What `targets` matches, in the model's order; a module that stands at several places is named at each of them.

    Attributes:
        names: linear modules.
        ignored: linear modules that `ignore` held back.
        others: modules with weights that are not linear.
    """

    names: tuple[str, ...]
    ignored: tuple[str, ...]
    others: tuple[str, ...]


def resolve_targets(tree: Tree, config: ModifierConfig) -> Matched:
    """Names of what `targets` matches, and neither `ignore` nor `skip_layers` holds back.

    A pattern may pass over containers (modules without weights of their own), or take what is in them (`takes_containers`). It is
    a PlanError when one of the targets matches nothing linear (unless `optional: true`).
    """
    taken: set[str] = set()
    ignored: set[str] = set()
    others: set[str] = set()
    modules = tree.modules
    for target in config.targets:
        matched = [(name, m) for name, m in modules if tree.matches(name, m, target)]
        if config.takes_containers:
            matched = _inside(matched)
        held = {name for name, m in matched if tree.matches(name, m, *config.ignore) or tree.skips(name, config)}
        linear = {name for name, m in matched if is_linear(m)}
        passed = held | linear
        others |= {name for name, m in matched if name not in passed and _has_weights(m)}
        if not linear and not others and not config.optional:
            raise PlanError(_fused(target, modules) or _nothing_matched(target, modules))
        taken |= linear - held
        ignored |= linear & held
    if not taken and not others and not config.optional:
        raise PlanError(
            f"{_holding(config)} holds back all {len(ignored)} modules that {list(config.targets)} matches; narrow it"
        )
    order = [name for name, _ in modules]
    return Matched(*(tuple(name for name in order if name in found) for found in (taken, ignored, others)))


def _inside(matched: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The matched modules, with the linear ones inside of each in the place of what has some."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in matched:
        parts = [] if is_linear(module) else module.named_modules(prefix=name, remove_duplicate=False)
        found += [part for part in parts if is_linear(part[1])] or [(name, module)]
    return found


def _holding(config: ModifierConfig) -> str:
    return (
        "`ignore`"
        if config.skip_layers is None
        else "`skip_layers`"
        if not config.ignore
        else "`ignore` with `skip_layers`"
    )


def vain_ignores(tree: Tree, config: ModifierConfig) -> list[str]:
    """A sentence on each pattern of `ignore` that matches no module of the model, or only such as have others in them."""
    return [text for pattern in config.ignore if (text := _vain(tree, pattern))]


def _vain(tree: Tree, pattern: str) -> str:
    holding: tuple[str, nn.Module] | None = None  # the first that has others in it
    for name, module in tree.modules:
        if not tree.matches(name, module, pattern):
            continue
        if is_linear(module) or _has_weights(module):
            return ""
        holding = holding or (name, module)
    if holding is None:
        return f"`ignore` {pattern!r} matches no module of this model and holds nothing back"
    name, module = holding
    inside = next((f"{name}.{part}" for part, one in module.named_modules() if part and is_linear(one)), "")
    if not inside:
        return ""
    return (
        f"`ignore` {pattern!r} matches {name} ({type(module).__name__}) and no linear module, such as {inside}, and holds nothing "
        f"back: to leave all in it, write 're:{re.escape(name)}\\..*'"
    )


def not_linear(name: str, module: nn.Module) -> UnfitError:
    """Why a module with weights of its own is no target."""
    return UnfitError(
        f"{name} ({type(module).__name__}) is no linear module: {_reason(module)}",
        f"narrow the pattern, or add {name!r} to `ignore`",
    )


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _reason(module: nn.Module) -> str:
    """What its weights are, from its class and their shapes."""
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters(recurse=False)}
    listed = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'a number'}" for name, shape in shapes.items())
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return f"rows of an embedding are looked up, not multiplied ({listed})"
    if isinstance(module, _ConvNd):
        return f"a convolution ({listed})"
    if all(len(shape) < 2 for shape in shapes.values()):
        return f"a norm or other vectors, which hold no matrix ({listed})"
    if any(len(shape) == _EXPERT_DIMENSIONS for shape in shapes.values()):
        return f"weights of several experts in one tensor, of a form that is not known ({listed})"
    return f"its matrix is multiplied by code of its own class ({listed})"


def _fused(target: str, modules: Sequence[tuple[str, nn.Module]]) -> str | None:
    """What a target is told that names a parameter in which linear layers are fused."""
    named = ((name, parts) for name, parts in fused_names(modules).items() if is_match(name, nn.Module(), target))
    name, parts = next(named, ("", ()))
    if not parts:
        return None
    return (
        f"target '{target}' matches {name}, in which {len(parts)} linear modules are fused, planned by names of their own: "
        f"{', '.join(parts[:3])}, …. Name those"
    )


def _nothing_matched(target: str, modules: Sequence[tuple[str, nn.Module]]) -> str:
    if target in _PRESETS:
        return f"target '{target}' finds no linear module in repeated layers of this model: name modules, or say `optional: true`"
    linear = [name for name, module in modules if is_linear(module)]
    linear = list({_of_block(name): name for name in reversed(linear)}.values())[::-1]
    wanted = target.removeprefix("re:").replace("\\", "").replace(".*", "").rstrip("$")
    tails = {name.rsplit(".", 1)[-1]: name for name in reversed(linear)}
    near = difflib.get_close_matches(wanted, linear, n=3, cutoff=0.3)
    near += [tails[tail] for tail in difflib.get_close_matches(wanted.rsplit(".", 1)[-1], tails, n=3, cutoff=0.5)]
    # One of each kind, the nearest first, so that the right name is among them.
    kinds: dict[str, str] = {}
    for name in (*near, *linear):
        kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), name)
    nearest = ", ".join(list(kinds.values())[:_NAMED])
    return (
        f"target '{target}' matches no linear module; nearest: {nearest}. Correct the pattern (it is matched from the start "
        "of the full name), or say `optional: true`"
    )


def _of_block(name: str) -> str:
    """A name with its numbers after the first left out, alike for all experts of a layer: comparing each would take long."""
    first = re.match(r".*?\.\d+(?=\.|$)", name)
    end = first.end() if first else 0
    return name[:end] + re.sub(r"\.\d+(?=\.|$)", ".", name[end:])
