"""Importing this registers our modifiers with llm-compressor, so that its `oneshot` runs them in its own pipeline.

| module | holds |
|---|---|
| `cores` | a linear layer whose weight is the core S, with A and B as hooks around it; no llm-compressor in it |
| `order` | which of llm-compressor's modifiers may stand before and after ours, with what was measured |
| `saving` | `save_pretrained` of a model with such layers, and the guard on its `state_dict` |
| `modifier` | our modifiers under llm-compressor's base class, with its lifecycle |
"""

from __future__ import annotations

from armor_recipes.errors import ArmorError

try:
    import llmcompressor as _llmcompressor  # noqa: F401 - theirs, not this package
except ImportError as error:
    raise ArmorError(
        f"armor_recipes.integrations.llmcompressor needs llm-compressor, which cannot be imported ({error}): "
        "install 'armor-recipes[llmcompressor]'"
    ) from error

from armor_recipes.integrations.llmcompressor.modifier import register

registered = register()
"""Our modifiers as llm-compressor takes them, by name. Names that llm-compressor has itself stay its own."""
globals().update(registered)

__all__ = ["register", "registered"]
