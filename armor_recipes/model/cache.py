"""Keys and values of attention, on their way into the cache: after rotation, as the cache is given them, with or without one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

States = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
CallHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
#: What transformers has called the argument, the newest first.
_ARGUMENTS = ("cache", "past_key_values", "past_key_value")
#: What makes keys or values in an attention module, as compressed-tensors knows one.
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")


def cache_argument(module: nn.Module) -> str | None:
    """The argument by which an attention module is given its cache; None where the module is none, or has no cache.

    By the rule of compressed-tensors: a class with attention in its name and a projection of keys or values.
    """
    if "attention" not in type(module).__name__.lower() or not any(hasattr(module, name) for name in _PROJECTIONS):
        return None
    known = inspect.signature(type(module).forward).parameters
    return next((name for name in _ARGUMENTS if name in known), None)


def through_cache(module: nn.Module, change: States) -> CallHook:
    """A forward pre-hook for an attention module: keys and values `(B, heads, T, D)` pass through `change` before the cache takes
    them. Raises ValueError where the module has no cache.
    """
    argument = cache_argument(module)
    if argument is None:
        raise ValueError(f"{type(module).__name__} is no attention module with a cache")

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, argument: _Through(kwargs.get(argument), change)}

    return hook


class _Through:
    """A cache in front of another, or of none."""

    def __init__(self, inner: Any, change: States) -> None:
        from transformers import DynamicCache

        self._inner = DynamicCache() if inner is None else inner
        self._change = change

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the cache gives for the changed keys and values."""
        keys, values = self._change(keys, values)
        return self._inner.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
