"""Find the stacks of blocks on the module tree: no tracing, no list of architectures."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks that are called one after the other, each on what the one before gave; a language model's decoder layers, say.

    Blocks are numbered through all stacks of a model: those of this one from `first` on. `keys` are the blocks' names in the stack
    where they are not 0, 1, …; a linear module outside of all lists of blocks is a stack of its own, whose only key is empty.
    """

    name: str
    modules: tuple[nn.Module, ...]
    first: int = 0
    keys: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the blocks, in order."""
        keys = self.keys or tuple(map(str, range(len(self.modules))))
        return tuple(f"{self.name}.{key}".strip(".") for key in keys)

    @property
    def indices(self) -> range:
        """The numbers of the blocks."""
        return range(self.first, self.first + len(self.modules))

    def block(self, index: int) -> nn.Module:
        """The block of that number."""
        return self.modules[index - self.first]

    def block_name(self, index: int) -> str:
        """Full name of the block of that number."""
        return self.names[index - self.first]


@dataclass(frozen=True, slots=True)
class Stacks:
    """All stacks of a model, in the order of the module tree: an encoder before the decoder, a tower before the text model.

    Attributes:
        all: the lists of blocks.
        outside: linear modules outside of them, each a stack of one block, numbered after all others: projectors, poolers, heads.
    """

    all: tuple[Stack, ...]
    outside: tuple[Stack, ...] = ()
    _numbers: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        numbers = {
            name: number for stack in self.every for name, number in zip(stack.names, stack.indices, strict=True)
        }
        object.__setattr__(self, "_numbers", numbers)

    @property
    def every(self) -> tuple[Stack, ...]:
        """Lists of blocks, then the modules outside of them."""
        return self.all + self.outside

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the blocks of all lists, by their numbers."""
        return tuple(name for stack in self.all for name in stack.names)

    def names_to(self, last: int) -> tuple[str, ...]:
        """`names`, and those of the modules outside where the block `last` is one of them."""
        names = self.names
        return names if last < len(names) else tuple(self._numbers)

    def block_of(self, module_name: str) -> int | None:
        """Number of the block that holds the module or is it, or None where it is outside of all blocks."""
        parts = module_name.split(".")
        names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((self._numbers[name] for name in names if name in self._numbers), None)

    def of_block(self, index: int) -> Stack:
        """The stack that holds the block of that number."""
        every = self.every
        return every[bisect_right([stack.first for stack in every], index) - 1]

    def block(self, index: int) -> nn.Module:
        """The block of that number."""
        return self.of_block(index).block(index)

    def block_name(self, index: int) -> str:
        """Full name of the block of that number."""
        return self.of_block(index).block_name(index)


def find_stacks(model: nn.Module) -> Stacks:
    """Every outermost list of modules with weight matrices in them, and what matrices there are outside of those lists.

    Blocks are found by their shapes and their place on the tree alone: one that is made linear is the block that it was.
    """
    lists: list[tuple[str, nn.Module]] = []
    outside: list[tuple[str, nn.Module]] = []
    for name, module in _outermost(model, ""):
        (outside if _is_matrix(module) else lists).append((name, module))
    first = 0
    stacks = []
    for name, module in lists:
        children = dict(module.named_children())
        stacks.append(Stack(name, tuple(children.values()), first, _keys(children)))
        first += len(children)
    singles: dict[int, Stack] = {}
    for name, module in outside:
        singles.setdefault(id(module), Stack(name, (module,), first + len(singles), ("",)))
    return Stacks(tuple(stacks), tuple(singles.values()))


def inner_name(block: str, module: str) -> str:
    """A module's name from its block; empty where it is the block."""
    return "" if module == block else module.removeprefix(f"{block}.")


def _keys(children: Mapping[str, nn.Module]) -> tuple[str, ...]:
    keys = tuple(children)
    return () if keys == tuple(map(str, range(len(keys)))) else keys


def _outermost(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Lists of blocks, and matrices outside of them, in the tree's order."""
    if _is_matrix(module) or _is_list(module):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _outermost(child, f"{name}.{key}".strip("."))


def _is_list(module: nn.Module) -> bool:
    """Whether it is a list of blocks. A list of lists that cannot be called, of stages say, is none: those lists are."""
    blocks = list(filter(_is_block, module.children())) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
    return bool(blocks) and not any(map(_only_holds, blocks))


def _only_holds(module: nn.Module) -> bool:
    """Whether it is a list or dictionary of modules that cannot be called itself."""
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward


def _is_block(module: nn.Module) -> bool:
    """Whether there are matrices in the module; one that is a matrix itself is a part of something."""
    return not _is_matrix(module) and any(map(_holds_matrix, module.modules()))


def _is_matrix(module: nn.Module) -> bool:
    """Whether a linear module stands here, or what can be made one: its weight is a matrix and no table."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and _multiplies(module)


def _holds_matrix(module: nn.Module) -> bool:
    """Whether the module itself, not one in it, has a matrix or several fused into one parameter."""
    return _multiplies(module) and any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _multiplies(module: nn.Module) -> bool:
    return not isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd))
