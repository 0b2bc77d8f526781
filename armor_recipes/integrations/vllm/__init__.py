"""vLLM reads ARMOR checkpoints: it finds `register` by the entry point of the group `vllm.general_plugins`.

| module | holds |
|---|---|
| `parts` | which part of each tensor a process holds, and how it gets there; no vLLM in it |
| `plugin` | vLLM's interfaces, imported in vLLM's processes alone |
"""

from __future__ import annotations

from importlib import import_module


def register() -> None:
    """Make vLLM take ARMOR checkpoints by their config.json. vLLM calls it in each of its processes, or several times in one."""
    import_module("armor_recipes.integrations.vllm.plugin")
