"""Statistics of what modules put out, and of keys and values on their way into the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from armor_recipes.model.cache import through_cache
from armor_recipes.model.hooks import Hooks
from armor_recipes.modifiers.base import Tap

Pieces = Callable[[Tensor], Iterable[Tensor]]


def feed_tap(hooks: Hooks, module: nn.Module, tap: Tap, statistic: Any, pieces: Pieces) -> None:
    """Feed the statistic with the tokens that count until the hooks' scope is left: of outputs `(..., O)`, of keys or values
    `(B, T, heads, D)`.
    """

    def take(value: Tensor) -> None:
        for piece in pieces(value):
            statistic.update(piece)

    if tap.side == "output":
        hooks.after(module, lambda _, __, output: take(output))
        return
    place = 0 if tap.side == "keys" else 1

    def look(*states: Tensor) -> tuple[Tensor, ...]:
        take(states[place].transpose(1, 2))
        return states

    hooks.rewriting(module, through_cache(module, look))
