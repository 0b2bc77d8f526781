"""Quantised keys and values of a loaded folder.

compressed-tensors (up to 0.20) does not know by what name transformers 5.24 gives attention its cache, so that stock loading leaves
a `kv_cache_scheme` out there; older transformers apply it. Here it is applied with all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from armor_recipes.checkpoint.header import shown
from armor_recipes.checkpoint.quantized import QuantizedCache, cache_tensors
from armor_recipes.errors import CheckpointError
from armor_recipes.model.cache import cache_argument, through_cache

_CACHE = "_armor_cache"


def without_cache(config: Any) -> None:
    """Take the cache out of a config's `quantization_config`, or all of it where nothing else is in it: nobody else hooks it."""
    found = dict(config.quantization_config)
    if found.get("config_groups"):
        config.quantization_config = {**found, "kv_cache_scheme": None}
    else:
        del config.quantization_config


def run_caches(model: Any, quantization: dict[str, Any], scheme: str, caches: Mapping[str, QuantizedCache]) -> None:
    """Let keys and values be quantised as `scheme` says, and the model be saved with all that its folder has.

    Raises:
        CheckpointError: where scales are there for other modules than those with a cache.
    """
    modules = {name: module for name, module in model.named_modules() if cache_argument(module) is not None}
    static = bool(cache_tensors(scheme))
    odd = sorted(modules.keys() ^ caches.keys()) if static else []
    if odd or not modules:
        raise CheckpointError(
            f"kv_cache_scheme: {shown(odd[0]) if odd else 'no module'} has no cache, or no scales for it in the files"
        )
    for name, module in modules.items():
        _attach(module, caches.get(name, QuantizedCache(scheme, {})))
    own = vars(model.config).get("quantization_config")
    if isinstance(own, dict) or own is None:
        model.config.quantization_config = dict(quantization)
    else:
        inner: Any = getattr(own, "quantization_config", own)
        inner.kv_cache_scheme = QuantizedCache(scheme, {}).args


def has_cache(module: nn.Module) -> bool:
    """Whether `run_caches` lets keys and values of this module be quantised."""
    return _CACHE in module.__dict__


def _attach(module: nn.Module, cache: QuantizedCache) -> None:
    module.__dict__[_CACHE] = cache
    for name, tensor in cache.tensors.items():
        module.register_buffer(name, tensor)
    module.register_forward_pre_hook(through_cache(module, cache.states), with_kwargs=True)
