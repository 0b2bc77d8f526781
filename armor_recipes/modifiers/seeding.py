"""A seed for each (recipe seed, module name), so that no module's draws depend on which others are in the recipe."""

from __future__ import annotations

import hashlib


def module_seed(seed: int, name: str) -> int:
    """A 63-bit seed from the recipe's seed and the module's full name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
