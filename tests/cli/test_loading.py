"""How commands import torch and transformers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

PROBE = """
import gc, json, os, resource
from armor_recipes.cli.loading import loading
with loading():
    import torch
x = torch.ones(750_000)  # 3 MB: less than what goes back to the system at once
for _ in range(3):
    x * 2
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    x * 2
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([os.environ["THP_MEM_ALLOC_ENABLE"], gc.isenabled(), gc.get_freeze_count() > 0, faults]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators cannot be told what to keep")
@pytest.mark.parametrize("asked", [None, "0"])
def test_huge_pages_are_asked_for_and_small_pieces_kept(asked: str | None) -> None:
    surroundings = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if asked is not None:
        surroundings["THP_MEM_ALLOC_ENABLE"] = asked
    run = subprocess.run([sys.executable, "-c", PROBE], env=surroundings, capture_output=True, text=True, check=True)
    enabled, collects, frozen, faults = json.loads(run.stdout)
    assert (enabled, collects, frozen) == (asked or "1", True, True)
    if asked is None:
        assert faults < 100  # with huge pages alone each of 100 pieces came from the system anew, in pages
