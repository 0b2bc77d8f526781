"""Which part of a model first gives numbers that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from armor_recipes.model.calls import hidden_states
from armor_recipes.model.hooks import Hooks

#: What to do about it.
ADVICE = "check the model's weights, or set a wider model.compute_dtype"


class _FoundError(Exception):
    """Ends the run; never leaves this file."""


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are."""
    return bool(x.isfinite().all())


def first_broken(network: nn.Module, run: Callable[[], object], among: Collection[str] | None = None) -> str:
    """The name, within `network`, of the first module (of those named, or of all) whose output is not finite while `run` runs it.

    Inner modules end before those that hold them. Empty where that is the network itself, or all outputs are finite; else the run
    is stopped there.
    """
    found = ""

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            nonlocal found
            first = hidden_states(output)
            if isinstance(first, Tensor) and not is_finite(first):
                found = name
                raise _FoundError

        return hook

    with Hooks() as hooks, suppress(_FoundError):
        for name, module in network.named_modules():
            if among is None or name in among:
                hooks.after(module, watch(name))
        run()
    return found


def joined(outer: str, inner: str) -> str:
    """The full name of a module inside of another one, or of that one itself."""
    return f"{outer}.{inner}" if inner else outer
