"""`exact` against `adam` (our implementation of the paper's method): time to the same loss, one thread, same process.

    python benchmarks/solver.py [--model models/smollm2-135m-instruct] [--results benchmarks/results/solver]

Rows: q_proj, up_proj and down_proj of SmolLM2's layer 10 at block 64, and a seeded 1024x1024 weight with a power-law spectrum and
log-normal column scales. One JSON file a row; rows that exist are not run again. A row holds both solvers' whole traces, and the
time of the bare matrix products that an iteration of `adam` contains, measured right before. `exact` runs before and after
`adam`, and the slower run counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from losses import Row, show
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.solver import Factorization, factorize
from armor_recipes.solver.blockdiag import left_multiply, right_multiply
from armor_recipes.solver.sweep import native_available

BLOCK = 64
LAYER = "model.layers.10"
MODULES = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
CHECKPOINTS = (1_000, 5_000, 20_000)
#: Points of a trace that a row keeps: dense at the start, every 100th afterwards.
_DENSE_START, _EVERY = 200, 100


@dataclass(frozen=True, slots=True)
class Case:
    """One weight `(O, I)` and its second moments `(I,)`."""

    name: str
    weight: Tensor
    second_moment: Tensor


def synthetic_case(size: int = 1024) -> Case:
    """A seeded weight with singular values ~ 1/k^0.6 and log-normal column scales; inputs with log-normal second moments."""
    generator = torch.Generator().manual_seed(1024)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    spectrum = torch.arange(1, size + 1).float().pow(-0.6)
    scales = torch.exp(0.5 * torch.randn(size, generator=generator))
    moments = torch.exp(1.0 * torch.randn(size, generator=generator))
    return Case(f"synthetic {size}x{size}", (left * spectrum) @ right.T * scales, moments)


def model_cases(folder: Path) -> list[Case]:
    """The three modules with second moments over 16 windows of 512 calibration tokens, from the dense model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    spec = CalibrationSpec(dataset="builtin:pydoc", samples=16, sequence_length=512)
    tokens = build_tokens(spec, tokenizer=AutoTokenizer.from_pretrained(folder), vocab_size=model.config.vocab_size)
    found = {}
    handles = []
    for name in MODULES:
        linear = model.get_submodule(f"{LAYER}.{name}")
        found[name] = InputSecondMoment(name, linear.get_parameter("weight").shape[1])
        handles.append(linear.register_forward_pre_hook(lambda _, args, s=found[name]: s.update(args[0])))
    with torch.inference_mode():
        for batch in tokens.ids.split(4):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    weights = {name: model.get_parameter(f"{LAYER}.{name}.weight").detach().clone() for name in MODULES}
    return [Case(f"{LAYER}.{name}", weights[name], found[name].value.clone()) for name in MODULES]


def bare_products_ms(case: Case) -> float:
    """Milliseconds of the matrix products of one `adam` iteration: A·T and S·B forward, and the gradients in A, S (two) and B."""
    core, blocks_o, blocks_i = case.weight, case.weight.shape[0] // BLOCK, case.weight.shape[1] // BLOCK
    a, b = torch.randn(blocks_o, BLOCK, BLOCK), torch.randn(blocks_i, BLOCK, BLOCK)

    def products() -> None:
        t = right_multiply(core, b)
        left_multiply(a, t)
        back = left_multiply(a.mT, core)
        right_multiply(back, b.mT)
        rows = core.view(blocks_o, BLOCK, -1)
        torch.bmm(rows, t.view(rows.shape).mT)
        columns, others = (x.view(x.shape[0], -1, BLOCK).transpose(0, 1) for x in (core, back))
        torch.bmm(columns.mT, others)

    return 1e3 * median_seconds(products, repeat=30)


