"""How the GPU's kernels are launched: measured on a card for a layer's shape, and kept on disk with the card's name.

Nothing is measured as a model runs: what was not tuned takes a default, which follows from the shape alone. Plans change which
parts a sum is made of, and so the last bits of a result, but not from call to call.
"""

from __future__ import annotations

import functools
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armor_recipes.checkpoint.files import write_whole
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import ResourceError
from armor_recipes.paths import cache_folder
from armor_recipes.runtime.fragments import COLUMNS, ROWS

KERNELS = 1
"""Of which kernels kept plans are: counts up when what was fast may be so no more."""
_A_MULTIPROCESSOR = 8
"""Programs of the core, a warp each, that a default plan gives to each of a card's multiprocessors."""
_MOST_SPLITS = 16
_CACHE_BYTES = 256 << 20
"""Written before each call that is timed; larger than any card's cache, so that weights come from memory."""


@dataclass(frozen=True, slots=True)
class CorePlan:
    """Of `core_kernel`."""

    tiles: int
    """Records, of 16 rows each, that a program has below one another."""
    splits: int
    """In how many parts the columns are summed."""
    stages: int
    """Of loads that are under way at once; 1 leaves it to other programs of the multiprocessor."""
    fused: bool = False
    """Whether A is applied as well: the rows of a program are then one of its blocks."""


@dataclass(frozen=True, slots=True)
class FactorPlan:
    """Of `factor_kernel`: a program's columns and tokens, and its warps."""

    columns: int
    tokens: int
    warps: int


Plan = CorePlan | FactorPlan
Measure = Callable[[Callable[[], object]], float]
"""Of a call: microseconds."""
_plans: dict[str, dict[str, Plan]] = {}
"""What is known of each card, by what it is of."""


def core_plan(packed: PackedLinear, tokens: int) -> CorePlan:
    """The plan that was measured for this layer and number of tokens on its card, or else the default."""
    found = known(packed.a.device).get(core_key(packed, tokens))
    return found if isinstance(found, CorePlan) else _core_plans(packed)[0]


def factor_plan(factor: Tensor, tokens: int) -> FactorPlan:
    """The same of a factor `(C/b, b, b)`."""
    found = known(factor.device).get(factor_key(factor, tokens))
    return found if isinstance(found, FactorPlan) else _factor_plans(factor.shape[1], tokens)[0]


def core_key(packed: PackedLinear, tokens: int) -> str:
    """What a plan of the core depends on, but for the card."""
    rows, columns = packed.shape
    group, most = packed.group_size or "rows", 8 if tokens <= 8 else 16
    return f"core {packed.core} {packed.dtype} {rows}x{columns} A {packed.block_size[0]} scale {group} tokens {most}"


def factor_key(factor: Tensor, tokens: int) -> str:
    """What a plan of a factor depends on, but for the card: numbers of tokens by powers of two."""
    blocks, size, _ = factor.shape
    return f"factor {factor.dtype} {blocks}x{size} tokens {max(16, 1 << (min(tokens, 8192) - 1).bit_length())}"


def tune(
    candidates: list[Plan],
    key: str,
    device: torch.device,
    run: Callable[[Plan], object],
    measure: Measure | None = None,
) -> dict[Plan, float | str]:
    """Time all candidates, and remember the fastest under `key` for this process and, on a GPU, on disk.

    Args:
        candidates: of `core_plans` or `factor_plans`.
        key: `core_key` or `factor_key`.
        device: where it runs.
        run: the call by a plan.
        measure: microseconds of a call; None measures on the GPU.

    Returns:
        Microseconds of each, or why the card cannot run it (it needs more shared memory or registers than there are).
    """
    from triton.runtime.errors import OutOfResources

    times: dict[Plan, float | str] = {}
    for plan in candidates:
        try:
            times[plan] = (measure or gpu_microseconds)(functools.partial(run, plan))
        except OutOfResources as error:
            times[plan] = str(error)
    fast = {plan: found for plan, found in times.items() if not isinstance(found, str)}
    if fast:
        known(device)[key] = min(fast, key=lambda plan: fast[plan])
        _keep(device)
    return times


