"""The room of the runtime: the linear layer that runs `A (S (B x))`, and its backends."""

from __future__ import annotations

from armor_recipes.runtime.kernel import Capabilities, capabilities
from armor_recipes.runtime.linear import ArmorLinear, set_backend

__all__ = ["ArmorLinear", "Capabilities", "capabilities", "set_backend"]
