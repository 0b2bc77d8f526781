"""The releases of this package and of those that it runs on, without importing anything of them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("armor-recipes")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"


@cache
def release_of(package: str) -> str:
    """The installed release, as it was when a process first asked: what it has imported, even if another is installed meanwhile.

    Raises PackageNotFoundError where it is not installed.
    """
    return version(package)
