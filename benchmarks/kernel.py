"""The cpu kernel, A and B included, against torch's bf16 `F.linear` and our own dense bf16 kernel, measured side by side.

    python benchmarks/kernel.py [--core bf16 int8 int4] [--tokens 1 8] [--block 64] [--repeats 30] [--threads 1] [--json FILE]

The core is stored as bf16, as int8 with a scale a row, or as int4 with a scale for each 32 kept values; factors and activations are
bf16. All contenders take turns in every repeat, so that what else the machine does meets all of them; a ratio is the median of
the ratios within repeats. The dense kernel, native/dense.c, is compiled here by the C compiler; it has the same care as ours
(vectors, tiles, prefetching) for up to 16 tokens, and takes more in several passes. For few tokens it tells what 2:4 brings apart
from the quality of torch's product on this machine.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from losses import markdown
from torch import Tensor
from turns import keep

from armor_recipes.checkpoint.packing import PackedLinear, pack_int4
from armor_recipes.runtime import capabilities
from armor_recipes.runtime.kernel import MOST_TOKENS, run_kernel

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
BLOCK = 64
CORES = ("bf16", "int8", "int4")
GROUP = 32
"""Kept values of an int4 core that have one scale."""
SOURCE = Path(__file__).parent / "native" / "dense.c"


@dataclass(frozen=True, slots=True)
class Row:
    """One shape, number of tokens and core: fastest milliseconds of each contender, and median ratios (above 1: ours is faster)."""

    rows: int
    columns: int
    tokens: int
    core: str
    torch_ms: float
    dense_ms: float
    ours_ms: float
    torch_over_ours: float
    dense_over_ours: float


def made_up_layer(rows: int, columns: int, core: str, generator: torch.Generator, block: int = BLOCK) -> PackedLinear:
    masks = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8)
    halves = masks[torch.randint(6, (rows, columns // 8, 2), generator=generator)]
    a, b = (
        (torch.eye(block) + 0.1 * torch.randn(side // block, block, block, generator=generator)).bfloat16()
        for side in (rows, columns)
    )
    bitmask = halves[..., 0] | halves[..., 1] << 4
    if core == "bf16":
        return PackedLinear(torch.randn(rows, columns // 2, generator=generator).bfloat16(), bitmask, a, b)
    bits, groups = (8, 1) if core == "int8" else (4, columns // 2 // GROUP)
    most = 2 ** (bits - 1) - 1
    integers = torch.randint(-most, most + 1, (rows, columns // 2), generator=generator, dtype=torch.int8)
    scale = ((0.5 + torch.rand(rows, groups, generator=generator)) / most).bfloat16()
    return PackedLinear(integers if bits == 8 else pack_int4(integers), bitmask, a, b, scale)


def dense_kernel(folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("this benchmark compiles its dense kernel: install a C compiler")
    library = folder / "dense.so"
    flags = ("-O3", "-std=c11", "-ffp-contract=off", "-shared", "-fPIC")
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    function: Any = ctypes.CDLL(str(library)).dense_linear
    function.restype, function.argtypes = None, [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3

    def run(x: Tensor, weight: Tensor) -> Tensor:
        (tokens, columns), rows = x.shape, weight.shape[0]
        y, inner = x.new_empty(tokens, rows), torch.empty(MOST_TOKENS, columns)
        for part, into in zip(x.split(MOST_TOKENS), y.split(MOST_TOKENS), strict=True):
            places = (part.data_ptr(), weight.data_ptr(), into.data_ptr(), inner.data_ptr())
            function(*places, len(part), rows, columns)
        return y

    return run


def seconds(run: Callable[[], Tensor]) -> float:
    # With one thread, the processor's own time: what it spends on other programs in between is none of the contenders'.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def measure(
    shape: tuple[int, int],
    tokens: int,
    cores: Sequence[str],
    repeats: int,
    dense: Callable[[Tensor, Tensor], Tensor],
    block: int,
) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    layers = [made_up_layer(*shape, core, generator, block) for core in cores]
    weight = torch.randn(shape, generator=generator).bfloat16()
    x = torch.randn(tokens, shape[1], generator=generator).bfloat16()
    product = torch.nn.functional.linear(x, weight)
    if (dense(x, weight) - product).norm() > 0.01 * product.norm():
        raise SystemExit("the dense kernel is wrong")
    own_weight = weight.clone()  # or the dense kernel would find in the cache what torch has just read
    contenders: list[Callable[[], Tensor]] = [
        lambda: torch.nn.functional.linear(x, weight),
        lambda: dense(x, own_weight),
        *(partial(run_kernel, x, layer) for layer in layers),
    ]
    times = [[seconds(run) for run in contenders] for _ in range(repeats)]
    fastest_torch, fastest_dense, *fastest = (1e3 * min(column) for column in zip(*times, strict=True))
    found = []
    for place, (core, ours) in enumerate(zip(cores, fastest, strict=True), start=2):
        over_torch, over_dense = (statistics.median(row[i] / row[place] for row in times) for i in (0, 1))
        found.append(Row(*shape, tokens, core, fastest_torch, fastest_dense, ours, over_torch, over_dense))
    return found


def report(row: Row) -> None:
    print(
        f"{row.rows:5} x {row.columns:5}, {row.tokens:2} tokens, {row.core}: torch {row.torch_ms:7.2f} ms, dense "
        f"{row.dense_ms:6.2f} ms, ours {row.ours_ms:6.2f} ms; torch/ours {row.torch_over_ours:.2f}, "
        f"dense/ours {row.dense_over_ours:.2f}",
        flush=True,
    )


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """By tokens and core, the median of the shapes' ratios, with the least and the most of them in `interval`."""
    found = []
    for tokens, core in dict.fromkeys((row.tokens, row.core) for row in rows):
        mine = [row for row in rows if (row.tokens, row.core) == (tokens, core)]
        ratios = {name: [getattr(row, f"{name}_over_ours") for row in mine] for name in ("torch", "dense")}
        figures = {
            f"{name} / ours": {"value": statistics.median(values), "interval": [min(values), max(values)]}
            for name, values in ratios.items()
        }
        found.append({"tokens": tokens, "core": core, **figures})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", nargs="+", choices=CORES, default=list(CORES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--block", type=int, default=BLOCK, help="of A and B")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="of torch and of ours; the dense kernel has one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(*capabilities().lines(), sep="\n")
    found = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        dense = dense_kernel(Path(folder))
        for tokens in options.tokens:
            for shape in SHAPES:
                rows = measure(shape, tokens, options.core, options.repeats, dense, options.block)
                for row in rows:
                    report(row)
                found += rows
    table = summaries(found)
    print(markdown(table, {"ours": ".2f"}))
    if options.json is not None:
        made = {"path": capabilities().path, "block": options.block, "threads": options.threads}
        keep(options.json, {**made, "rows": table, "shapes": [asdict(row) for row in found]})


if __name__ == "__main__":
    main()
