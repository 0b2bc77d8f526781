"""vLLM reads ARMOR checkpoints: it finds `register` by the entry point of the group `vllm.general_plugins`.

| module | holds |
|---|---|
| `parts` | which part of each tensor a process holds, and how it gets there; no vLLM in it |
| `plugin` | vLLM's interfaces, imported in vLLM's processes alone |
"""

from __future__ import annotations

import logging
from importlib import import_module


def register() -> None:
    """Make vLLM take ARMOR checkpoints by their config.json. vLLM calls it in each of its processes, or several times in one.

    It is called wherever this package is installed, whatever is served: where this vLLM is not as the plugin knows it, a warning
    is logged, and all other models are served as without it.
    """
    try:
        import_module(f"{__name__}.plugin")
    except Exception as error:
        logging.getLogger("armor_recipes").warning(
            "ARMOR checkpoints are not served in this process, for armor_recipes does not fit this vLLM (%s: %s); see "
            "docs/serving.md of armor_recipes for the versions that it was tried with",
            type(error).__name__,
            error,
        )
