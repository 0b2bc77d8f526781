"""What modules inside a block are called with on a share's calibration, and what they give with other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.calibration.statistics import InputSize
from armor_recipes.model.calls import hidden_states
from armor_recipes.model.experts import every_expert, expert_of
from armor_recipes.model.padding import Padding
from armor_recipes.model.views import view
from armor_recipes.modifiers.kinds.contract import BlockContext, Share


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor among the arguments that a module is called with."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def first_output(output: Any) -> Any:
    """What a module gives, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


def parent_of(names: Sequence[str], model: nn.Module) -> str:
    """The innermost module that holds all of these, or the only one itself, as long as it is one that is called: no list."""
    levels = zip(*(name.split(".") for name in names), strict=False)
    name = ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
    while isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict):
        name = name.rpartition(".")[0]
    return name


@dataclass(frozen=True, slots=True, eq=False)
class Calls:
    """All calls of one module on the calibration, with the padding of each.

    `sizes` is the mean of the absolute value of what is measured beside it, over tokens alone; None where nothing was.
    """

    parent: str
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any], Padding], ...]
    sizes: InputSize | None

    def outputs(self, model: nn.Module, changed: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """What the module gives on each call, rows of padding left out, with these parameters by full name."""
        prefix = f"{self.parent}."
        own = {name.removeprefix(prefix): value for name, value in changed.items() if name.startswith(prefix)}
        module = view(model.get_submodule(self.parent), own)
        for args, kwargs, padding in self.arguments:
            output: Tensor = hidden_states(module(*args, **kwargs))
            yield torch.cat([piece.flatten(0, -2) for piece in padding.pieces(output)])


@dataclass(frozen=True, slots=True)
class Wanted:
    """A module whose calls are wanted, and where sizes are measured: at the outputs of a norm, or at the inputs of a reader."""

    parent: str
    measured: str
    outputs: bool


class CallsOf:
    """Calls of modules of a block, taken when they are asked for, on the block with the weights that it has by then.

    Those of one mixture's experts are taken together, in one pass, and kept until others are asked for.
    """

    def __init__(self, share: Share, context: BlockContext, weights: Mapping[str, Tensor]) -> None:
        self._share, self._context, self._weights = share, context, weights
        self._kept: dict[Wanted, Calls] = {}

    def of(self, wanted: Wanted, beside: Sequence[Wanted] = ()) -> Calls:
        """The calls of one module; `beside` are others that will be asked for next."""
        if wanted not in self._kept:
            self._kept.clear()
            self._kept |= self._take([wanted, *(one for one in beside if one != wanted)])
        return self._kept.pop(wanted)

    def _take(self, wanted: Sequence[Wanted]) -> dict[Wanted, Calls]:
        prefix = f"{self._context.name}."
        inside = {name.removeprefix(prefix): value for name, value in self._weights.items()}
        takers = {one: _Taker(one.measured, []) for one in wanted}
        names = dict.fromkeys(name for one in wanted for name in (one.parent, one.measured))
        copied = [name.removeprefix(prefix) for name in names if name != self._context.name]
        block = view(self._context.module, inside, copied=copied)
        for one, taker in takers.items():
            place = block if one.parent == self._context.name else block.get_submodule(one.parent.removeprefix(prefix))
            place.register_forward_pre_hook(taker.called, with_kwargs=True)
            measured = block.get_submodule(one.measured.removeprefix(prefix))
            if one.outputs:
                measured.register_forward_hook(taker.gave)
            else:
                measured.register_forward_pre_hook(taker.reads, with_kwargs=True)
        (source,) = self._share.modifier.needs.streams
        stream = self._context.stream(self._share, source)
        index = self._context.index
        with every_expert(block, wanted=self._share.every_expert):
            for calls, padding in zip(stream.uses(index), stream.paddings(index), strict=True):
                for taker in takers.values():
                    taker.padding = padding
                for call in calls:
                    call.run(block)
        return {one: Calls(one.parent, tuple(taker.arguments), taker.sizes) for one, taker in takers.items()}


@dataclass(slots=True)
class _Taker:
    """Hooks that keep a module's arguments, and sum the sizes of what is measured."""

    name: str
    arguments: list[tuple[tuple[Any, ...], dict[str, Any], Padding]]
    padding: Padding | None = None
    sizes: InputSize | None = None

    def called(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a call."""
        assert self.padding is not None
        self.arguments.append((args, dict(kwargs), self.padding))

    def gave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Add an output."""
        self._add(first_output(output))

    def reads(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add an input."""
        self._add(first_tensor(args, kwargs))

    def _add(self, x: Tensor) -> None:
        assert self.padding is not None
        if self.sizes is None:
            self.sizes = InputSize(self.name, x.shape[-1])
        for piece in self.padding.pieces(x):
            self.sizes.update(piece)


def expert_layer(name: str) -> str:
    """The module of the experts that a module of an expert is in; empty for any other."""
    expert = expert_of(name)
    return "" if expert is None else expert.layer
