"""The package's version, without importing anything of it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("armor-recipes")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