def median_seconds(run: Callable[[], None], *, repeat: int) -> float:
    """Median over `repeat` calls, after three that do not count."""
    times = []
    for index in range(repeat + 3):
        started = time.perf_counter()
        run()
        if index >= 3:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def run_case(case: Case, *, adam_iterations: int, exact_iterations: int) -> dict[str, Any]:
    """Both solvers on one weight, and the ratios of their times at the losses that `adam` has at the checkpoints."""

    def solve(solver: str, iterations: int) -> Factorization:
        return factorize(
            case.weight, case.second_moment, block_size=BLOCK, solver=solver, iterations=iterations, seed=0
        )

    solve("exact", 2), solve("adam", 20)
    products = bare_products_ms(case)
    before = solve("exact", exact_iterations)
    adam = solve("adam", adam_iterations)
    after = solve("exact", exact_iterations)
    exact = max(before, after, key=lambda found: found.seconds[-1])
    return {
        "case": case.name,
        "shape": list(case.weight.shape),
        "block": BLOCK,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "native_sweep": native_available(),
        "bare_products_ms": products,
        "exact": trace(exact),
        "adam": trace(adam),
        "at": [compare(adam, exact, checkpoint) for checkpoint in CHECKPOINTS if checkpoint <= adam_iterations],
    }


def trace(found: Factorization) -> dict[str, Any]:
    """Start, end and a thinned trace of one solve."""
    steps = len(found.losses) - 1
    kept = [i for i in range(steps + 1) if i <= _DENSE_START or i % _EVERY == 0 or i == steps]
    return {
        "iterations": steps,
        "stop_reason": found.stop_reason.value,
        "seconds": found.seconds[-1],
        "ms_per_iteration": 1e3 * (found.seconds[-1] - found.seconds[0]) / max(1, steps),
        "first_loss": found.losses[0],
        "last_loss": found.losses[-1],
        "trace": [[i, found.seconds[i], found.losses[i]] for i in kept],
    }


def compare(adam: Factorization, exact: Factorization, checkpoint: int) -> dict[str, Any]:
    """When `exact` has the loss that `adam` has after `checkpoint` iterations (or had when its rule stopped it)."""
    at = min(checkpoint, len(adam.losses) - 1)
    loss = adam.losses[at]
    reached = next((i for i, value in enumerate(exact.losses) if value <= loss), None)
    row = {"adam_iterations": at, "loss": loss, "adam_seconds": adam.seconds[at]}
    if reached is None:
        return {**row, "exact_cycles": None, "exact_seconds": None, "ratio": None}
    seconds = exact.seconds[reached]
    return {**row, "exact_cycles": reached, "exact_seconds": seconds, "ratio": adam.seconds[at] / seconds}


def summary(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """The table's rows; `sooner` is null where `exact` did not reach the loss."""
    return [
        {
            "weight": f"{row['case']} {row['shape'][0]}x{row['shape'][1]}",
            "adam ms": row["adam"]["ms_per_iteration"],
            "bare products ms": row["bare_products_ms"],
            "exact ms": row["exact"]["ms_per_iteration"],
            "first loss": row["exact"]["first_loss"],
            "adam loss": row["adam"]["last_loss"],
            "adam seconds": row["adam"]["seconds"],
            "exact loss": row["exact"]["last_loss"],
            "exact seconds": row["exact"]["seconds"],
            **{f"at {checkpoint} sooner": at["ratio"] for checkpoint, at in zip(CHECKPOINTS, row["at"], strict=False)},
        }
        for row in rows
    ]


def mean_line(rows: Sequence[dict[str, Any]]) -> str:
    """How much sooner at the last checkpoint, over the weights that got there."""
    last = [row["at"][-1]["ratio"] for row in rows if row["at"]]
    reached = [ratio for ratio in last if ratio]
    return (
        f"At the last checkpoint: reached on {len(reached)} of {len(last)} weights, "
        f"{statistics.geometric_mean(reached):.0f}x sooner there by geometric mean."
        if reached
        else "The last checkpoint was not reached."
    )


def main() -> None:
    """Run the rows that are missing, then print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/solver"))
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    parser.add_argument("--adam-iterations", type=int, default=20_000)
    parser.add_argument("--exact-iterations", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in [*model_cases(options.model), synthetic_case()]:
        file = options.results / f"{case.name.replace(' ', '-')}.json"
        if not file.exists():
            print(f"{case.name} …", flush=True)
            row = run_case(case, adam_iterations=options.adam_iterations, exact_iterations=options.exact_iterations)
            file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        rows.append(json.loads(file.read_text(encoding="utf-8")))
    show(summary(rows), {"ms": ".1f", "loss": ".6f", "seconds": ".1f", "sooner": ".0f"}, options.json)
    print(f"\n{mean_line(rows)}")


if __name__ == "__main__":
    main()
