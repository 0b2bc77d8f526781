"""Tests that older releases of compressed-tensors do not pass by themselves."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def since(release: str) -> pytest.MarkDecorator:
    """Skip with an older release: before 0.18 patterns must not name activations, before 0.19 no blocks are read."""
    old = Version(version("compressed-tensors")) < Version(release)
    return pytest.mark.skipif(old, reason=f"compressed-tensors before {release}")
