"""What a cycle of `solver: exact` costs against the number of columns, both objectives, one thread, random matrices.

    python benchmarks/solver_cost.py [512 1024 2048] [--rows 512] [--block 64] [--repeat 5] [--json FILE]

Prints the median milliseconds of a cycle (sweep, A, B) with the loss after it; masks change as they do in the first cycles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from losses import Row, show

from armor_recipes.solver.entry import nowag_start
from armor_recipes.solver.exact import ExactProblem, Problem
from armor_recipes.solver.hessian import HessianProblem, regularize
from armor_recipes.solver.normalize import nowag_normalize
from armor_recipes.solver.patterns import magnitude_mask
from armor_recipes.solver.result import Factors
from armor_recipes.solver.sweep import native_available


def problems(rows: int, columns: int, block: int) -> dict[str, tuple[Problem, Factors]]:
    """Both objectives of one seeded weight, with inputs that share `block` factors, and their NoWag-P starts."""
    generator = torch.Generator().manual_seed(columns)
    weight = nowag_normalize(torch.randn(rows, columns, generator=generator)).weight
    common = torch.randn(columns, block, generator=generator) / torch.arange(1, block + 1).sqrt()
    gram = common @ common.T
    gram.diagonal().add_(torch.rand(columns, generator=generator))
    gram, _ = regularize((gram + gram.T) / 2, shrinkage=0.2, damping=0.01)
    h = gram.diagonal()
    start = nowag_start(weight, magnitude_mask(weight.square() * h), (block, block))
    scaled = Factors(start.a, start.core, start.b * h.sqrt().view(-1, 1, block), start.index)
    return {
        "diagonal": (ExactProblem(weight * h.sqrt()), scaled),
        "hessian": (HessianProblem(weight, gram), start),
    }


def cycle_ms(problem: Problem, factors: Factors, *, repeat: int) -> float:
    """Median milliseconds of a cycle with its loss, after one that does not count."""
    times = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        factors = problem.cycle(factors.clone())
        problem.squared_error(factors)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("columns", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, one thread, compiled sweep: {native_available()}; ms a cycle")
    table: list[Row] = []
    for columns in args.columns:
        found = problems(args.rows, columns, args.block)
        times = {
            f"{name} ms": cycle_ms(problem, factors, repeat=args.repeat) for name, (problem, factors) in found.items()
        }
        table.append({"shape": f"{args.rows}x{columns}", **times})
    show(table, {"ms": ".1f"}, args.json)


if __name__ == "__main__":
    main()
