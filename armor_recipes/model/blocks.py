"""Find the stacks of blocks on the module tree: no tracing, no list of architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from armor_recipes.errors import PlanError


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks that are called one after the other, each on what the one before gave; a language model's decoder layers.

    Blocks are numbered through all stacks of a model in the order of the forward pass: those of this one from `first` on.
    """

    name: str
    modules: tuple[nn.Module, ...]
    first: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the blocks, in order."""
        return tuple(f"{self.name}.{i}" for i in range(len(self.modules)))

    @property
    def indices(self) -> range:
        """The numbers of the blocks."""
        return range(self.first, self.first + len(self.modules))

    def block(self, index: int) -> nn.Module:
        """The block of that number."""
        return self.modules[index - self.first]

    def block_name(self, index: int) -> str:
        """Full name of the block of that number."""
        return f"{self.name}.{index - self.first}"


@dataclass(frozen=True, slots=True)
class Stacks:
    """All stacks of a model, in the order in which the forward pass calls them."""

    all: tuple[Stack, ...]
    _numbers: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {name: number for number, name in enumerate(self.names)})

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of all blocks, by their numbers."""
        return tuple(name for stack in self.all for name in stack.names)

    def block_of(self, module_name: str) -> int | None:
        """Number of the block that holds the module, or None where it is outside of all blocks."""
        end = module_name.find(".")
        while end >= 0:
            number = self._numbers.get(module_name[:end])
            if number is not None:
                return number
            end = module_name.find(".", end + 1)
        return None

    def of_block(self, index: int) -> Stack:
        """The stack that holds the block of that number."""
        return next(stack for stack in self.all if index in stack.indices)

    def block(self, index: int) -> nn.Module:
        """The block of that number."""
        return self.of_block(index).block(index)


def find_stacks(model: nn.Module) -> Stacks:
    """The one `nn.ModuleList` whose members transformers must not split, or else the largest list of equals.

    Raises PlanError where no list or more than one qualifies (an encoder and a decoder, say).
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    found = [(name, m) for name, m in lists if all(type(layer).__name__ in unsplit for layer in m)]
    if not found:
        found = _largest([(name, m) for name, m in lists if len({type(layer) for layer in m}) == 1])
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise PlanError(
            f"{type(model).__name__}: expected one list of decoder layers on the module tree, found {names}; "
            "only decoder-only language models are supported"
        )
    name, layers = found[0]
    return Stacks((Stack(name, tuple(layers)),))


def _largest(lists: list[tuple[str, nn.ModuleList]]) -> list[tuple[str, nn.ModuleList]]:
    sizes = [sum(p.numel() for p in m.parameters()) for _, m in lists]
    return [entry for entry, size in zip(lists, sizes, strict=True) if size == max(sizes) and size > 0][:1]
