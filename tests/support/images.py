"""Whether processors of images can be had here."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest
from packaging.version import Version

needs_processors = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.18") and find_spec("torchvision") is None,
    reason="transformers before 5.18 reads images with torchvision",
)
