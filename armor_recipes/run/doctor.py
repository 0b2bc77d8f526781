"""What this machine and environment can run, and why not more. Nothing is imported that would start a GPU where there is none."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, Literal

import torch

from armor_recipes import paths
from armor_recipes.errors import RecipeError
from armor_recipes.report.machine import machine_class
from armor_recipes.runtime import capabilities
from armor_recipes.solver.sweep import native_available
from armor_recipes.version import __version__, release_of

State = Literal["ok", "less", "broken"]
_GIB = 2**30
_MEMORY = Path("/proc/meminfo")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PACKAGES = ("torch", "transformers", "compressed-tensors", "safetensors", "datasets")
#: Extra → what it needs, by the names of modules, and what it gives.
EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "llmcompressor": (("llmcompressor",), "llm-compressor's modifiers in a recipe, and ours in its `oneshot`"),
    "gguf": (("gguf", "accelerate"), "models that are GGUF files"),
    "vision": (("PIL",), "samples that are images"),
    "eval": (("lm_eval",), "lm-eval's tasks in `armor eval --tasks`"),
    "tensorboard": (("tensorboard",), "`--metrics tensorboard`"),
    "trackio": (("trackio",), "`--metrics trackio`"),
    "wandb": (("wandb",), "`--metrics wandb`"),
    "mlflow": (("mlflow",), "`--metrics mlflow`"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact. `less`: something would run better, and `advice` says how; `broken`: what is installed does not work here."""

    subject: str
    state: State
    found: str
    advice: str = ""


def examine(folder: Path) -> tuple[Finding, ...]:
    """Look at this process's Python, packages, processor, memory and GPU, and at the disks of `folder` and of the caches."""
    return (
        Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        Finding("packages", "ok", ", ".join((f"armor-recipes {__version__}", *map(_release, _PACKAGES)))),
        *_processor(),
        _threads(),
        *_memory(),
        *_huge_pages(),
        *_gpu(),
        *_extras(),
        _server(),
        *_disks(folder),
    )


def _release(package: str) -> str:
    try:
        return f"{package} {release_of(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _processor() -> list[Finding]:
    here = machine_class("cpu")
    level = str(here["level"])
    slow = "" if level.startswith("AVX512") or "aarch" in here["architecture"] else "AVX-512 runs ARMOR layers faster"
    compiler = "install a C compiler, and armor-recipes again"
    sweep = native_available()
    return [
        Finding("processor", "less" if slow else "ok", f"{here['vendor'] or here['architecture']}, {level}", slow),
        _kernels(compiler),
        Finding(
            "solver",
            "ok" if sweep else "less",
            "compiled sweep" if sweep else "torch's sweep, several times slower",
            "" if sweep else compiler,
        ),
        Finding(
            "machine class",
            "ok",
            f"{here['architecture']} {here['vendor']}, {level}, torch {here['torch'].split()[0]}: equal recipes give equal bytes "
            "where `armor lock` names the same",
        ),
    ]


def _kernels(compiler: str) -> Finding:
    """The CPU kernel's paths; `compiler` is what to do where they were not built."""
    try:
        found = capabilities()
    except RecipeError as error:  # a variable of the environment names no path
        problem, _, advice = str(error).partition("; ")
        return Finding("kernels", "broken", problem, advice)
    state: State = "broken" if found.rejected else "ok" if found.compiled else "less"
    wrong = f"{', '.join(found.rejected)} fail the self-check: please report it with this output"
    return Finding(
        "kernels", state, "; ".join(found.lines()), wrong if found.rejected else "" if found.compiled else compiler
    )


def _threads() -> Finding:
    have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    use = torch.get_num_threads()
    fewer = use < have and "OMP_NUM_THREADS" in os.environ
    advice = f"OMP_NUM_THREADS is {os.environ.get('OMP_NUM_THREADS')}: leave it out for more" if fewer else ""
    return Finding(
        "threads", "less" if fewer else "ok", f"{use} of {have} processors that this process may use", advice
    )


def _memory() -> list[Finding]:
    if not _MEMORY.exists():
        return [Finding("memory", "ok", "not told by this system")]
    lines = (line.split() for line in _MEMORY.read_text(encoding="ascii").splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    free, all_ = kib["MemAvailable"] * 1024 / _GIB, kib["MemTotal"] * 1024 / _GIB
    few = free < 2
    advice = "set `model.memory` in the recipe for models that do not fit" if few else ""
    return [Finding("memory", "less" if few else "ok", f"{free:.1f} of {all_:.1f} GiB available", advice)]


def _huge_pages() -> list[Finding]:
    if not _HUGE_PAGES.exists():
        return []
    chosen = _HUGE_PAGES.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    never = chosen == "never"
    advice = (
        f"write madvise to {_HUGE_PAGES}: solves of layers of 4,096 channels take 0.7 of the time, and tokens less"
        if never
        else ""
    )
    return [Finding("huge pages", "less" if never else "ok", chosen, advice)]


def _gpu() -> list[Finding]:
    triton = importlib.util.find_spec("triton") is not None
    built = torch.version.cuda or torch.version.hip
    if not built:
        found = Finding(
            "gpu", "less", "none: this torch is built for CPUs alone", "for `--device cuda` install torch for CUDA"
        )
    elif not torch.cuda.is_available():
        found = Finding("gpu", "less", f"none that torch (built for {built}) can use", "look at the driver: nvidia-smi")
    else:
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        found = Finding("gpu", "ok", f"{names} (torch built for {built})")
    advice = (
        "a GPU runs torch's sweep without it, slower: pip install triton" if found.state == "ok" and not triton else ""
    )
    return [found, Finding("triton", "less" if advice else "ok", "installed" if triton else "not installed", advice)]


def _extras() -> list[Finding]:
    return [_extra(name, modules, gives) for name, (modules, gives) in EXTRAS.items()]


def _extra(name: str, modules: tuple[str, ...], gives: str) -> Finding:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    advice = f"for {gives}: pip install 'armor-recipes[{name}]'" if missing else ""
    return Finding(
        f"extra {name}", "less" if missing else "ok", "not installed" if missing else f"installed: {gives}", advice
    )


def _server() -> Finding:
    there = importlib.util.find_spec("vllm") is not None
    advice = "" if there else "to serve checkpoints, in an environment of its own: docs/how-to/serve.md"
    return Finding("vllm", "ok" if there else "less", _release("vllm") if there else "not installed", advice)


def _disks(folder: Path) -> list[Finding]:
    return [_disk("output", folder), _disk("measurements", paths.cache_folder("measurements"))]


def _disk(what: str, folder: Path) -> Finding:
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free / _GIB
    few = free < 1
    return Finding(
        f"disk of {what}",
        "less" if few else "ok",
        f"{free:.1f} GiB free ({folder})",
        "free some, or use another" if few else "",
    )


def to_dict(findings: tuple[Finding, ...]) -> dict[str, Any]:
    """Plain data for `--json`: each subject's state, what was found and what to do, and the machine class as a lock has it."""
    rows = {row.subject: {"state": row.state, "found": row.found, "advice": row.advice} for row in findings}
    return {"findings": rows, "machine": machine_class("cpu")}
