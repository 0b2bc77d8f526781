"""The machine class: what the bits of a result depend on beside its inputs and the releases of packages.

Products are computed by the code that torch, its BLAS and its compilers chose for a processor. Equal classes run equal code, and
give equal bytes; of two classes last digits may differ, and with them kept weights.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

#: Variables by which a user keeps a library to fewer instructions, or to others.
_LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
)
#: Lines of torch's build that say nothing of what is run, or what is said elsewhere.
_NOT_CODE = ("Build settings", "CPU capability usage", "C++ Version")
_PROCESSORS = Path("/proc/cpuinfo")


def machine_class(device: str) -> dict[str, Any]:
    """Plain data: equal in every process of one machine and environment, whatever the number of threads.

    `level` is the instruction set that torch's own loops take, `instructions` all that the processor has, as torch names them
    (`avx512_bf16` or `amx_bf16` for products of bfloat16; empty where torch does not tell), `vendor` its maker, by which BLAS
    libraries choose, too. `libraries` and `blas` are what torch was built with. `compiled` are the parts of this package in C.
    """
    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    built = torch.__config__.show()
    parts = {name: importlib.util.find_spec(f"armor_recipes.{name}._native") for name in ("runtime", "solver")}
    return {
        "architecture": platform.machine(),
        "vendor": _vendor(),
        "level": torch.backends.cpu.get_cpu_capability(),
        "instructions": " ".join(sorted(name for name, there in told.items() if there is True)),
        "limits": " ".join(f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ),
        "torch": f"{torch.__version__} ({torch.version.git_version})",
        "libraries": [
            line for line in re.findall(r"^  - (.*)$", built, re.MULTILINE) if not line.startswith(_NOT_CODE)
        ],
        "blas": dict(re.findall(r"\b(BLAS_INFO|LAPACK_INFO)=(\w+)", built)),
        "compiled": {name: found is not None for name, found in parts.items()},
        **({"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}),
    }


@cache
def _vendor() -> str | None:
    """The processor's maker as the kernel tells it; None where it does not."""
    try:
        told = _PROCESSORS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^(?:vendor_id|CPU implementer)\s*:\s*(.*)$", told, re.MULTILINE)
    return found[1].strip() if found else None