def core_plans(packed: PackedLinear) -> list[Plan]:
    """What is worth a measurement for the core of a layer, the default first."""
    return [*_core_plans(packed)]


def factor_plans(factor: Tensor, tokens: int) -> list[Plan]:
    """The same of a factor and so many tokens."""
    return [*_factor_plans(factor.shape[1], tokens)]


def _core_plans(packed: PackedLinear) -> list[CorePlan]:
    rows, columns = packed.shape
    down, across, size = -(-rows // ROWS), -(-columns // COLUMNS), packed.block_size[0]
    processors = _processors(packed.a.device)

    def splits(tiles: int, programs: int) -> int:
        return max(1, min(round(programs * processors * tiles / down), across, _MOST_SPLITS))

    found = [
        CorePlan(tiles, splits(tiles, programs), stages)
        for stages in (1, 3)
        for tiles in (1, 2)
        for programs in (_A_MULTIPROCESSOR, 2 * _A_MULTIPROCESSOR, _A_MULTIPROCESSOR // 2)
    ]
    fused = [CorePlan(size // ROWS, 1, stages, fused=True) for stages in (1, 3) if size in (16, 32, 64)]
    return list(dict.fromkeys([*found, *fused]))


def _factor_plans(size: int, tokens: int) -> list[FactorPlan]:
    most = min(128, max(16, 1 << (size - 1).bit_length()))
    if tokens <= 16:
        return list(
            dict.fromkeys(FactorPlan(min(most, columns), 16, warps) for columns in (32, 16, 64) for warps in (2, 1, 4))
        )
    wide = [FactorPlan(most, 64, 4), FactorPlan(most, 32, 4), FactorPlan(most, 128, 8), FactorPlan(most, 64, 8)]
    return [*wide, *(FactorPlan(most // 2, count, 4) for count in (64, 128) if most > 16)]


def known(device: torch.device) -> dict[str, Plan]:
    """The plans of a card, read from disk when they are first asked for; of other devices those of this process alone."""
    card = _card(device)
    if card not in _plans:
        _plans[card] = {} if device.type != "cuda" else _read(card)
    return _plans[card]


def forget() -> None:
    """Forget what this process knows; what is on disk is read again."""
    _plans.clear()


@functools.cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # in the interpreter: so that small shapes are split, too
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _of(card: str) -> dict[str, Any]:
    import triton

    return {"card": card, "kernels": KERNELS, "triton": triton.__version__}


def _file(card: str) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in card)
    return cache_folder("gpu-plans") / f"{name}.json"


def _read(card: str) -> dict[str, Plan]:
    try:
        content = json.loads(_file(card).read_bytes())
        if content["of"] != _of(card):
            return {}  # other kernels' or another Triton's: they are measured again, and written over
        return {
            key: (CorePlan if key.startswith("core") else FactorPlan)(**plan) for key, plan in content["plans"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"plans of the GPU's kernels cannot be read ({type(error).__name__}: {error}): the defaults are taken. Remove "
            f"{_file(card)}, or tune again",
            stacklevel=2,
        )
        return {}


def _keep(device: torch.device) -> None:
    if device.type != "cuda":
        return
    card = _card(device)
    content = {"of": _of(card), "plans": {key: asdict(plan) for key, plan in sorted(_plans[card].items())}}
    try:
        _file(card).parent.mkdir(parents=True, exist_ok=True)
        write_whole(_file(card), (json.dumps(content, indent=1) + "\n").encode())
    except (OSError, RuntimeError, ResourceError) as error:
        warnings.warn(f"plans are not kept for later runs ({type(error).__name__}: {error})", stacklevel=2)


def gpu_microseconds(run: Callable[[], object], repeats: int = 20, *, cold: bool = True) -> float:
    """What the GPU needs for a call: the median over replays of a graph of it, `cold` each after its cache was overwritten."""
    graph, cache = captured(run), torch.empty(_CACHE_BYTES if cold else 1, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(1e3 * statistics.median(times))


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of one call, after calls on another stream that compile what has to be compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph
