"""What modifiers that quantise by the fields of `SchemeConfig` have in common."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from armor_recipes.calibration.ranges import InputRange
from armor_recipes.checkpoint.quantized import QuantizedCache, Scheme
from armor_recipes.modifiers.base import Tap
from armor_recipes.modifiers.kinds.quantizer import Quantizer
from armor_recipes.modifiers.plain import cached, observed_tap
from armor_recipes.modifiers.schemes import SchemeConfig

S = TypeVar("S", bound=SchemeConfig)


class SchemeQuantizer(Quantizer[S]):
    """A quantiser whose config says what to: the scheme of each module, of what it puts out, and of keys and values."""

    def scheme_of(self, name: str, module: Any) -> Scheme | None:
        """The scheme of the group that takes a module; None where none does."""
        return self.config.scheme_of(name, module)

    @property
    def cache(self) -> str | None:
        """How keys and values are quantised."""
        return self.config.cache

    @property
    def takes_modules(self) -> bool:
        """Whether there is any scheme of weights."""
        return self.config.for_weights

    def outranked(self, name: str, module: Any) -> tuple[Scheme, ...]:
        """The schemes of groups that match a module less closely."""
        return self.config.matching(name, module)[1:]

    def listen(self, tap: Tap) -> InputRange:
        """The range of what a module puts out, or of keys or values."""
        return observed_tap(tap, self.config.args_of(tap))

    def cached(self, scheme: str, keys: Any, values: Any, dtype: torch.dtype) -> QuantizedCache:
        """The scales of keys and values."""
        return cached(scheme, keys, values, dtype)
